"""What results say: regret against cost, cost to reach a quality, ranks, wins. Every figure is over common seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.landscapes import TRAININGS
from benchmarks.store import Key, Result

Array = NDArray[np.float64]
Results = Mapping[str, Mapping[Key, Result]]
"""Strategy to landscape and seed to result."""

GRID = np.linspace(0, TRAININGS, 401)
"""Costs at which curves are compared, in full runs of the target."""

RESAMPLES = 2000
"""Bootstrap samples over seeds."""

TIE = 1e-4
"""Regrets that differ by less are equal."""


@dataclass(frozen=True)
class Interval:
    """A figure with its central 95 % bootstrap interval over seeds."""

    value: float
    low: float
    high: float


def regret_curve(result: Result) -> Array:
    """Regret of the incumbent at the costs of `GRID`, shape (len(GRID),)."""
    costs = np.array([seconds for seconds, _ in result.trace]) / result.training_seconds
    regrets = np.array([max(0.0, result.best_score - score) for _, score in result.trace])
    return regrets[np.searchsorted(costs, GRID, side="right") - 1]


def recommended_regrets(known: Mapping[Key, Result], landscape: str) -> dict[int, float]:
    """What searches of one landscape recommended in the end, by seed."""
    return {seed: result.recommended_regret for (name, seed), result in known.items() if name == landscape}


def common_keys(results: Results, strategies: Sequence[str], landscapes: Sequence[str]) -> list[Key]:
    """Landscapes and seeds that all strategies have finished, sorted."""
    keys = set.intersection(*(set(results[name]) for name in strategies)) if strategies else set()
    return sorted(key for key in keys if key[0] in landscapes)


def scales(results: Results, strategy: str, keys: Sequence[Key]) -> Array:
    """What regrets are divided by, shape (len(keys),), so that no landscape outweighs the others in an average.

    The mean regret of the defaults on the landscape, which is the same for all strategies; 1 on a single landscape.
    """
    starts: dict[str, list[float]] = {}
    for key in keys:
        starts.setdefault(key[0], []).append(float(regret_curve(results[strategy][key])[0]))
    return np.array([float(np.mean(starts[key[0]])) if len(starts) > 1 else 1.0 for key in keys])


def curves(results: Results, strategy: str, keys: Sequence[Key]) -> Array:
    """Regret curves, shape (len(keys), len(GRID)), scaled if they are of several landscapes."""
    raw = np.array([regret_curve(results[strategy][key]) for key in keys])
    return raw / scales(results, strategy, keys)[:, None]


def final_regrets(results: Results, strategy: str, keys: Sequence[Key]) -> Array:
    """Regrets when the budget is spent, shape (len(keys),), scaled if they are of several landscapes."""
    raw = np.array([results[strategy][key].final_regret for key in keys])
    return raw / scales(results, strategy, keys)


def mean_curve(results: Results, strategy: str, keys: Sequence[Key]) -> tuple[Array, Array, Array]:
    """Mean regret curve and its interval's lower and upper end, each of shape (len(GRID),)."""
    every = curves(results, strategy, keys)
    low, high = np.quantile([every[pick].mean(0) for pick in _resamples(keys)], [0.025, 0.975], axis=0)
    return every.mean(0), low, high


def final_regret(results: Results, strategy: str, keys: Sequence[Key]) -> Interval:
    """Mean regret at the end."""
    return over_seeds(final_regrets(results, strategy, keys), keys)


def over_seeds(figures: Array, keys: Sequence[Key]) -> Interval:
    """Mean of a figure of each run, shape (len(keys),)."""
    return _interval(float(figures.mean()), [float(figures[pick].mean()) for pick in _resamples(keys)])


def best_peer(results: Results, own: str, peers: Sequence[str], keys: Sequence[Key]) -> str:
    """The strategy other than `own` with the lowest mean final regret."""
    others = [name for name in peers if name != own]
    return min(others, key=lambda name: float(final_regrets(results, name, keys).mean()))


def cost_to_reach(mean: Array, level: float) -> float:
    """First cost, in trainings, at which a mean regret curve is at or below a level; infinite if never."""
    reached = np.flatnonzero(mean <= level + TIE)
    return float(GRID[reached[0]]) if len(reached) else float("inf")


def cost_ratio(results: Results, own: str, peer: str, keys: Sequence[Key]) -> Interval:
    """Cost at which `own` reaches the peer's final mean regret, over the cost at which the peer itself does."""
    mine, other = curves(results, own, keys), curves(results, peer, keys)

    def ratio(pick: NDArray[np.int64]) -> float:
        mean = other[pick].mean(0)
        level = float(mean[-1])
        return cost_to_reach(mine[pick].mean(0), level) / max(cost_to_reach(mean, level), float(GRID[1]))

    return _interval(ratio(np.arange(len(keys))), [ratio(pick) for pick in _resamples(keys)])


def regret_ratio(results: Results, own: str, peer: str, keys: Sequence[Key]) -> Interval:
    """Mean final regret of `own` over that of the peer."""
    mine, other = (final_regrets(results, name, keys) for name in (own, peer))

    def ratio(pick: NDArray[np.int64]) -> float:
        return float(mine[pick].mean() / max(other[pick].mean(), TIE))

    return _interval(ratio(np.arange(len(keys))), [ratio(pick) for pick in _resamples(keys)])


def ranks(results: Results, strategies: Sequence[str], keys: Sequence[Key]) -> dict[str, float]:
    """Mean rank by final regret, 1 the best; ties share their ranks."""
    finals = np.array([final_regrets(results, name, keys) for name in strategies])
    below = (finals[None] < finals[:, None] - TIE).sum(1)
    equal = (np.abs(finals[None] - finals[:, None]) <= TIE).sum(1)
    return dict(zip(strategies, (1 + below + (equal - 1) / 2).mean(1).tolist(), strict=True))


def wins(results: Results, own: str, peer: str, keys: Sequence[Key]) -> tuple[int, int, int]:
    """How often `own` ends with a lower, an equal and a higher regret than the peer."""
    gaps = np.array([results[own][key].final_regret - results[peer][key].final_regret for key in keys])
    return int((gaps < -TIE).sum()), int((np.abs(gaps) <= TIE).sum()), int((gaps > TIE).sum())


def _resamples(keys: Sequence[Key]) -> list[NDArray[np.int64]]:
    """Bootstrap samples of positions in `keys`: seeds are drawn with replacement within each landscape."""
    random = np.random.default_rng(0)
    groups = [
        np.array([i for i, key in enumerate(keys) if key[0] == name]) for name in dict.fromkeys(k[0] for k in keys)
    ]
    return [np.concatenate([random.choice(group, len(group)) for group in groups]) for _ in range(RESAMPLES)]


def _interval(value: float, samples: Sequence[float]) -> Interval:
    low, high = np.quantile(np.array(samples), [0.025, 0.975], method="nearest")
    return Interval(value, float(low), float(high))
