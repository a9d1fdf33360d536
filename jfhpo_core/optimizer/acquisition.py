r"""Cost-aware knowledge gradient over explicit candidates, in closed discretized form.

The value of a run is how much it is expected to raise the best posterior mean at the target (target size, full
horizon). With A the configurations considered for the target, an observation at candidate c with noise variance
v(c) moves the mean of every a in A along one direction,

    mu_new(a) = mu(a) + s(a, c) Z,   s(a, c) = cov(a, c) / sqrt(var(c) + v(c)),   Z ~ N(0, 1),

    KG(c) = E[ max_a p(a) mu_new(a) ] - max_a p(a) mu(a),

where p(a) is the probability that a can be trained at all: a run that fails leaves the untrained model, whose
gain is zero. The expectation over the scalar Z is a one-dimensional integral, taken at equally likely nodes. No inner
optimization, no gradient, no sampling noise; a thousand candidates cost a fraction of a second. For an ensemble the
values of its members are averaged.

References:
    Frazier, Powell, Dayanik (2009), The knowledge-gradient policy for correlated normal beliefs.
    Poloczek, Wang, Frazier (2017), Multi-information source optimization (cost-aware form).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.cost_aware import CostAwareUtility
from botorch.models.model import Model
from torch import Tensor

from jfhpo_core.optimizer.surrogate import JointSurrogate, Moments

NODES = 16


def normal_nodes(count: int = NODES) -> Tensor:
    """Equally likely nodes of the standard normal, each the mean of its stratum, scaled to unit variance; (count,)."""
    density = _density(torch.special.ndtri(torch.linspace(0, 1, count + 1, dtype=torch.double)))
    means = (density[:-1] - density[1:]) * count
    return means / means.square().mean().sqrt()


def knowledge_gradient(means: Tensor, slopes: Tensor, nodes: Tensor | None = None) -> Tensor:
    """Expected rise of the best mean.

    Args:
        means: Posterior means of the target points, shape (..., a).
        slopes: s(a, c) as above, shape (..., a, c).
        nodes: Equally likely nodes of Z, shape (q,).

    Returns:
        Non-negative, shape (..., c), in the units of the means.
    """
    nodes = normal_nodes() if nodes is None else nodes
    total = torch.zeros_like(slopes[..., 0, :])
    # One pass over the nodes keeps the memory at (a, c) instead of (a, c, q).
    for node in nodes.tolist():
        total += torch.add(means.unsqueeze(-1), slopes, alpha=node).amax(dim=-2)
    return (total / len(nodes) - means.amax(-1, keepdim=True)).clamp_min(0.0)


class TargetKnowledgeGradient(AcquisitionFunction):  # type: ignore[misc]
    """Knowledge gradient at the target as a BoTorch acquisition function.

    Args:
        model: A fitted surrogate.
        targets: Points at (target size, full horizon, any seed), shape (a, d + 4).
        measurement_variance: Variance of an evaluation's value.
        feasibility: p(a) of the targets, shape (a,); None: all 1.
        failed_value: What a run that fails counts as.
        pending: Inputs of running trainings, shape (p, d + 4).
        utility: A BoTorch utility that weighs the value against the cost, e.g. `NetCostUtility`.
    """

    def __init__(
        self,
        model: Model,
        targets: Tensor,
        measurement_variance: float,
        feasibility: Tensor | None = None,
        failed_value: float = 0.0,
        pending: Tensor | None = None,
        utility: CostAwareUtility | None = None,
    ) -> None:
        super().__init__(model)
        assert isinstance(model, JointSurrogate)
        self.surrogate = model
        self.variance = measurement_variance
        self.failed_value = failed_value
        self.moments: Moments = model.moments(pending, measurement_variance)
        self.targets = self.moments.at(targets)
        self.feasibility = torch.ones(len(targets), dtype=targets.dtype) if feasibility is None else feasibility
        self.utility = utility

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803  BoTorch's name
        """Worth of observing each of the points, on the scale of values, or what the utility makes of it.

        Args:
            X: Shape (b, 1, d + 4).

        Returns:
            Shape (b,).
        """
        with torch.no_grad():
            points = self.moments.at(X.squeeze(-2))
            spread = (points.variance + self.variance).sqrt()
            slopes = self.moments.covariance(self.targets, points) / spread.unsqueeze(-2)
            weights = self.feasibility
            gains = knowledge_gradient(
                weights * (self.targets.mean - self.failed_value), weights.unsqueeze(-1) * slopes
            )
            value = gains.mean(0)
        return value if self.utility is None else self.utility(X, value)


class NetCostUtility(CostAwareUtility):  # type: ignore[misc]
    """Value per device-second, where the price is what a run would add to checkpoints already paid for.

    Args:
        seconds: Price of each point of an (b, 1, d + 4) input, shape (b,), positive.
    """

    def __init__(self, seconds: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, X: Tensor, deltas: Tensor, **kwargs: object) -> Tensor:  # noqa: N803  BoTorch's name
        """Deltas per second, shape (..., b)."""
        return deltas / self.seconds(X)


def expected_improvement(means: Tensor, deviations: Tensor, incumbent: float) -> Tensor:
    """E[max(f - incumbent, 0)] for independent normals, same shape as the means."""
    scaled = (means - incumbent) / deviations
    improvement: Tensor = deviations * (scaled * torch.special.ndtr(scaled) + _density(scaled))
    return improvement


def _density(values: Tensor) -> Tensor:
    """Density of the standard normal; 0 at infinity."""
    return torch.exp(-values.square() / 2) / math.sqrt(2 * math.pi)
