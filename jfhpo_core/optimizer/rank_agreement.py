"""Do smaller models, and shorter runs, rank configurations as the target at full length does?

A proxy is worth its price only if it does. Two measures, both over pairs (x_i, y_i) of one configuration measured
under two fidelities, both from the signs of the differences s_ij(x) = sign(x_i - x_j):

    Spearman's rho = sum_i a_i b_i / sqrt(sum_i a_i^2  sum_i b_i^2),    a_i = sum_j s_ij(x),  b_i = sum_j s_ij(y)
    Kendall's tau-b = sum_ij s_ij(x) s_ij(y) / sqrt(sum_ij s_ij(x)^2  sum_ij s_ij(y)^2)

(a_i / 2 is the centred mid-rank of x_i.) Written with weights, the same sums give every bootstrap sample by a matrix
product. Spearman: Proof and Measurement of Association, 1904. Kendall: Rank Correlation Methods, 1948.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Vector
from jfhpo_core.study.trial import Evaluation, Trial, configuration_key

RESAMPLES = 2000

FEW_PAIRS = 5
"""Below this many pairs no interval is given: a bootstrap of four points knows next to nothing."""


@dataclass(frozen=True)
class RankAgreement:
    """How alike two lists of scores rank the same configurations.

    Attributes:
        pairs: Pairs compared.
        dropped: Pairs left out because a score was not finite.
        spearman: Spearman's rho in [-1, 1], ties by mid-ranks; None with fewer than two pairs or a constant list.
        kendall: Kendall's tau-b in [-1, 1]; None likewise.
        spearman_interval: Percentile bootstrap interval (95 %) over pairs; None below `FEW_PAIRS` pairs. It contains
            no measurement noise beyond that of the scores themselves, and a perfect order resamples to itself.
        kendall_interval: Likewise.
    """

    pairs: int
    dropped: int
    spearman: float | None
    kendall: float | None
    spearman_interval: tuple[float, float] | None
    kendall_interval: tuple[float, float] | None

    def explain(self) -> str:
        """What this says, in plain words for the reader of a report."""
        if self.pairs == 0:
            return "No configuration was measured on both: nothing is known."
        if self.pairs == 1:
            return "Only 1 pair: there is no order to compare."
        count = f"{self.pairs} pairs"
        if self.spearman is None:
            return f"{count}, but all scores on one side are equal: there is no order to compare."
        if self.pairs < FEW_PAIRS:
            return f"Only {count}: says little."
        strength = next(words for bound, words in _STRENGTHS if self.spearman >= bound)
        if self.spearman_interval is not None and self.spearman_interval[0] <= 0 <= self.spearman_interval[1]:
            return f"{count} rank {strength}; the interval includes 0, so this may be chance."
        if self.kendall is not None and abs(self.kendall) > 1 - 1e-9:
            return f"{count} rank {strength}, all of them; by chance that happens once in {math.factorial(self.pairs)}."
        return f"{count} rank {strength}."


_STRENGTHS = (
    (0.8, "much the same way"),
    (0.5, "roughly the same way, with swaps"),
    (0.2, "only weakly alike"),
    (-0.2, "as if unrelated"),
    (-math.inf, "in opposite ways"),
)


def rank_agreement(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> RankAgreement:
    """Rank agreement of two lists of scores, with bootstrap intervals.

    Args:
        first: Scores, shape (n,).
        second: Scores of the same configurations, shape (n,). Pairs with NaN or infinity are dropped and counted.
        seed: Of the bootstrap; the same seed gives the same intervals.
        resamples: Bootstrap samples. A sample in which one list is constant has no rank order and is left out.

    Raises:
        ValueError: The lists differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"the lists must have equal lengths, got {len(first)} and {len(second)}")
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    spearman, kendall = _statistics(x, y, np.ones((1, len(x))))
    intervals: list[tuple[float, float] | None] = [None, None]
    if len(x) >= FEW_PAIRS and math.isfinite(spearman[0]):
        weights = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
        intervals = [_interval(sample) for sample in _statistics(x, y, weights.astype(float))]
    return RankAgreement(
        pairs=len(x),
        dropped=int((~finite).sum()),
        spearman=_number(spearman[0]),
        kendall=_number(kendall[0]),
        spearman_interval=intervals[0],
        kendall_interval=intervals[1],
    )


def _statistics(x: Vector, y: Vector, weights: Vector) -> tuple[Vector, Vector]:
    """Spearman and Kendall of each weighted sample; NaN where undefined.

    Args:
        x: Shape (n,).
        y: Shape (n,).
        weights: How often each pair occurs in each sample, shape (samples, n).
    """
    sx, sy = np.sign(x[:, None] - x), np.sign(y[:, None] - y)  # n x n
    a, b = weights @ sx.T, weights @ sy.T  # samples x n: twice the centred mid-ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        spearman = (weights * a * b).sum(1) / np.sqrt((weights * a**2).sum(1) * (weights * b**2).sum(1))
        untied = [((weights @ s**2) * weights).sum(1) for s in (sx, sy)]
        kendall = ((weights @ (sx * sy)) * weights).sum(1) / np.sqrt(untied[0] * untied[1])
    return np.clip(spearman, -1, 1), np.clip(kendall, -1, 1)


def _interval(sample: Vector) -> tuple[float, float] | None:
    finite = sample[np.isfinite(sample)]
    if len(finite) == 0:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class MeanScore:
    """A configuration's score at one fidelity: the mean over its seeds, and the evaluation noise of that mean."""

    score: float
    standard_error: float
    trials: tuple[int, ...]


def scores_at(study: Study, trials: Sequence[Trial], model: str, prompts: int) -> dict[str, MeanScore]:
    """Scores of all configurations that were evaluated on a model after exactly this many training prompts.

    Keys identify the complete configuration, so that a baseline which leaves out a default meets its like. A trial
    that was stopped before has no score here: none is invented for it.
    """
    found: dict[str, list[tuple[int, Evaluation]]] = {}
    for trial in trials:
        if trial.model == model:
            key = configuration_key(study.complete(trial.configuration))
            found.setdefault(key, []).extend(
                (trial.number, evaluation) for evaluation in trial.evaluations if evaluation.prompts == prompts
            )
    return {
        key: MeanScore(
            fmean(evaluation.score for _, evaluation in items),
            math.sqrt(sum(evaluation.standard_error**2 for _, evaluation in items)) / len(items),
            tuple(number for number, _ in items),
        )
        for key, items in found.items()
        if items
    }


@dataclass(frozen=True)
class FidelityAgreement:
    """Rank agreement between two fidelities, with the pairs behind it.

    Attributes:
        first: Model and prompts of the cheaper fidelity.
        second: Model and prompts of the dearer one.
        pairs: Scores of each configuration measured at both, in order of the first.
    """

    first: tuple[str, int]
    second: tuple[str, int]
    pairs: tuple[tuple[MeanScore, MeanScore], ...]
    agreement: RankAgreement


def fidelity_agreement(
    study: Study, trials: Sequence[Trial], first: tuple[str, int], second: tuple[str, int], seed: int = 0
) -> FidelityAgreement:
    """Agreement between two (model, prompts) fidelities over the configurations that were measured at both."""
    cheap, dear = scores_at(study, trials, *first), scores_at(study, trials, *second)
    pairs = _join(cheap, dear)
    agreement = rank_agreement([a.score for a, _ in pairs], [b.score for _, b in pairs], seed)
    return FidelityAgreement(first, second, tuple(pairs), agreement)


def _join(first: Mapping[str, MeanScore], second: Mapping[str, MeanScore]) -> list[tuple[MeanScore, MeanScore]]:
    return [(value, second[key]) for key, value in first.items() if key in second]


def size_agreements(study: Study, trials: Sequence[Trial], proxy: str, seed: int = 0) -> list[FidelityAgreement]:
    """A proxy against the target at each rung, both at the same share of the horizon."""
    target = study.ladder.target.name
    return [
        fidelity_agreement(study, trials, (proxy, level), (target, level), seed) for level in study.spec.fidelity.levels
    ]


def length_agreements(study: Study, trials: Sequence[Trial], model: str, seed: int = 0) -> list[FidelityAgreement]:
    """Each rung below the horizon against the full horizon, on one model.

    Only trials that were continued to the end can be compared. A search continues the promising ones, which are hard
    to tell apart, so this understates how well an early look sorts good from bad.
    """
    *early, horizon = study.spec.fidelity.levels
    return [fidelity_agreement(study, trials, (model, level), (model, horizon), seed) for level in early]


def most_telling(agreements: Sequence[FidelityAgreement]) -> FidelityAgreement | None:
    """The longest fidelity with enough pairs; with too few everywhere, the one with most pairs; None without any."""
    enough = [item for item in agreements if item.agreement.pairs >= FEW_PAIRS]
    if enough:
        return enough[-1]
    some = [item for item in agreements if item.agreement.pairs]
    return max(reversed(some), key=lambda item: item.agreement.pairs) if some else None
