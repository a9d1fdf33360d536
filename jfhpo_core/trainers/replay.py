"""A trainer that trains nothing: it answers from a table of recorded runs, on the clock of their cost.

A search over real learning curves takes seconds this way. See `replay_table` for what a table is.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Evaluation, Value, configuration_key
from jfhpo_core.trainers.base import Job, Observer, TrainingResult, read_settings
from jfhpo_core.trainers.replay_table import SPACE, Recording, Table, read_table
from jfhpo_core.trainers.scripted import play


class RecordedHyperparameters(Hyperparameters):
    """The hyperparameters of `Hyperparameters`, within the bounds in which the table was recorded."""

    learning_rate: float = Field(default=1e-4, description="Peak learning rate of AdamW.")

    @field_validator("*")
    @classmethod
    def _recorded(cls, value: Value, info: ValidationInfo) -> Value:
        name = str(info.field_name)
        if name in set(SPACE):
            SPACE[name].encode(value)
        elif value != cls.model_fields[name].default:
            raise ValueError(f"all recorded runs have {cls.model_fields[name].default!r}")
        return value


class ReplaySettings(BaseModel):
    """The section `trainer.settings` of a study with trainer `replay`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str = Field(description="Folder of the table; relative to the working directory.")
    task: str = Field(description="Which of the table's tasks.")
    mode: Literal["nearest", "surrogate"] = Field(
        default="nearest",
        description="'nearest' answers with the recorded configuration nearest in the unit cube of the space 'tiny', "
        "the exact one for a space that has only recorded values. 'surrogate' draws scores from a smooth model fitted "
        "to the table, and takes records and cost from the nearest.",
    )


class ReplayTrainer:
    """Answers every job from a table.

    A job's seed picks among the recorded seeds. A collapsed training that was cut short goes on as it ended.
    """

    name: ClassVar[str] = "replay"
    pauses: ClassVar[bool] = True
    hyperparameters: ClassVar[type[BaseModel]] = RecordedHyperparameters
    reinforces: ClassVar[bool] = True
    settings: ClassVar[type[BaseModel]] = ReplaySettings

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        table = _table(study)
        for name in study.space:
            if name in set(SPACE) and type(study.space[name]) is not type(SPACE[name]):
                raise SpecError(
                    f"space.{name}: the table was recorded over {SPACE[name].model_dump(exclude_defaults=True)}; "
                    f"make it a {type(SPACE[name]).model_fields['type'].default} within that"
                )
        horizon = table.total_steps * table.prompts_per_step
        if study.fidelity.horizon_prompts != horizon:
            raise SpecError(
                f"fidelity.horizon_prompts is {study.fidelity.horizon_prompts}, but the recorded runs (and their "
                f"learning-rate schedules) have {horizon} prompts; set it to {horizon}"
            )
        for model in build_ladder(study).models:
            if table.sizes.get(model.name) != model.parameters:
                raise SpecError(
                    f"family: model {model.name!r} with {model.parameters} parameters is not in the table, which has "
                    f"{table.sizes}; name these, or leave it out of target and proxies"
                )

    def warm_up(self) -> None:
        """See `Trainer.warm_up`; the table is read by the first job that asks for it."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        recording = _table(job.study).nearest(job.model, SPACE.encode(SPACE.restrict(job.configuration)), job.seed)
        return play(
            job,
            start,
            stage,
            observe,
            recording.record,
            lambda step: _evaluate(job, recording, step),
            recording.startup_seconds,
        )


def settings(study: StudySpec) -> ReplaySettings:
    """The study's trainer settings.

    Raises:
        SpecError: A setting is unknown, missing or wrong.
    """
    return read_settings(ReplaySettings, study, "replay")


def _table(study: StudySpec) -> Table:
    chosen = settings(study)
    return read_table(chosen.table, chosen.task)


def _evaluate(job: Job, recording: Recording, step: int) -> Evaluation:
    """The recorded evaluation, or one drawn from the surrogate with the noise of a real one."""
    recorded = recording.evaluation(step)
    chosen = settings(job.study)
    if chosen.mode == "nearest":
        return recorded
    from jfhpo_core.trainers.replay_surrogate import fitted

    surrogate = fitted(chosen.table, chosen.task)
    identity = [int(configuration_key(job.configuration), 16), job.parameters, job.seed]
    seed_effect = surrogate.seed_noise * float(np.random.default_rng(identity).normal()) * step / job.total_steps
    mean = surrogate.score(job.model, SPACE.encode(SPACE.restrict(job.configuration)), step)
    hits = np.random.default_rng([*identity, step]).binomial(recorded.samples, min(1.0, max(0.0, mean + seed_effect)))
    score = hits / recorded.samples
    floor = 0.25 / recorded.samples
    return recorded.model_copy(
        update={"score": score, "standard_error": math.sqrt(max(score * (1 - score), floor) / recorded.samples)}
    )
