"""Regrets of the foreign benchmark at a cost: what a strategy delivers when so much is spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.analysis import RESAMPLES, TIE, Interval, Results
from benchmarks.store import Result


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error (NaN for one seed)."""

    value: float
    standard_error: float
    seeds: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Mean:
        """Mean of the values of all seeds, at least one."""
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        return cls(float(np.mean(values)), error, len(values))

    def __str__(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.standard_error:.4f}" if self.seeds > 1 else "")


def runs(results: Results, strategy: str, setting: str, cost: float, seeds: Sequence[int]) -> list[Result]:
    """Runs that say what a strategy delivers at a cost: those with the smallest budget that covers it."""
    found = results.get(strategy, {})
    budgets = sorted({int(budget) for name, _, budget in (key[0].partition("@") for key in found) if name == setting})
    for budget in budgets:
        chosen = [found[key] for seed in seeds if (key := (f"{setting}@{budget}", seed)) in found]
        if budget >= cost and chosen:
            return chosen
    return []


def recipe_regret(result: Result) -> float:
    """True score that the recipe lacks."""
    return result.regret_at(0.0)


def regrets(results: Results, strategy: str, setting: str, cost: float, seeds: Sequence[int]) -> list[float]:
    """Regrets at a cost of the seeds that the strategy has done."""
    return [result.regret_at(cost) for result in runs(results, strategy, setting, cost, seeds)]


def mean_regret(results: Results, strategy: str, setting: str, cost: float, seeds: Sequence[int]) -> Mean | None:
    """Mean regret at a cost; None without runs."""
    found = regrets(results, strategy, setting, cost, seeds)
    return Mean.over(found) if found else None


def best_peer(
    results: Results, peers: Iterable[str], setting: str, cost: float, seeds: Sequence[int]
) -> tuple[str, Mean] | None:
    """The peer with the lowest mean regret at a cost, each over the seeds that it has done; None if none has any."""
    means = {name: mean for name in peers if (mean := mean_regret(results, name, setting, cost, seeds)) is not None}
    return min(means.items(), key=lambda item: item[1].value, default=None)


def ratio(own: Sequence[float], peer: Sequence[float]) -> Interval:
    """Mean regret of one strategy over that of another, with the central 95 % bootstrap interval over seeds."""
    random = np.random.default_rng(0)

    def resampled(values: Sequence[float]) -> NDArray[np.float64]:
        picks = random.integers(len(values), size=(RESAMPLES, len(values)))
        means: NDArray[np.float64] = np.array(values)[picks].mean(1)
        return means

    low, high = np.quantile(resampled(own) / np.maximum(resampled(peer), TIE), [0.025, 0.975])
    return Interval(float(np.mean(own) / max(float(np.mean(peer)), TIE)), float(low), float(high))
