"""Two models on the same held-out prompts: is one better, or was it the luck of sampled completions?

Scores of the same prompts go up and down together, so their differences are far less noisy than two scores told apart.
The test is a permutation test: were the models alike, each prompt's difference could as well have the other sign. For
prompts that are solved or not, with one completion each, this is McNemar's test, and the p-value is exact; else signs
are drawn at random, always the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from jfhpo_core.report.text import number, signed

PERMUTATIONS = 20_000
BATCH = 1_000
"""Sign patterns at a time, to bound the memory that thousands of prompts take."""
SEED = 20240213
SIGNIFICANT = 0.05
"""Two-sided p-value below which a difference is called clear."""
Z_95 = 1.959964


@dataclass(frozen=True)
class Paired:
    """A model against another one over the same prompts.

    Attributes:
        difference: Mean score of the first minus that of the second.
        low, high: Its 95 % interval over prompts (normal approximation).
        p_value: Two-sided, that they are alike.
        prompts: How many there are.
        better, worse: On how many of them the first scores higher, and lower.
    """

    difference: float
    low: float
    high: float
    p_value: float
    prompts: int
    better: int
    worse: int

    @property
    def is_clear(self) -> bool:
        """Whether the models differ, as far as held-out prompts can tell."""
        return self.p_value < SIGNIFICANT

    def __str__(self) -> str:
        """For people."""
        p = f"p = {self.p_value:.2g}" if self.p_value >= 1e-4 else "p < 0.0001"
        return (
            f"paired over {self.prompts} held-out prompts {signed(self.difference)} ({number(self.low)} to "
            f"{number(self.high)}, {p}), better on {self.better} and worse on {self.worse}"
        )


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Paired | None:
    """Compare mean rewards of the same prompts, in the same order.

    Args:
        first: Of one model, shape (n,).
        second: Of the other.

    Returns:
        None if there are fewer than two prompts, or not the same number of them.
    """
    if len(first) != len(second) or len(first) < 2:
        return None
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / len(differences) ** 0.5
    return Paired(
        difference=mean,
        low=mean - Z_95 * error,
        high=mean + Z_95 * error,
        p_value=_p_value(differences),
        prompts=len(differences),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )


def _p_value(differences: np.ndarray) -> float:
    told = differences[differences != 0]
    if not len(told):
        return 1.0
    sizes = np.abs(told)
    if np.allclose(sizes, sizes[0]):
        return float(binomtest(int((told > 0).sum()), len(told)).pvalue)
    generator, seen = np.random.default_rng(SEED), abs(told.sum())
    extreme = 0
    for _ in range(PERMUTATIONS // BATCH):
        signs = generator.integers(0, 2, (BATCH, len(told)), dtype=np.int8) * 2 - 1
        # Sums that are equal in exact arithmetic shall count as equal.
        extreme += int((np.abs(signs @ told) >= seen - 1e-9).sum())
    return (extreme + 1) / (PERMUTATIONS + 1)
