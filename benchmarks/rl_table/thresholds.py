"""Thresholds of stopping rules, chosen on one task's recorded trainings and judged on the other's.

A rule's thresholds are the ones of its grid that save the most compute on the first task without stopping more than
`MAX_FALSE_KILLS` of its good trainings. A set of rules is built the same way, by adding one variant after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product

import numpy as np
from numpy.typing import NDArray

from benchmarks.rl_table.rules import fates, step_seconds, stopping_step
from jfhpo_core.stopping.rules import (
    AbsoluteKl,
    BelowBase,
    EntropyCollapse,
    EntropyExplosion,
    GradientNorm,
    KlGrowth,
    NoProgress,
    RewardDrop,
    RewardHacking,
    StoppingRule,
    Truncation,
    ZeroReward,
    ZeroVariance,
)
from jfhpo_core.trainers.replay_table import Table

MAX_FALSE_KILLS = 0.01
"""Of the good trainings, the share that a choice may stop."""

LEAST_GAIN = 0.002
"""Share of the compute that a further variant has to save to be added to a set."""

GRIDS: dict[type[StoppingRule], dict[str, tuple[float, ...]]] = {
    ZeroReward: {"patience": (3, 5, 8)},
    RewardDrop: {"threshold": (0.2, 0.3, 0.5, 0.7), "patience": (2, 4), "warmup": (4, 8)},
    KlGrowth: {
        "threshold": (0.15, 0.3, 0.5),
        "patience": (3, 5),
        "floor": (0.3, 1.0),
        "reward_growth": (0.0, math.inf),
    },
    AbsoluteKl: {"threshold": (1.0, 2.0, 5.0, 10.0, 20.0)},
    ZeroVariance: {"threshold": (0.6, 0.8), "patience": (5, 10), "reward": (0.1, 0.2)},
    GradientNorm: {"threshold": (3.0, 5.0, 10.0), "patience": (1, 3)},
    EntropyCollapse: {"threshold": (0.2, 1 / 3, 0.5)},
    EntropyExplosion: {"threshold": (1.5, 2.0, 4.0)},
    Truncation: {"threshold": (0.2, 0.3, 0.5), "warmup": (6, 12)},
    BelowBase: {"threshold": (0.0, 1.0, 2.0, 3.0), "patience": (1, 2, 3)},
    RewardHacking: {"threshold": (0.02, 0.05, 0.1), "patience": (2, 3)},
    NoProgress: {"threshold": (0.0, 0.01, 0.02, 0.05, 0.1, 0.15), "warmup": (0.25, 0.375, 0.5, 0.75)},
}
"""Parameters of each rule that reads one training alone; those that are not named keep their defaults."""


def variants(rule: type[StoppingRule]) -> list[StoppingRule]:
    """The rule with each combination of its grid."""
    grid = GRIDS[rule]
    return [rule(**dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


@dataclass(frozen=True)
class Watched:
    """What variants of rules do to the trainings of a task, all sizes.

    Attributes:
        rules: The variants.
        stops: Step after which a variant stops a training, the full horizon if it does not, of shape (n, variants).
        left: CPU seconds of a training after a step, of shape (n, steps + 1).
        good: Whether a training ends in the top quarter of its size, of shape (n,).
    """

    rules: tuple[StoppingRule, ...]
    stops: NDArray[np.int64]
    left: NDArray[np.float64]
    good: NDArray[np.bool_]

    def saved(self, chosen: Sequence[int]) -> float:
        """Share of the compute that variants save together."""
        return float(self.left[np.arange(len(self.stops)), self._stops(chosen)].sum() / self.left[:, 0].sum())

    def false_kills(self, chosen: Sequence[int]) -> int:
        """How many good trainings variants stop together."""
        return int(np.count_nonzero(self._stops(chosen)[self.good] < self._horizon))

    def allows(self, chosen: Sequence[int]) -> bool:
        """Whether variants stop few enough good trainings together."""
        return self.false_kills(chosen) <= MAX_FALSE_KILLS * int(self.good.sum())

    @property
    def _horizon(self) -> int:
        return int(self.left.shape[1]) - 1

    def _stops(self, chosen: Sequence[int]) -> NDArray[np.int64]:
        stops: NDArray[np.int64] = self.stops[:, list(chosen)].min(axis=1, initial=self._horizon)
        return stops


def watch(rules: Iterable[StoppingRule], table: Table, sizes: Sequence[str]) -> Watched:
    """Let each variant watch each training of a task."""
    rules = tuple(rules)
    horizon = table.total_steps
    recordings = [recording for size in sizes for recording in table.of_size(size)]
    remaining = [np.cumsum([0.0, *reversed(step_seconds(recording, horizon))])[::-1] for recording in recordings]
    return Watched(
        rules=rules,
        stops=np.array(
            [[stopping_step([rule], recording, horizon) or horizon for rule in rules] for recording in recordings]
        ),
        left=np.array(remaining),
        good=np.array([fate.good for size in sizes for fate in fates([], table, size)]),
    )


def best_variant(watched: Watched, rule: type[StoppingRule]) -> int | None:
    """The variant of a rule that saves the most; None if each stops too many good trainings, or nothing at all."""
    safe = [i for i, one in enumerate(watched.rules) if isinstance(one, rule) and watched.allows([i])]
    best = max(safe, key=lambda i: watched.saved([i]), default=None)
    return None if best is None or watched.saved([best]) == 0 else best


def best_set(watched: Watched) -> list[int]:
    """Variants added one after another, each time the one that saves the most with those before it."""
    chosen: list[int] = []
    while True:
        grown = [[*chosen, i] for i in range(len(watched.rules)) if watched.allows([*chosen, i])]
        best = max(grown, key=watched.saved, default=chosen)
        if watched.saved(best) < watched.saved(chosen) + LEAST_GAIN:
            return chosen
        chosen = best


def described(rule: StoppingRule) -> str:
    """A variant by its name and the parameters of its grid."""
    settings = ", ".join(
        f"{item.name} {getattr(rule, item.name):.3g}" for item in fields(rule) if item.name in GRIDS[type(rule)]
    )
    return f"`{rule.name}` ({settings})"


def hindsight(table: Table, sizes: Sequence[str]) -> float:
    """Share of the compute that floors save which no good training of the same table falls below.

    A floor for each size and rung, the lowest score of a good training there: what comparing scores at the same step
    could save at most without a false kill, if the outcome were known.
    """
    saved = total = 0.0
    for size in sizes:
        recordings = table.of_size(size)
        good = [fate.good for fate in fates([], table, size)]
        rungs = [evaluation.step for evaluation in recordings[0].evaluations if 0 < evaluation.step < table.total_steps]
        scores = np.array([[recording.evaluation(rung).score for rung in rungs] for recording in recordings])
        below = scores < scores[good].min(axis=0)
        for recording, low in zip(recordings, below, strict=True):
            costs = step_seconds(recording, table.total_steps)
            total += sum(costs)
            saved += sum(costs[rungs[int(low.argmax())] :]) if low.any() else 0.0
    return saved / total
