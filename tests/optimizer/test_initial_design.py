"""What is trained before the model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.joint_fidelity import JointFidelity
from jfhpo_core.optimizer.observations import observed_rows
from jfhpo_core.optimizer.strategy import Proposal, load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial
from tests.studies import simulated_study

DESIGN = "jfhpo/initial-design"

RECIPE_RATE = 1e-4
"""Learning rate of the baseline of `simulated_study`."""


def study_of(tmp_path: Path, **changes: Any) -> Study:
    """One that knows nothing before, and whose design may take nearly all of the budget."""
    return simulated_study(
        tmp_path,
        fidelity={"horizon_prompts": 960, "rungs": 5},
        budget={"trial_seconds": 300, "max_parallel": 1, "initial_share": 0.9},
        stopping={"rules": "none"},
        strategy={"name": "jfhpo", "settings": {"prior": "none"}},
        **changes,
    )


@dataclass(frozen=True)
class DesignOnly(JointFidelity):
    """The search, but for what comes after its initial design."""

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        proposal = super().suggest(study, trials, remaining_seconds, seed)
        over = proposal is not None and proposal.suggestion.source != DESIGN and any(map(is_of_design, trials))
        return None if over else proposal


def designed(study: Study) -> list[Trial]:
    """The trials of the initial design of a search, in their order."""
    result = run_search(study, MemoryLedger(), InlineDispatcher(1), strategy=DesignOnly(prior="none"))
    return [trial for trial in result.trials if is_of_design(trial)]


def is_of_design(trial: Trial) -> bool:
    return bool(trial.segments) and trial.segments[0].segment.suggestion.source == DESIGN


def reached(trial: Trial) -> int:
    return trial.segments[0].end_step * trial.prompts_per_step


def test_on_a_proxy_the_recipe_is_compared_with_short_and_with_long_runs(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    trials = designed(study)
    levels = study.spec.fidelity.levels
    assert {trial.model for trial in trials} == {"small"}
    assert len(trials) == study.space.dimension + 1
    assert trials[0].configuration["learning_rate"] == RECIPE_RATE
    assert reached(trials[0]) == max(reached(trial) for trial in trials)
    assert {reached(trial) for trial in trials[1:]} == {levels[0], reached(trials[0])}
    history = History.of(study, trials)
    first = levels[0] / study.spec.fidelity.horizon_prompts
    shared = {row.inputs[-2] for row in observed_rows(history) if row.group[2] == pytest.approx(first)}
    assert shared == {float(trial.number) for trial in trials}, "not all runs can be compared at the first rung"


def test_the_first_run_of_the_target_is_what_is_expected_else_the_middle_of_the_ranges(tmp_path: Path) -> None:
    plain = study_of(tmp_path)
    costs = CostModel.fit(plain, ())
    remaining = 2 * costs.estimate(plain.space.middle(), "large", 0, plain.spec.fidelity.horizon_prompts).seconds
    strategy = load_strategy(plain)
    first = strategy.suggest(plain, (), remaining, 0)
    assert first is not None
    assert (first.model, first.stop_prompts) == ("large", plain.spec.fidelity.horizon_prompts)
    assert first.configuration == plain.space.middle()

    rate = {"type": "float", "low": 1e-5, "high": 1e-2, "log": True, "expected": 2e-3}
    told = study_of(tmp_path, space={"learning_rate": rate, "kl_coefficient": {"type": "float", "low": 0, "high": 0.1}})
    first = load_strategy(told).suggest(told, (), remaining, 0)
    assert first is not None
    assert first.configuration["learning_rate"] == pytest.approx(2e-3)
    assert first.configuration["kl_coefficient"] == pytest.approx(told.space.middle()["kl_coefficient"])

    cheaper = strategy.suggest(plain, (), remaining / 3, 0)
    assert cheaper is not None
    differing = {name for name, value in cheaper.configuration.items() if value != plain.space.middle()[name]}
    assert (cheaper.model, differing) == ("large", {"n_samples"}), "the middle costs too much: fewer completions do not"
    short = strategy.suggest(plain, (), remaining / 50, 0)
    assert short is not None
    assert short.model == "small", "what cannot be paid is not begun"
    recipe = study_of(tmp_path, baselines=[{"name": "recipe", "configuration": plain.space.middle()}])
    assert recipe.space.middle() not in [trial.configuration for trial in designed(recipe) if trial.model == "large"]
