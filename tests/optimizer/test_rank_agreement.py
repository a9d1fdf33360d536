from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jfhpo_core.optimizer.rank_agreement import (
    FEW_PAIRS,
    _statistics,
    fidelity_agreement,
    length_agreements,
    most_telling,
    rank_agreement,
    scores_at,
    size_agreements,
)
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import Outcome, Trial
from tests.studies import evaluation, result, segment

STUDY = """
study: agreement
family:
  - {name: small, path: simulated, parameters: 100000}
  - {name: large, path: simulated, parameters: 600000}
target: large
task: instruct
trainer: simulated
space: tiny
fidelity: {horizon_prompts: 960, rungs: 2}
budget: {trial_seconds: 600}
"""


@pytest.fixture(scope="module")
def study() -> Study:
    return resolve(parse_study(STUDY))


def trained(
    study: Study, number: int, rate: float, model: str, scores: dict[int, float], seed: int = 0, stopped: bool = False
) -> Trial:
    """A trial with scores by step (60 steps are the horizon)."""
    trial = study.new_trial(number, {"learning_rate": rate}, model, seed)
    part = result(
        0, 0, max(scores), segment=segment(0, 0, 60), outcome=Outcome.STOPPED if stopped else Outcome.REACHED,
        evaluations=tuple(evaluation(step, score) for step, score in scores.items()),
    )  # fmt: skip
    return trial.model_copy(update={"segments": (part,)})


@pytest.mark.parametrize("size", [2, 3, 7, 40])
@pytest.mark.parametrize("ties", [False, True])
def test_point_estimates_are_those_of_scipy(size: int, ties: bool) -> None:
    random = np.random.default_rng(size)
    x = random.normal(size=size)
    y = x + random.normal(size=size)
    if ties and size > 3:
        x, y = x.round(), y.round()
    agreement = rank_agreement(list(x), list(y))
    assert agreement.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert agreement.kendall == pytest.approx(stats.kendalltau(x, y).statistic)


def test_a_weighted_sample_is_the_sample_with_its_pairs_repeated() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=8).round(1), random.normal(size=8).round(1)
    weights = random.multinomial(8, np.full(8, 1 / 8), size=20)
    spearman, kendall = _statistics(x, y, weights.astype(float))
    for index, counts in enumerate(weights):
        repeated = np.repeat(np.arange(8), counts)
        assert spearman[index] == pytest.approx(stats.spearmanr(x[repeated], y[repeated]).statistic)
        assert kendall[index] == pytest.approx(stats.kendalltau(x[repeated], y[repeated]).statistic)


SCORES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=FEW_PAIRS, max_size=12)


@given(SCORES)
def test_bounds_symmetry_and_invariance_under_rising_maps(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    agreement = rank_agreement(x, y, resamples=50)
    mirrored = rank_agreement(y, x, resamples=50)
    stretched = rank_agreement([math.exp(value / 10) for value in x], y, resamples=50)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert agreement.spearman is None
        assert agreement.kendall is None
        return
    assert agreement.spearman is not None
    assert agreement.kendall is not None
    assert -1 <= agreement.spearman <= 1
    assert agreement.spearman == pytest.approx(mirrored.spearman) == pytest.approx(stretched.spearman)
    assert agreement.kendall == pytest.approx(mirrored.kendall) == pytest.approx(stretched.kendall)
    assert agreement.spearman_interval is not None
    low, high = agreement.spearman_interval
    assert -1 <= low <= high <= 1


def test_the_bootstrap_is_seeded_and_narrows_with_more_pairs() -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=200)
    y = x + random.normal(size=200)
    few, many = rank_agreement(x[:10].tolist(), y[:10].tolist()), rank_agreement(x.tolist(), y.tolist())
    assert few == rank_agreement(x[:10].tolist(), y[:10].tolist())
    assert few != rank_agreement(x[:10].tolist(), y[:10].tolist(), seed=1)
    assert few.spearman_interval is not None
    assert many.spearman_interval is not None
    assert np.ptp(many.spearman_interval) < np.ptp(few.spearman_interval) / 2
    assert many.spearman_interval[0] < stats.spearmanr(x, y).statistic < many.spearman_interval[1]


def test_pairs_that_are_not_finite_are_dropped_and_counted() -> None:
    agreement = rank_agreement([1, math.nan, 2, 3, math.inf], [1, 2, 2, 3, 4])
    assert (agreement.pairs, agreement.dropped, agreement.spearman) == (3, 2, 1.0)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lengths, got 2 and 1"):
        rank_agreement([1, 2], [1])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([], [], "nothing is known"),
        ([1], [1], "Only 1 pair: there is no order"),
        ([1, 2, 3], [1, 2, 3], "Only 3 pairs: says little"),
        ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], "no order to compare"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "by chance that happens once in 120"),
        ([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], "in opposite ways"),
        ([1, 2, 3, 4, 5, 6], [3, 1, 5, 2, 6, 4], "may be chance"),
        (list(range(30)), [*range(2, 30), 0, 1], "much the same way|roughly the same way"),
    ],
)
def test_agreement_in_plain_words(first: list[float], second: list[float], words: str) -> None:
    import re

    assert re.search(words, rank_agreement(first, second).explain())


def test_seeds_are_averaged_and_stopped_trials_have_no_later_score(study: Study) -> None:
    trials = [
        trained(study, 0, 1e-4, "large", {30: 0.2, 60: 0.4}),
        trained(study, 1, 1e-4, "large", {30: 0.4, 60: 0.6}, seed=1),
        trained(study, 2, 1e-2, "large", {17: 0.0}, stopped=True),
        trained(study, 3, 1e-3, "small", {30: 0.3}),
    ]
    at_half = scores_at(study, trials, "large", 480)
    (measured,) = at_half.values()
    assert measured.score == pytest.approx(0.3)
    assert measured.standard_error == pytest.approx(0.02 / math.sqrt(2))
    assert measured.trials == (0, 1)
    assert scores_at(study, trials, "small", 960) == {}


def test_a_spelled_out_default_is_the_same_configuration(study: Study) -> None:
    plain = trained(study, 0, 1e-4, "small", {60: 0.3})
    spelled = trained(study, 1, 1e-4, "large", {60: 0.4})
    spelled = spelled.model_copy(update={"configuration": {**spelled.configuration, "scheduler": "constant"}})
    assert len(fidelity_agreement(study, [plain, spelled], ("small", 960), ("large", 960)).pairs) == 1


def test_size_and_length_agreements_over_a_study(study: Study) -> None:
    rates = [1e-4 * 2**index for index in range(6)]
    trials = [trained(study, i, rate, "small", {30: 0.1 * i, 60: 0.12 * i}) for i, rate in enumerate(rates)]
    trials += [trained(study, 6 + i, rate, "large", {30: 0.5 - 0.1 * i}) for i, rate in enumerate(rates)]
    trials[7] = trained(study, 7, rates[1], "large", {30: 0.4, 60: 0.7})
    half, full = size_agreements(study, trials, "small")
    assert (half.agreement.pairs, half.agreement.spearman) == (6, -1.0)
    assert full.agreement.pairs == 1
    assert most_telling([half, full]) is half
    (early,) = length_agreements(study, trials, "small")
    assert (early.first, early.second, early.agreement.kendall) == (("small", 480), ("small", 960), 1.0)


def test_most_telling_prefers_length_and_then_pairs(study: Study) -> None:
    trials = [trained(study, i, 1e-4 * (i + 1), "small", {30: 0.1 * i, 60: 0.1 * i}) for i in range(FEW_PAIRS)]
    trials += [trained(study, 9 + i, 1e-4 * (i + 1), "large", {30: 0.1 * i, 60: 0.1 * i}) for i in range(FEW_PAIRS)]
    both = size_agreements(study, trials, "small")
    assert most_telling(both) is both[1]
    few = size_agreements(study, [*trials[:2], *trials[FEW_PAIRS:]], "small")
    assert most_telling(few) is few[1]
    assert most_telling(size_agreements(study, [], "small")) is None
