"""The Pareto front of score and second objective that the model expects, configurations that were not run among them.

Each configuration has an expected score at full length on the target, failures included, and a median of the metric
there. The front is found by an archive of what no other configuration beats in both: a Sobol sample and everything that
was run, then random moves of what is in the archive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np
from pydantic import Field
from scipy.stats import qmc

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.best_values import moved
from jfhpo_core.optimizer.constraints import LimitModel
from jfhpo_core.optimizer.observations import full_length_inputs
from jfhpo_core.optimizer.score_scale import TARGET
from jfhpo_core.study.metrics import Limit
from jfhpo_core.study.space import Vector
from jfhpo_core.study.trial import Configuration, Record, configuration_key

SAMPLE = 512
"""Points of the Sobol sequence that the search for the front begins with."""

MOVES = np.geomspace(0.25, 0.01, 8)
"""Standard deviations of the moves, by round, in the unit cube."""

MOVED = 64
"""Points of the archive that are moved in a round, at even distances of the metric."""

MOST_POINTS = 8
"""Points of the front that are told, at even distances of the metric."""

RESPECTED = 0.5
"""Probability of respecting the study's constraints that a point of the front has at least."""

DEVIATIONS = 1.2816
"""Half-width of an 80 % interval, in standard deviations."""

WIDER = 1.55
METRIC_WIDER = 1.75
"""Factors on the deviations of scores and metrics, chosen on thirteen simulated fronts: where a mean is highest it is
too high. Without them 63 % of the scores and 41 % of the metrics held on six of these fronts, with them 87 % of both on
six others."""


class Predicted(Record):
    """A configuration on the front of score and second objective, as the model expects it."""

    configuration: Configuration
    trial: int | None = Field(description="Its first full run on the target; null: it has none.")
    score: float = Field(description="Expected score at full length on the target.")
    score_low: float = Field(description="Lower end of its 80 % interval.")
    score_high: float = Field(description="Upper end.")
    metric: float = Field(description="Median of the second objective's metric.")
    metric_low: float = Field(description="Lower end of its 80 % interval.")
    metric_high: float = Field(description="Upper end.")


def predicted_front(beliefs: Beliefs) -> tuple[Predicted, ...]:
    """The front, best score first; empty without a second objective that a full run of the target has recorded.

    Points that probably break a constraint of the study are left out, and so are those that may score no better than
    the untrained target: the lower end of their interval lies below it.

    Raises:
        NotPSDError: A posterior covariance could not be factored.
    """
    history = beliefs.history
    study, second = history.study, history.study.spec.second_objective
    if second is None:
        return ()
    measured = (history.measured(trial.configuration).get(second.metric) for trial in history.finished)
    known = [value for value in measured if value is not None]
    if not known:
        return ()
    # The bound only sets the scale below which values count as 0, so it must be above 0.
    bound = median([value for value in known if value > 0] or [1.0])
    model = LimitModel.fit(history, Limit(second.metric, second.direction == "minimize", bound))
    if model is None:
        return ()
    space, random = study.space, np.random.default_rng(0)
    sign = -1.0 if second.direction == "minimize" else 1.0
    base = history.bases.get(study.ladder.target.name, math.nan)
    least = beliefs.scale.value(TARGET, base)[0] if math.isfinite(base) else -math.inf

    def front_of(points: Vector) -> tuple[Vector, Vector]:
        """The points that no other one beats, and their metrics on the scale; the best metric comes first."""
        inputs = full_length_inputs(points)
        values, deviations = (item.numpy() for item in beliefs.expected(inputs))
        metrics = model.surrogate.mean_and_deviation(inputs)[0].numpy()
        better = values - DEVIATIONS * WIDER * deviations > least
        possible = np.flatnonzero(better & (beliefs.respected(inputs).numpy() >= RESPECTED))
        order = possible[np.lexsort((-values[possible], -sign * metrics[possible]))]
        best = np.maximum.accumulate(np.append(-math.inf, values[order]))
        kept = order[values[order] > best[:-1]]
        return points[kept], metrics[kept]

    tried = [space.encode(trial.configuration) for trial in history.in_space]
    sobol = space.snap(qmc.Sobol(space.dimension, rng=random).random(SAMPLE))
    archive, metrics = front_of(np.concatenate([sobol, np.array(tried).reshape(-1, space.dimension)]))
    for scale in MOVES:
        chosen = archive[_even(metrics, MOVED)]
        proposals = space.snap(moved(chosen, scale, random).reshape(-1, space.dimension))
        archive, metrics = front_of(np.concatenate([archive, proposals]))
    told = archive[_even(metrics, MOST_POINTS)][::-1]
    return tuple(_predicted(beliefs, model, space.snap(told)))


def _even(values: Vector, count: int) -> list[int]:
    """Indices of at most `count` of some ordered values, at about even distances, both ends among them."""
    if len(values) <= count:
        return list(range(len(values)))
    wanted = np.linspace(values[0], values[-1], count)
    return sorted({int(np.abs(values - place).argmin()) for place in wanted})


def _predicted(beliefs: Beliefs, model: LimitModel, points: Vector) -> Sequence[Predicted]:
    history = beliefs.history
    finished = {configuration_key(trial.configuration): trial.number for trial in reversed(history.finished)}
    inputs = full_length_inputs(points)
    means, deviations = beliefs.expected(inputs)
    deviations = WIDER * deviations
    middles, spreads = model.surrogate.mean_and_deviation(inputs)
    spreads = METRIC_WIDER * model.surrogate.moments().inflation() * spreads
    score, low, high = (
        beliefs.scale.score(TARGET, (means + side * DEVIATIONS * deviations).tolist()) for side in (0, -1, 1)
    )
    found = []
    for index, point in enumerate(points):
        configuration = history.study.space.decode(point)
        metric, least, most = (
            model.scale.metric(float(middles[index] + side * DEVIATIONS * spreads[index])) for side in (0, -1, 1)
        )
        found.append(
            Predicted(
                configuration=configuration,
                trial=finished.get(configuration_key(configuration)),
                score=float(score[index]),
                score_low=float(low[index]),
                score_high=float(high[index]),
                metric=metric,
                metric_low=least,
                metric_high=most,
            )
        )
    return found
