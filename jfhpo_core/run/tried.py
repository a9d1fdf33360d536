"""What the search has to choose from: configurations with full runs on the target, and their front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import Limit, broken
from jfhpo_core.study.trial import Configuration, configuration_key


@dataclass(frozen=True)
class Tried:
    """A configuration that the search may recommend, by its full runs on the target.

    Attributes:
        trial: Number of its first run.
        score: Mean held-out score of its runs.
        standard_error: Of the score, by evaluation noise.
        measured: What the runs come to, by metric; see `jfhpo_core.study.metrics`.
        broken: Constraints that it does not respect; those whose metric no run has recorded among them.
        on_front: Whether no other one that respects all constraints is as good in score and second objective and
            better in one of them; False without a second objective.
    """

    configuration: Configuration
    trial: int
    score: float
    standard_error: float
    measured: dict[str, float]
    broken: tuple[Limit, ...]
    on_front: bool = False

    @property
    def excess(self) -> float:
        """How far it is beyond the constraints, in all: 0 within, infinite where a metric was not recorded."""
        return sum(
            max(0.0, limit.excess(self.measured[limit.metric])) if limit.metric in self.measured else math.inf
            for limit in self.broken
        )


def tried(history: History) -> tuple[Tried, ...]:
    """All of them, best score first."""
    spec, found = history.study.spec, []
    for trial in {configuration_key(trial.configuration): trial for trial in reversed(history.finished)}.values():
        finals = history.final(trial.configuration)
        measured = history.measured(trial.configuration)
        error = math.sqrt(sum(final.standard_error**2 for final in finals)) / len(finals)
        score = fmean(final.score for final in finals)
        found.append(Tried(trial.configuration, trial.number, score, error, measured, broken(spec.limits, measured)))
    found.sort(key=lambda item: (-item.score, item.trial))
    second = spec.second_objective
    if second is None:
        return tuple(found)
    sign = -1.0 if second.direction == "minimize" else 1.0
    aims = [
        (item.score, sign * item.measured[second.metric])
        if second.metric in item.measured and not item.broken
        else None
        for item in found
    ]
    return tuple(
        item if aim is None else replace(item, on_front=not _dominated(aim, aims))
        for item, aim in zip(found, aims, strict=True)
    )


def _dominated(aim: tuple[float, float], others: Sequence[tuple[float, float] | None]) -> bool:
    """Whether one of the others is at least as good in both, and better in one; more is better."""
    return any(other is not None and other != aim and other[0] >= aim[0] and other[1] >= aim[1] for other in others)
