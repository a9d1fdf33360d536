r"""The probability that a configuration respects a limit on a metric at full length on the target.

Each limited metric has a surrogate of the same form as the score's (`surrogate`), over hyperparameters, size and
progress, of the metric's logarithm (of a share: its logit). The metric w of a run at full length is normal, so

    P(w <= limit | x) = Phi((limit - mean(x)) / deviation(x)),

the deviation widened as the score's is. Limits are taken as independent of each other and of the score given x. The
probability weighs the gain over the untrained model: a configuration that breaks a limit is of no more use than that.

References:
    Gardner et al. (2014), Bayesian optimization with inequality constraints; Gelbart et al. (2014), Bayesian
    optimization with unknown constraints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor

from jfhpo_core.optimizer.observations import (
    CURVE_POINTS,
    TARGET_CURVE_POINTS,
    Row,
    milestone,
    observe,
    point,
    rank_of,
    thinned,
    trained_evaluations,
)
from jfhpo_core.optimizer.score_scale import Group
from jfhpo_core.optimizer.surrogate import (
    ANY_SEED,
    FIDELITY_COLUMNS,
    MEAN_VALUE,
    THIS_STUDY,
    JointStructure,
    JointSurrogate,
    fitted_surrogate,
)
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import METRICS, Limit

SMALLEST = 1e-3
"""Values below this part of the bound (shares: nearer to 0 or 1) count as this much: how far within says nothing."""

NOISE = 0.05
"""Standard error of a mean over a rung, on the scale; what runs differ by beyond it is the surrogate's to find."""

LEAST_SPREAD = 0.05
"""Standard deviation of the logarithm that the scale takes at least, so that constants stay constants."""

DRAWN_SHARE = 0.5
"""Share of suggestions that seek the front of a second objective; the others seek the best score."""


@dataclass(frozen=True)
class MetricScale:
    """Between values of a metric and the surrogate's, whose typical value is its prior mean.

    Attributes:
        limit: What it is for.
        middle: Mean of the transformed values.
        spread: Their standard deviation.
    """

    limit: Limit
    middle: float
    spread: float

    @classmethod
    def of(cls, limit: Limit, values: Sequence[float]) -> MetricScale:
        """The scale that values suggest; at least one is needed."""
        moved = [_transformed(limit, value) for value in values]
        return cls(limit, fmean(moved), max(pstdev(moved), LEAST_SPREAD))

    def value(self, group: Group, metric: float) -> tuple[float, float]:
        """A metric on the scale, and the slope by which standard errors are scaled: `NOISE` is on the scale already."""
        return (_transformed(self.limit, metric) - self.middle) / self.spread + MEAN_VALUE.mean, 1.0

    def metric(self, value: float) -> float:
        """The metric that a value on the scale stands for."""
        moved = (value - MEAN_VALUE.mean) * self.spread + self.middle
        return 1 / (1 + math.exp(-moved)) if METRICS[self.limit.metric].share else math.exp(moved)

    @property
    def bound(self) -> float:
        """The limit on the scale."""
        return self.value((THIS_STUDY, 0.0, 1.0), self.limit.bound)[0]


def _transformed(limit: Limit, value: float) -> float:
    if METRICS[limit.metric].share:
        value = min(max(value, SMALLEST), 1 - SMALLEST)
        return math.log(value / (1 - value))
    return math.log(max(value, SMALLEST * limit.bound))


@dataclass(frozen=True)
class LimitModel:
    """What the trials say about a limit.

    Attributes:
        scale: Has the limit.
        surrogate: Of the metric's values on the scale.
    """

    scale: MetricScale
    surrogate: JointSurrogate

    @classmethod
    def fit(cls, history: History, limit: Limit) -> LimitModel | None:
        """From the trials alone; None if none has recorded the metric."""
        rows = metric_rows(history, limit.metric)
        if not rows:
            return None
        commits = max(result.committed for trial in history.trials for result in trial.segments)
        basis = [row for row in rows if row.order[0] <= milestone(commits)] or rows
        scale, space = MetricScale.of(limit, [row.score for row in basis]), history.study.space
        surrogate = fitted_surrogate(
            observe(rows, scale, space.dimension),
            observe(basis, scale, space.dimension),
            JointStructure(space.dimension, space.shifting_coordinates),
        )
        return cls(scale, surrogate)

    def probability(self, inputs: Tensor) -> Tensor:
        """P(limit is respected) of configurations at (target, full horizon), shape (m,).

        Args:
            inputs: Shape (m, d + 4), of whatever fidelity.
        """
        at_target = inputs.clone()
        at_target[:, -FIDELITY_COLUMNS:] = torch.tensor([0.0, 1.0, ANY_SEED, THIS_STUDY], dtype=inputs.dtype)
        means, deviations = self.surrogate.mean_and_deviation(at_target)
        within = (self.scale.bound - means) / (deviations * self.surrogate.moments().inflation())
        probability: Tensor = torch.special.ndtr(within if self.scale.limit.at_most else -within)
        return probability


def drawn_limit(history: History, random: np.random.Generator) -> Limit | None:
    """A limit on the second objective, in half of the draws, between what the full runs on the target have shown.

    To maximize the score under a limit that is drawn anew each time finds the points of a Pareto front, concave parts
    of it as well (the epsilon-constraint method; Haimes, Lasdon and Wismer, 1971). None without a second objective, in
    the other half, and as long as two configurations that respect the constraints do not differ.
    """
    second = history.study.spec.second_objective
    if second is None or random.random() >= DRAWN_SHARE:
        return None
    finished = [trial.configuration for trial in history.finished if not history.breaks(trial.configuration)]
    values = [
        measured[second.metric]
        for configuration in finished
        if (measured := history.measured(configuration)).get(second.metric, 0.0) > 0
    ]
    if not values or min(values) == max(values):
        return None
    bound = math.exp(random.uniform(math.log(min(values)), math.log(max(values))))
    return Limit(second.metric, second.direction == "minimize", bound)


def metric_rows(history: History, metric: str) -> list[Row]:
    """What the search's runs have recorded of a metric, in the order in which it became known."""
    study, rows = history.study, []
    for trial in history.in_space:
        size = study.ladder.size_coordinate(trial.model)
        curve = [evaluation for evaluation in trained_evaluations(trial) if metric in evaluation.training]
        for evaluation in thinned(curve, TARGET_CURVE_POINTS if size == 0 else CURVE_POINTS):
            inputs = point(study, trial.configuration, trial.model, evaluation.prompts, trial.number)
            order = (rank_of(trial, evaluation), trial.number, evaluation.step)
            last = evaluation is curve[-1]
            rows.append(Row(tuple(inputs), evaluation.training[metric], NOISE**2, order, last))
    return sorted(rows, key=lambda row: row.order)
