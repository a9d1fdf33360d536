"""Analytic multi-fidelity functions as a trainer: BoTorch's augmented Branin, Hartmann and Rosenbrock.

Model size and share of the horizon take the place of the functions' fidelity parameters. Scores are scaled so that the
optimum is 1 and the median over the target's inputs is 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from botorch.test_functions.multi_fidelity import AugmentedBranin, AugmentedHartmann, AugmentedRosenbrock
from botorch.test_functions.synthetic import SyntheticTestFunction
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import qmc

from jfhpo_core.study.hyperparameters import DEFAULT_PROMPTS_PER_STEP
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Evaluation, StepRecord, Value, canonical_json
from jfhpo_core.trainers import Job, Observer, TrainingResult
from jfhpo_core.trainers.scripted import play

Matrix = NDArray[np.float64]

SIZE_DECADES = 2.0
"""Decades in parameters from a fidelity of 1, the target, down to 0."""


class Inputs(BaseModel):
    """Inputs of a function in the unit cube; `prompts_per_step` is what every trainer has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    x0: float = Field(default=0.5, ge=0, le=1)
    x1: float = Field(default=0.5, ge=0, le=1)
    x2: float = Field(default=0.5, ge=0, le=1)
    x3: float = Field(default=0.5, ge=0, le=1)
    x4: float = Field(default=0.5, ge=0, le=1)
    x5: float = Field(default=0.5, ge=0, le=1)
    prompts_per_step: int = Field(default=DEFAULT_PROMPTS_PER_STEP, ge=1)


class Function:
    """A test function, its inputs permuted and reflected at random, its value scaled.

    Args:
        kind: The function; its last parameters are the fidelities.
        fidelities: How many of them: with one, it is the product of size and progress; with two, one each.
        logarithmic: Scale log(1 + value above the optimum) instead of the value.
        seed: Of permutation and reflections.
    """

    def __init__(self, kind: SyntheticTestFunction, fidelities: int, logarithmic: bool, seed: int) -> None:
        self.kind = kind
        self.fidelities = fidelities
        self.dimension = kind.dim - fidelities
        self._logarithmic = logarithmic
        random = np.random.default_rng(seed)
        self._order = random.permutation(self.dimension)
        self._reflected = random.random(self.dimension) < 0.5

    def score(self, inputs: Mapping[str, Value], size: float, progress: float) -> float:
        """Value at a fidelity, both parts in [0, 1]; 1 at the optimum of the highest."""
        point = np.array([float(inputs[f"x{index}"]) for index in range(self.dimension)])
        point = np.where(self._reflected, 1 - point, point)[self._order]
        return 1 - float(self._loss(point[None], size, progress)[0]) / self._scale

    @cached_property
    def _scale(self) -> float:
        """Median loss on the target."""
        return float(np.median(self._loss(qmc.Sobol(self.dimension, rng=np.random.default_rng(0)).random(1024), 1, 1)))

    def _loss(self, points: Matrix, size: float, progress: float) -> Matrix:
        """How far the values at points of the unit cube, shape (n, dimension), lie above the optimum; shape (n,)."""
        low, high = self.kind.bounds.numpy()[:, : self.dimension]
        fidelity = [size * progress] if self.fidelities == 1 else [size, progress]
        inputs = np.column_stack([low + points * (high - low), np.tile(fidelity, (len(points), 1))])
        above: Matrix = self.kind(torch.tensor(inputs, dtype=torch.double)).numpy() - self.kind.optimal_value
        return np.log1p(np.maximum(above, 0.0)) if self._logarithmic else above


def make(name: str, seed: int) -> Function:
    """The function of this name: 'branin', 'hartmann' or 'rosenbrock'."""
    if name == "branin":
        return Function(AugmentedBranin(), 1, False, seed)
    if name == "hartmann":
        return Function(AugmentedHartmann(), 1, False, seed)
    return Function(AugmentedRosenbrock(dim=6), 2, True, seed)


def size_fidelity(size_ratio: float) -> float:
    """Fidelity of a model with this share of the target's parameters."""
    return 1 + math.log10(size_ratio) / SIZE_DECADES


class FunctionTrainer:
    """Answers every job from a function, on a simulated clock.

    Args:
        function: The function.
        noise: Standard deviation of an evaluation.
        seconds_per_step: Of the target; that of a smaller model is less by the size ratio to `size_exponent`.
        size_exponent: See above.
        startup_seconds: Of every segment.
        evaluation_seconds: Of the target.
    """

    name: ClassVar[str] = "function"
    hyperparameters: ClassVar[type[BaseModel]] = Inputs

    def __init__(
        self,
        function: Function,
        noise: float,
        seconds_per_step: float,
        size_exponent: float,
        startup_seconds: float,
        evaluation_seconds: float,
    ) -> None:
        self.function = function
        self.noise = noise
        self.seconds_per_step = seconds_per_step
        self.size_exponent = size_exponent
        self.startup_seconds = startup_seconds
        self.evaluation_seconds = evaluation_seconds

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        share = (job.parameters / job.target_parameters) ** self.size_exponent
        return play(
            job,
            start,
            stage,
            observe,
            lambda step: self._record(job, step, self.seconds_per_step * share),
            lambda step: self._evaluate(job, step, share),
            self.startup_seconds,
        )

    def _evaluate(self, job: Job, step: int, share: float) -> Evaluation:
        """A noisy value; 0, the median, before the first step."""
        random = _random([job.configuration, job.model, job.seed, step])
        return Evaluation(
            step=step,
            prompts=step * job.prompts_per_step,
            score=self._score(job, step) + self.noise * random.normal() if step else 0.0,
            standard_error=self.noise,
            samples=1,
            seconds=self.evaluation_seconds * share,
        )

    def _score(self, job: Job, step: int) -> float:
        size = size_fidelity(job.parameters / job.target_parameters)
        return self.function.score(job.configuration, size, step / job.total_steps)

    def _record(self, job: Job, step: int, seconds: float) -> StepRecord:
        return StepRecord(
            step=step,
            prompts=step * job.prompts_per_step,
            tokens=0,
            reward=self._score(job, step),
            reward_std=0.0,
            zero_variance_share=0.0,
            kl=None,
            entropy=None,
            clip_fraction=None,
            grad_norm=None,
            completion_tokens=0.0,
            truncated_share=0.0,
            generation_seconds=0.0,
            training_seconds=seconds,
        )


def _random(parts: Sequence[object]) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(canonical_json(parts).encode()))
