r"""One Gaussian process over hyperparameters, model size and training progress.

A point is (x, z, t): hyperparameters x in the unit cube, z = log10(parameters / target's parameters) <= 0, and the
share t of the full horizon. What is modelled is the gain over the untrained model of that size, which is measured,
so every curve starts at zero:

    gain(x, z, t) = g(t) [ c + shared(x + beta z) + residual(x, z) + size(z) ],    k_t(t, t') over all of it

* `g` saturates: g(t) = (1 - exp(-t / tau)) / (1 - exp(-1 / tau)), so g(0) = 0 and g(1) = 1.
* `shared` is a Matern-5/2 process common to all sizes. `beta` moves the best learning rate (and what else is marked
  `shifts_with_size`) linearly in log parameters: the scaling that recipes for different sizes show.
* `residual` and `size` are Wiener processes in -z: nothing at the target, and the further away a model is the more it
  may differ. They make a proxy worth exactly as much as its agreement with larger models has shown.
* `k_t` is a Matern-5/2 correlation over t, for curves that depart from the saturating shape.

Every evaluation enters with its own measured standard error; the variance between training seeds is learned on top.
All parameters have normal priors on their logarithm (beta and c: normal), and are set to the posterior mode.

References:
    The size structure follows the need stated in the JF-HPO paper (proxy-optimal learning rates shift); the kernel
    algebra is standard (Rasmussen and Williams, 2006, chapter 4; Kennedy and O'Hagan, 2000, for discrepancy terms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from scipy.optimize import minimize
from torch import Tensor

JITTER = 1e-6
"""Added to the diagonal of standardized covariances, for a stable Cholesky factor."""

FIT_ITERATIONS = 80

UNUSABLE = 1e10
"""Objective of parameters whose covariance has no Cholesky factor."""

SQRT5 = math.sqrt(5.0)

SMALLEST_SPREAD = 1e-6
"""Gains that differ from zero by less than this are not standardized."""


@dataclass(frozen=True)
class Prior:
    """Normal prior of a parameter (for scales, of its logarithm); its mean is where the fit begins."""

    mean: float
    deviation: float


SHARED_VARIANCE = Prior(math.log(1.0), 1.0)
RESIDUAL_VARIANCE = Prior(math.log(0.15), 1.0)
SIZE_VARIANCE = Prior(math.log(0.05), 1.0)
LENGTHSCALE = Prior(math.log(0.8), 0.9)
RESIDUAL_STRETCH = Prior(math.log(1.5), 0.5)
TIME_CONSTANT = Prior(math.log(0.6), 0.6)
TIME_LENGTHSCALE = Prior(math.log(0.8), 0.6)
SEED_VARIANCE = Prior(math.log(0.01), 1.0)
SHIFT = Prior(0.0, 0.12)
"""In units of the unit cube per factor of ten in parameters."""

MEAN_GAIN = Prior(0.0, 1.0)


def matern52(distance: Tensor) -> Tensor:
    """Matern-5/2 correlation of a scaled distance."""
    scaled = SQRT5 * distance
    return (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances, shape (..., n, m), of rows (..., n, d) and (..., m, d); smooth at zero."""
    squared = (first.square().sum(-1).unsqueeze(-1) + second.square().sum(-1).unsqueeze(-2)) - 2 * (
        first @ second.transpose(-1, -2)
    )
    return squared.clamp_min(1e-12).sqrt()


class _Parameters(torch.nn.Module):
    """Named parameters with normal priors."""

    def __init__(self) -> None:
        super().__init__()
        self._priors: dict[str, Prior] = {}

    def add(self, name: str, prior: Prior, size: int = 1) -> None:
        value = torch.full((size,), prior.mean, dtype=torch.double)
        self.register_parameter(name, torch.nn.Parameter(value))
        self._priors[name] = prior

    def value(self, name: str) -> Tensor:
        """The parameter itself."""
        return self.get_parameter(name)

    def scale(self, name: str) -> Tensor:
        """The exponential of a parameter that is kept as a logarithm."""
        return self.get_parameter(name).exp()

    def bounds(self) -> list[tuple[float, float]]:
        """Search range of every entry: four prior deviations around the prior mean."""
        return [
            (prior.mean - 4 * prior.deviation, prior.mean + 4 * prior.deviation)
            for name, prior in self._priors.items()
            for _ in range(self.value(name).numel())
        ]

    def log_prior(self) -> Tensor:
        """Sum of the log densities, constants left out."""
        total = torch.zeros((), dtype=torch.double)
        for name, prior in self._priors.items():
            total = total - ((self.value(name) - prior.mean) / prior.deviation).square().sum() / 2
        return total


class JointFidelityKernel(Kernel):  # type: ignore[misc]
    """Covariance of the standardized gain; see the module's docstring.

    Args:
        dimension: Hyperparameter coordinates d; inputs have d + 2 columns (x, z, t).
        shifting: Coordinates whose best value moves with size.
    """

    has_lengthscale = False

    def __init__(self, dimension: int, shifting: Sequence[int]) -> None:
        super().__init__()
        self.dimension = dimension
        self.shifting = list(shifting)
        self.parameters_ = _Parameters()
        for name, prior in (
            ("shared", SHARED_VARIANCE),
            ("residual", RESIDUAL_VARIANCE),
            ("size", SIZE_VARIANCE),
            ("stretch", RESIDUAL_STRETCH),
            ("tau", TIME_CONSTANT),
            ("time", TIME_LENGTHSCALE),
            ("seed", SEED_VARIANCE),
        ):
            self.parameters_.add(name, prior)
        self.parameters_.add("lengthscales", LENGTHSCALE, dimension)
        if self.shifting:
            self.parameters_.add("shift", SHIFT, len(self.shifting))

    def saturation(self, progress: Tensor) -> Tensor:
        """g(t), same shape as t."""
        tau = self.parameters_.scale("tau")
        return torch.expm1(-progress / tau) / torch.expm1(-1 / tau)

    def seed_variance(self, inputs: Tensor) -> Tensor:
        """Variance between training seeds at inputs (..., n, d + 2), shape (..., n)."""
        return self.parameters_.scale("seed") * self.saturation(inputs[..., -1]).square()

    def _shifted(self, inputs: Tensor) -> Tensor:
        x = inputs[..., : self.dimension]
        if not self.shifting:
            return x
        move = torch.zeros(self.dimension, dtype=x.dtype).index_put(
            (torch.tensor(self.shifting),), self.parameters_.value("shift")
        )
        return x + move * inputs[..., self.dimension].unsqueeze(-1)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Covariance matrix (..., n, m), or its diagonal (..., n)."""
        if diag:
            return self.variance(x1)
        values, scale = self.parameters_, self.parameters_.scale("lengthscales")
        shared = values.scale("shared") * matern52(distances(self._shifted(x1) / scale, self._shifted(x2) / scale))
        first, second = x1[..., : self.dimension] / scale, x2[..., : self.dimension] / scale
        residual = values.scale("residual") * matern52(distances(first, second) / values.scale("stretch"))
        below = torch.minimum(-x1[..., self.dimension].unsqueeze(-1), -x2[..., self.dimension].unsqueeze(-2))
        t1, t2 = x1[..., -1], x2[..., -1]
        over_time = matern52((t1.unsqueeze(-1) - t2.unsqueeze(-2)).abs() / values.scale("time"))
        outer = self.saturation(t1).unsqueeze(-1) * self.saturation(t2).unsqueeze(-2)
        return outer * over_time * (shared + below.clamp_min(0) * (residual + values.scale("size")))

    def variance(self, inputs: Tensor) -> Tensor:
        """Prior variance, shape (..., n)."""
        values = self.parameters_
        below = -inputs[..., self.dimension]
        spread = values.scale("shared") + below.clamp_min(0) * (values.scale("residual") + values.scale("size"))
        return self.saturation(inputs[..., -1]).square() * spread


class SaturatingMean(Mean):  # type: ignore[misc]
    """Mean gain c g(t)."""

    def __init__(self, kernel: JointFidelityKernel) -> None:
        super().__init__()
        self.parameters_ = _Parameters()
        self.parameters_.add("gain", MEAN_GAIN)
        # Held in a tuple so that torch does not register the kernel as a part of the mean.
        self._kernel = (kernel,)

    def forward(self, x: Tensor) -> Tensor:
        """Mean at inputs (..., n, d + 2), shape (..., n)."""
        return self.parameters_.value("gain") * self._kernel[0].saturation(x[..., -1])


@dataclass(frozen=True)
class Observations:
    """What the surrogate learns from.

    Attributes:
        inputs: (x, z, t), shape (n, d + 2), double.
        gains: Score minus the untrained model's score, shape (n,).
        variances: Squared standard errors of the scores, shape (n,).
    """

    inputs: Tensor
    gains: Tensor
    variances: Tensor


class JointSurrogate(SingleTaskGP):  # type: ignore[misc]
    """A BoTorch model with the joint kernel, fitted to the posterior mode of its parameters.

    Its targets are gains divided by `scale`; `posterior` and the moments below are in those units too, so that
    BoTorch's own acquisition functions see a standardized model. `gain_moments` returns score units.

    Args:
        observations: At least one.
        shifting: Coordinates whose best value moves with size.
    """

    def __init__(self, observations: Observations, shifting: Sequence[int]) -> None:
        gains = observations.gains
        spread = float(gains.square().mean().sqrt()) if len(gains) else 0.0
        scale = spread if spread > SMALLEST_SPREAD else 1.0
        kernel = JointFidelityKernel(observations.inputs.shape[-1] - 2, shifting)
        super().__init__(
            train_X=observations.inputs,
            train_Y=(gains / scale).unsqueeze(-1),
            train_Yvar=(observations.variances / scale**2).unsqueeze(-1),
            covar_module=kernel,
            mean_module=SaturatingMean(kernel),
            outcome_transform=None,
        )
        self.scale = scale
        self.measured_variances = observations.variances / scale**2
        self.kernel = kernel

    def fit(self) -> JointSurrogate:
        """Set the parameters to their posterior mode (L-BFGS from the prior means) and return the model."""
        modules = (self.kernel.parameters_, self.mean_module.parameters_)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        bounds = [bound for module in modules for bound in module.bounds()]
        shapes = [parameter.numel() for parameter in parameters]

        def assign(vector: np.ndarray) -> None:
            with torch.no_grad():
                for parameter, part in zip(parameters, torch.split(torch.from_numpy(vector), shapes), strict=True):
                    parameter.copy_(part)

        def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
            assign(vector)
            posterior = self.log_posterior()
            if posterior is None:
                return UNUSABLE, np.zeros_like(vector)
            loss = -posterior / len(self.train_targets)
            gradients = torch.autograd.grad(loss, parameters)
            return loss.item(), np.concatenate([gradient.numpy().ravel() for gradient in gradients])

        start = np.concatenate([parameter.detach().numpy().ravel() for parameter in parameters])
        result = minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": FIT_ITERATIONS, "ftol": 1e-6},
        )
        assign(result.x if result.fun < UNUSABLE else start)
        # The learned seed variance joins the measured one as the model's fixed observation noise.
        with torch.no_grad():
            self.likelihood.noise_covar.noise = self.noise_variances()
        self.eval()
        return self

    def noise_variances(self) -> Tensor:
        """Observation noise of the training data: measured plus between seeds, shape (n,)."""
        inputs = self.train_inputs[0]
        return self.measured_variances + self.kernel.seed_variance(inputs)

    def log_posterior(self) -> Tensor | None:
        """Log marginal likelihood plus log prior of the current parameters (up to a constant).

        None if the covariance has no Cholesky factor.
        """
        inputs, targets = self.train_inputs[0], self.train_targets
        covariance = self.kernel.forward(inputs, inputs)
        noise = self.noise_variances() + JITTER
        factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag(noise))
        if failed.item():
            return None
        residual = (targets - self.mean_module(inputs)).unsqueeze(-1)
        white = torch.linalg.solve_triangular(factor, residual, upper=False)
        likelihood: Tensor = -white.square().sum() / 2 - factor.diagonal().log().sum()
        prior: Tensor = self.kernel.parameters_.log_prior() + self.mean_module.parameters_.log_prior()
        return likelihood + prior

    def moments(self, pending: Tensor | None = None, pending_variances: Tensor | None = None) -> Moments:
        """Posterior moments in standardized units.

        Trainings that are still running count as if they had returned what is expected of them, which leaves the mean
        as it is and takes away the variance that they will take away.

        Args:
            pending: Inputs of the running trainings, shape (p, d + 2).
            pending_variances: Their measurement variances, shape (p,).
        """
        with torch.no_grad():
            inputs, targets, noise = self.train_inputs[0], self.train_targets, self.noise_variances()
            moments = Moments(self.kernel, self.mean_module, inputs, targets, noise)
            if pending is None or pending_variances is None or len(pending) == 0:
                return moments
            believed = moments.mean(pending)
            extra = pending_variances + self.kernel.seed_variance(pending)
            return Moments(
                self.kernel,
                self.mean_module,
                torch.cat([inputs, pending]),
                torch.cat([targets, believed]),
                torch.cat([noise, extra]),
            )

    def gain_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the noise-free gain in score units, each of shape (n,)."""
        moments = self.moments()
        return moments.mean(inputs) * self.scale, moments.variance(inputs).sqrt() * self.scale


class Moments:
    """Posterior mean and covariances, by one Cholesky factor of the training covariance.

    Args:
        kernel: Covariance function.
        mean: Prior mean function.
        inputs: Training inputs, shape (n, d + 2).
        targets: Shape (n,).
        noise: Observation variances, shape (n,).
    """

    def __init__(self, kernel: JointFidelityKernel, mean: Mean, inputs: Tensor, targets: Tensor, noise: Tensor) -> None:
        self._kernel, self._inputs = kernel, inputs
        self._mean: Callable[[Tensor], Tensor] = mean
        with torch.no_grad():
            covariance = kernel.forward(inputs, inputs) + torch.diag(noise + JITTER)
            self._factor = torch.linalg.cholesky(covariance)
            residual = (targets - mean(inputs)).unsqueeze(-1)
            self._weights = torch.cholesky_solve(residual, self._factor)

    @torch.no_grad()
    def mean(self, inputs: Tensor) -> Tensor:
        """Posterior mean, shape (m,)."""
        cross = self._kernel.forward(inputs, self._inputs)
        return self._mean(inputs) + (cross @ self._weights).squeeze(-1)

    @torch.no_grad()
    def variance(self, inputs: Tensor) -> Tensor:
        """Posterior variance of the noise-free gain, shape (m,)."""
        white = self._whiten(inputs)
        return (self._kernel.variance(inputs) - white.square().sum(0)).clamp_min(1e-12)

    @torch.no_grad()
    def covariance(self, first: Tensor, second: Tensor) -> Tensor:
        """Posterior covariance between two sets of inputs, shape (m, k)."""
        return self._kernel.forward(first, second) - self._whiten(first).T @ self._whiten(second)

    def _whiten(self, inputs: Tensor) -> Tensor:
        cross = self._kernel.forward(self._inputs, inputs)
        white: Tensor = torch.linalg.solve_triangular(self._factor, cross, upper=False)
        return white
