"""A setting's recorded runs as a trainer: losses of any configuration on any model, at the price of its tokens."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, create_model
from scipy.stats import qmc

from benchmarks.foreign.tables import Flags, Interpolator, Matrix, Table, Vector
from jfhpo_core.errors import TrialFailure
from jfhpo_core.study.hyperparameters import DEFAULT_PROMPTS_PER_STEP
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Evaluation, FailureKind, StepRecord, Value, canonical_json
from jfhpo_core.trainers import Job, Observer, Trainer, TrainingResult
from jfhpo_core.trainers.scripted import play

RUN_SECONDS = 3600.0
"""Simulated seconds of a full run of the target. That of a smaller model costs less in proportion to its parameters."""

NOISE = 0.002
"""Standard deviation of a measured loss over seeds, as a share of the loss. The tables have no replicates; that of
language models is 0.1 to 0.3 %."""

SAMPLE = 2**15
"""Random configurations among which the best is looked for, before it is improved."""

STARTS, STEPS = 64, 16


@dataclass(frozen=True)
class Setting:
    """A target with its proxies in one of the tables.

    Attributes:
        name: Name of the landscape.
        table: Name of the table.
        purpose: What it is there for, for the page.
        models: Small to large, the last is the target: parameter counts of their parts (see `Table.sizes`).
        length: Length of a full run on every model, in the table's unit.
        rungs: Equally spaced evaluations of a run; 1: final losses only.
        recipe: Published hyperparameters, which a search has to beat.
        base_loss: Told as the loss of the untrained models: that of chance; the tables do not have it.
    """

    name: str
    table: str
    purpose: str
    models: tuple[tuple[float, ...], ...]
    length: float
    rungs: int
    recipe: Mapping[str, Value]
    base_loss: float

    @property
    def parameters(self) -> dict[str, int]:
        """Parameter counts by name of the model, small to large."""
        counts = [sum(parts) for parts in self.models]
        return {f"{count / 1e6:.3g}m" if count >= 1e6 else f"{count / 1e3:.0f}k": round(count) for count in counts}

    @property
    def target(self) -> str:
        """Name of the target."""
        return list(self.parameters)[-1]


@dataclass(frozen=True)
class Course:
    """What a run of one configuration on one model looks like.

    Attributes:
        losses: At the rungs, noise-free.
        diverges: Whether it becomes non-finite.
    """

    losses: tuple[float, ...]
    diverges: bool


class Surface:
    """The interpolated losses of a setting.

    Args:
        setting: The setting.
        table: Its table.
        interpolator: Fitted to the table.
    """

    def __init__(self, setting: Setting, table: Table, interpolator: Interpolator) -> None:
        self.setting = setting
        self.space = table.space
        self.divergence_share = table.divergence_share
        self._interpolator = interpolator
        self._sizes = {
            name: np.log10(np.array(parts)) for name, parts in zip(setting.parameters, setting.models, strict=True)
        }
        self._known: dict[tuple[str, bytes], Course] = {}

    def course(self, model: str, configuration: Mapping[str, Value]) -> Course:
        """The run of a configuration, which may have more hyperparameters than those of the space."""
        point = self.space.encode(self.space.restrict(configuration))
        key = model, point.tobytes()
        if key not in self._known:
            shares = np.arange(1, self.setting.rungs + 1) / self.setting.rungs
            losses, diverges = self._predict(model, point[None], shares)
            self._known[key] = Course(tuple(losses[0].tolist()), bool(diverges[0]))
        return self._known[key]

    def score(self, model: str, configuration: Mapping[str, Value]) -> float:
        """Noise-free negative loss at full length; that of chance for a run that diverges."""
        course = self.course(model, configuration)
        return -(self.setting.base_loss if course.diverges else course.losses[-1])

    def trainer(self) -> Trainer:
        """A trainer that answers from this surface, and whose defaults are the recipe."""
        fields: dict[str, Any] = {name: (type(value), value) for name, value in self.setting.recipe.items()}
        model = create_model(
            "Recipe",
            __config__=ConfigDict(frozen=True, extra="forbid"),
            **fields,
            prompts_per_step=(int, DEFAULT_PROMPTS_PER_STEP),
        )

        class Trained(SurfaceTrainer):
            hyperparameters: ClassVar[type[BaseModel]] = model

        return Trained(self)

    @cached_property
    def best_score(self) -> float:
        """The highest score of the target: of a Sobol sample, improved by shrinking random steps."""
        random = np.random.default_rng(0)
        points = qmc.Sobol(self.space.dimension, rng=random).random(SAMPLE)
        scores = self.scores(self.setting.target, points)
        chosen = np.argsort(-scores)[:STARTS]
        points, scores = points[chosen], scores[chosen]
        for scale in np.geomspace(0.2, 0.005, STEPS):
            moves = random.normal(0, scale, (8, *points.shape)) * (random.random((8, *points.shape)) < 0.5)
            trials = np.clip(points + moves, 0, 1)
            reached = self.scores(self.setting.target, trials.reshape(-1, points.shape[1])).reshape(8, -1)
            best = reached.argmax(0)
            better = reached.max(0) > scores
            points = np.where(better[:, None], trials[best, np.arange(len(points))], points)
            scores = np.where(better, reached.max(0), scores)
        return float(scores.max())

    def scores(self, model: str, points: Matrix) -> Vector:
        """See `score`; of points of the unit cube, shape (n, dimension), at once."""
        losses, diverges = self._predict(model, self.space.snap(points), np.ones(1))
        return -np.where(diverges, self.setting.base_loss, losses[:, 0])

    def _predict(self, model: str, points: Matrix, shares: Vector) -> tuple[Matrix, Flags]:
        sizes, length = self._sizes[model], float(np.log10(self.setting.length))
        return (
            self._interpolator.curves(sizes, length, points, shares),
            self._interpolator.diverges(sizes, length, points),
        )


class SurfaceTrainer:
    """Answers every job from a surface, on a simulated clock. One step is one rung; scores are negative losses.

    A run that diverges fails at the share of its length at which the median diverging run of the table did.

    Args:
        surface: The surface.
    """

    name: ClassVar[str] = "foreign"
    hyperparameters: ClassVar[type[BaseModel]]

    def __init__(self, surface: Surface) -> None:
        self.surface = surface

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        course = self.surface.course(job.model, job.configuration)
        seconds = RUN_SECONDS / job.total_steps * job.parameters / job.target_parameters
        onset = self.surface.divergence_share * job.total_steps

        def record(step: int) -> StepRecord:
            if course.diverges and step >= onset:
                spent = max(0.0, onset - job.segment.start_step) * seconds
                raise TrialFailure(FailureKind.NON_FINITE, "the recorded runs around it diverged", spent)
            return StepRecord(
                step=step,
                prompts=step * job.prompts_per_step,
                tokens=0,
                reward=-course.losses[step - 1],
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

        return play(job, start, stage, observe, record, lambda step: self._evaluate(job, course, step), 0.0)

    def _evaluate(self, job: Job, course: Course, step: int) -> Evaluation:
        loss = course.losses[step - 1] if step else self.surface.setting.base_loss
        if step:
            identity = canonical_json([job.configuration, job.model, job.seed, step])
            loss *= 1 + NOISE * np.random.default_rng(zlib.crc32(identity.encode())).normal()
        return Evaluation(
            step=step,
            prompts=step * job.prompts_per_step,
            score=-loss,
            standard_error=NOISE * loss,
            samples=1,
            seconds=0.0,
        )
