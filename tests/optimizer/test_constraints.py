"""Constraints and a second objective on simulated studies: without them the best learning rate has a KL of 0.18."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.constraints import LimitModel, MetricScale, drawn_limit, metric_rows
from jfhpo_core.optimizer.joint_fidelity import JointFidelity
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.report import caveats, verdict
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.run.planning import call_seed
from jfhpo_core.run.search import run_search
from jfhpo_core.run.standing import Standing
from jfhpo_core.run.tried import tried
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import Limit
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Trial
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.studies import simulated_study, trained

LIMIT = 0.08
SEEDS = (0, 1, 2)
LIMITED = {"constraints": {"kl": f"<= {LIMIT}"}, "strategy": "jfhpo", "baselines": []}


def limited(tmp_path: Path, **changes: Any) -> Study:
    return simulated_study(tmp_path, **{"seeds": {"training": [0]}, **LIMITED, **changes})


def search(study: Study) -> SearchResult:
    return run_search(study, MemoryLedger(), InlineDispatcher(study.spec.slots))


def true_kl(study: Study, configuration: Configuration) -> float:
    """Of the last rung, on the target."""
    curve = study_surface(study.spec).curve(study.complete(configuration), 1.0)
    before, end = study.spec.fidelity.levels[-2:]
    return float(curve.kl(np.arange(before + 16, end + 1, 16) / end).mean())


def true_final(study: Study, configuration: Configuration) -> float:
    return true_score(study_surface(study.spec), study.complete(configuration), 1.0, 1.0)


def with_metrics(trial: Trial, **training: float) -> Trial:
    """A trial whose evaluations have these means."""
    results = tuple(
        result.model_copy(
            update={
                "evaluations": tuple(
                    one.model_copy(update={"training": training if one.step else {}}) for one in result.evaluations
                )
            }
        )
        for result in trial.segments
    )
    return trial.model_copy(update={"segments": results})


def full_runs(study: Study, *runs: tuple[float, float]) -> list[Trial]:
    """Full runs on the target with these final scores and KLs."""
    return [
        with_metrics(
            trained(study, study.space.middle(learning_rate=1e-4 * (1 + n)), "large", [0.1, 0.2, 0.3, score], n), kl=kl
        )
        for n, (score, kl) in enumerate(runs)
    ]


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(limited(tmp_path_factory.mktemp("unlimited"), constraints={}, budget={"trial_seconds": 400}))


@pytest.mark.slow
def test_every_evaluation_knows_the_steps_since_the_rung_before(unlimited: SearchResult) -> None:
    study = unlimited.study
    finished = [trial for trial in unlimited.trials if trial.final is not None and trial.model == "large"]
    assert finished
    for trial in finished:
        assert trial.final is not None
        assert trial.final.training["kl"] == pytest.approx(true_kl(study, trial.configuration), rel=0.15)
        assert trial.final.training["completion_tokens"] == 8.0
        assert not trial.evaluations[0].training or trial.evaluations[0].step > 0


@pytest.mark.slow
def test_the_model_tells_the_kl_of_configurations_it_has_not_seen(unlimited: SearchResult, tmp_path: Path) -> None:
    study = unlimited.study
    model = LimitModel.fit(History.of(study, unlimited.trials), Limit("kl", True, LIMIT))
    assert model is not None
    history = History.of(study, unlimited.trials)
    beliefs = Beliefs.form(history)
    assert beliefs is not None
    rates = [3e-5, 1e-4, 1e-3, 3e-3]
    configurations = [study.space.middle(learning_rate=rate) for rate in rates]
    probability = model.probability(beliefs.at_target(configurations)).tolist()
    for configuration, found in zip(configurations, probability, strict=True):
        assert (found > 0.5) == (true_kl(study, configuration) <= LIMIT)
    assert min(probability) < 0.05
    # Whatever the fidelity of the input, it is the full length on the target that counts.
    inputs = beliefs.at_target(configurations)
    early = inputs.clone()
    early[:, -4:-2] = torch.tensor([-1.0, 0.3], dtype=torch.double)
    assert model.probability(early).tolist() == probability


@pytest.mark.parametrize("metric", ["kl", "truncated_share"])
def test_the_scale_keeps_order_and_bears_what_is_constant(metric: str) -> None:
    limit = Limit(metric, True, 0.2)
    scale = MetricScale.of(limit, [0.1, 0.2, 0.4])
    values = [scale.value((0.0, 0.0, 1.0), value)[0] for value in (0.0, 0.1, 0.2, 0.9)]
    assert values == sorted(values)
    assert scale.bound == values[2]
    assert np.isfinite(values).all()
    constant = MetricScale.of(limit, [0.1, 0.1])
    assert constant.bound > constant.value((0.0, 0.0, 1.0), 0.1)[0] + 3


@pytest.mark.slow
def test_without_constraints_nothing_is_decided_by_metrics(unlimited: SearchResult) -> None:
    """The metrics that runs record change no suggestion and no ranking, bit for bit."""
    study, strategy = unlimited.study, JointFidelity()
    some = [trial for trial in unlimited.trials if trial.number < 14]
    plain = [with_metrics(trial) for trial in some]
    assert some != plain
    seed = call_seed(study, some)
    assert strategy.suggest(study, some, 200.0, seed) == strategy.suggest(study, plain, 200.0, seed)
    assert strategy.rank(study, some) == strategy.rank(study, plain)
    beliefs = Beliefs.form(History.of(study, some))
    assert beliefs is not None
    inputs = beliefs.at_target([study.space.middle()])
    assert beliefs.limits == ()
    assert beliefs.accepted(inputs).equal(beliefs.probability(inputs))
    assert beliefs.worth(inputs).equal(beliefs.expected(inputs)[0])


@pytest.mark.slow
def test_a_limit_that_all_respect_hardly_changes_the_ranking(unlimited: SearchResult, tmp_path: Path) -> None:
    study = limited(tmp_path, constraints={"completion_tokens": "<= 7.9"})
    loose = limited(tmp_path, constraints={"device_seconds": "<= 1e6"})
    plain = JointFidelity().rank(unlimited.study, unlimited.trials)
    ranked = JointFidelity().rank(loose, unlimited.trials)
    assert [item.configuration for item in ranked][:3] == [item.configuration for item in plain][:3]
    assert all(item.respected is not None and item.respected > 0.99 for item in ranked)
    assert all((item.respected or 0) < 0.5 for item in JointFidelity().rank(study, unlimited.trials))


@pytest.mark.slow
def test_a_search_under_a_limit_finds_what_respects_it_and_beats_random_search(tmp_path: Path) -> None:
    """Both are judged by the true score of what they recommend, which has to respect the limit as measured."""
    found: dict[str, list[float]] = {"jfhpo": [], "random": []}
    for strategy, scores in found.items():
        for seed in SEEDS:
            study = limited(
                tmp_path,
                strategy=strategy,
                family=[
                    {"name": name, "path": "simulated", "parameters": size}
                    for name, size in (("small", 100_000), ("medium", 300_000), ("large", 600_000))
                ],
                fidelity={"horizon_prompts": 480, "rungs": 3},
                budget={"trial_seconds": 300, "max_parallel": 2},
                seeds={"search": seed, "training": [0]},
            )
            result = search(study)
            assert result.recommended is not None
            assert result.rows[0].broken == ()
            assert "It respects kl <= 0.08 (0.0" in verdict(result)
            assert true_kl(study, result.recommended.configuration) < 1.1 * LIMIT
            scores.append(true_final(study, result.recommended.configuration))
    assert fmean(found["jfhpo"]) > fmean(found["random"])


def test_what_breaks_a_constraint_is_neither_recommended_nor_validated(tmp_path: Path) -> None:
    study = limited(tmp_path, strategy="random", budget={"trial_seconds": 300, "top_k": 2})
    trials = full_runs(study, (0.7, 0.3), (0.4, 0.07), (0.5, 0.079))
    standing = Standing(History.of(study, trials), load_strategy(study))
    assert standing.recommended is not None
    assert standing.recommended.configuration == trials[2].configuration
    assert [trial.number for _, trial in standing.finalists if trial is not None] == [2]
    assert [item.mean for item in standing.ranked] == [0.5, 0.4, 0.7]
    result = conclude(study, trials, load_strategy(study), complete=True)
    assert result.target_trial is not None
    assert result.target_trial.number == 2
    assert any("Constraints are judged" in note for note in caveats(result))


def test_if_nothing_respects_a_constraint_what_comes_nearest_is_named(tmp_path: Path) -> None:
    study = limited(tmp_path, strategy="random")
    result = conclude(study, full_runs(study, (0.7, 0.3), (0.4, 0.1)), load_strategy(study), complete=True)
    assert result.recommended is None
    assert result.target_trial is None
    assert "none of 2 configurations trained to full length on large is known to respect kl <= 0.08" in verdict(result)
    assert "Trial 1 comes nearest: it scores 0.400 and breaks kl <= 0.08 (0.1)" in verdict(result)


def test_a_metric_that_no_run_records_is_named(tmp_path: Path) -> None:
    study = limited(tmp_path, strategy="random", constraints={"entropy": ">= 0.1"})
    trials = full_runs(study, (0.7, 0.3))
    assert metric_rows(History.of(study, trials), "entropy") == []
    assert "no full run has recorded entropy" in verdict(conclude(study, trials, load_strategy(study), complete=True))


def test_the_recipe_has_to_respect_constraints_too(tmp_path: Path) -> None:
    recipe = {"name": "recipe", "configuration": {"learning_rate": 9e-4}}
    study = limited(tmp_path, strategy="random", baselines=[recipe])
    trials = full_runs(study, (0.5, 0.07))
    run = study.new_trial(1, recipe["configuration"], "large", 0, "baseline", "recipe")  # type: ignore[arg-type]
    known = with_metrics(trained(study, {}, "large", [0.1, 0.2, 0.3, 0.8], 1), kl=0.4)
    trials.append(run.model_copy(update={"segments": known.segments}))
    result = conclude(study, trials, load_strategy(study), complete=True)
    assert result.recommended is not None
    assert result.recommended.configuration == trials[0].configuration
    assert "recipe (\N{MINUS SIGN}0.300, which breaks kl <= 0.08 (0.4))" in verdict(result)


def test_the_front_is_what_no_other_configuration_dominates(tmp_path: Path) -> None:
    runs = ((0.7, 0.3), (0.6, 0.2), (0.5, 0.25), (0.4, 0.05), (0.4, 0.06), (0.3, 0.04))
    study = limited(tmp_path, constraints={}, second_objective="kl")
    found = tried(History.of(study, full_runs(study, *runs)))
    assert [item.trial for item in found] == [0, 1, 2, 3, 4, 5]
    assert [item.trial for item in found if item.on_front] == [0, 1, 3, 5]
    more = limited(tmp_path, constraints={}, second_objective={"metric": "kl", "direction": "maximize"})
    assert [item.trial for item in tried(History.of(more, full_runs(more, *runs))) if item.on_front] == [0]
    bounded = limited(tmp_path, constraints={"kl": "<= 0.28"}, second_objective="kl")
    assert [item.trial for item in tried(History.of(bounded, full_runs(bounded, *runs))) if item.on_front] == [1, 3, 5]


def test_half_of_the_suggestions_seek_the_front(tmp_path: Path) -> None:
    study = limited(tmp_path, constraints={}, second_objective="kl")
    history, random = History.of(study, full_runs(study, (0.7, 0.3), (0.4, 0.1))), np.random.default_rng(0)
    drawn = [drawn_limit(history, random) for _ in range(200)]
    bounds = [limit.bound for limit in drawn if limit is not None]
    assert 70 < len(bounds) < 130
    assert all(0.1 <= bound <= 0.3 for bound in bounds)
    assert drawn_limit(History.of(study, history.trials[:1]), np.random.default_rng(1)) is None
