"""Whether a run can still come to matter: the floors of the stopping rule `unpromising`.

The surrogate makes the score of a run at a step and its configuration's score at (target, full horizon) jointly
normal. An evaluation y at the step turns the belief about the target, mean m and variance V, into

    m + c (y - e) / (v + s)   and   V - c^2 / (v + s)

(e, v: mean and variance of the run's own score there; s: variance of an evaluation; c: their covariance). So the
probability of exceeding a given score falls below p just where y falls below a floor that is known before the run
begins: a worker compares numbers and needs no model.
"""

from __future__ import annotations

import math

from scipy.stats import norm
from torch import Tensor

from jfhpo_core.optimizer.surrogate import JointSurrogate


def value_floors(
    surrogate: JointSurrogate,
    target: Tensor,
    steps: Tensor,
    incumbent: float,
    probability: float,
    measurement_variance: float,
    inflation: float = 1.0,
) -> list[float | None]:
    """Values at some steps of a run below which its configuration is not expected to beat the incumbent.

    Args:
        surrogate: What is believed; its ensemble counts as one normal of the same mean and covariance.
        target: Input of the configuration at (target, full horizon), shape (1, d + 4).
        steps: Inputs of the run at the steps, shape (n, d + 4).
        incumbent: Value at the target that is to be beaten.
        probability: Of beating it, at the floor; in (0, 1).
        measurement_variance: Of an evaluation's value.
        inflation: Factor on the deviation at the target; see `calibration.inflation`.

    Returns:
        One for each step; None where an evaluation says nothing about the target.
    """
    moments = surrogate.moments()
    there, here = moments.at(target), moments.at(steps)
    mean, deviation = (float(value) for value in there.mixture())
    between = (there.mean - there.mean.mean(0)) * (here.mean - here.mean.mean(0))
    common = (moments.covariance(there, here).squeeze(-2) + between).mean(0)
    floors: list[float | None] = []
    for expected, own, covariance in zip(*here.mixture(), common, strict=True):
        seen = float(own) ** 2 + measurement_variance
        slope = float(covariance) / seen
        left = math.sqrt(max(0.0, (inflation * deviation) ** 2 - slope**2 * seen))
        missing = incumbent - mean + float(norm.ppf(probability)) * left
        floors.append(float(expected) + missing / slope if slope > 0 else None)
    return floors
