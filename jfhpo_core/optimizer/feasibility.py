r"""The probability that a configuration can be trained at all.

Runs that ran out of memory, became non-finite or were rejected have no score, and none is invented for them. They
are labels of a Gaussian process classifier over hyperparameters and log size:

    P(feasible | x, z) = Phi(h(x, z)),    h ~ GP(offset, bias + linear(x, z) + Matern-5/2(x, z))

The linear part is what makes a few labels go far: failure lies on one side of a boundary (a batch too large, a learning
rate too high), and the boundary moves with size. The posterior is Laplace's approximation.

References:
    Rasmussen and Williams (2006), sections 3.4 and 3.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from jfhpo_core.optimizer.surrogate import JITTER, distances, matern52

OFFSET = 1.3
"""Prior mean of h: nine runs in ten are expected to be feasible, before the prior variance is counted."""

BIAS_VARIANCE = 1.0
LINEAR_VARIANCE = 9.0
"""Prior variance of a slope: one standard deviation changes h by 1.5 from the middle of a range to its end."""

SIZE_VARIANCE = 4.0
LOCAL_VARIANCE = 1.0
LENGTHSCALE = 0.5
SIZE_LENGTHSCALE = 0.6
"""Correlation length over size, in factors of ten in parameters."""

NEWTON_STEPS = 50
CONVERGED = 1e-6
SMALLEST = 1e-9


@dataclass(frozen=True)
class Feasibility:
    """A fitted classifier.

    Attributes:
        inputs: (x, z) of judged trainings, shape (n, d + 1).
        gradient: Derivative of the log likelihood at the mode, shape (n,).
        root: Square root of the likelihood's curvature at the mode, shape (n,).
        factor: Cholesky factor of I + root K root, shape (n, n).
    """

    inputs: Tensor
    gradient: Tensor
    root: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, inputs: Tensor, feasible: Tensor) -> Feasibility:
        """Find the mode by Newton's method.

        Args:
            inputs: (x, z), shape (n, d + 1).
            feasible: 1 or 0, shape (n,).
        """
        covariance = _covariance(inputs, inputs)
        signs = 2 * feasible - 1
        identity = torch.eye(len(signs), dtype=inputs.dtype)
        latent, gradient, root, factor = torch.zeros_like(signs), signs, torch.ones_like(signs), identity
        for _ in range(NEWTON_STEPS):
            margin = signs * (latent + OFFSET)
            # The ratio density / distribution of the normal, stable for negative margins.
            ratio = torch.exp(-margin.square() / 2 - math.log(2 * math.pi) / 2 - torch.special.log_ndtr(margin))
            gradient = signs * ratio
            curvature = (ratio.square() + margin * ratio).clamp_min(SMALLEST)
            root = curvature.sqrt()
            factor = torch.linalg.cholesky(identity + root.unsqueeze(-1) * covariance * root)
            step = curvature * latent + gradient
            solved = torch.cholesky_solve((root * (covariance @ step)).unsqueeze(-1), factor).squeeze(-1)
            moved = covariance @ (step - root * solved)
            change = float((moved - latent).abs().max()) if len(moved) else 0.0
            latent = moved
            if change < CONVERGED:
                break
        return cls(inputs, gradient, root, factor)

    def probability(self, inputs: Tensor) -> Tensor:
        """P(feasible) at (x, z) of shape (m, d + 1), shape (m,)."""
        mean, white = self._posterior(inputs)
        variance = (_variance(inputs) - white.square().sum(0)).clamp_min(0)
        probability: Tensor = torch.special.ndtr(mean / (1 + variance).sqrt())
        return probability

    def drawn(self, anchors: Tensor, normal: Tensor) -> Callable[[Tensor], Tensor]:
        """P(feasible) as functions drawn from the posterior: jointly at anchors, between them the mean given these.

        Args:
            anchors: (x, z), shape (m, d + 1).
            normal: Standard normal numbers, a row for each function, shape (functions, m).

        Returns:
            From (x, z) of shape (functions, k, d + 1) to probabilities (functions, k).
        """
        mean, white = self._posterior(anchors)
        prior = _covariance(anchors, anchors) + JITTER * torch.eye(len(anchors), dtype=anchors.dtype)
        latent = mean - OFFSET + normal @ psd_safe_cholesky(prior - white.T @ white).T
        weights = torch.cholesky_solve(latent.T, psd_safe_cholesky(prior)).T

        def probability(inputs: Tensor) -> Tensor:
            cross = _covariance(inputs.flatten(0, 1), anchors).reshape(*inputs.shape[:2], -1)
            found: Tensor = torch.special.ndtr(OFFSET + (cross @ weights.unsqueeze(-1)).squeeze(-1))
            return found

        return probability

    def _posterior(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of h at (x, z), shape (m,), and the whitened covariance with what is known, shape (n, m)."""
        cross = _covariance(inputs, self.inputs)
        white = torch.linalg.solve_triangular(self.factor, self.root.unsqueeze(-1) * cross.T, upper=False)
        return OFFSET + cross @ self.gradient, white


def _covariance(first: Tensor, second: Tensor) -> Tensor:
    scale = torch.full((first.shape[-1],), LENGTHSCALE, dtype=first.dtype)
    scale[-1] = SIZE_LENGTHSCALE
    x1, x2 = first[:, :-1] - 0.5, second[:, :-1] - 0.5
    linear = LINEAR_VARIANCE * x1 @ x2.T + SIZE_VARIANCE * torch.outer(first[:, -1], second[:, -1])
    return BIAS_VARIANCE + linear + LOCAL_VARIANCE * matern52(distances(first / scale, second / scale))


def _variance(inputs: Tensor) -> Tensor:
    slope = LINEAR_VARIANCE * (inputs[:, :-1] - 0.5).square().sum(-1) + SIZE_VARIANCE * inputs[:, -1].square()
    return BIAS_VARIANCE + slope + LOCAL_VARIANCE
