"""What is expected of hyperparameters before a study has trained anything."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.landscapes import TABLE, load_problem
from benchmarks.prior import MISLEADING
from benchmarks.rl_table.optima import recorded
from benchmarks.warm_start import first_study, mirrored
from jfhpo_core.optimizer.candidates import expected_configuration, with_other_choices
from jfhpo_core.optimizer.joint_fidelity import DOUBT, JointFidelity
from jfhpo_core.optimizer.known_optima import MOST_SPREAD, described, known_optima, with_known_optima
from jfhpo_core.optimizer.observations import (
    EARLIER_OPTIMUM,
    believed_earlier,
    earlier_configurations,
    observed_rows,
    point,
)
from jfhpo_core.optimizer.surrogate import THIS_STUDY
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import StudySpec, TaskSpec
from jfhpo_core.trainers.openrlhf.trainer import OpenRlhfTrainer
from jfhpo_core.trainers.simulated import SimulatedTrainer
from jfhpo_core.trainers.trl import TrlTrainer


def of_size(parameters: float, space: Any = "llm", trainer: Any = None, **settings: Any) -> Study:
    """A study of one model of this size, which need not exist."""
    spec = StudySpec.model_validate(
        {
            "study": "known",
            "family": [{"name": "target", "path": "nowhere", "parameters": int(parameters)}],
            "target": "target",
            "task": "instruct",
            "trainer": {"name": "openrlhf", "settings": settings},
            "space": space,
            "budget": {"trial_seconds": 1000},
        }
    )
    return Study(spec, build_ladder(spec), trainer or OpenRlhfTrainer())


def recorded_study(folder: Path, budget: float, **settings: Any) -> Study:
    """A search on the recorded runs of one task, whose own table is left out."""
    problem = replace(load_problem("table-instruct", 1), trainings=budget)
    return problem.study(folder, "jfhpo", settings)


@pytest.mark.slow
def test_what_is_known_of_the_tables_is_what_they_say() -> None:
    known = [item for item in known_optima() if item.task is not None]
    assert known == recorded(TABLE), "run `python -m benchmarks.rl_table optima`"


def test_every_recipe_names_where_it_is_published() -> None:
    recipes = [item for item in known_optima() if item.task is None]
    assert len({item.source for item in recipes}) == len(recipes) > 5
    assert all(item.source.startswith("https://") and item.parameters > 1e8 for item in recipes)


@pytest.mark.parametrize("parameters", [0.5e9, 7.6e9, 32e9])
def test_large_models_are_expected_to_learn_at_the_rates_of_the_recipes(parameters: float) -> None:
    expected = with_known_optima(of_size(parameters))
    rate = expected["learning_rate"]
    assert 5e-7 <= float(rate.expected or 0) <= 2e-6


def test_small_models_are_expected_to_learn_faster_the_smaller_they_are() -> None:
    rates = [float(with_known_optima(of_size(size, "tiny"))["learning_rate"].expected or 0) for size in (1e5, 6e5, 4e6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 2 * rates[-1]


def test_far_from_every_known_size_less_is_certain() -> None:
    space = {"learning_rate": {"type": "float", "low": 1e-7, "high": 1e-2, "log": True, "shifts_with_size": True}}
    near, far = (with_known_optima(of_size(size, space))["learning_rate"].spread for size in (7e9, 3e7))
    assert near < far <= MOST_SPREAD


def test_what_the_user_says_stays() -> None:
    space = {
        "learning_rate": {"type": "float", "low": 1e-7, "high": 1e-5, "log": True, "expected": 5e-6, "spread": 0.05},
        "n_samples": {"type": "choice", "values": [4, 8, 16]},
    }
    expected = with_known_optima(of_size(7e9, space))
    assert expected["learning_rate"] == of_size(7e9, space).space["learning_rate"]
    assert expected["n_samples"].expected is not None
    assert "learning_rate" not in (described(expected, of_size(7e9, space).space) or "")


@pytest.mark.parametrize(
    "space",
    [
        {"learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True}},
        {"n_samples": {"type": "choice", "values": [64, 128]}},
        {"scheduler": {"type": "choice", "values": ["constant", "cosine"]}},
        {"weight_decay": {"type": "float", "low": 0.0, "high": 0.1}},
    ],
)
def test_ranges_that_the_recipes_do_not_reach_get_no_expectation(space: dict[str, Any]) -> None:
    study = of_size(7e9, space)
    assert with_known_optima(study) == study.space
    assert described(with_known_optima(study), study.space) is None


def test_other_kinds_of_training_get_none() -> None:
    plain = of_size(7e9)
    assert with_known_optima(replace(plain, trainer=SimulatedTrainer())) == plain.space
    adapters = replace(of_size(7e9, lora={"rank": 16}), trainer=TrlTrainer())
    assert with_known_optima(adapters) == plain.space


def test_the_table_of_the_own_task_is_left_out(tmp_path: Path) -> None:
    """A benchmark on a recorded task is not told its answer."""
    study = recorded_study(tmp_path, 3)
    assert study.spec.task.embedded == "instruct"
    other = replace(study, spec=study.spec.model_copy(update={"task": TaskSpec(embedded="arithmetic")}))
    assert with_known_optima(study) != with_known_optima(other)


def test_an_expectation_that_is_wrong_is_doubted(tmp_path: Path) -> None:
    """However far a candidate is from what is expected, its weight stays above `DOUBT`; the expected one has 1."""
    study = recorded_study(tmp_path, 3)
    strategy = JointFidelity()
    expected = strategy.expected(study)
    near = expected_configuration(expected)
    assert near is not None
    far = study.space.decode(1 - np.array(study.space.encode(near)))
    history = History.of(study, [])
    inputs = torch.tensor([point(study, item, study.ladder.target.name, 1) for item in (near, far)]).double()
    weights = strategy._weights(history, inputs, expected)
    assert float(weights.max()) == pytest.approx(1.0)
    assert DOUBT <= float(weights[-1]) < DOUBT + 0.01
    assert bool((strategy._weights(history, inputs, study.space) == 1).all())


def test_what_is_expected_is_a_candidate_with_every_choice() -> None:
    space = with_known_optima(of_size(6e5, "tiny"))
    best = expected_configuration(space)
    assert best is not None
    found = with_other_choices(space, best)
    assert len(found) == 2 * 3 * 3
    assert best in found
    assert {item["n_samples"] for item in found} == {4, 8, 16}
    assert {item["learning_rate"] for item in found} == {best["learning_rate"]}
    assert expected_configuration(of_size(6e5, "tiny").space) is None


@pytest.mark.slow
def test_where_runs_were_compared_the_search_begins_on_the_target(tmp_path: Path) -> None:
    """On a budget of three full runs of which the recipe takes one: it is beaten without a proxy."""
    problem = replace(load_problem("table-instruct", 1), trainings=3)
    first = {}
    for prior in ("shipped", "none"):
        study = problem.study(tmp_path / prior, "jfhpo", {"prior": prior})
        dispatcher = InlineDispatcher(1, trainer=problem.trainer)
        outcome = run_search(study, MemoryLedger(), dispatcher, strategy=JointFidelity(**study.spec.strategy.settings))
        first[prior] = next(trial for trial in outcome.trials if trial.purpose == "search")
        if prior == "shipped":
            assert outcome.recommended is not None
            gained = problem.true_score(outcome.recommended.configuration) - problem.true_score(problem.default)
            assert gained > 0.1
    assert first["shipped"].model == study.ladder.target.name
    sources = {prior: trial.segments[0].segment.suggestion.source for prior, trial in first.items()}
    assert sources == {"shipped": "jfhpo/known-optimum", "none": "jfhpo/expected"}
    assert math.isclose(float(first["shipped"].configuration["learning_rate"]), 2e-4, rel_tol=0.9)


@pytest.mark.slow
def test_what_is_said_to_be_best_and_is_not_is_believed_no_more(tmp_path: Path) -> None:
    """Told that the worst runs are the best, the search tries them once on the target and begins like any other."""
    problem = replace(load_problem("table-instruct", 1), trainings=6)
    study = problem.study(tmp_path, "jfhpo", {"prior": str(MISLEADING)})
    strategy = JointFidelity(prior=str(MISLEADING))
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=problem.trainer), strategy=strategy)
    searched = [trial for trial in outcome.trials if trial.purpose == "search"]
    sources = [trial.segments[0].segment.suggestion.source for trial in searched]
    assert sources[0] == "jfhpo/known-optimum"
    assert sources.count("jfhpo/known-optimum") == 1
    assert searched[0].model == study.ladder.target.name
    target = study.ladder.target.name
    assert any(trial.model != target for trial in searched), "proxies come after all"
    later = [trial for trial in searched[1:] if trial.model == target]
    assert later[0].segments[0].segment.suggestion.source == "jfhpo/expected", "the refuted run does not count"
    assert later[0].configuration == study.space.middle()
    assert float(searched[0].configuration["learning_rate"]) > 5e-4


@pytest.mark.slow
def test_an_earlier_study_that_misleads_is_believed_no_more(tmp_path: Path) -> None:
    """Its best, which is its worst, is tried once on the target; then the search begins like any other."""
    problem = replace(load_problem("table-arithmetic", 1), trainings=4)
    study = problem.study(tmp_path, "jfhpo", {"prior": "none"})
    study = replace(study, earlier=(mirrored(first_study("table-instruct", 1)),))
    strategy = JointFidelity(prior="none")
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=problem.trainer), strategy=strategy)
    target = study.ladder.target.name
    searched = [trial for trial in outcome.trials if trial.purpose == "search" and trial.model == target]
    sources = [trial.segments[0].segment.suggestion.source for trial in searched]
    assert sources[:2] == [EARLIER_OPTIMUM, "jfhpo/expected"]
    assert EARLIER_OPTIMUM not in sources[1:]
    history = History.of(study, outcome.trials)
    assert believed_earlier(history) == ()
    assert earlier_configurations(history) == []
    assert all(row.inputs[-1] == THIS_STUDY for row in observed_rows(history))
    assert outcome.recommended is not None
    gained = problem.true_score(outcome.recommended.configuration) - problem.true_score(problem.default)
    assert gained > 0.05
