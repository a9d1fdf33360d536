"""What a segment will cost, learned from what segments did cost, and net of checkpoints that are already paid for.

    seconds = startup + steps x step(model, batch) + evaluations x evaluation(model)

Each part is a price times a correction. The price comes from parameters, tokens and hardware (price.py); for trainers
that say nothing about their hardware it is one second. The correction is a log-linear law with a Gaussian prior on its
coefficients (conjugate Bayesian regression), so that it predicts from the first trial on, sharpens with every segment,
and can never become zero or negative. Earlier studies of the same trainer sharpen it before the first segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from jfhpo_core.optimizer.price import Prices, prices
from jfhpo_core.study.models import steps_at
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Outcome, StepRecord, Trial

Vector = NDArray[np.floating]

FLOOR_SECONDS = 1e-3
"""No prediction is below this: a gain per cost must stay finite."""

REFERENCE_COMPLETIONS = 128.0

NEW_STUDY_VARIANCE = 0.1
"""Variance that the level of log seconds gains from an earlier study to a new one: other lengths, other load."""


@dataclass(frozen=True)
class LogLinearLaw:
    """log(seconds / price) = coefficients . features + noise, with a Gaussian prior on the coefficients.

    Below, "seconds" are multiples of the price.

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

    def for_another_study(self) -> LogLinearLaw:
        """The law as the prior of a new study, where its level may differ."""
        covariance = self.covariance.copy()
        covariance[0, 0] += NEW_STUDY_VARIANCE
        return replace(self, covariance=covariance)

    def predict(self, features: Vector) -> tuple[Vector, Vector]:
        """Mean and variance of log seconds for features of shape (n, k); both of shape (n,)."""
        return features @ self.mean, np.einsum("ij,jk,ik->i", features, self.covariance, features)

    def expected(self, features: Vector) -> Vector:
        """Expected seconds, shape (n,); the width is capped so that ignorance does not read as infinite cost."""
        mean, variance = self.predict(features)
        return np.exp(mean + np.minimum(variance, 1.0) / 2)


def step_law(*, priced: bool = False) -> LogLinearLaw:
    """A training step; features: 1, log size ratio, log completions / 128, log mini-batches.

    Args:
        priced: Whether there is a price, which knows size and completions already. It is right within a factor of
            1.6 (one standard deviation, docs/evidence/prices.md).
    """
    if priced:
        return LogLinearLaw(np.zeros(4), np.diag([0.25, 0.02, 0.02, 0.01]), noise=0.2)
    return LogLinearLaw(np.array([0.0, 0.6, 0.8, 0.1]), np.diag([4.0, 0.09, 0.04, 0.01]), noise=0.2)


def evaluation_law(*, priced: bool = False) -> LogLinearLaw:
    """What is done at a rung; features: 1, log size ratio."""
    if priced:
        return LogLinearLaw(np.zeros(2), np.diag([0.5, 0.02]), noise=0.2)
    return LogLinearLaw(np.array([0.0, 0.5]), np.diag([4.0, 0.09]), noise=0.2)


def startup_law(*, priced: bool = False) -> LogLinearLaw:
    """From start to first step; features: 1, log size ratio."""
    if priced:
        return LogLinearLaw(np.zeros(2), np.diag([0.5, 0.02]), noise=0.4)
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
    prices: Prices | None
    _known: dict[tuple[object, ...], CostEstimate] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(cls, study: Study, trials: Sequence[Trial], live: Mapping[str, StepRecord] | None = None) -> CostModel:
        """Fit to every segment that was not cut off: of a failed one it is not known what its time was spent on.

        Args:
            study: The study; earlier ones that it learns from count as well if they have the same trainer and GPU.
            trials: Its trials.
            live: The latest steps of running trials, by key: the first measured step already corrects the price.
        """
        listed = prices(study)
        priced = listed is not None
        laws = [step_law(priced=priced), evaluation_law(priced=priced), startup_law(priced=priced)]
        for earlier in study.earlier:
            same = earlier.spec.trainer.name, earlier.spec.cluster.gpu
            if earlier.trials and same == (study.spec.trainer.name, study.spec.cluster.gpu):
                past = replace(study, spec=earlier.spec, ladder=earlier.ladder, earlier=())
                rows = _measured(past, prices(past), study.ladder.target.parameters, earlier.trials, {})
                laws = [_updated(law, seen).for_another_study() for law, seen in zip(laws, rows, strict=True)]
        rows = _measured(study, listed, study.ladder.target.parameters, trials, live or {})
        step, evaluation, startup = (_updated(law, seen) for law, seen in zip(laws, rows, strict=True))
        return cls(study, step, evaluation, startup, listed)

    def estimate(self, configuration: Configuration, model: str, start_prompts: int, stop_prompts: int) -> CostEstimate:
        """Cost of training a configuration on a model from one prompt count to another.

        Args:
            configuration: Searched hyperparameters.
            model: Name in the family.
            start_prompts: Prompts of the checkpoint to continue from; 0 for a new trial.
            stop_prompts: A rung.
        """
        full = self.study.complete(configuration)
        features = _step_features(full, _log_size(self.study, model, self.study.ladder.target.parameters))
        batch = int(full["prompts_per_step"])
        price = 1.0 if self.prices is None else self.prices.step(full, model)
        key = (*features, batch, price, model, start_prompts, stop_prompts)
        if key not in self._known:
            count = steps_at(stop_prompts, batch) - start_prompts // batch
            levels = sum(start_prompts < level <= stop_prompts for level in self.study.spec.fidelity.levels)
            self._known[key] = self._estimate(features, price, model, count, levels)
        return self._known[key]

    def _estimate(self, features: list[float], price: float, model: str, steps: int, evaluations: int) -> CostEstimate:
        size, step = np.array([features[:2]]), np.array([features])
        startup, rung = (1.0, 1.0) if self.prices is None else (self.prices.startup(model), self.prices.rung(model))
        parts = [
            (count * float(law.expected(row)[0]), law.predict(row)[1][0] + law.noise**2)
            for count, law, row in (
                (startup, self.startup, size),
                (steps * price, self.step, step),
                (evaluations * rung, self.evaluation, size),
            )
        ]
        devices = self.study.ladder[model].devices
        total = max(FLOOR_SECONDS, sum(seconds for seconds, _ in parts)) * devices
        # Parts are log-normal; their sum is given the log-normal with the same first two moments.
        variance = sum((seconds * devices) ** 2 * math.expm1(min(float(spread), 4.0)) for seconds, spread in parts)
        spread = math.sqrt(math.log1p(variance / total**2))
        median = total * math.exp(-(spread**2) / 2)
        return CostEstimate(total, median * math.exp(-1.645 * spread), median * math.exp(1.645 * spread))


Measurement = tuple[list[float], float]
"""Features of a law, and what was measured as a multiple of its price."""


def _measured(
    study: Study,
    listed: Prices | None,
    target_parameters: int,
    trials: Sequence[Trial],
    live: Mapping[str, StepRecord],
) -> tuple[list[Measurement], list[Measurement], list[Measurement]]:
    """What a study's segments say about steps, evaluations and starts."""
    steps: list[Measurement] = []
    evaluations: list[Measurement] = []
    startups: list[Measurement] = []
    for trial in trials:
        full = study.complete(trial.configuration)
        features = _step_features(full, _log_size(study, trial.model, target_parameters))
        price = startup = rung = 1.0
        if listed is not None:
            price, startup, rung = (
                listed.step(full, trial.model), listed.startup(trial.model), listed.rung(trial.model)
            )  # fmt: skip
        record = live.get(trial.key)
        if record is not None and (seconds := record.generation_seconds + record.training_seconds) > 0:
            steps.append((features, seconds / price))
        for result in trial.segments:
            if result.outcome in (Outcome.INFEASIBLE, Outcome.LOST):
                continue
            evaluations += [(features[:2], evaluation.seconds / rung) for evaluation in result.evaluations]
            if result.startup_seconds > 0:
                startups.append((features[:2], result.startup_seconds / startup))
            count = result.end_step - result.began_step
            trained = result.seconds - result.startup_seconds - result.evaluation_seconds
            if count > 0 and trained > 0:
                steps.append((features, trained / count / price))
    return steps, evaluations, startups


def _updated(law: LogLinearLaw, rows: list[Measurement]) -> LogLinearLaw:
    if not rows:
        return law
    return law.updated(np.array([features for features, _ in rows]), np.array([seconds for _, seconds in rows]))


def _log_size(study: Study, model: str, target_parameters: int) -> float:
    return math.log(study.ladder[model].parameters / target_parameters)


def _step_features(full: Configuration, log_size: float) -> list[float]:
    completions = float(full["prompts_per_step"]) * float(full.get("n_samples", 1))
    return [
        1.0,
        log_size,
        math.log(completions / REFERENCE_COMPLETIONS),
        math.log(float(full.get("mini_batches", 1))),
    ]
