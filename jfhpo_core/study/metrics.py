"""What a run is measured by besides its score, and limits on it.

Every metric is a mean over the training steps since the rung before, and belongs to the evaluation at the rung's end.
What a configuration comes to is its value over the last rung of full-length runs on the target.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jfhpo_core.study.trial import StepRecord

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Metric:
    """A quantity of training that may be limited or be a second objective.

    Attributes:
        description: With its unit.
        value: Of one step; None if the trainer did not measure it. Positive, or a share.
        share: Whether it lies in [0, 1].
        has_floor: Whether 'at least' makes sense as a limit.
    """

    description: str
    value: Callable[[StepRecord], float | None]
    share: bool = False
    has_floor: bool = False


METRICS: Mapping[str, Metric] = {
    "kl": Metric("KL divergence to the reference model, nats per token", lambda record: record.kl),
    "entropy": Metric("entropy of the sampling policy, nats per token", lambda record: record.entropy, has_floor=True),
    "completion_tokens": Metric(
        "length of the training completions, tokens", lambda record: record.completion_tokens, has_floor=True
    ),
    "truncated_share": Metric(
        "share of completions cut off at the length limit", lambda record: record.truncated_share, share=True
    ),
    "device_seconds": Metric(
        "device-seconds of a full run at this pace, start-up and evaluation apart",
        lambda record: record.generation_seconds + record.training_seconds,
    ),
}

LIMIT = re.compile(r"\s*(<=|>=)\s*(-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*")


@dataclass(frozen=True)
class Limit:
    """A constraint on a metric.

    Attributes:
        metric: Its name.
        at_most: Whether the bound is an upper one.
        bound: In the metric's unit.
    """

    metric: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, metric: str, text: str) -> Limit:
        """A limit as study files have it, such as '<= 0.2'.

        Raises:
            ValueError: The metric is not known, or the text is no limit that can be met and can be missed.
        """
        known = METRICS.get(metric)
        if known is None:
            listed = "; ".join(f"{name} ({item.description})" for name, item in METRICS.items())
            raise ValueError(f"there is no metric {metric!r}; name one of: {listed}")
        found = LIMIT.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no limit; write '<= NUMBER'{known.has_floor * ' or >= NUMBER'}, in quotes")
        limit = cls(metric, found[1] == "<=", float(found[2]))
        if not limit.at_most and not known.has_floor:
            raise ValueError(f"less of {metric} is always welcome, so '{text}' asks for the wrong side; write '<= ...'")
        if limit.bound <= 0:
            raise ValueError(
                f"{text!r} can hardly be met, as means of {metric} are above 0; give a bound above 0"
                if limit.at_most
                else f"{text!r} is always met; give a bound above 0, or leave the limit out"
            )
        if known.share and limit.bound >= 1:
            raise ValueError(f"{text!r} is always met by a share; give a bound below 1, or leave the limit out")
        return limit

    def holds(self, value: float) -> bool:
        """Whether a value respects it."""
        return value <= self.bound if self.at_most else value >= self.bound

    def excess(self, value: float) -> float:
        """How far a value is beyond the bound, as the logarithm of their ratio; negative within."""
        ratio = math.log(max(value, 1e-12) / self.bound)
        return ratio if self.at_most else -ratio

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.bound:g}"


def training_means(records: Sequence[StepRecord], devices: int, total_steps: int) -> dict[str, float]:
    """Means of all metrics over some steps; those that a step lacks or that are not finite are left out.

    Args:
        records: Of the steps.
        devices: That the run holds.
        total_steps: At full length.
    """
    means = {}
    for name, metric in METRICS.items():
        values = [value for record in records if (value := metric.value(record)) is not None]
        if values and len(values) == len(records) and all(map(math.isfinite, values)):
            means[name] = sum(values) / len(values)
    if "device_seconds" in means:
        means["device_seconds"] *= devices * total_steps
    return means


def mean_of(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over runs, of the metrics that all of them have."""
    names = [name for name in METRICS if measured and all(name in run for run in measured)]
    return {name: sum(run[name] for run in measured) / len(measured) for name in names}


def broken(limits: Sequence[Limit], measured: Mapping[str, float]) -> tuple[Limit, ...]:
    """Limits that measured values do not respect; what was not measured is not taken to respect any."""
    return tuple(limit for limit in limits if limit.metric not in measured or not limit.holds(measured[limit.metric]))
