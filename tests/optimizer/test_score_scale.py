"""The scale on which scores are modelled."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfhpo_core.optimizer.score_scale import Group, ScoreScale

TARGET: Group = (0.0, 0.0, 1.0)
PROXY: Group = (0.0, -1.0, 0.5)

score_lists = st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=12)


def test_it_is_linear_above_the_best_and_logarithmic_below() -> None:
    scale = ScoreScale.of([TARGET] * 5, [0.2, 0.5, 0.6, 0.7, 0.8], [0.01] * 5)
    assert scale.unit() == pytest.approx(0.15)  # 0.8 minus the mean of 0.7 and 0.6
    assert scale.value(TARGET, 0.95) == pytest.approx((1.0, 1 / 0.15))
    assert scale.value(TARGET, 0.8) == pytest.approx((0.0, 1 / 0.15))
    assert scale.value(TARGET, 0.2) == pytest.approx((-math.log(5), 1 / 0.75))


@given(scores=score_lists, value=st.floats(-5, 5))
def test_values_turn_back_into_scores(scores: list[float], value: float) -> None:
    scale = ScoreScale.of([TARGET] * len(scores), scores, [0.01] * len(scores))
    (score,) = scale.score(TARGET, [value])
    assert scale.value(TARGET, float(score))[0] == pytest.approx(value, abs=1e-6)


@given(scores=score_lists, factor=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_units_and_offsets_of_scores_do_not_matter(scores: list[float], factor: float, shift: float) -> None:
    groups, errors = [TARGET, PROXY] * len(scores), [0.01] * 2 * len(scores)
    every = [score for pair in zip(scores, scores[::-1], strict=True) for score in pair]
    plain = ScoreScale.of(groups, every, errors)
    other = ScoreScale.of(groups, [factor * score + shift for score in every], [factor * error for error in errors])
    for group, score in zip(groups, every, strict=True):
        expected = plain.value(group, score)[0]
        assert other.value(group, factor * score + shift)[0] == pytest.approx(expected, abs=1e-4)


def test_a_group_is_compared_with_its_own_best() -> None:
    scale = ScoreScale.of([TARGET, TARGET, PROXY, PROXY], [0.8, 0.7, 0.3, 0.2], [0.01] * 4)
    assert scale.value(TARGET, 0.7)[0] == pytest.approx(scale.value(PROXY, 0.2)[0])


def test_one_collapse_does_not_make_good_scores_look_alike() -> None:
    good = [0.70, 0.72, 0.74, 0.76, 0.78, 0.80]
    plain = ScoreScale.of([TARGET] * 6, good, [0.01] * 6)
    beside = ScoreScale.of([TARGET] * 7, [*good, -50.0], [0.01] * 7)
    assert beside.unit() == pytest.approx(plain.unit(), rel=0.5)
    assert beside.value(TARGET, -50.0)[0] > -10


def test_a_unit_is_no_smaller_than_what_can_be_measured() -> None:
    assert ScoreScale.of([TARGET] * 4, [0.5, 0.5001, 0.5002, 0.5003], [0.02] * 4).unit() == pytest.approx(0.02)


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5], [0.0, 0.0, 0.0]])
def test_equal_scores_are_zero(scores: list[float]) -> None:
    scale = ScoreScale.of([TARGET] * len(scores), scores, [0.0] * len(scores))
    assert [scale.value(TARGET, score)[0] for score in scores] == [0.0] * len(scores)


def test_each_study_has_a_unit_of_its_own() -> None:
    earlier: Group = (1.0, 0.0, 1.0)
    scale = ScoreScale.of([TARGET] * 2 + [earlier] * 2, [0.8, 0.7, 80.0, 70.0], [0.01, 0.01, 1.0, 1.0])
    assert scale.unit() == pytest.approx(0.1)
    assert scale.unit(earlier) == pytest.approx(10.0)


def test_a_group_has_a_unit_of_its_own_the_more_scores_it_has() -> None:
    """Runs of the target spread more than short runs of a proxy: what is 0.1 there is little here."""
    on_proxy = [0.20, 0.21, 0.22, 0.23, 0.24, 0.25, 0.26, 0.27]
    units = []
    for count in (1, 2, 4, 8):
        on_target = [0.8, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0][:count]
        groups = [TARGET] * count + [PROXY] * len(on_proxy)
        units.append(ScoreScale.of(groups, [*on_target, *on_proxy], [0.001] * len(groups)).unit())
    assert units == sorted(units)
    assert units[0] == pytest.approx(0.02, rel=0.1)
    assert units[-1] > 5 * units[0]


def test_two_that_are_equally_good_do_not_make_all_others_hopeless() -> None:
    """As the best and the second best of six runs of a recorded task."""
    scores = [0.453, 0.443, 0.441, 0.344, 0.244, 0.018, 0.0]
    scale = ScoreScale.of([TARGET] * 7, scores, [0.01] * 7)
    assert scale.value(TARGET, 0.8)[0] < 10


def test_an_unseen_group_has_the_level_of_the_nearest_one() -> None:
    scale = ScoreScale.of([TARGET, PROXY], [0.8, 0.3], [0.01] * 2)
    assert scale.reference((0.0, -0.9, 1.0)) == 0.3
    assert np.allclose(scale.score((0.0, 0.0, 0.5), [0.0]), 0.8)
