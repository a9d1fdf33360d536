"""What MLflow shows of constraints, and that what breaks one is registered saying so and not served by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities.model_registry import ModelVersion

from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.study.trial import Checkpoint
from mlflow_plugin.presentation import outcome_metrics, result_metrics, study_note
from mlflow_plugin.provenance import TaskData
from mlflow_plugin.registry import BREAKS, CHALLENGER, CHAMPION, CONSTRAINTS, _compare, _description, _tags
from tests.optimizer.test_constraints import full_runs, limited, with_metrics


@pytest.fixture
def result(tmp_path: Path) -> SearchResult:
    study = limited(tmp_path, strategy="random", second_objective="kl")
    trials = full_runs(study, (0.7, 0.3), (0.5, 0.07), (0.4, 0.02))
    return conclude(study, trials, load_strategy(study), complete=True)


def test_the_studys_run_has_the_constraint_and_the_front(result: SearchResult) -> None:
    values = {metric.key: metric.value for metric in outcome_metrics(result, 0)}
    assert values["study/recommended_kl"] == pytest.approx(0.07)
    assert values["study/respects_constraints"] == 1.0
    assert values["study/front_configurations"] == 2.0
    note = study_note(result.study.spec, result.trials, result)
    assert "| recommended | 0.500 |" in note
    assert "| 1 | 0.500 ± 0.020 | 0.07 |" in note


def test_a_trials_run_has_the_secondary_metrics_by_rung(result: SearchResult) -> None:
    trial = result.trials[1]
    shown = result_metrics(trial, trial.segments[0], 0, None, TaskData(None, None), result.study.spec.secondary_metrics)
    assert [(metric.step, metric.value) for metric in shown if metric.key == "rung/kl"] == [
        (10, 0.07), (20, 0.07), (30, 0.07)
    ]  # fmt: skip
    plain = result_metrics(trial, trial.segments[0], 0, None, TaskData(None, None))
    assert not any(metric.key.startswith("rung/") for metric in plain)


def test_a_version_that_breaks_a_constraint_says_so_and_is_not_served_by_itself(result: SearchResult) -> None:
    trial = result.target_trial
    assert trial is not None
    saved = trial.segments[-1].model_copy(
        update={"checkpoint": Checkpoint(step=30, prompts=480, path="x", digest="d" * 64, size_bytes=1)}
    )
    trial = trial.model_copy(update={"segments": (saved,)})
    assert trial.final is not None
    tags = _tags(result.study, result, trial, trial.final)
    assert tags[CONSTRAINTS] == "kl <= 0.08 (0.07)"
    assert BREAKS not in tags
    assert "It respects all constraints." in _description(result.study, result, trial, trial.final)

    other = with_metrics(trial, kl=0.11)
    row = replace(result.rows[0], measured={"kl": 0.09}, broken=result.study.spec.limits)
    judged = replace(result, rows=(row, *result.rows[1:]))
    assert other.final is not None
    broken = _tags(result.study, judged, other, other.final)
    assert broken[BREAKS] == "kl <= 0.08 (0.11) in the registered run, kl <= 0.08 (0.09) over all runs"
    assert "**It breaks kl <= 0.08 (0.11)" in _description(result.study, judged, other, other.final)

    for known, alias in ((tags, CHAMPION), (broken, CHALLENGER)):
        version = ModelVersion("tuned", "1", 0, tags=[])
        version._tags = known
        found, reason = _compare(version, None, None)
        assert found == alias
        assert ("breaks kl <= 0.08 (0.11)" in reason) == (alias == CHALLENGER)
