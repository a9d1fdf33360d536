"""The contract between the search and whatever trains: one job in, a stream of step records and a checkpoint out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jfhpo_core.errors import JfhpoError, SpecError
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    Checkpoint,
    Configuration,
    Decision,
    Evaluation,
    Pause,
    Record,
    Segment,
    StepRecord,
)

Observer = Callable[[StepRecord | Evaluation], Decision | Pause | None]
"""Called by a trainer after every step and every evaluation. A decision that says stop ends the segment there; a pause,
which only steps are answered by, saves it there."""


TRAININGS = "trainings"
"""Folder beside the checkpoint store for what runs leave behind for people: logs, command lines, events."""


class Job(Record):
    """Everything a worker needs to train one segment. Plain data: it is sent to other machines.

    Attributes:
        configuration: The trial's complete configuration: hyperparameters that are searched, fixed or left at the
            trainer's defaults (the trainer fills these in).
        evaluation_steps: Steps at which the held-out set is scored, ascending; 0 asks for the base model's score.
        history: Step records of the trial's earlier segments, for stopping rules that look back.
        evaluations: Of the trained model in those segments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", arbitrary_types_allowed=True)

    study: StudySpec
    trial_key: str
    trial_number: int = Field(ge=0, description="By which messages name the trial.")
    model: str
    model_path: str = Field(description="Folder of the checkpoint, or its name on the hub.")
    parameters: int = Field(ge=1, description="Parameter count of the model.")
    target_parameters: int = Field(ge=1, description="Parameter count of the target.")
    devices: int = Field(default=1, ge=1, description="Devices that the trial holds.")
    configuration: Configuration
    seed: int
    total_steps: int = Field(ge=1)
    prompts_per_step: int = Field(ge=1)
    segment: Segment
    evaluation_steps: tuple[int, ...]
    history: tuple[StepRecord, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    store: str = Field(description="Root folder of the checkpoint store.")
    start_checkpoints: tuple[Checkpoint, ...] = Field(
        default=(), description="Checkpoints to continue from, newest first; a damaged one is passed over."
    )
    base: Evaluation | None = Field(default=None, description="Evaluation of the untrained model, if known.")
    measured: bool = Field(
        default=False, description="Whether its final score is to be reported, so that no rule that guesses may end it."
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables while it is trained: what a trainer's own tracking has to know.",
    )
    deadline: float | None = Field(
        default=None, description="Seconds since the epoch at which it has to be paused if it has not ended."
    )

    def full_at(self, step: int) -> bool:
        """Whether it is a full-length run of the target after so many steps: these are compared prompt by prompt."""
        return step >= self.total_steps and self.parameters == self.target_parameters


class TrainingResult(Record):
    """What a trainer returns for a segment; the surrounding execution adds checkpoint, charge and verdict."""

    end_step: int
    end_prompts: int
    evaluations: tuple[Evaluation, ...]
    startup_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    seconds: float | None = Field(
        default=None, description="Simulated duration; None means that the wall clock is the truth."
    )


class Level(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        subject: What was looked at, in one or two words.
        message: What was found; for a failure also what to do about it.
    """

    level: Level
    subject: str
    message: str


def failing_as(subject: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of a check; an error of ours that ends it is its last finding, a failure."""
    try:
        yield from findings
    except JfhpoError as error:
        yield Finding(Level.FAILURE, subject, str(error))


class Trainer(Protocol):
    """Turns a job into step records, evaluations and a checkpoint.

    Contract (`jfhpo.testing.TrainerConformance` holds every trainer to it):

    * `total_steps` sets the learning-rate schedule, whatever the segment's `stop_step` is.
    * Training up to b in one segment or in two gives the same records, evaluations and checkpoint (exactly on CPU).
    * `observe` is called once per step, in order, with consecutive steps, and with every evaluation, after the step's
      record. When it returns a stopping decision the trainer evaluates at that step, if it has not, and returns; no
      checkpoint needs to be written then, and the evaluation of a run that stops needs not be shown.
    * A trainer that can write its checkpoint after any step, without knowing so when it starts, says so by a class
      attribute `pauses = True`. When `observe` answers a step with a `Pause`, it takes the evaluation that is due at
      that step, if one is, writes its resumable state into `stage` and returns. Others are never asked to.
    * A trainer whose runs shall have a price before any is timed says by a class attribute `engine` what generates its
      completions: "vllm" or "transformers" (`jfhpo_core.optimizer.price`).
    * A trainer whose hyperparameters mean what published recipes of reinforcement learning mean by them says so by a
      class attribute `reinforces = True`: good values are then expected near theirs
      (`jfhpo_core.optimizer.known_optima`).
    * A trainer with settings names the model that validates them by a class attribute `settings`. A study may be
      continued with other values of the fields that the model marks as operational (`jfhpo_core.study.operational`);
      of a trainer without the attribute no setting may change.
    * When `segment.stop_step` is reached the trainer evaluates there and writes its resumable state into `stage`.
    * A configuration it cannot train is refused by `check` before any work; failures during the work that are the
      configuration's fault are raised as `TrialFailure`.
    """

    name: ClassVar[str]

    hyperparameters: ClassVar[type[BaseModel]]
    """Typed hyperparameters with their defaults and bounds. Unknown names in a study are refused by it."""

    def check(self, study: StudySpec) -> None:
        """Refuse a study that this trainer cannot run.

        Raises:
            SpecError: With the field, its value and the remedy.
        """
        ...

    def warm_up(self) -> None:
        """Import what `run` needs. A worker calls it once, before its first job; `run` must work without it, too."""
        ...

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """Train one segment.

        Args:
            job: What to train.
            start: Verified checkpoint folder to continue from (written by this trainer at `segment.start_step`), or
                None to start at step 0.
            stage: Empty folder that takes the checkpoint at `segment.stop_step`.
            observe: See `Observer`.

        Raises:
            TrialFailure: The configuration's fault (out of memory, non-finite, a failing reward function).
        """
        ...


def model_dump_hyperparameters(kind: type[BaseModel], configuration: dict[str, Any]) -> dict[str, Any]:
    """Fill a configuration with a trainer's defaults, validated."""
    return kind.model_validate(configuration).model_dump()


Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(kind: type[Settings], study: StudySpec, trainer: str) -> Settings:
    """The study's trainer settings.

    Args:
        kind: What they are validated as.
        study: The study.
        trainer: Name of the trainer, for the message.

    Raises:
        SpecError: A setting is unknown, missing or out of bounds.
    """
    try:
        return kind.model_validate(study.trainer.settings)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise SpecError(
            f"trainer.settings.{'.'.join(map(str, fault['loc']))}: {fault['msg']}; trainer {trainer!r} knows "
            f"{', '.join(kind.model_fields)}"
        ) from None
