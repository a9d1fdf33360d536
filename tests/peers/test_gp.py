from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.peers.gp import Gp, Scored, fit, observed, propose
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial
from tests.peers.test_peers import peer_study
from tests.studies import evaluation, result


def bump(study: Study, count: int, best: float = 0.7) -> list[Scored]:
    """Scores that depend on the learning rate alone, best at a coordinate."""
    return [
        Scored(item, float(np.exp(-8 * (study.space.encode(item)[0] - best) ** 2)), 1e-4)
        for item in fresh_configurations(study, (), 0, count)
    ]


def proposed(study: Study, scored: list[Scored], seed: int = 0) -> float:
    known = [item.configuration for item in scored]
    chosen = propose(study, scored, [], known, 128, 128, seed)
    assert chosen is not None
    assert chosen not in known
    return float(study.space.encode(chosen)[0])


def test_the_proposal_lies_where_the_score_is_high(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "gp")
    assert abs(proposed(study, bump(study, 25)) - 0.7) < 0.15


def test_running_trials_push_the_proposal_away(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "gp")
    scored = bump(study, 25)
    known = [item.configuration for item in scored]
    first = propose(study, scored, [], known, 128, 128, 0)
    assert first is not None
    second = propose(study, scored, [first], [*known, first], 128, 128, 0)
    assert second not in (None, first)


@pytest.mark.parametrize("case", ["one", "constant", "twins", "exact"])
def test_degenerate_observations_are_survived(tmp_path: Path, case: str) -> None:
    study = peer_study(tmp_path, "gp")
    scored = bump(study, 8)
    cases = {
        "one": scored[:1],
        "constant": [Scored(item.configuration, 0.5, 1e-4) for item in scored],
        "twins": [scored[0]] * 8,
        "exact": [Scored(item.configuration, item.score, 0.0) for item in scored],
    }
    assert 0 <= proposed(study, cases[case]) <= 1


def test_the_model_reproduces_precise_scores(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "gp")
    scored = [Scored(item.configuration, item.score, 1e-6) for item in bump(study, 20)]
    model = fit(study.space, scored)
    means = model.posterior(model.train_inputs[0]).mean.detach().squeeze(-1).numpy()
    assert np.abs(means - [item.score for item in scored]).max() < 0.02


def test_failed_trials_count_as_the_worst_and_lost_ones_not_at_all(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "gp")
    first, second, third, fourth = fresh_configurations(study, (), 0, 4)

    def trial(number: int, configuration: dict[str, object], **changes: object) -> Trial:
        done = result(0, 0, 30, **changes)
        new = study.new_trial(number, configuration, "large", 0)  # type: ignore[arg-type]
        return new.model_copy(update={"segments": (done,)})

    trials = [
        trial(0, first, evaluations=(evaluation(0, 0.1), evaluation(30, 0.6))),
        trial(1, second, evaluations=(evaluation(10, 0.3),), outcome="stopped", end_step=10),
        trial(2, third, outcome="infeasible", failure="out-of-memory", end_step=0),
        trial(3, fourth, outcome="lost", end_step=0),
    ]
    assert [(item.configuration, item.score) for item in observed(trials)] == [
        (first, 0.6),
        (second, 0.3),
        (third, 0.3),
    ]
    assert observed(trials[2:]) == []


def test_the_initial_design_is_as_long_as_asked(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "gp")
    trials = [
        study.new_trial(number, item, "large", 0).model_copy(
            update={"segments": (result(0, 0, 30, evaluations=(evaluation(30, 0.1 * number),)),)}
        )
        for number, item in enumerate(fresh_configurations(study, (), 0, 4))
    ]
    explanations = [
        choice.explanation
        for count in (3, 4)
        if (choice := Gp(initial_trials=4).choose(study, trials[:count], 0)) is not None
    ]
    assert explanations == ["initial design: Sobol configuration", "largest noisy expected improvement"]
