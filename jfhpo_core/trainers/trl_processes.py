"""Runs of the `trl` trainer in processes of their own: one per device, or one whose vLLM engine ends with it.

The processes are started by `torch.distributed.run` and find each other through accelerate, as in any run of TRL on
several GPUs. The first of them tells what it has measured by a file, and waits for the answer; the others learn it from
the first, so that all of them end at the same step. Each file has a number and is written whole, or not at all.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from pathlib import Path

from jfhpo_core.errors import InfrastructureError, TrialFailure
from jfhpo_core.files import replace_file
from jfhpo_core.study.trial import Decision, Evaluation, Pause, Record, StepRecord
from jfhpo_core.trainers.base import TRAININGS, Job, Observer, TrainingResult
from jfhpo_core.trainers.external.process import TrainingProcess
from jfhpo_core.trainers.external.watch import Watch
from jfhpo_core.trainers.trl_settings import TrlSettings

MODULE = "jfhpo_core.trainers.trl_rank"

STARTUP_SECONDS, HANG_SECONDS = 1800.0, 900.0
"""As of trainers that live in environments of their own."""

ANSWER_POLL_SECONDS = 0.01


class Event(Record):
    """What was measured."""

    event: StepRecord | Evaluation


class Answer(Record):
    """What the driver says to it."""

    decision: Decision | Pause | None


class Talk:
    """Files by which the first process and its driver talk.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turn = 0

    @property
    def event(self) -> Path:
        """File of this turn's event."""
        return self.folder / f"event-{self._turn}.json"

    @property
    def answer(self) -> Path:
        """File of the answer to it."""
        return self.folder / f"answer-{self._turn}.json"

    @property
    def result(self) -> Path:
        """What the run came to."""
        return self.folder / "result.json"

    @property
    def failure(self) -> Path:
        """A verdict on the configuration."""
        return self.folder / "failure.json"

    def ask(self, event: StepRecord | Evaluation) -> Decision | Pause | None:
        """Tell the driver, and wait for its answer; it ends this process if it is gone."""
        replace_file(self.event, Event(event=event).model_dump_json())
        while not self.answer.exists():
            time.sleep(ANSWER_POLL_SECONDS)
        answer = Answer.model_validate_json(self.answer.read_bytes())
        self._turn += 1
        return answer.decision

    def reply(self, observe: Observer) -> bool:
        """Answer what was told, if anything was. Whether it was a step."""
        event = Event.model_validate_json(self.event.read_bytes()).event
        replace_file(self.answer, Answer(decision=observe(event)).model_dump_json())
        self.event.unlink()
        self._turn += 1
        return isinstance(event, StepRecord)


def train_apart(job: Job, settings: TrlSettings, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
    """See `Trainer.run`."""
    root = Path(job.store).absolute().parent / TRAININGS / job.trial_key
    folder = root / f"{job.segment.index:02d}-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    plan = {
        "job": job.model_dump_json(),
        "start": None if start is None else str(start.absolute()),
        "stage": str(stage.absolute()),
        "folder": str(Path.cwd()),
    }
    replace_file(folder / "plan.json", json.dumps(plan))
    talk, log = Talk(folder), folder / "log.txt"
    with TrainingProcess(command(settings, job.devices, folder), os.environ, log) as process:
        watch = Watch(process, log, STARTUP_SECONDS, HANG_SECONDS)
        while not talk.result.exists():
            if talk.event.exists():
                watch.watchdog.hear(step=talk.reply(observe))
                continue
            try:
                watch.poll(may_end=True)
            except (TrialFailure, InfrastructureError):
                if talk.failure.exists():
                    raise TrialFailure(**json.loads(talk.failure.read_text(encoding="utf-8"))) from None
                raise
            if process.exit_code == 0 and not talk.result.exists():
                raise InfrastructureError(f"the processes of this run ended without a result (log: {log})")
        return TrainingResult.model_validate_json(talk.result.read_bytes())


def command(settings: TrlSettings, processes: int, folder: Path) -> list[str]:
    """What starts the processes of a run."""
    return [
        settings.python or sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1",
        "--nproc-per-node", str(processes), "-m", MODULE, str(folder),
    ]  # fmt: skip
