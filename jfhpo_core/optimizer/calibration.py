r"""How much wider a surrogate's intervals at the target have to be than it says itself.

The parameters are fitted to many runs of small models, and what a larger model does differently shows only in a
few: the surrogate is too sure of the target. How it fares there can be asked: each run of a larger model is left
out of the data in turn, its last evaluation is predicted from everything else, and the squared error is divided by the
variance that was promised. With the prior that the variance is too small by a factor f, scaled inverse chi-squared
with `PRIOR_TRAININGS` degrees of freedom around `PRIOR_INFLATION`, m such ratios r give

    f = (PRIOR_TRAININGS * PRIOR_INFLATION + sum(r)) / (PRIOR_TRAININGS + m)

Nothing is fitted again: the errors follow from one inverse of the covariance, of which a run takes a block I,

    error_I = (K^-1_II)^-1 (K^-1 y)_I,    covariance of error_I = (K^-1_II)^-1

Means stay as they are, so that no choice by the mean is changed.

References:
    Rasmussen and Williams (2006), section 5.4.2, for leaving out one point; blocks follow in the same way.
    Gelman et al., Bayesian Data Analysis (2013), section 2.6, for the prior of a variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PRIOR_TRAININGS = 4.0
"""Number of runs that the prior counts as much as."""

PRIOR_INFLATION = 2.0
"""Factor on the variance where no run has been judged; chosen on simulated landscapes, see docs/decisions/."""

THIS_STUDY = 0.0
TARGET = 0.0
"""Size of the target: log10 of its parameters relative to itself."""


def inflation(factor: Tensor, residuals: Tensor, fidelities: Tensor) -> float:
    """The factor by which posterior deviations at the target are to be multiplied.

    Args:
        factor: Lower Cholesky factors of the observations' covariance, noise included, shape (members, n, n).
        residuals: Observations minus their prior means, shape (members, n).
        fidelities: Size, progress, training and study of each observation: the last columns of the surrogate's inputs,
            shape (n, 4).
    """
    precision = torch.cholesky_inverse(factor)
    weights = (precision @ residuals.unsqueeze(-1)).squeeze(-1)
    ratios = [_surprise(precision, weights, rows) for rows in judged_trainings(fidelities)]
    return math.sqrt((PRIOR_TRAININGS * PRIOR_INFLATION + sum(ratios)) / (PRIOR_TRAININGS + len(ratios)))


def left_out(precision: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What is observed in some rows minus what all others predict for them.

    Args:
        precision: Inverse covariance of the observations, shape (members, n, n).
        weights: It times the residuals, shape (members, n).
        rows: Of the observations, shape (k,).

    Returns:
        Errors, shape (members, k), and their covariance, shape (members, k, k).
    """
    covariance = torch.linalg.inv(precision[:, rows][:, :, rows])
    return (covariance @ weights[:, rows].unsqueeze(-1)).squeeze(-1), covariance


def judged_trainings(fidelities: Tensor) -> Iterator[Tensor]:
    """Rows of every run of this study on a model larger than its smallest or on the target, by progress.

    Args:
        fidelities: See `inflation`.
    """
    size, progress, training, study = fidelities.unbind(-1)
    mine = study == THIS_STUDY
    if not bool(mine.any()):
        return
    larger = mine & ((size > size[mine].min()) | (size == TARGET))
    for number in sorted(set(training[larger].tolist())):
        rows = torch.nonzero(larger & (training == number)).squeeze(-1)
        yield rows[torch.argsort(progress[rows])]


def _surprise(precision: Tensor, weights: Tensor, rows: Tensor) -> float:
    """Squared error of a run's last evaluation over its variance, both of the mixture of all members."""
    errors, covariance = left_out(precision, weights, rows)
    last, variance = errors[:, -1], covariance[:, -1, -1]
    return float(last.mean() ** 2 / (variance.mean() + last.var(correction=0)))
