from __future__ import annotations

import math
from pathlib import Path

import pytest

from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.peers.fastbo import Curve, FastBo
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Evaluation, Trial
from tests.peers.test_peers import peer_study
from tests.studies import evaluation, result

LEVELS = tuple(48 * number for number in range(1, 11))


def curve_points(rate: float, *steps: int, gain: float = 0.6, error: float = 0.02) -> list[Evaluation]:
    """Scores 0.1 + gain (1 - exp(-rate t)) at steps of a horizon of 30."""
    return [
        evaluation(step, 0.1 + gain * (1 - math.exp(-rate * step / 30))).model_copy(update={"standard_error": error})
        for step in steps
    ]


@pytest.mark.parametrize("rate", [1.0, 3.0, 10.0])
def test_a_curve_is_recovered_from_precise_scores(rate: float) -> None:
    curve = Curve.fit(curve_points(rate, 3, 6, 12, error=1e-3), 480, 0.1)
    assert curve.score(0.0) == 0.1
    assert curve.score(1.0) == pytest.approx(0.1 + 0.6 * (1 - math.exp(-rate)), abs=0.02)
    assert curve.rate == pytest.approx(rate, rel=0.15)


def test_a_single_score_is_extended_at_the_typical_rate() -> None:
    curve = Curve.fit(curve_points(3.0, 6), 480, 0.1)
    assert curve.rate == pytest.approx(3.0, rel=0.1)
    assert curve.score(0.2) == pytest.approx(0.1 + 0.6 * (1 - math.exp(-0.6)))


def test_the_efficient_point_is_the_first_whose_doubling_gains_too_little() -> None:
    fast, slow = Curve(0.1, 0.6, 20.0), Curve(0.1, 0.6, 1.0)
    assert fast.efficient_point(LEVELS, 0.02) == 96
    assert fast.score(0.4) - fast.score(0.2) < 0.02 < fast.score(0.2) - fast.score(0.1)
    assert slow.efficient_point(LEVELS, 0.02) == 480
    assert Curve(0.1, 0.0, 3.0).efficient_point(LEVELS, 0.02) == 48


def trained(study: Study, number: int, points: list[Evaluation]) -> Trial:
    configuration = fresh_configurations(study, (), 0, number + 1)[number]
    base = evaluation(0, 0.1)
    done = result(0, 0, points[-1].step, evaluations=(base, *points), committed=number + 1)
    return study.new_trial(number, configuration, "large", 0).model_copy(update={"segments": (done,)})


def test_each_trial_goes_to_its_own_efficient_point(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "fastbo", fidelity={"horizon_prompts": 480, "rungs": 10})
    stops = []
    for rate in (30.0, 8.0, 1.0):
        choice = FastBo().choose(study, [trained(study, 0, curve_points(rate, 3, 6, error=1e-3))], 0)
        assert choice is not None
        stops.append(choice.stop_prompts if choice.explanation.startswith("efficient") else None)
    assert stops == [None, 240, 480], "the first is done after the warm-up, and a new trial begins"


def test_a_trial_that_falls_below_the_untrained_model_is_given_up(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "fastbo", fidelity={"horizon_prompts": 480, "rungs": 10})
    falling = trained(study, 0, curve_points(3.0, 3, 6, gain=-0.1))
    choice = FastBo().choose(study, [falling], 0)
    assert choice is not None
    assert choice.configuration != falling.configuration
    assert choice.stop_prompts == 96


def test_the_ranking_forecasts_what_is_not_measured(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "fastbo", fidelity={"horizon_prompts": 480, "rungs": 10})
    slow = trained(study, 0, curve_points(1.0, 3, 6, error=1e-3, gain=1.2))
    done = trained(study, 1, curve_points(3.0, 3, 6, 30, gain=0.5))
    flat = trained(study, 2, curve_points(20.0, 3, 6, error=1e-3, gain=0.3))
    ranked = FastBo().rank(study, [flat, done, slow])
    assert [item.configuration for item in ranked] == [slow.configuration, done.configuration, flat.configuration]
    assert ranked[1].mean == done.evaluations[-1].score
