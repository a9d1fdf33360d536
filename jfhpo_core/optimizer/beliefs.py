"""What the trials so far say about the target: values with uncertainty, feasibility, and the scale they are on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from jfhpo_core.optimizer.constraints import LimitModel
from jfhpo_core.optimizer.feasibility import Feasibility
from jfhpo_core.optimizer.observations import (
    believed_earlier,
    measurement_variance,
    milestone,
    observe,
    observed_rows,
    point,
    scale_of,
    verdicts,
)
from jfhpo_core.optimizer.score_scale import TARGET, ScoreScale
from jfhpo_core.optimizer.surrogate import (
    DRAWS,
    FIDELITY_COLUMNS,
    JointStructure,
    JointSurrogate,
    fitted_surrogate,
)
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import Limit
from jfhpo_core.study.trial import Configuration

NUMERICAL_ERRORS = (NanError, NotPSDError, LinAlgError)
"""What linear algebra raises when a covariance cannot be factored."""


@dataclass(frozen=True)
class Beliefs:
    """The surrogate, the feasibility, and what follows for the target.

    Attributes:
        history: What they were formed from.
        surrogate: Of values on the scale.
        scale: Between scores and values.
        feasibility: None as long as nothing has failed.
        limits: Of the study's constraints, those that something is known about.
    """

    history: History
    surrogate: JointSurrogate
    scale: ScoreScale
    feasibility: Feasibility | None
    limits: tuple[LimitModel, ...] = ()

    @classmethod
    def form(cls, history: History, draws: int = DRAWS, further: Sequence[Limit] = ()) -> Beliefs | None:
        """From the trials alone; None if nothing has been evaluated, here or in an earlier study.

        Args:
            history: The trials.
            draws: Members of the surrogate's ensemble.
            further: Limits beside the study's constraints.
        """
        rows = observed_rows(history)
        if not rows:
            return None
        commits = max((result.committed for trial in history.trials for result in trial.segments), default=0)
        basis = [row for row in rows if row.order[0] <= milestone(commits)] or rows
        study, scale = history.study, scale_of(rows)
        earlier = len(believed_earlier(history))
        structure = JointStructure(study.space.dimension, study.space.shifting_coordinates, earlier)
        surrogate = fitted_surrogate(
            observe(rows, scale, study.space.dimension),
            observe(basis, scale_of(basis), study.space.dimension),
            structure,
            draws,
        )
        inputs, feasible = verdicts(history)
        ruined = bool((feasible == 0).any())
        wanted = (*study.spec.limits, *further)
        limits = [model for limit in wanted if (model := LimitModel.fit(history, limit)) is not None]
        return cls(history, surrogate, scale, Feasibility.fit(inputs, feasible) if ruined else None, tuple(limits))

    def probability(self, inputs: Tensor) -> Tensor:
        """P(feasible) at inputs (m, d + 4), shape (m,)."""
        if self.feasibility is None:
            return torch.ones(len(inputs), dtype=inputs.dtype)
        return self.feasibility.probability(inputs[:, : -FIDELITY_COLUMNS + 1])

    def respected(self, inputs: Tensor) -> Tensor:
        """P(all constraints are respected) at (target, full horizon), whatever the inputs' fidelity; shape (m,)."""
        probability = torch.ones(len(inputs), dtype=inputs.dtype)
        for model in self.limits:
            probability = probability * model.probability(inputs)
        return probability

    def accepted(self, inputs: Tensor) -> Tensor:
        """P(can be trained, and respects all constraints on the target) at inputs (m, d + 4), shape (m,)."""
        feasible = self.probability(inputs)
        return feasible * self.respected(inputs) if self.limits else feasible

    def at_target(self, configurations: Iterable[Configuration]) -> Tensor:
        """Inputs of configurations at (target, full horizon), shape (m, d + 4)."""
        study = self.history.study
        name, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        rows = [point(study, configuration, name, horizon) for configuration in configurations]
        return torch.tensor(rows, dtype=torch.double).reshape(-1, study.space.dimension + FIDELITY_COLUMNS)

    @cached_property
    def failed_value(self) -> float:
        """What a run that fails counts as: the lowest value seen."""
        return float(self.surrogate.observations.values.min())

    @cached_property
    def inflation(self) -> float:
        """Factor on posterior deviations at the target; see `calibration.inflation`."""
        return self.surrogate.moments().inflation()

    @cached_property
    def measurement_variance(self) -> float:
        """Variance of an evaluation near the best, in values."""
        return measurement_variance(self.history.study, self.history.trials) / self.scale.unit() ** 2

    def values(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and calibrated deviation of the value at the target, if feasible; each of shape (m,)."""
        means, deviations = self.surrogate.mean_and_deviation(inputs)
        return means, deviations * self.inflation

    def expected(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Expected value, failures included, and the value's deviation if feasible; each of shape (m,)."""
        means, deviations = self.values(inputs)
        return self.failed_value + self.probability(inputs) * (means - self.failed_value), deviations

    @cached_property
    def useless_value(self) -> float:
        """What a run counts as that fails or, with constraints, breaks one: then that of the untrained target.

        The lowest value seen may be that of a collapse far below: whatever is safe would seem good beside it.
        """
        base = self.history.bases.get(self.history.study.ladder.target.name)
        if not self.limits or base is None or not math.isfinite(base):
            return self.failed_value
        return self.scale.value(TARGET, base)[0]

    def worth(self, inputs: Tensor) -> Tensor:
        """Expected value, failures and broken constraints included, shape (m,): by it is chosen."""
        means, _ = self.expected(inputs)
        if not self.limits:
            return means
        useful = self.useless_value + self.respected(inputs) * (means - self.useless_value)
        return torch.minimum(means, useful)

    def score(self, mean: float, deviation: float) -> tuple[float, float]:
        """Median and deviation of the score at the target whose value is normal with this mean and deviation."""
        return self.scale.median_and_deviation(TARGET, mean, deviation)
