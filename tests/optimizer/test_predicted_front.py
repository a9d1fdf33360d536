"""The front that the model expects, on a simulated landscape whose scores and KLs are known."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.predicted_front import MOST_POINTS, Predicted, predicted_front
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.optimizer.test_constraints import limited, true_final, true_kl, with_metrics
from tests.studies import trained

SECOND = {"second_objective": "kl", "constraints": {}}


def runs(study: Study, count: int = 32) -> list[Trial]:
    """Full runs of Sobol configurations on the target, with what they truly come to."""
    found = []
    for number, configuration in enumerate(fresh_configurations(study, [], 0, count)):
        surface = study_surface(study.spec)
        base = true_score(surface, study.complete(configuration), 1.0, 0.0)
        scores = [base, base, base, true_final(study, configuration)]
        trial = trained(study, configuration, "large", scores, number)
        found.append(with_metrics(trial, kl=true_kl(study, configuration)))
    return found


def front(study: Study, trials: list[Trial]) -> tuple[Predicted, ...]:
    beliefs = Beliefs.form(History.of(study, trials))
    assert beliefs is not None
    return predicted_front(beliefs)


def study_of(tmp_path: Path, **changes: Any) -> Study:
    return limited(tmp_path, **{**SECOND, **changes})


def test_the_predicted_front_holds_what_its_configurations_truly_come_to(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    trials = runs(study)
    found = front(study, trials)
    assert 3 <= len(found) <= MOST_POINTS
    assert any(item.trial is None for item in found)
    scores, metrics = [item.score for item in found], [item.metric for item in found]
    assert scores == sorted(scores, reverse=True)
    assert metrics == sorted(metrics, reverse=True)
    truth = [(true_final(study, item.configuration), true_kl(study, item.configuration)) for item in found]
    # Intervals of 80 %, fewer than ten of them and not independent.
    assert (
        np.mean([one.score_low <= score <= one.score_high for one, (score, _) in zip(found, truth, strict=True)]) > 0.5
    )
    assert np.mean([one.metric_low <= kl <= one.metric_high for one, (_, kl) in zip(found, truth, strict=True)]) > 0.5
    # What it promises is about as good as anything that was run, at every KL.
    for trial in trials:
        assert trial.final is not None
        rivals = [score for score, kl in truth if kl <= 1.25 * trial.final.training["kl"]]
        if trial.final.training["kl"] >= min(metrics):
            assert max(rivals) >= trial.final.score - 0.1


def test_configurations_that_were_run_have_their_trial(tmp_path: Path) -> None:
    study = study_of(tmp_path, space={"learning_rate": {"type": "choice", "values": [1e-5, 2e-4, 3e-4, 4e-4]}})
    trials = runs(study, 4)
    found = front(study, trials)
    assert found
    numbers = {trial.configuration["learning_rate"]: trial.number for trial in trials}
    assert all(item.trial == numbers[item.configuration["learning_rate"]] for item in found)


def test_what_probably_breaks_a_constraint_is_not_on_it(tmp_path: Path) -> None:
    study = study_of(tmp_path, constraints={"kl": "<= 0.08"})
    found = front(study, runs(study))
    assert found
    assert max(item.metric for item in found) <= 0.08


@pytest.mark.parametrize("second", [None, "entropy"])
def test_without_a_second_objective_that_was_recorded_there_is_none(tmp_path: Path, second: str | None) -> None:
    study = study_of(tmp_path, second_objective=second)
    assert front(study, runs(study, 8)) == ()


@pytest.mark.parametrize(("metric", "values"), [("truncated_share", [0.0]), ("kl", [0.0]), ("kl", [0.0, 0.0, 0.3])])
def test_values_of_0_are_known_values(tmp_path: Path, metric: str, values: list[float]) -> None:
    study = study_of(tmp_path, second_objective=metric)
    trials = [
        with_metrics(trial, **{metric: value}) for trial, value in zip(runs(study, 8), cycle(values), strict=False)
    ]
    found = front(study, trials)
    assert found
    assert all(0 <= item.metric_low <= item.metric for item in found)
