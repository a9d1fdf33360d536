from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jfhpo.testing.strategies import RUNGS
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.peers.base import Choice
from jfhpo_core.peers.optuna import Asha, Bohb, Tpe
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial
from tests.peers.test_peers import peer_study
from tests.studies import evaluation, result, segment


def reported(study: Study, scores: list[float], steps: int = 3, **changes: Any) -> list[Trial]:
    """Trials of Sobol configurations that reached a step, committed in order."""
    trials = []
    for number, (configuration, score) in enumerate(
        zip(fresh_configurations(study, (), 0, len(scores)), scores, strict=True)
    ):
        done = result(0, 0, steps, evaluations=(evaluation(steps, score),), committed=number + 1, **changes)
        trials.append(study.new_trial(number, configuration, "large", 0).model_copy(update={"segments": (done,)}))
    return trials


def test_asha_continues_the_best_third_of_a_rung_at_once(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "asha")
    trials = reported(study, [0.5])
    assert Asha().choose(study, trials, 0) == Choice(trials[0].configuration, 160, "promoted to 160 of 480 prompts")
    trials = reported(study, [0.5, 0.3, 0.2, 0.6])
    trials[0] = trials[0].model_copy(
        update={"segments": (*trials[0].segments, result(1, 3, 10, evaluations=(evaluation(10, 0.4),), committed=5))}
    )
    choice = Asha().choose(study, trials, 0)
    assert choice is not None
    assert (choice.configuration, choice.stop_prompts) == (trials[0].configuration, 480), "the best at its rung so far"
    running = trials[0].model_copy(update={"open_segment": segment(2, 10, 30)})
    choice = Asha().choose(study, [running, *trials[1:]], 0)
    assert choice is not None
    assert (choice.configuration, choice.stop_prompts) == (trials[3].configuration, 160)
    running = trials[3].model_copy(update={"open_segment": segment(1, 3, 10)})
    choice = Asha().choose(study, [*trials[:3], running], 0)
    assert choice is not None
    assert choice.configuration == trials[0].configuration


def test_asha_begins_a_new_trial_when_none_is_good_enough(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "asha")
    trials = reported(study, [0.5, 0.4, 0.3])
    trials[0] = trials[0].model_copy(update={"open_segment": segment(1, 3, 10)})
    choice = Asha().choose(study, trials, 0)
    assert choice is not None
    assert choice.configuration not in [trial.configuration for trial in trials]
    assert choice.stop_prompts == RUNGS["rungs"][0]


def test_a_trial_that_a_rule_stopped_is_not_continued(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "asha")
    stopped = reported(study, [0.9], steps=2, outcome="stopped")
    choice = Asha().choose(study, stopped, 0)
    assert choice is not None
    assert choice.configuration != stopped[0].configuration


def test_bohb_begins_some_trials_at_later_rungs(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "bohb")
    begun = set()
    for count in range(1, 13):
        trials = [
            trial.model_copy(update={"open_segment": segment(0, 0, 3), "segments": ()})
            for trial in reported(study, [0.5] * count)
        ]
        choice = Bohb().choose(study, trials, count)
        assert choice is not None
        begun.add(choice.stop_prompts)
    assert begun == {48, 160, 480}


def test_tpe_moves_to_where_scores_are_high(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "tpe")
    trials = reported(study, [0.0] * 30, steps=30)
    rates = [study.space.encode(trial.configuration)[0] for trial in trials]
    scored = [
        trial.model_copy(
            update={
                "segments": (
                    trial.segments[0].model_copy(update={"evaluations": (evaluation(30, float(1 - abs(rate - 0.7))),)}),
                )
            }
        )
        for trial, rate in zip(trials, rates, strict=True)
    ]
    choices = [Tpe().choose(study, scored, seed) for seed in range(20)]
    distance = np.mean([abs(study.space.encode(choice.configuration)[0] - 0.7) for choice in choices if choice])
    assert distance < 0.15 < np.mean([abs(rate - 0.7) for rate in rates])
