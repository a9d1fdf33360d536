"""A trainer that trains nothing: a synthetic response surface with the same contract, on a simulated clock.

The surface has what matters in LLM RL: a best learning rate that moves with model size, an instability boundary that
moves too, curves that saturate, weak further hyperparameters, seed noise, binomial evaluation noise, and a cost that
grows with model and batch. All randomness is a hash of trial and step, so that resuming is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.hyperparameters import Hyperparameters
from jfhpo_core.spec import StudySpec
from jfhpo_core.trainers.base import Job, Observer, TrainingResult
from jfhpo_core.trial import Configuration, Evaluation, FailureKind, StepRecord, Value, canonical_json

STATE = "state.json"
TOKENS_PER_COMPLETION = 8


class Landscape(BaseModel):
    """The synthetic surface; the defaults resemble the embedded instruction task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_score: float = Field(default=0.15, ge=0, lt=1, description="Score of an untrained target.")
    ceiling: float = Field(default=0.8, gt=0, le=1, description="Best final score on the target.")
    size_gain: float = Field(default=0.08, description="Loss of ceiling per factor of ten in parameters.")
    best_learning_rate: float = Field(default=5e-4, gt=0, description="On the target.")
    size_shift: float = Field(
        default=-0.35, description="Decades by which the best learning rate moves per factor of ten in parameters."
    )
    width: float = Field(default=0.45, gt=0, description="Decades of learning rate at which the gain falls to 1/e.")
    boundary: float = Field(default=0.6, gt=0, description="Decades above the best learning rate where runs collapse.")
    collapse_at: float = Field(default=0.12, gt=0, le=1, description="Share of the horizon at which they do.")
    best_kl_coefficient: float = Field(default=3e-3, gt=0)
    weak_effect: float = Field(default=0.15, ge=0, description="Largest loss by the weak hyperparameters together.")
    disagreement: float = Field(
        default=0.0, ge=0, le=1, description="Share of a proxy's surface that has nothing to do with the target's."
    )
    speed: float = Field(default=3.0, gt=0, description="How fast curves saturate, in horizons.")
    seed_noise: float = Field(default=0.02, ge=0, description="Standard deviation of the final score over seeds.")
    seconds_per_step: float = Field(default=1.0, gt=0, description="Of the target, at 128 completions per step.")
    size_exponent: float = Field(default=0.8, description="Cost of a step grows as parameters to this power.")
    startup_seconds: float = Field(default=1.0, ge=0)
    evaluation_seconds: float = Field(default=1.0, ge=0, description="Of the target.")
    memory_limit: float | None = Field(
        default=None, description="Completions per step times size ratio above which a trial runs out of memory."
    )
    real_seconds_per_step: float = Field(
        default=0.0, ge=0, description="Sleep this long in each step, for tests of interruption."
    )


class SimulatedTrainer:
    """Answers every job from a `Landscape` (the trainer's settings)."""

    name: ClassVar[str] = "simulated"
    hyperparameters: ClassVar[type[BaseModel]] = Hyperparameters

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        landscape(study)

    def warm_up(self) -> None:
        """See `Trainer.warm_up`; there is nothing to import."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        surface = landscape(job.study)
        first = 0 if start is None else int(json.loads((start / STATE).read_text())["step"])
        samples = int(job.configuration["n_samples"])
        completions = job.prompts_per_step * samples
        ratio = job.parameters / job.target_parameters
        if surface.memory_limit is not None and completions * ratio > surface.memory_limit:
            raise TrialFailure(
                FailureKind.OUT_OF_MEMORY, f"simulated: {completions} completions per step do not fit in memory"
            )
        step_seconds = surface.seconds_per_step * ratio**surface.size_exponent * (completions / 128) ** 0.9
        evaluation_seconds = surface.evaluation_seconds * ratio**surface.size_exponent
        evaluations = []
        if 0 in job.evaluation_steps and first == 0:
            evaluations.append(_evaluate(job, surface, 0, evaluation_seconds))
        step, stopped = first, False
        while step < job.segment.stop_step and not stopped:
            step += 1
            if surface.real_seconds_per_step:
                time.sleep(surface.real_seconds_per_step)
            decision = observe(_record(job, surface, step, step_seconds))
            stopped = decision is not None and decision.stop
            if stopped or step in job.evaluation_steps:
                evaluations.append(_evaluate(job, surface, step, evaluation_seconds))
        if not stopped:
            (stage / STATE).write_text(json.dumps({"step": step}), encoding="utf-8")
        spent = len(evaluations) * evaluation_seconds
        return TrainingResult(
            end_step=step,
            end_prompts=step * job.prompts_per_step,
            evaluations=tuple(evaluations),
            startup_seconds=surface.startup_seconds,
            evaluation_seconds=spent,
            seconds=surface.startup_seconds + spent + (step - first) * step_seconds,
        )


def landscape(study: StudySpec) -> Landscape:
    """The study's landscape.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    try:
        return Landscape.model_validate(study.trainer.settings)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise SpecError(f"trainer.settings.{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def true_score(surface: Landscape, configuration: Configuration, size_ratio: float, share: float) -> float:
    """Noise-free score of a complete configuration.

    Args:
        surface: The landscape.
        configuration: With the trainer's defaults filled in.
        size_ratio: Parameters over the target's parameters.
        share: Share of the horizon trained, in [0, 1].
    """
    size = math.log10(size_ratio)
    rate = math.log10(_number(configuration["learning_rate"]))
    best = math.log10(surface.best_learning_rate) + surface.size_shift * size
    if surface.disagreement and size < 0:
        best -= 1.5 * surface.disagreement * surface.width
    distance = (rate - best) / surface.width
    coefficient = _number(configuration["kl_coefficient"]) or 1e-5
    weak = [
        (math.log10(coefficient / surface.best_kl_coefficient) / 2) ** 2,
        ((_number(configuration["clip_high"]) - 0.28) / 0.15) ** 2,
        (math.log10(_number(configuration["max_grad_norm"]) / 0.7) / 1) ** 2,
        (math.log2(_number(configuration["n_samples"]) / 8) / 2) ** 2,
        float(configuration["scheduler"] != "cosine"),
    ]
    loss = surface.weak_effect * (1 - math.exp(-sum(weak) / 3))
    ceiling = surface.ceiling + surface.size_gain * size
    base = surface.base_score * (1 + 0.3 * size / 2)
    gain = (ceiling - base) * math.exp(-(distance**2)) * (1 - loss)
    if surface.disagreement and size < 0:
        own = math.sin(7 * _number(configuration["clip_high"]) * 2 * math.pi + 3 * rate)
        gain *= 1 - surface.disagreement * 0.5 * (1 + own)
    speed = surface.speed * 10 ** min(0.0, 0.5 * (rate - best))
    value = base + gain * (1 - math.exp(-speed * share)) / (1 - math.exp(-surface.speed))
    excess = rate - best - surface.boundary
    if excess > 0:
        onset = surface.collapse_at / (1 + 2 * excess)
        value *= math.exp(-max(0.0, share - onset) / 0.05)
    return min(1.0, max(0.0, value))


def _number(value: Value) -> float:
    return float(value)


def _noise(job: Job, *parts: object) -> np.random.Generator:
    text = canonical_json([job.configuration, job.model, job.seed, *parts])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def _score(job: Job, surface: Landscape, step: int) -> float:
    share = step / job.total_steps
    score = true_score(surface, job.configuration, job.parameters / job.target_parameters, share)
    wobble = surface.seed_noise * share * float(_noise(job, "seed").normal())
    return min(1.0, max(0.0, score + wobble)) if score > 0 else 0.0


def _evaluate(job: Job, surface: Landscape, step: int, seconds: float) -> Evaluation:
    count = (job.study.evaluation.prompts or 1024) * job.study.evaluation.samples_per_prompt
    hits = int(_noise(job, "evaluation", step).binomial(count, _score(job, surface, step)))
    score = hits / count
    return Evaluation(
        step=step,
        prompts=step * job.prompts_per_step,
        score=score,
        standard_error=math.sqrt(max(score * (1 - score), 0.25 / count) / count),
        samples=count,
        seconds=seconds,
    )


def _record(job: Job, surface: Landscape, step: int, seconds: float) -> StepRecord:
    random = _noise(job, "record", step)
    score = _score(job, surface, step)
    samples = int(job.configuration["n_samples"])
    completions = job.prompts_per_step * samples
    reward = int(random.binomial(completions, score)) / completions
    share = step / job.total_steps
    best = math.log10(surface.best_learning_rate) + surface.size_shift * math.log10(
        job.parameters / job.target_parameters
    )
    excess = math.log10(_number(job.configuration["learning_rate"])) - best
    divergence = min(20.0, 0.2 * share * 10**excess * (1 + 4 * max(0.0, excess) * share))
    return StepRecord(
        step=step,
        prompts=step * job.prompts_per_step,
        tokens=step * completions * TOKENS_PER_COMPLETION,
        reward=reward,
        reward_std=math.sqrt(reward * (1 - reward)),
        zero_variance_share=min(1.0, score**samples + (1 - score) ** samples),
        kl=divergence * float(random.lognormal(0, 0.1)),
        entropy=0.5,
        clip_fraction=0.01,
        grad_norm=float(random.lognormal(0, 0.2)),
        completion_tokens=float(TOKENS_PER_COMPLETION),
        truncated_share=0.0,
        learning_rate=_number(job.configuration["learning_rate"]),
        generation_seconds=seconds / 2,
        training_seconds=seconds / 2,
    )
