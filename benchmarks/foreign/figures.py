"""Regrets of the foreign benchmark at a cost: what a strategy delivers when so much is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.analysis import Results
from benchmarks.foreign.settings import BUDGETS
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
        return f"{self.value:.4f} ± {self.standard_error:.4f}"


def runs(results: Results, strategy: str, setting: str, cost: float, seeds: Sequence[int]) -> list[Result]:
    """Runs that say what a strategy delivers at a cost: those with the smallest budget that covers it."""
    found = results.get(strategy, {})
    for budget in sorted({*BUDGETS, *(_budget(landscape) for landscape, _ in found)}):
        chosen = [found[key] for seed in seeds if (key := (f"{setting}@{budget}", seed)) in found]
        if budget >= cost and chosen:
            return chosen
    return []


def _budget(landscape: str) -> int:
    return int(landscape.partition("@")[2])


def regret_at(result: Result, cost: float) -> float:
    """True score that the incumbent lacks when so many full runs of the target are spent."""
    scores = [score for seconds, score in result.trace if seconds <= cost * result.training_seconds]
    return max(0.0, result.best_score - scores[-1])


def recipe_regret(result: Result) -> float:
    """True score that the recipe lacks."""
    return regret_at(result, 0.0)


def mean_regret(results: Results, strategy: str, setting: str, cost: float, seeds: Sequence[int]) -> Mean | None:
    """Mean regret at a cost; None without runs."""
    found = runs(results, strategy, setting, cost, seeds)
    return Mean.over([regret_at(result, cost) for result in found]) if found else None
