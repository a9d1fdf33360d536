"""A smooth stand-in for a table: scores of any configuration, not only of the recorded ones.

One Gaussian process maps (unit-cube coordinates, log model size) to the whole learning curve: the gain over the base
score at each rung, with one Matern kernel and one noise for all rungs. Runs cut short count with their last score
from there on. What it is off by is measured by leaving configurations out: `cross_validate`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from jfhpo_core.study.space import Vector
from jfhpo_core.trainers.replay_table import SPACE, Recording, Table, read_table

Matrix = NDArray[np.float64]

FOLDS = 8
"""Folds of the cross-validation."""

VARIANCES = (0.1, 10.0)
LENGTHS = (0.2, 50.0)
NOISES = (1e-3, 0.5)
"""Bounds of the kernel: variances in units of the gains' variance, lengths in unit-cube coordinates."""


@dataclass(frozen=True)
class Surrogate:
    """A fitted table.

    Attributes:
        process: From features, shape (n, SPACE.dimension + 1), to gains at the rungs, shape (n, rungs).
        rungs: Steps of the rungs, ascending.
        base: Base score of each size.
        parameters: Parameter count of each size.
        seed_noise: Standard deviation of the final score over seeds, evaluation noise taken off; 0 without second
            seeds.
    """

    process: GaussianProcessRegressor
    rungs: tuple[int, ...]
    base: dict[str, float]
    parameters: dict[str, int]
    seed_noise: float

    def scores(self, size: str, points: Matrix) -> Matrix:
        """Mean scores at the rungs, shape (n, rungs), of points of the unit cube, shape (n, SPACE.dimension)."""
        gains = self.process.predict(_features(points, [self.parameters[size]] * len(points)))
        clipped: Matrix = np.clip(self.base[size] + gains, 0, 1)
        return clipped

    def score(self, size: str, point: Vector, step: int) -> float:
        """Mean score after a number of steps, in [0, 1]; linear between rungs."""
        curve = [self.base[size], *self.scores(size, point[None])[0]]
        return float(np.interp(step, [0, *self.rungs], curve))


@cache
def fitted(folder: str, task: str) -> Surrogate:
    """The surrogate of a table's task; fitted once in a process."""
    return fit(read_table(folder, task).recordings)


def fit(recordings: tuple[Recording, ...]) -> Surrogate:
    """Fit recorded runs of one task (all seeds)."""
    parameters = {recording.size: recording.parameters for recording in recordings}
    longest = max(recordings, key=lambda recording: len(recording.evaluations))
    rungs = tuple(evaluation.step for evaluation in longest.evaluations[1:])
    base = {recording.size: recording.evaluations[0].score for recording in recordings}
    points = np.array([recording.point for recording in recordings])
    gains = [[recording.evaluation(step).score - base[recording.size] for step in rungs] for recording in recordings]
    kernel = ConstantKernel(1.0, VARIANCES) * Matern(np.ones(SPACE.dimension + 1), LENGTHS, nu=2.5)
    process = GaussianProcessRegressor(kernel + WhiteKernel(0.05, NOISES), normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        # The bounds are priors: a hyperparameter without effect lies at its upper one, and that is no fault.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(_features(points, [recording.parameters for recording in recordings]), np.array(gains))
    return Surrogate(process, rungs, base, parameters, _seed_noise(recordings))


def _features(points: Matrix, parameters: list[int]) -> Matrix:
    """Shape (n, SPACE.dimension + 1)."""
    return np.column_stack([points, np.log10(parameters)])


def _seed_noise(recordings: tuple[Recording, ...]) -> float:
    """From pairs of seeds: their differences have twice the variance of a score, evaluation noise included."""
    finals: dict[tuple[str, int], list[Recording]] = {}
    for recording in recordings:
        if recording.completed:
            finals.setdefault((recording.size, recording.number), []).append(recording)
    pairs = [(group[0].evaluations[-1], group[1].evaluations[-1]) for group in finals.values() if len(group) > 1]
    if not pairs:
        return 0.0
    total = np.mean([(one.score - other.score) ** 2 / 2 for one, other in pairs])
    evaluation = np.mean([(one.standard_error**2 + other.standard_error**2) / 2 for one, other in pairs])
    return math.sqrt(max(0.0, float(total - evaluation)))


@dataclass(frozen=True)
class CrossValidation:
    """How far the surrogate is off on configurations that it has not seen.

    Attributes:
        predicted: Final scores by the surrogate, of each recording in order.
        recorded: Final scores as recorded.
        standard_errors: Of these, by evaluation.
    """

    predicted: Vector
    recorded: Vector
    standard_errors: Vector

    @property
    def noise(self) -> float:
        """Root mean square of the standard errors: the error of a perfect surrogate."""
        return float(np.sqrt(np.mean(self.standard_errors**2)))

    def only(self, chosen: Sequence[bool]) -> CrossValidation:
        """The part of some recordings."""
        rows = np.array(chosen)
        return CrossValidation(self.predicted[rows], self.recorded[rows], self.standard_errors[rows])

    @property
    def rmse(self) -> float:
        """Root mean squared error of the final score."""
        return float(np.sqrt(np.mean((self.predicted - self.recorded) ** 2)))


def cross_validate(table: Table, folds: int = FOLDS) -> CrossValidation:
    """Predict each configuration, on all sizes, from the other folds' configurations."""
    recordings = table.recordings
    predicted = np.empty(len(recordings))
    for fold in range(folds):
        surrogate = fit(tuple(recording for recording in recordings if recording.number % folds != fold))
        for position, recording in enumerate(recordings):
            if recording.number % folds == fold:
                predicted[position] = surrogate.scores(recording.size, recording.point[None])[0, -1]
    finals = [recording.evaluations[-1] for recording in recordings]
    return CrossValidation(
        predicted=predicted,
        recorded=np.array([evaluation.score for evaluation in finals]),
        standard_errors=np.array([evaluation.standard_error for evaluation in finals]),
    )
