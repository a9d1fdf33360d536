"""A trainer that trains nothing: a synthetic response surface with the same contract, on a simulated clock.

The surface has what matters in LLM RL: a best learning rate and clip range that move with model size, an instability
boundary that moves too, curves that saturate (the faster, the higher the learning rate), weak further
hyperparameters, proxies that agree with the target as far as a setting says, seed noise, binomial evaluation noise,
and a cost that grows with model and batch. All randomness is a hash of the trial, so that resuming is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jfhpo_core.errors import TrialFailure
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.study.space import Space, Vector
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Evaluation, FailureKind, StepRecord, Value, canonical_json
from jfhpo_core.trainers.base import Job, Observer, TrainingResult, read_settings
from jfhpo_core.trainers.scripted import play

TOKENS_PER_COMPLETION = 8

NO_KL_COEFFICIENT = 1e-5
"""A coefficient of zero acts like this one: below it the penalty no longer matters."""

COLLAPSE_LENGTH = 0.05
"""Share of the horizon within which the score of a collapsing run falls to 1/e."""

WAVES = 96
"""Random Fourier features of a random surface."""

SMOOTHNESS = 1.5
"""Length scale of random surfaces, in the units of `coordinates`; the default spaces are one to two units wide."""

SIZE_SMOOTHNESS = 1.0
"""The same over sizes, in factors of ten: what a size has of its own is shared in part by its neighbours."""

COORDINATES = 7
"""Hyperparameters that matter to the score."""

SAMPLE = 1024
"""Random configurations over which the agreement of proxies with the target is set."""


class Landscape(BaseModel):
    """The synthetic surface; the defaults resemble the embedded instruction task.

    Hyperparameters without a `best_` setting have no effect on the score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_score: float = Field(default=0.15, ge=0, lt=1, description="Score of an untrained target.")
    ceiling: float = Field(default=0.8, gt=0, le=1, description="Best final score on the target.")
    size_gain: float = Field(default=0.08, description="Loss of ceiling per factor of ten in parameters.")

    best_learning_rate: float = Field(default=5e-4, gt=0, description="On the target.")
    size_shift: float = Field(
        default=-0.35, description="Decades by which the best learning rate moves per factor of ten in parameters."
    )
    width: float = Field(default=0.45, gt=0, description="Decades of learning rate at which the gain falls to 1/e.")
    best_clip_high: float = Field(default=0.28, gt=0, description="On the target.")
    clip_shift: float = Field(
        default=0.0, description="By how much the best upper clip range moves per factor of ten in parameters."
    )
    best_kl_coefficient: float = Field(default=3e-3, gt=0)
    best_max_grad_norm: float = Field(default=0.7, gt=0)
    best_n_samples: int = Field(default=8, ge=2)
    best_temperature: float = Field(default=1.0, gt=0)
    best_scheduler: str = "cosine"
    weak_effect: float = Field(
        default=0.15, ge=0, lt=1, description="Largest share of the gain that all but the learning rate can lose."
    )
    roughness: float = Field(
        default=0.0, ge=0, lt=1, description="Largest share of the gain that a smooth random surface takes, all sizes."
    )
    agreement: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Correlation (to within 0.1) of a proxy's final scores with the target's over random "
        "configurations of the space, collapse apart; the rest is a smooth random surface of the proxy's own. 1 leaves "
        "it to the shifts, which may make it lower than any setting.",
    )
    instance: int = Field(default=0, ge=0, description="Seed of the random surfaces.")

    boundary: float = Field(default=0.6, gt=0, description="Decades above the best learning rate where runs collapse.")
    boundary_shift: float = Field(
        default=0.0, description="Decades by which the boundary moves, beside the best rate, per factor of ten."
    )
    collapse_at: float = Field(default=0.12, gt=0, le=1, description="Share of the horizon at which they do.")
    divergence: float | None = Field(
        default=None, ge=0, description="Decades beyond the boundary where collapse ends in non-finite values."
    )

    speed: float = Field(default=3.0, gt=0, description="How fast curves saturate, in horizons, at the best rate.")
    speed_exponent: float = Field(
        default=0.5, ge=0, description="Speed grows as the learning rate to this power: short runs favour high rates."
    )
    seed_noise: float = Field(default=0.02, ge=0, description="Standard deviation of the final score over seeds.")
    noise_growth: float = Field(
        default=0.0, description="Seed noise grows as the learning rate to this power, and is as given at the best."
    )

    seconds_per_step: float = Field(default=1.0, gt=0, description="Of the target, at 128 completions per step.")
    size_exponent: float = Field(default=0.8, description="Cost of a step grows as parameters to this power.")
    startup_seconds: float = Field(default=1.0, ge=0)
    evaluation_seconds: float = Field(default=1.0, ge=0, description="Of the target.")
    memory_limit: float | None = Field(
        default=None, description="Completions per step times size ratio above which a trial runs out of memory."
    )
    real_seconds_per_step: float = Field(
        default=0.0,
        ge=0,
        description="Sleep this long in each step, for tests of interruption.",
        json_schema_extra=OPERATIONAL,
    )


@dataclass(frozen=True)
class Curve:
    """What one configuration does on one model, noise apart.

    Attributes:
        base: Score before training.
        gain: Gain over the base at the full horizon, collapse apart; negative if training does harm.
        speed: Rate of saturation, per horizon.
        excess: Decades of learning rate above the best one.
        onset: Share of the horizon at which the run collapses; infinite if it does not.
        diverges: Whether it then becomes non-finite.
    """

    base: float
    gain: float
    speed: float
    excess: float
    onset: float
    diverges: bool

    def score(self, share: float) -> float:
        """Noise-free score, in [0, 1], after a share of the horizon in [0, 1]."""
        value = self.base + self.gain * math.expm1(-self.speed * share) / math.expm1(-self.speed)
        if share > self.onset:
            value *= math.exp((self.onset - share) / COLLAPSE_LENGTH)
        return min(1.0, max(0.0, value))

    def kl(self, share: Vector) -> Vector:
        """KL to the reference, nats per token, without noise, after shares of the horizon in [0, 1]; same shape."""
        drift = 0.2 * share * 10**self.excess * (1 + 4 * max(0.0, self.excess) * share)
        return np.minimum(20.0, drift)


class Surface:
    """A landscape over the space of a study.

    Args:
        settings: The landscape.
        sample: Random complete configurations of the space, over which the agreement of sizes is set.
    """

    def __init__(self, settings: Landscape, sample: Sequence[Mapping[str, Value]] = ()) -> None:
        self.settings = settings
        self._sample = sample
        self._common = _Waves.draw(settings.instance, "common")
        self._mixtures: dict[float, _Mixture] = {}

    def curve(self, configuration: Mapping[str, Value], size_ratio: float) -> Curve:
        """What a complete configuration does on a model of `size_ratio` times the target's parameters."""
        settings, size = self.settings, math.log10(size_ratio)
        excess = self._excess(configuration, size)
        ceiling = settings.ceiling + settings.size_gain * size
        base = settings.base_score * (1 + 0.3 * size / 2)
        quality = self._common_quality(configuration, size)
        if settings.agreement < 1 and size < 0:
            target = self._common_quality(configuration, 0.0)
            quality = self._mixture(size).quality(target, quality, configuration, size)
        beyond = excess - settings.boundary - settings.boundary_shift * size
        return Curve(
            base=base,
            gain=(ceiling - base) * quality,
            speed=settings.speed * 10 ** (settings.speed_exponent * min(1.0, excess)),
            excess=excess,
            onset=settings.collapse_at / (1 + 2 * beyond) if beyond > 0 else math.inf,
            diverges=settings.divergence is not None and beyond > settings.divergence,
        )

    def _excess(self, configuration: Mapping[str, Value], size: float) -> float:
        best = math.log10(self.settings.best_learning_rate) + self.settings.size_shift * size
        return math.log10(float(configuration["learning_rate"])) - best

    def _common_quality(self, configuration: Mapping[str, Value], size: float) -> float:
        """Share of the attainable gain that the part common to all sizes gives, in [0, 1]."""
        settings = self.settings
        distance = self._excess(configuration, size) / settings.width
        clip = float(configuration["clip_high"]) - settings.best_clip_high - settings.clip_shift * size
        weak = (
            (math.log10(_kl_coefficient(configuration) / settings.best_kl_coefficient) / 2) ** 2
            + (clip / 0.15) ** 2
            + math.log10(float(configuration["max_grad_norm"]) / settings.best_max_grad_norm) ** 2
            + (math.log2(float(configuration["n_samples"]) / settings.best_n_samples) / 2) ** 2
            + ((float(configuration["temperature"]) - settings.best_temperature) / 0.3) ** 2
            + (configuration["scheduler"] != settings.best_scheduler)
        )
        quality = math.exp(-(distance**2)) * (1 - settings.weak_effect * (1 - math.exp(-weak / 3)))
        if settings.roughness:
            bump = self._common.at(coordinates(configuration), 0.0)
            quality *= 1 - settings.roughness * (1 + math.tanh(bump)) / 2
        return quality

    def _mixture(self, size: float) -> _Mixture:
        """How a proxy's surface is mixed; found once, over the sample."""
        if size not in self._mixtures:
            waves = _Waves.draw(self.settings.instance, "own")
            target = np.array([self._common_quality(configuration, 0.0) for configuration in self._sample])
            shared = np.array([self._common_quality(configuration, size) for configuration in self._sample])
            own = np.array([waves.at(coordinates(configuration), size) for configuration in self._sample])
            self._mixtures[size] = _Mixture.fit(waves, target, shared, own, self.settings.agreement)
        return self._mixtures[size]


@dataclass(frozen=True)
class _Waves:
    """A smooth random function of coordinates and log size, mean 0, variance 1: random Fourier features of a GP.

    Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007.
    """

    frequencies: Vector
    phases: Vector

    @classmethod
    def draw(cls, *seed: object) -> _Waves:
        random = _random(*seed)
        frequencies = random.normal(size=(WAVES, COORDINATES + 1)) / SMOOTHNESS
        frequencies[:, -1] *= SMOOTHNESS / SIZE_SMOOTHNESS
        return cls(frequencies, random.uniform(0, 2 * math.pi, WAVES))

    def at(self, point: Vector, size: float) -> float:
        angles = self.frequencies @ np.append(point, size) + self.phases
        return math.sqrt(2 / WAVES) * float(np.cos(angles).sum())


@dataclass(frozen=True)
class _Mixture:
    """A proxy's quality: intercept + target * (target's) + common * (common, at its size) + own * (its random surface).

    The terms free the random surface of its chance correlation with the others, so that what correlation remains
    between proxy and target is what the common part brings.
    """

    waves: _Waves
    intercept: float
    target: float
    common: float
    own: float

    @classmethod
    def fit(cls, waves: _Waves, target: Vector, common: Vector, own: Vector, agreement: float) -> _Mixture:
        """From values over a sample, each of shape (n,)."""
        basis = np.column_stack([np.ones_like(target), target, common])
        rest = np.linalg.lstsq(basis, own, rcond=None)[0]
        free = own - basis @ rest
        by_shift = float(np.corrcoef(target, common)[0, 1])
        weight = min(1.0, agreement / by_shift) if by_shift > agreement else 1.0
        scale = math.sqrt(1 - weight**2) * float(common.std() / free.std())
        kept = (1 - weight) * float(common.mean())
        return cls(waves, kept - scale * rest[0], -scale * rest[1], weight - scale * rest[2], scale)

    def quality(self, target: float, common: float, configuration: Mapping[str, Value], size: float) -> float:
        """Quality of a configuration whose common quality is `target` on the target and `common` on the proxy."""
        own = self.waves.at(coordinates(configuration), size)
        return self.intercept + self.target * target + self.common * common + self.own * own


def coordinates(configuration: Mapping[str, Value]) -> Vector:
    """The hyperparameters that matter, in units half as wide as the default spaces or wider; shape (COORDINATES,)."""
    return np.array(
        [
            math.log10(float(configuration["learning_rate"])),
            math.log10(_kl_coefficient(configuration)) / 2,
            float(configuration["clip_high"]) / 0.15,
            math.log10(float(configuration["max_grad_norm"])),
            math.log2(float(configuration["n_samples"])) / 2,
            float(configuration["temperature"]) / 0.3,
            float(configuration["scheduler"] == "cosine"),
        ]
    )


def _kl_coefficient(configuration: Mapping[str, Value]) -> float:
    return float(configuration["kl_coefficient"]) or NO_KL_COEFFICIENT


class SimulatedTrainer:
    """Answers every job from a `Landscape` (the trainer's settings)."""

    name: ClassVar[str] = "simulated"
    pauses: ClassVar[bool] = True
    hyperparameters: ClassVar[type[BaseModel]] = Hyperparameters
    settings: ClassVar[type[BaseModel]] = Landscape

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        landscape(study)

    def warm_up(self) -> None:
        """See `Trainer.warm_up`; there is nothing to import."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        surface = study_surface(job.study)
        settings = surface.settings
        completions = job.prompts_per_step * int(job.configuration["n_samples"])
        ratio = job.parameters / job.target_parameters
        if settings.memory_limit is not None and completions * ratio > settings.memory_limit:
            raise TrialFailure(
                FailureKind.OUT_OF_MEMORY,
                f"simulated: {completions} completions per step do not fit in memory",
                seconds=settings.startup_seconds,
            )
        step_seconds = settings.seconds_per_step * ratio**settings.size_exponent * (completions / 128) ** 0.9
        evaluation_seconds = settings.evaluation_seconds * ratio**settings.size_exponent
        run = _Run.plan(job, surface.curve(job.configuration, ratio), settings)

        def record(step: int) -> StepRecord:
            if settings.real_seconds_per_step:
                time.sleep(settings.real_seconds_per_step)
            return run.record(step, step_seconds)

        return play(
            job,
            start,
            stage,
            observe,
            record,
            lambda step: run.evaluation(step, evaluation_seconds),
            settings.startup_seconds,
        )


@dataclass(frozen=True)
class _Run:
    """A trial's whole course at full length, noise included: a segment shows a part of it.

    Attributes:
        hits: Right answers among `count` at an evaluation after each step, from step 0; shape (steps + 1,).
        rewards: Mean training rewards; `kl` and `grad_norm` likewise, all of shape (steps,).
    """

    job: Job
    scores: Vector
    count: int
    hits: Vector
    rewards: Vector
    kl: Vector
    grad_norm: Vector

    @classmethod
    def plan(cls, job: Job, curve: Curve, settings: Landscape) -> _Run:
        random = _random(job.configuration, job.model, job.seed)
        shares = np.arange(job.total_steps + 1) / job.total_steps
        noise = settings.seed_noise * 10 ** (settings.noise_growth * min(1.0, curve.excess))
        wobble = noise * random.normal() * shares
        clean = np.array([curve.score(float(share)) for share in shares])
        scores = np.where(clean > 0, np.clip(clean + wobble, 0, 1), 0.0)
        count = (job.study.evaluation.prompts or 1024) * job.study.evaluation.samples_per_prompt
        completions = job.prompts_per_step * int(job.configuration["n_samples"])
        share = shares[1:]
        grad_norm = random.lognormal(0, 0.2, job.total_steps)
        if curve.diverges:
            grad_norm[share > curve.onset] = math.nan
        return cls(
            job=job,
            scores=scores,
            count=count,
            hits=random.binomial(count, scores).astype(np.float64),
            rewards=random.binomial(completions, scores[1:]) / completions,
            kl=curve.kl(share) * random.lognormal(0, 0.1, job.total_steps),
            grad_norm=grad_norm,
        )

    def evaluation(self, step: int, seconds: float) -> Evaluation:
        score = int(self.hits[step]) / self.count
        return Evaluation(
            step=step,
            prompts=step * self.job.prompts_per_step,
            score=score,
            standard_error=math.sqrt(max(score * (1 - score), 0.25 / self.count) / self.count),
            samples=self.count,
            seconds=seconds,
        )

    def record(self, step: int, seconds: float) -> StepRecord:
        samples = int(self.job.configuration["n_samples"])
        score, reward = float(self.scores[step]), float(self.rewards[step - 1])
        return StepRecord(
            step=step,
            prompts=step * self.job.prompts_per_step,
            tokens=step * self.job.prompts_per_step * samples * TOKENS_PER_COMPLETION,
            reward=reward,
            reward_std=math.sqrt(reward * (1 - reward)),
            zero_variance_share=min(1.0, score**samples + (1 - score) ** samples),
            kl=float(self.kl[step - 1]),
            entropy=0.5,
            clip_fraction=0.01,
            grad_norm=float(self.grad_norm[step - 1]),
            completion_tokens=float(TOKENS_PER_COMPLETION),
            truncated_share=0.0,
            learning_rate=float(self.job.configuration["learning_rate"]),
            generation_seconds=seconds / 2,
            training_seconds=seconds / 2,
        )


def landscape(study: StudySpec) -> Landscape:
    """The study's landscape.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    return read_settings(Landscape, study, SimulatedTrainer.name)


def study_surface(study: StudySpec) -> Surface:
    """The study's landscape over its space.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    settings = landscape(study)
    return _surface(settings.model_dump_json(), study.space.model_dump_json(), canonical_json(study.trainer.fixed))


@lru_cache(maxsize=8)
def _surface(settings: str, space: str, fixed: str) -> Surface:
    known, searched = Landscape.model_validate_json(settings), Space.model_validate_json(space)
    if known.agreement == 1:
        return Surface(known, [])
    from scipy.stats import qmc  # takes longer to import than all else that a worker needs

    points = qmc.Sobol(searched.dimension, rng=np.random.default_rng(0)).random(SAMPLE)
    sample = [
        Hyperparameters.model_validate(json.loads(fixed) | searched.decode(point)).model_dump() for point in points
    ]
    return Surface(known, sample)


def true_score(surface: Surface, configuration: Mapping[str, Value], size_ratio: float, share: float) -> float:
    """Noise-free score, the mean over training seeds, of a complete configuration.

    Args:
        surface: The landscape over its space.
        configuration: With the trainer's defaults filled in.
        size_ratio: Parameters over the target's parameters.
        share: Share of the horizon trained, in [0, 1].
    """
    return surface.curve(configuration, size_ratio).score(share)


def _random(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256(canonical_json(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
