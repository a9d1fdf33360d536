"""What a segment will cost, learned from what segments did cost, and net of checkpoints that are already paid for.

    seconds = startup + steps x step(model, batch) + evaluations x evaluation(model)

Each part is a log-linear law with a Gaussian prior on its coefficients (conjugate Bayesian regression), so that it
predicts from the first trial on, sharpens with every segment, and can never become zero or negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jfhpo_core.study.models import steps_at
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Outcome, Trial

Vector = NDArray[np.floating]

FLOOR_SECONDS = 1e-3
"""No prediction is below this: a gain per cost must stay finite."""

REFERENCE_COMPLETIONS = 128.0


@dataclass(frozen=True)
class LogLinearLaw:
    """log(seconds) = coefficients . features + noise, with a Gaussian prior on the coefficients.

    Attributes:
        mean: Posterior mean of the coefficients, shape (k,).
        covariance: Posterior covariance, shape (k, k).
        noise: Standard deviation of log seconds around the law.
    """

    mean: Vector
    covariance: Vector
    noise: float

    def updated(self, features: Vector, seconds: Vector) -> LogLinearLaw:
        """The posterior after observations.

        Args:
            features: Shape (n, k).
            seconds: Positive, shape (n,).
        """
        if len(seconds) == 0:
            return self
        precision = np.linalg.inv(self.covariance)
        target = np.log(np.maximum(seconds, FLOOR_SECONDS))
        covariance = np.linalg.inv(precision + features.T @ features / self.noise**2)
        mean = covariance @ (precision @ self.mean + features.T @ target / self.noise**2)
        return LogLinearLaw(mean, covariance, self.noise)

    def predict(self, features: Vector) -> tuple[Vector, Vector]:
        """Mean and variance of log seconds for features of shape (n, k); both of shape (n,)."""
        return features @ self.mean, np.einsum("ij,jk,ik->i", features, self.covariance, features)

    def expected(self, features: Vector) -> Vector:
        """Expected seconds, shape (n,); the width is capped so that ignorance does not read as infinite cost."""
        mean, variance = self.predict(features)
        return np.exp(mean + np.minimum(variance, 1.0) / 2)


def step_law() -> LogLinearLaw:
    """Seconds of a training step; features: 1, log size ratio, log completions / 128, log mini-batches."""
    return LogLinearLaw(np.array([0.0, 0.6, 0.8, 0.1]), np.diag([4.0, 0.09, 0.04, 0.01]), noise=0.2)


def evaluation_law() -> LogLinearLaw:
    """Seconds of one evaluation; features: 1, log size ratio."""
    return LogLinearLaw(np.array([0.0, 0.5]), np.diag([4.0, 0.09]), noise=0.2)


def startup_law() -> LogLinearLaw:
    """Seconds from start to first step; features: 1, log size ratio."""
    return LogLinearLaw(np.array([0.0, 0.2]), np.diag([4.0, 0.04]), noise=0.4)


@dataclass(frozen=True)
class CostEstimate:
    """Device-seconds that a segment should add.

    Attributes:
        seconds: Expected value.
        low, high: Central 90 % interval.
    """

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class CostModel:
    """The three laws, fitted to a study's segments."""

    study: Study
    step: LogLinearLaw
    evaluation: LogLinearLaw
    startup: LogLinearLaw
    _known: dict[tuple[object, ...], CostEstimate] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(cls, study: Study, trials: Sequence[Trial]) -> CostModel:
        """Fit to every segment that was not cut off: of a failed one it is not known what its time was spent on."""
        steps: list[tuple[list[float], float]] = []
        evaluations: list[tuple[list[float], float]] = []
        startups: list[tuple[list[float], float]] = []
        for trial in trials:
            size = _log_size(study, trial.model)
            for result in trial.segments:
                if result.outcome in (Outcome.INFEASIBLE, Outcome.LOST):
                    continue
                evaluations += [([1.0, size], evaluation.seconds) for evaluation in result.evaluations]
                if result.startup_seconds > 0:
                    startups.append(([1.0, size], result.startup_seconds))
                count = result.end_step - result.began_step
                trained = result.seconds - result.startup_seconds - result.evaluation_seconds
                if count > 0 and trained > 0:
                    steps.append((_step_features(study, trial.configuration, trial.model), trained / count))
        return cls(
            study,
            _updated(step_law(), steps),
            _updated(evaluation_law(), evaluations),
            _updated(startup_law(), startups),
        )

    def estimate(self, configuration: Configuration, model: str, start_prompts: int, stop_prompts: int) -> CostEstimate:
        """Cost of training a configuration on a model from one prompt count to another.

        Args:
            configuration: Searched hyperparameters.
            model: Name in the family.
            start_prompts: Prompts of the checkpoint to continue from; 0 for a new trial.
            stop_prompts: A rung.
        """
        features = _step_features(self.study, configuration, model)
        batch = int(self.study.complete(configuration)["prompts_per_step"])
        key = (*features, batch, model, start_prompts, stop_prompts)
        if key not in self._known:
            count = steps_at(stop_prompts, batch) - start_prompts // batch
            levels = sum(start_prompts < level <= stop_prompts for level in self.study.spec.fidelity.levels)
            self._known[key] = self._estimate(features, model, count, levels)
        return self._known[key]

    def _estimate(self, features: list[float], model: str, steps: int, evaluations: int) -> CostEstimate:
        size, step = np.array([[1.0, _log_size(self.study, model)]]), np.array([features])
        parts = [
            (count * float(law.expected(row)[0]), law.predict(row)[1][0] + law.noise**2)
            for count, law, row in (
                (1, self.startup, size),
                (steps, self.step, step),
                (evaluations, self.evaluation, size),
            )
        ]
        devices = self.study.ladder[model].devices
        total = max(FLOOR_SECONDS, sum(seconds for seconds, _ in parts)) * devices
        # Parts are log-normal; their sum is given the log-normal with the same first two moments.
        variance = sum((seconds * devices) ** 2 * math.expm1(min(float(spread), 4.0)) for seconds, spread in parts)
        spread = math.sqrt(math.log1p(variance / total**2))
        median = total * math.exp(-(spread**2) / 2)
        return CostEstimate(total, median * math.exp(-1.645 * spread), median * math.exp(1.645 * spread))


def _updated(law: LogLinearLaw, rows: list[tuple[list[float], float]]) -> LogLinearLaw:
    if not rows:
        return law
    return law.updated(np.array([features for features, _ in rows]), np.array([seconds for _, seconds in rows]))


def _log_size(study: Study, model: str) -> float:
    return math.log(study.ladder[model].parameters / study.ladder.target.parameters)


def _step_features(study: Study, configuration: Configuration, model: str) -> list[float]:
    full = study.complete(configuration)
    completions = float(full["prompts_per_step"]) * float(full.get("n_samples", 1))
    return [
        1.0,
        _log_size(study, model),
        math.log(completions / REFERENCE_COMPLETIONS),
        math.log(float(full.get("mini_batches", 1))),
    ]
