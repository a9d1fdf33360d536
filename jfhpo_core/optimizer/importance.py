r"""Which hyperparameters matter at the target, from what the trials of all sizes and lengths say about it.

Globally: shares of the variance of the expected value over the search space, failures included (`Beliefs.expected`).
With f(A) and f(B) at independent uniform points, and A_i the points A with hyperparameter i taken from B (all of its
coordinates, so that a choice is one hyperparameter),

    first_i = 1 - mean((f(B) - f(A_i))^2) / (2 var f),    total_i = mean((f(A) - f(A_i))^2) / (2 var f).

`first` is what the hyperparameter explains alone, `total` includes its interactions. f is drawn jointly at all points
from the posterior of every member of the surrogate's ensemble: a share is the median over draws, its interval holds
95 % of them.

Locally: how far each hyperparameter alone may move from its best value before the expected value has fallen by the
standard error of one evaluation, or may well have fallen by more.

References:
    Sobol (2001), global sensitivity indices; Jansen (1999) for the estimators; Saltelli et al. (2010) compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from pydantic import Field
from scipy.stats import qmc
from torch import Tensor

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.observations import full_length_inputs
from jfhpo_core.optimizer.score_scale import TARGET
from jfhpo_core.optimizer.surrogate import JITTER
from jfhpo_core.study.space import ChoiceParameter, Vector
from jfhpo_core.study.trial import Configuration, Record, Value

DRAWS = 64
"""Functions drawn from each member of the ensemble."""

MOST_POINTS = 1536
"""Points at which functions are drawn jointly: one Cholesky factor of this size for each member."""

GRID = 65
"""Values of a hyperparameter that are tried locally, if it has more."""

SAFE = 0.975
MOST_ERRORS = 1.25
"""A value is harmless only if it costs less than so many standard errors with this probability. On simulated landscapes
the ends of 5 of 65 such ranges truly cost more than three with 3 and 80 %, and of 1 of 127 with 1.5 and 95 %."""

INTERVAL = (0.025, 0.975)
"""Ends of intervals, as quantiles."""


LEADING = 3
"""How many hyperparameters are the most important ones: so many are asked for."""


class Estimate(Record):
    """A quantity of which the posterior was sampled."""

    value: float = Field(description="Median over posterior draws.")
    low: float = Field(description="Lower end of the 95 % interval.")
    high: float = Field(description="Upper end of the 95 % interval.")

    @classmethod
    def of(cls, draws: Vector) -> Estimate:
        """From draws, shape (n,)."""
        low, value, high = np.quantile(draws, [INTERVAL[0], 0.5, INTERVAL[1]])
        return cls(value=float(value), low=float(low), high=float(high))


class Importance(Record):
    """How much a hyperparameter matters at the target."""

    name: str
    first: Estimate = Field(description="Share of the variance over the space that it explains alone, in [0, 1].")
    total: Estimate = Field(description="The same with its interactions, in [0, 1].")
    leading: float = Field(description=f"Probability that it is among the {LEADING} most important ones.")
    best: Value | None = Field(description="Its value in the recommended configuration; null if it is not active.")
    harmless: tuple[Value, ...] | None = Field(
        description="Lowest and highest value (of a choice: all values) at which it alone costs less than one standard "
        "error of the score; null if it is not active."
    )


class Interaction(Record):
    """How much two hyperparameters matter together, beyond what each of them does alone."""

    names: tuple[str, str]
    share: Estimate = Field(description="Share of the variance from terms that contain both of them, in [0, 1].")


def expected_draws(beliefs: Beliefs, inputs: Tensor) -> Tensor:
    """Joint posterior draws of the expected value, failures included, at the target.

    Args:
        beliefs: What is believed.
        inputs: At (target, full horizon), shape (m, d + 4).

    Returns:
        Shape (draws, m).
    """
    moments = beliefs.surrogate.moments()
    predicted = moments.at(inputs)
    members, points = predicted.mean.shape
    factor = psd_safe_cholesky(moments.covariance(predicted, predicted) + JITTER * torch.eye(points))
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal((members, points, DRAWS)))
    values = predicted.mean.unsqueeze(-1) + beliefs.inflation * factor @ normal
    draws = values.transpose(-1, -2).reshape(members * DRAWS, points)
    expected: Tensor = beliefs.failed_value + beliefs.probability(inputs) * (draws - beliefs.failed_value)
    return expected


def importances(beliefs: Beliefs, best: Configuration) -> list[Importance]:
    """Of every searched hyperparameter, the most important one first.

    Args:
        beliefs: What is believed.
        best: The configuration around which to look locally; it lies in the space.

    Raises:
        NotPSDError: The posterior covariance could not be factored.
    """
    space = beliefs.history.study.space
    slices = space.slices()
    count = 2 ** int(math.log2(MOST_POINTS / (len(space) + 2)))
    base, other = np.split(
        qmc.Sobol(2 * space.dimension, rng=np.random.default_rng(0)).random(count), 2, axis=1
    )  # each count x d
    mixed = []
    for coordinates in slices.values():
        points = base.copy()
        points[:, coordinates] = other[:, coordinates]
        mixed.append(points)
    inputs = full_length_inputs(space.snap(np.concatenate([base, other, *mixed])))
    draws = expected_draws(beliefs, inputs).reshape(-1, len(space) + 2, count)
    variance = draws[:, :2].flatten(1).var(-1).clamp_min(np.finfo(float).tiny)
    totals = (draws[:, :1] - draws[:, 2:]).square().mean(-1) / (2 * variance).unsqueeze(-1)
    leading = torch.zeros_like(totals).scatter(1, totals.topk(min(LEADING, len(space)), dim=1).indices, 1.0).mean(0)
    found = []
    for index, name in enumerate(slices):
        alone = 1 - (draws[:, 1] - draws[:, 2 + index]).square().mean(-1) / (2 * variance)
        total = totals[:, index]
        found.append(
            Importance(
                name=name,
                # Of one draw of f it cannot exceed the total; estimated over few points it may.
                first=Estimate.of(alone.minimum(total).clamp(0, 1).numpy()),
                total=Estimate.of(total.clamp(0, 1).numpy()),
                leading=float(leading[index]),
                best=best.get(name),
                harmless=_harmless(beliefs, best, name) if name in best else None,
            )
        )
    return sorted(found, key=lambda item: -item.total.value)


def interactions(beliefs: Beliefs, names: Sequence[str]) -> list[Interaction]:
    """Of every pair of some hyperparameters, the strongest one first.

    With A_ij the points A with both hyperparameters taken from B,
    mean((f(A) - f(A_i) - f(A_j) + f(A_ij))^2) / (4 var f) is the share.

    Args:
        beliefs: What is believed.
        names: The hyperparameters; points grow with their square.

    Raises:
        NotPSDError: The posterior covariance could not be factored.

    References:
        Liu and Owen (2006), superset importance.
    """
    if len(names) < 2:
        return []
    space = beliefs.history.study.space
    slices, pairs = space.slices(), list(combinations(names, 2))
    sets: list[tuple[str, ...]] = [(), *((name,) for name in names), *pairs]
    count = 2 ** int(math.log2(MOST_POINTS / len(sets)))
    base, other = np.split(qmc.Sobol(2 * space.dimension, rng=np.random.default_rng(1)).random(count), 2, axis=1)
    mixed = []
    for chosen in sets:
        points = base.copy()
        for name in chosen:
            points[:, slices[name]] = other[:, slices[name]]
        mixed.append(points)
    draws = expected_draws(beliefs, full_length_inputs(space.snap(np.concatenate(mixed)))).reshape(-1, len(sets), count)
    variance = draws.flatten(1).var(-1).clamp_min(np.finfo(float).tiny)
    found = []
    for pair in pairs:
        first, second, both = (draws[:, sets.index(chosen)] for chosen in ((pair[0],), (pair[1],), pair))
        share = (draws[:, 0] - first - second + both).square().mean(-1) / (4 * variance)
        found.append(Interaction(names=pair, share=Estimate.of(share.clamp(0, 1).numpy())))
    return sorted(found, key=lambda item: -item.share.value)


def _harmless(beliefs: Beliefs, best: Configuration, name: str) -> tuple[Value, ...]:
    """See `Importance.harmless`."""
    space = beliefs.history.study.space
    parameter = space[name]
    values = parameter.grid(GRID, best[name])
    places = [parameter.encode(value) for value in values]
    place = places.index(parameter.encode(best[name]))
    points = np.tile(space.encode(best), (len(values), 1))
    points[:, space.slices()[name]] = places
    inputs = full_length_inputs(space.snap(points))
    # In scores: the scale is logarithmic below the best.
    scores = beliefs.scale.score(TARGET, beliefs.expected(inputs)[0].tolist())
    draws = beliefs.scale.score(TARGET, expected_draws(beliefs, inputs).flatten().tolist()).reshape(-1, len(values))
    error = math.sqrt(beliefs.measurement_variance) * beliefs.scale.unit()
    most = np.quantile(draws[:, place : place + 1] - draws, SAFE, axis=0)
    kept = ((scores >= scores[place] - error) & (most <= MOST_ERRORS * error)).tolist()
    if isinstance(parameter, ChoiceParameter):
        return tuple(value for value, keep in zip(values, kept, strict=True) if keep)
    low = next((i + 1 for i in range(place, -1, -1) if not kept[i]), 0)
    high = next((i - 1 for i in range(place, len(values)) if not kept[i]), len(values) - 1)
    return values[low], values[high]
