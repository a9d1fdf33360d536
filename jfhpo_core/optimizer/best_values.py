r"""Where the best configuration lies at a model size, the target's or another one, as draws from what is believed.

A draw takes one member of the surrogate's ensemble (its shift `beta` of the best values with size among them), draws a
function of the hyperparameters at that size and full length from the member's posterior, counts failures in by a drawn
P(feasible), and maximizes it: where runs fail is as open as how well the others do. Intervals over draws widen with the
distance from the sizes that were run for two reasons: what is left open about the shift counts once per factor of ten,
and the residual that a size has to itself grows.

The function is drawn jointly at anchors (a Sobol sequence and the neighbourhood of the expected best); between them it
is the posterior mean given its values there.

References:
    Russo and Van Roy (2014), Learning to optimize via posterior sampling; Hennig and Schuler (2012), entropy search,
    for the distribution of the maximizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from scipy.stats import qmc
from torch import Tensor

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.observations import full_length_inputs
from jfhpo_core.optimizer.surrogate import FIDELITY_COLUMNS, JITTER, Moments
from jfhpo_core.study.space import INACTIVE, ZERO_SHARE, FloatParameter, IntParameter, Parameter, Vector
from jfhpo_core.study.trial import Configuration, Value

DRAWS = 32
"""Members of the ensemble, each of which gives one draw."""

CHUNK = 16
"""Members whose covariances are in memory at once."""

ANCHORS = 192
"""Points of a Sobol sequence at which functions are drawn."""

NEAR = 64
"""Further ones around the expected best."""

SAMPLE = 512
"""Points among which the expected best is looked for, before it is improved."""

STARTS, PROPOSALS = 2, 8
"""Best anchors that are improved, and moves that are tried for each of them in a round."""

MOVES = np.geomspace(0.25, 0.02, 8)
"""Standard deviations of the moves, by round, in the unit cube."""

COVERAGE = 0.8
"""Share of the best values that the intervals are meant to hold."""

DRAWS_HELD = 0.9
"""Share of the draws that an interval of best values takes. The shortest of a finite sample is too short: if the best
value were one more draw, 29 of 32 draws would hold it in 81 to 85 % of the cases (uniform, normal, exponential), and 26
in 71 to 74 %. How often it is held: docs/evidence/recipe.md."""


@dataclass(frozen=True)
class BestValues:
    """Draws of the best configuration at one size.

    Attributes:
        size: log10 of the parameters relative to the target.
        expected: The configuration whose expected value, failures included, is highest there.
        points: Best points of the draws, snapped to the space, shape (draws, dimension).
    """

    size: float
    expected: Configuration
    points: Vector


def best_values(beliefs: Beliefs, size: float) -> BestValues:
    """Draw the best configuration at a size.

    Args:
        beliefs: With an ensemble of `DRAWS` members.
        size: log10 of the parameters relative to the target.

    Raises:
        NotPSDError: A posterior covariance could not be factored.
    """
    space, random = beliefs.history.study.space, np.random.default_rng(0)
    moments = beliefs.surrogate.moments()

    def expected(points: Vector) -> Vector:
        inputs = full_length_inputs(points, size)
        return _with_failures(beliefs, beliefs.probability(inputs), moments.at(inputs).mean.mean(0)).numpy()

    sobol = space.snap(qmc.Sobol(space.dimension, rng=random).random(SAMPLE))
    values = expected(sobol)
    order = np.argsort(-values)[:STARTS]
    best, reached = sobol[order], values[order]
    for scale in MOVES:
        proposals = space.snap(moved(best, scale, random).reshape(-1, space.dimension))
        values = expected(proposals).reshape(PROPOSALS, -1)
        chosen = values.argmax(0)
        better = values.max(0) > reached
        places = proposals.reshape(PROPOSALS, -1, space.dimension)[chosen, np.arange(len(best))]
        best, reached = np.where(better[:, None], places, best), np.maximum(values.max(0), reached)
    summit = best[int(reached.argmax())]
    near = space.snap(moved(np.tile(summit, (NEAR // PROPOSALS, 1)), 0.15, random).reshape(-1, space.dimension))
    anchors = np.concatenate([sobol[:ANCHORS], near])
    draws = [
        _maximizers(beliefs, anchors, size, beliefs.surrogate.parameter_draws[start : start + CHUNK], start)
        for start in range(0, len(beliefs.surrogate.parameter_draws), CHUNK)
    ]
    return BestValues(size, space.decode(summit), np.concatenate(draws))


def _maximizers(beliefs: Beliefs, anchors: Vector, size: float, parameters: Tensor, number: int) -> Vector:
    """Where functions drawn from some members are highest, shape (members, dimension)."""
    space, random, data = (
        beliefs.history.study.space,
        np.random.default_rng([1, number]),
        beliefs.surrogate.observations,
    )
    members, structure = len(parameters), beliefs.surrogate.structure
    moments = Moments(structure, parameters, data.inputs, data.values.expand(members, -1), data.variances)
    inputs = full_length_inputs(anchors, size)
    predicted = moments.at(inputs)
    factor = psd_safe_cholesky(moments.covariance(predicted, predicted) + JITTER * torch.eye(len(anchors)))
    normal = torch.from_numpy(random.standard_normal((members, len(anchors), 1)))
    values = predicted.mean + beliefs.inflation * (factor @ normal).squeeze(-1)
    drawn = Moments(
        structure,
        parameters,
        torch.cat([data.inputs, inputs]),
        torch.cat([data.values.expand(members, -1), values], dim=-1),
        torch.cat([data.variances, torch.full((len(anchors),), JITTER, dtype=torch.double)]),
    )
    feasible = _drawn_feasibility(beliefs, inputs, members, random)
    worth = _with_failures(beliefs, feasible(inputs.expand(members, -1, -1)), values)
    order = torch.argsort(worth, dim=-1, descending=True)[:, :STARTS].numpy()
    best = anchors[order]  # members x starts x d
    reached = np.full(best.shape[:2], -math.inf)
    for scale in (0.0, *MOVES):
        proposals = moved(best, scale, random)  # proposals x members x starts x d
        flat = space.snap(proposals.reshape(-1, space.dimension))
        proposals = flat.reshape(proposals.shape)
        places = full_length_inputs(flat, size).reshape(PROPOSALS, members, STARTS, -1).movedim(0, 1).flatten(1, 2)
        mean = drawn.at(places).mean  # members x (proposals * starts)
        worth = _with_failures(beliefs, feasible(places), mean).reshape(members, PROPOSALS, STARTS)
        found = worth.movedim(1, 0).numpy()
        chosen, highest = found.argmax(0), found.max(0)
        moves = np.take_along_axis(proposals, chosen[None, ..., None], axis=0)[0]
        best = np.where((highest > reached)[..., None], moves, best)
        reached = np.maximum(highest, reached)
    summits: Vector = best[np.arange(members), reached.argmax(1)]
    return summits


def _drawn_feasibility(
    beliefs: Beliefs, anchors: Tensor, members: int, random: np.random.Generator
) -> Callable[[Tensor], Tensor]:
    """For each member a function drawn for P(feasible), of inputs (members, k, d + 4) to shape (members, k)."""
    if beliefs.feasibility is None:
        return lambda inputs: torch.ones(inputs.shape[:-1], dtype=inputs.dtype)
    normal = torch.from_numpy(random.standard_normal((members, len(anchors))))
    probability = beliefs.feasibility.drawn(anchors[:, : -FIDELITY_COLUMNS + 1], normal)
    return lambda inputs: probability(inputs[..., : -FIDELITY_COLUMNS + 1])


def moved(points: Vector, scale: float, random: np.random.Generator) -> Vector:
    """`PROPOSALS` moves of points (..., d), a few coordinates at a time, shape (PROPOSALS, ..., d)."""
    shape = (PROPOSALS, *points.shape)
    changed = random.random(shape) < max(0.4, 1.5 / points.shape[-1])
    places: Vector = np.clip(points + changed * random.normal(0, 1, shape) * scale, 0, 1)
    return places


def _with_failures(beliefs: Beliefs, feasible: Tensor, values: Tensor) -> Tensor:
    """Expected values, failures counted in by P(feasible); all of one shape."""
    expected: Tensor = beliefs.failed_value + feasible * (values - beliefs.failed_value)
    return expected


@dataclass(frozen=True)
class Range:
    """Where the best value of a hyperparameter lies.

    Attributes:
        values: Lowest and highest value of the shortest interval with `DRAWS_HELD` of the draws; of a choice without an
            order, the fewest values that have as much.
        width: Share of the hyperparameter's range or of its values that this is, in (0, 1].
    """

    values: tuple[Value, ...]
    width: float

    @property
    def told(self) -> bool:
        """Whether the data tell anything: draws from nothing would spread over the whole range."""
        return self.width <= MOST_TOLD


MOST_TOLD = 0.5
"""Share of a range that an interval may take and still tell something; without any data it takes `DRAWS_HELD`."""


def range_of(parameter: Parameter, coordinates: Vector) -> Range | None:
    """The range of a hyperparameter.

    Args:
        parameter: The hyperparameter.
        coordinates: Its coordinates in the draws, shape (draws, width).

    Returns:
        None if it is active in fewer than half of the draws.
    """
    active = coordinates[~(coordinates == INACTIVE).all(1)] if parameter.when else coordinates
    if 2 * len(active) < len(coordinates):
        return None
    if parameter.width > 1:
        counts = active.sum(0)
        order = np.argsort(-counts, kind="stable")
        needed = int(np.searchsorted(np.cumsum(counts[order]), DRAWS_HELD * len(active))) + 1
        options: Sequence[Value] = parameter.options or ()
        return Range(tuple(options[index] for index in order[:needed]), needed / len(counts))
    places = np.sort(active[:, 0])
    inside = math.ceil(DRAWS_HELD * len(places))
    widths = places[inside - 1 :] - places[: len(places) - inside + 1]
    first = int(widths.argmin())
    low, high = (parameter.decode([place]) for place in (places[first], places[first + inside - 1]))
    if parameter.options is None:
        return Range((low, high), float(widths[first]))
    options = parameter.options
    taken = options.index(high) - options.index(low) + 1
    return Range((low, high), taken / len(options))


@dataclass(frozen=True)
class Shift:
    """How the best value of a hyperparameter moves per factor of ten in parameters.

    Attributes:
        value: Median over the ensemble: a factor for a logarithmic scale, else a difference.
        low: Lower end of the interval that holds `COVERAGE` of it.
        high: Upper end.
        factor: Whether these are factors.
    """

    value: float
    low: float
    high: float
    factor: bool


def shifts(beliefs: Beliefs) -> dict[str, Shift]:
    """Of every hyperparameter that the study lets move with size (`shifts_with_size`)."""
    space, structure = beliefs.history.study.space, beliefs.surrogate.structure
    names = [name for name in space if space[name].shifts_with_size]
    found = {}
    for name, beta in zip(names, structure.value(beliefs.surrogate.parameter_draws, "shift").T.numpy(), strict=True):
        parameter = space[name]
        if not isinstance(parameter, FloatParameter | IntParameter):
            continue
        low, high = float(parameter.low), float(parameter.high)
        length = math.log(high / low) if parameter.logarithmic else high - low
        if isinstance(parameter, FloatParameter) and parameter.zero:
            length /= 1 - ZERO_SHARE
        # What is best at x on the target is best at x - beta z.
        ends = np.quantile(-beta * length, [0.5, (1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
        middle, least, most = (math.exp(end) if parameter.logarithmic else float(end) for end in ends)
        found[name] = Shift(middle, least, most, parameter.logarithmic)
    return found
