from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test

from jfhpo_core.report.paired import compare_paired

REWARDS = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 1.0])), min_size=2)


def test_solved_or_not_is_mcnemars_test() -> None:
    first, second = [1.0] * 30 + [0.0] * 70, [0.0] * 22 + [1.0] * 18 + [0.0] * 60
    found = compare_paired(first, second)
    assert found is not None
    assert (found.better, found.worse, found.prompts) == (22, 10, 100)
    assert found.difference == pytest.approx(0.12)
    assert found.p_value == pytest.approx(binomtest(22, 32).pvalue)
    assert found.is_clear == (found.p_value < 0.05)
    assert "better on 22 and worse on 10" in str(found)


def test_means_of_several_completions_are_permuted() -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(0, 1, 60)
    better = np.clip(base + generator.normal(0.05, 0.15, 60), 0, 1)
    found = compare_paired(list(better), list(base))
    assert found is not None

    def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray((x - y).mean(axis=axis))

    exact = permutation_test(
        (better, base), mean_difference, permutation_type="samples", vectorized=True, n_resamples=20_000, rng=1
    )
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.01)


def test_pairing_sees_what_two_scores_hide() -> None:
    """Prompts differ much more than the models do: two standard errors of the scores are ten times the difference."""
    hard = np.linspace(0, 0.9, 400)
    noise = np.random.default_rng(1).normal(0, 0.01, 400)
    found = compare_paired(list(hard + 0.003 + noise), list(hard))
    assert found is not None
    assert found.is_clear
    assert found.low > 0
    assert 2 * hard.std() / 20 > 5 * found.difference


@given(REWARDS)
def test_the_other_way_round_only_the_signs_change(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    one, other = compare_paired(first, second), compare_paired(second, first)
    assert one is not None
    assert other is not None
    assert one.p_value == pytest.approx(other.p_value)
    assert one.difference == pytest.approx(-other.difference)
    assert (one.better, one.worse) == (other.worse, other.better)
    assert 0 < one.p_value <= 1


def test_models_that_are_alike_are_rarely_told_apart() -> None:
    generator = np.random.default_rng(3)
    clear = 0
    for _ in range(200):
        first, second = (generator.binomial(4, 0.5, 50) / 4 for _ in range(2))
        found = compare_paired(list(first), list(second))
        assert found is not None
        clear += found.is_clear
    assert clear <= 20


def test_other_prompts_cannot_be_paired() -> None:
    assert compare_paired([1.0, 0.0], [1.0]) is None
    assert compare_paired([], []) is None
    alike = compare_paired([1.0, 0.0], [1.0, 0.0])
    assert alike is not None
    assert alike.p_value == 1
