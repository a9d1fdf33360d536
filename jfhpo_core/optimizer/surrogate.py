r"""One Gaussian process over hyperparameters, model size and training progress.

A point is a row (x, z, t, trial, study): hyperparameters x in the unit cube, z = log10(parameters / target's
parameters) <= 0, the share t of the full horizon, the number of the run it belongs to, and the study (0 is this one).
What is modelled are scores on the scale of `score_scale`, which has no units:

    value(x, z, t) = c + offset(z, t) + a(t) [ arch(x + beta z) + shared(x + beta z) + residual(x, z) + seed(trial) ]

* `offset` is a level for each size and length: how high scores are there says nothing about a configuration.
* `a` lets configurations lie closer together early in a run: a(t) = exp(-growth (1 - t)). A Matern-5/2 correlation over
  t multiplies `shared` and `residual`, for curves that cross.
* `arch` expects less towards both ends of the range of what is marked `shifts_with_size`, as of the learning rate: with
  too small a rate nothing is learned, with too large a one runs collapse. Without it the ends, where a Gaussian process
  knows least, are tried again and again. How much less is fitted.
* `shared` is a Matern-5/2 process common to all sizes. `beta` moves the best learning rate (and what else is marked
  `shifts_with_size`) linearly in log parameters: the scaling that recipes for different sizes show.
* `residual` is a Wiener process in |z|: nothing at the target, and the further away a model is the more it may differ;
  of models above the target (`best_values` asks for them) those below say nothing here.
  It makes a proxy worth exactly as much as its agreement with larger models has shown. On the scale that is modelled,
  agreement among good configurations is what counts.
* `seed` is one deviation for each run. Points with trial = -1 stand for the expectation over seeds.
* Points of an earlier study are correlated with this one's by a learned factor of its own.

Every evaluation enters with its own measured standard error. All parameters have normal priors on their logarithm
(`beta`, `c`, `growth` and the logit of a relation: normal). The model is a small ensemble: the mode of the parameters'
posterior and draws from its Laplace approximation, so that what the data leave open (above all the shift `beta`) widens
the predictions.

References:
    The size structure follows the need stated in the JF-HPO paper (proxy-optimal learning rates shift); the kernel
    algebra is standard (Rasmussen and Williams, 2006, chapter 4; Kennedy and O'Hagan, 2000, for discrepancy terms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from botorch.models import SingleTaskGP
from botorch.posteriors.fully_bayesian import GaussianMixturePosterior
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from scipy.optimize import minimize
from scipy.stats import norm, qmc
from torch import Tensor

from jfhpo_core.optimizer.calibration import inflation

FIDELITY_COLUMNS = 4
"""Columns of an input after the hyperparameters: size, progress, trial, study."""

ANY_SEED = -1.0
"""Value of the trial column that stands for the expectation over training seeds."""

THIS_STUDY = 0.0

JITTER = 1e-6
"""Added to the diagonal of standardized covariances, for a stable Cholesky factor."""

DRAWS = 4
"""Members of the ensemble: the mode and DRAWS - 1 draws."""

TRIAL_ITERATIONS = 8
"""L-BFGS iterations spent on each start before the best one goes on."""

FIT_ITERATIONS = 50

NARROW = 1.5
"""Prior deviations by which the start for a narrow peak lies below the prior mean."""

UNUSABLE = 1e10
"""Objective of parameters whose covariance has no Cholesky factor."""

SQRT5 = math.sqrt(5.0)

BOUND = 4.0
"""Parameters stay within this many prior deviations of the prior mean."""


@dataclass(frozen=True)
class Prior:
    """Normal prior of a parameter (for scales, of its logarithm); its mean is where the fit begins."""

    mean: float
    deviation: float


SHARED_VARIANCE = Prior(math.log(1.0), 1.0)
RESIDUAL_VARIANCE = Prior(math.log(0.4), 1.0)
OFFSET_VARIANCE = Prior(math.log(0.3), 1.0)
OFFSET_LENGTHSCALES = (1.0, 1.0)
"""Correlation lengths of the level over size (factors of ten) and over progress."""

LENGTHSCALE = Prior(math.log(0.8), 0.9)
RESIDUAL_STRETCH = Prior(math.log(1.0), 0.5)
TIME_LENGTHSCALE = Prior(math.log(1.2), 0.6)
"""Of the recorded RL runs: rank correlations with the final score of 0.77 to 0.95 at 2/8 and 0.94 to 0.97 at 4/8."""

GROWTH = Prior(0.5, 0.7)
SEED_VARIANCE = Prior(math.log(0.02), 1.0)
SHIFT = Prior(0.0, 0.15)
"""In units of the unit cube per factor of ten in parameters."""

ARCH = Prior(math.log(1.0), 0.7)
"""How far a value falls from the middle of a range to its ends; see decision 31."""

MEAN_VALUE = Prior(-1.0, 1.0)
MEAN_SQUARE = 1 / 3
"""Of the distance from the middle to a point of the range, in halves of it: the arch is zero on average."""

RELATION = Prior(1.5, 1.5)
"""Logit of the correlation with an earlier study; its mean is a correlation of 0.82."""


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


class JointStructure:
    """The model's algebra: prior mean and covariance, given a vector of parameters.

    Every method takes parameters of shape (..., p) and broadcasts over their leading dimensions.

    Args:
        dimension: Hyperparameter coordinates d; inputs have d + 4 columns (x, z, t, trial, study).
        shifting: Coordinates whose best value moves with size.
        earlier: Earlier studies; each has a relation of its own.
    """

    def __init__(self, dimension: int, shifting: Sequence[int], earlier: int = 0) -> None:
        self.dimension = dimension
        self.shifting = list(shifting)
        self.earlier = earlier
        priors = {
            "shared": (SHARED_VARIANCE, 1),
            "residual": (RESIDUAL_VARIANCE, 1),
            "offset": (OFFSET_VARIANCE, 1),
            "stretch": (RESIDUAL_STRETCH, 1),
            "growth": (GROWTH, 1),
            "time": (TIME_LENGTHSCALE, 1),
            "seed": (SEED_VARIANCE, 1),
            "mean": (MEAN_VALUE, 1),
            "relation": (RELATION, earlier),
            "shift": (SHIFT, len(self.shifting)),
            "arch": (ARCH, len(self.shifting)),
            "lengthscales": (LENGTHSCALE, dimension),
        }
        self.slices: dict[str, slice] = {}
        start = 0
        for name, (_, size) in priors.items():
            self.slices[name] = slice(start, start + size)
            start += size
        self.prior_mean = torch.cat([torch.full((size,), prior.mean) for prior, size in priors.values()]).double()
        self.prior_deviation = torch.cat(
            [torch.full((size,), prior.deviation) for prior, size in priors.values()]
        ).double()

    def value(self, parameters: Tensor, name: str) -> Tensor:
        """A parameter, shape (..., size)."""
        return parameters[..., self.slices[name]]

    def _scale(self, parameters: Tensor, name: str) -> Tensor:
        """The exponential of a scalar parameter, shape (..., 1, 1), to multiply covariance matrices with."""
        return self.value(parameters, name).exp().unsqueeze(-1)

    def log_prior(self, parameters: Tensor) -> Tensor:
        """Log density up to a constant, shape (...)."""
        return -((parameters - self.prior_mean) / self.prior_deviation).square().sum(-1) / 2

    def amplitude(self, parameters: Tensor, progress: Tensor) -> Tensor:
        """a(t), same shape as t (..., n)."""
        return torch.exp(-self.value(parameters, "growth") * (1 - progress))

    def mean(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        """Prior mean c + a(t) arch(x + beta z) at inputs (..., n, d + 4), shape (..., n)."""
        x, progress = inputs[..., : self.dimension + 1], inputs[..., self.dimension + 1]
        height = self.value(parameters, "arch").exp().unsqueeze(-2)
        from_middle = 2 * self._shifted(parameters, x)[..., self.shifting] - 1
        arch = (height * (MEAN_SQUARE - from_middle.square())).sum(-1)
        mean: Tensor = self.value(parameters, "mean") + self.amplitude(parameters, progress) * arch
        return mean

    def _shifted(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        x = inputs[..., : self.dimension]
        if not self.shifting:
            return x
        move = torch.zeros(*parameters.shape[:-1], self.dimension, dtype=x.dtype)
        move[..., self.shifting] = self.value(parameters, "shift")
        return x + move.unsqueeze(-2) * inputs[..., self.dimension].unsqueeze(-1)

    def covariance(self, parameters: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Prior covariance of inputs (..., n, d + 4) and (..., m, d + 4), shape (..., n, m).

        Terms that are zero for all of the second inputs are not computed: most covariances asked for are those with
        (target, full horizon).
        """
        d = self.dimension
        scale = self.value(parameters, "lengthscales").exp().unsqueeze(-2)
        both = self._scale(parameters, "shared") * matern52(
            distances(self._shifted(parameters, first) / scale, self._shifted(parameters, second) / scale)
        )
        z1, z2 = first[..., d].unsqueeze(-1), _constant(second[..., d]).unsqueeze(-2)
        if bool((z2 != 0).any()):
            residual = self._scale(parameters, "residual") * matern52(
                distances(first[..., :d] / scale, second[..., :d] / scale) / self._scale(parameters, "stretch")
            )
            both = both + torch.where(z1 * z2 > 0, torch.minimum(z1.abs(), z2.abs()), 0.0) * residual
        t1, t2 = first[..., d + 1].unsqueeze(-1), _constant(second[..., d + 1]).unsqueeze(-2)
        both = matern52((t1 - t2).abs() / self._scale(parameters, "time")) * both
        study1, study2 = first[..., d + 3].unsqueeze(-1), _constant(second[..., d + 3]).unsqueeze(-2)
        same_study = study1 == study2
        if self.earlier:
            both = both * torch.where(
                same_study, 1.0, self._relation(parameters, study1) * self._relation(parameters, study2)
            )
        trial1, trial2 = first[..., d + 2].unsqueeze(-1), second[..., d + 2].unsqueeze(-2)
        if bool((trial2 != ANY_SEED).any()):
            same = (trial1 == trial2) & (trial1 != ANY_SEED) & same_study
            both = both + self._scale(parameters, "seed") * same
        outer = self.amplitude(parameters, t1.squeeze(-1)).unsqueeze(-1) * self.amplitude(
            parameters, t2.squeeze(-2)
        ).unsqueeze(-2)
        size_scale, time_scale = OFFSET_LENGTHSCALES
        level = matern52((z1 - z2).abs() / size_scale) * matern52((t1 - t2).abs() / time_scale) * same_study
        return outer * both + self._scale(parameters, "offset") * level

    def _relation(self, parameters: Tensor, study: Tensor) -> Tensor:
        """Correlation of each point's study with this one, same shape as `study` after broadcasting."""
        relations = torch.sigmoid(self.value(parameters, "relation"))
        every = torch.cat([torch.ones_like(relations[..., :1]), relations], dim=-1)
        return every[..., study.long()] if parameters.dim() == 1 else _take(every, study.long())

    def variance(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        """Prior variance, shape (..., n)."""
        d = self.dimension

        def scale(name: str) -> Tensor:
            return self.value(parameters, name).exp()

        away = inputs[..., d].abs()
        spread = scale("shared") + away * scale("residual") + scale("seed") * (inputs[..., d + 2] != ANY_SEED)
        return self.amplitude(parameters, inputs[..., d + 1]).square() * spread + scale("offset")


def _constant(values: Tensor) -> Tensor:
    """Values of shape (..., m), or (..., 1) if they are all equal: smaller intermediate matrices."""
    return values[..., :1] if bool((values == values[..., :1]).all()) else values


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table (members, k) at an index (..., n, m), with or without the members' dimension."""
    wide = index.expand(*table.shape[:-1], *index.shape[-2:])
    return table.gather(-1, wide.flatten(-2)).reshape(wide.shape)


class JointFidelityKernel(Kernel):  # type: ignore[misc]
    """The covariance of a `JointStructure` as a GPyTorch kernel.

    Args:
        structure: The algebra.
        parameters: Shape (p,), or (members, p) for an ensemble.
    """

    has_lengthscale = False

    def __init__(self, structure: JointStructure, parameters: Tensor) -> None:
        super().__init__(batch_shape=parameters.shape[:-1])
        self.structure = structure
        self.register_buffer("parameters_", parameters)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Covariance matrix (..., n, m), or its diagonal (..., n)."""
        if diag:
            return self.structure.variance(self.parameters_, x1)
        return self.structure.covariance(self.parameters_, x1, x2)


class ConstantMean(Mean):  # type: ignore[misc]
    """The prior mean of a `JointStructure` as a GPyTorch mean."""

    def __init__(self, structure: JointStructure, parameters: Tensor) -> None:
        super().__init__()
        self.structure = structure
        self.register_buffer("parameters_", parameters)

    def forward(self, x: Tensor) -> Tensor:
        """Mean at inputs (..., n, d + 4), shape (..., n)."""
        return self.structure.mean(self.parameters_, x)


@dataclass(frozen=True)
class Observations:
    """What the surrogate learns from, in the order in which it became known.

    Attributes:
        inputs: (x, z, t, trial, study), shape (n, d + 4), double.
        values: Scores on the scale of `score_scale.ScoreScale`, shape (n,).
        variances: Squared standard errors of the values, shape (n,).
    """

    inputs: Tensor
    values: Tensor
    variances: Tensor

    def __len__(self) -> int:
        return len(self.values)


def log_posterior(structure: JointStructure, parameters: Tensor, data: Observations) -> Tensor | None:
    """Log marginal likelihood of the values plus log prior, up to a constant; scalar.

    None if the covariance has no Cholesky factor.
    """
    covariance = structure.covariance(parameters, data.inputs, data.inputs)
    noise = data.variances + JITTER
    factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag(noise))
    if failed.item():
        return None
    residual = (data.values - structure.mean(parameters, data.inputs)).unsqueeze(-1)
    white = torch.linalg.solve_triangular(factor, residual, upper=False)
    likelihood: Tensor = -white.square().sum() / 2 - factor.diagonal().log().sum()
    return likelihood + structure.log_prior(parameters)


def fit_parameters(structure: JointStructure, data: Observations, draws: int = DRAWS) -> Tensor:
    """The mode of the parameters' posterior and draws from its Laplace approximation.

    Args:
        structure: The algebra.
        data: At least one observation.
        draws: Rows wanted, the mode included.

    Returns:
        Shape (m, p) with m <= draws (draws without a usable covariance are left out); the mode comes first.
    """

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(vector).requires_grad_()
        posterior = log_posterior(structure, parameters, data)
        if posterior is None:
            return UNUSABLE, np.zeros_like(vector)
        (gradient,) = torch.autograd.grad(-posterior, parameters)
        return -posterior.item(), gradient.numpy()

    def descend(start: np.ndarray, iterations: int) -> Any:
        options = {"maxiter": iterations, "ftol": 1e-6}
        return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)

    mean, deviation = structure.prior_mean.numpy(), structure.prior_deviation.numpy()
    bounds = list(zip(mean - BOUND * deviation, mean + BOUND * deviation, strict=True))
    starts = [mean]
    if structure.shifting:
        # A narrow peak beside the wide arch: the posterior has a mode for each.
        narrow = mean.copy()
        narrow[structure.slices["arch"]] -= NARROW * ARCH.deviation
        narrow[structure.slices["lengthscales"]][structure.shifting] -= NARROW * LENGTHSCALE.deviation
        starts.append(narrow)
    if structure.shifting and float(data.inputs[:, structure.dimension].std(correction=0)) > 0:
        # That of the shift may have several as well: one start on each side.
        for side in (-1.0, 1.0):
            start = mean.copy()
            start[structure.slices["shift"]] += side * SHIFT.deviation
            starts.append(start)
    start = min((descend(start, TRIAL_ITERATIONS) for start in starts), key=lambda result: result.fun).x
    result = descend(start, FIT_ITERATIONS)
    mode = torch.from_numpy(result.x if result.fun < UNUSABLE else mean)
    return torch.cat([mode.unsqueeze(0), _laplace_draws(structure, data, mode, draws - 1)])


def _laplace_draws(structure: JointStructure, data: Observations, mode: Tensor, count: int) -> Tensor:
    """Quasi-random draws from the normal approximation at the mode, shape (at most `count`, p)."""
    if count < 1 or log_posterior(structure, mode, data) is None:
        return mode.new_empty(0, len(mode))

    def loss(parameters: Tensor) -> Tensor:
        posterior = log_posterior(structure, parameters, data)
        assert posterior is not None
        return -posterior

    precision: Tensor = torch.autograd.functional.hessian(loss, mode)  # type: ignore[no-untyped-call]
    # Along no direction is the posterior taken to be wider than the prior.
    unit = torch.diag(structure.prior_deviation)
    values, vectors = torch.linalg.eigh(unit @ (precision + precision.T) @ unit / 2)
    nodes = norm.ppf(qmc.Sobol(len(mode), rng=np.random.default_rng(0)).random(2 ** math.ceil(math.log2(count + 1))))
    scaled = torch.from_numpy(np.clip(nodes[:count], -2, 2)) / values.clamp_min(1.0).sqrt()
    low, high = (structure.prior_mean + side * BOUND * structure.prior_deviation for side in (-1, 1))
    draws = (mode + scaled @ vectors.T @ unit).clamp(low, high)
    usable = [draw for draw in draws if log_posterior(structure, draw, data) is not None]
    return torch.stack(usable) if usable else mode.new_empty(0, len(mode))


class JointSurrogate(SingleTaskGP):  # type: ignore[misc]
    """A BoTorch model with the joint kernel; with several parameter vectors, an ensemble of them.

    Args:
        observations: At least one.
        structure: The algebra.
        parameters: From `fit_parameters`, shape (members, p).
    """

    def __init__(self, observations: Observations, structure: JointStructure, parameters: Tensor) -> None:
        members = len(parameters)
        shape = (members, 1, 1) if members > 1 else (1, 1)
        held = parameters if members > 1 else parameters[0]
        super().__init__(
            train_X=observations.inputs.repeat(shape),
            train_Y=observations.values.unsqueeze(-1).repeat(shape),
            train_Yvar=(observations.variances + JITTER).unsqueeze(-1).repeat(shape),
            covar_module=JointFidelityKernel(structure, held),
            mean_module=ConstantMean(structure, held),
            outcome_transform=None,
        )
        self._is_ensemble = members > 1
        self.observations, self.structure, self.parameter_draws = observations, structure, parameters
        self.eval()

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: N803  BoTorch's name
        """BoTorch's posterior at inputs (..., q, d + 4); of an ensemble, the mixture over its members."""
        if not self._is_ensemble:
            return super().posterior(X, *args, **kwargs)
        posterior = super().posterior(X.unsqueeze(-3), *args, **kwargs)
        return GaussianMixturePosterior(distribution=posterior.distribution)

    def moments(self, pending: Tensor | None = None, pending_variance: float = 0.0) -> Moments:
        """Posterior moments, per member.

        Runs that have not ended count as if they had returned what is expected of them, which leaves the mean as it is
        and takes away the variance that they will take away.

        Args:
            pending: Inputs of the running segments' ends, shape (p, d + 4).
            pending_variance: Measurement variance of their evaluations.
        """
        data, moments = self.observations, self._moments
        if pending is None or len(pending) == 0:
            return moments
        return Moments(
            self.structure,
            self.parameter_draws,
            torch.cat([data.inputs, pending]),
            torch.cat([self._targets, moments.at(pending).mean], dim=-1),
            torch.cat([data.variances, torch.full((len(pending),), pending_variance, dtype=data.variances.dtype)]),
        )

    @property
    def _targets(self) -> Tensor:
        """Values, for every member, shape (members, n)."""
        return self.observations.values.expand(len(self.parameter_draws), -1)

    @cached_property
    def _moments(self) -> Moments:
        """Without pending runs: asked for several times in a suggestion, factored once."""
        data = self.observations
        return Moments(self.structure, self.parameter_draws, data.inputs, self._targets, data.variances)

    def shared_share(self, size: float) -> float:
        """Share of a model's variance, in [0, 1], that it has in common with the target: how far it can be trusted.

        Args:
            size: z of the model, <= 0.
        """
        shared, residual = (self.structure.value(self.parameter_draws, name).exp() for name in ("shared", "residual"))
        return float((shared / (shared - size * residual)).mean())

    def mean_and_deviation(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the noise-free value, each of shape (n,)."""
        return self.moments().at(inputs).mixture()


@lru_cache(maxsize=16)
def _remembered_parameters(dimension: int, shifting: tuple[int, ...], earlier: int, data: bytes, draws: int) -> Tensor:
    """`fit_parameters` for observations given as bytes: saves repeated fits, changes nothing."""
    columns = dimension + FIDELITY_COLUMNS + 2
    table = torch.from_numpy(np.frombuffer(data).reshape(-1, columns).copy())
    observations = Observations(table[:, :-2].contiguous(), table[:, -2], table[:, -1])
    return fit_parameters(JointStructure(dimension, shifting, earlier), observations, draws)


def fitted_surrogate(
    observations: Observations, basis: Observations, structure: JointStructure, draws: int = DRAWS
) -> JointSurrogate:
    """A surrogate conditioned on observations, its parameters fitted to a part of them.

    Args:
        observations: What is known.
        basis: What the parameters are fitted to; the same basis costs one fit in a process.
        structure: The algebra.
        draws: Members of the ensemble.
    """
    table = torch.cat([basis.inputs, basis.values.unsqueeze(-1), basis.variances.unsqueeze(-1)], dim=-1)
    parameters = _remembered_parameters(
        structure.dimension, tuple(structure.shifting), structure.earlier, table.numpy().tobytes(), draws
    )
    return JointSurrogate(observations, structure, parameters)


@dataclass(frozen=True)
class Predicted:
    """Posterior at some inputs, for every member.

    Attributes:
        inputs: Shape (m, d + 4).
        mean: Shape (members, m).
        variance: Of the noise-free gain, shape (members, m).
        white: Cross-covariance with the data, whitened, shape (members, n, m).
    """

    inputs: Tensor
    mean: Tensor
    variance: Tensor
    white: Tensor

    def mixture(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the ensemble, each of shape (m,)."""
        mean = self.mean.mean(0)
        return mean, (self.variance.mean(0) + self.mean.var(0, correction=0)).sqrt()


class Moments:
    """Posterior means and covariances, by one Cholesky factor of the training covariance for each member.

    Args:
        structure: The algebra.
        parameters: Shape (members, p).
        inputs: Training inputs, shape (n, d + 4).
        targets: Standardized, shape (members, n).
        noise: Observation variances, shape (n,).
    """

    def __init__(
        self, structure: JointStructure, parameters: Tensor, inputs: Tensor, targets: Tensor, noise: Tensor
    ) -> None:
        self._inputs = inputs
        self._covariance: Callable[[Tensor, Tensor], Tensor] = lambda a, b: structure.covariance(parameters, a, b)
        self._variance: Callable[[Tensor], Tensor] = lambda a: structure.variance(parameters, a)
        self._mean: Callable[[Tensor], Tensor] = lambda a: structure.mean(parameters, a)
        with torch.no_grad():
            self._factor = torch.linalg.cholesky(self._covariance(inputs, inputs) + torch.diag(noise + JITTER))
            residual = (targets - self._mean(inputs)).unsqueeze(-1)
            self._residual = residual
            self._weights = torch.linalg.solve_triangular(self._factor, residual, upper=False)

    def inflation(self) -> float:
        """Factor on posterior deviations at the target that runs left out ask for; see `calibration.inflation`."""
        return inflation(self._factor, self._residual.squeeze(-1), self._inputs[:, -FIDELITY_COLUMNS:])

    @torch.no_grad()
    def at(self, inputs: Tensor) -> Predicted:
        """Posterior at inputs of shape (m, d + 4)."""
        white = torch.linalg.solve_triangular(self._factor, self._covariance(self._inputs, inputs), upper=False)
        mean = self._mean(inputs) + (white * self._weights).sum(-2)
        variance = (self._variance(inputs) - white.square().sum(-2)).clamp_min(1e-12)
        return Predicted(inputs, mean, variance, white)

    @torch.no_grad()
    def covariance(self, first: Predicted, second: Predicted) -> Tensor:
        """Posterior covariance between two sets of inputs, shape (members, m, k)."""
        return self._covariance(first.inputs, second.inputs) - first.white.transpose(-1, -2) @ second.white
