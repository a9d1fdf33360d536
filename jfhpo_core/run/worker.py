"""Running one job where it stands: start from a verified checkpoint, watch the rules, commit the next checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from jfhpo_core.errors import CheckpointError, InfrastructureError, TrialFailure
from jfhpo_core.run.parts import Countdown, Part, Paused, after_part, cut, find_part, save_part
from jfhpo_core.stopping.rules import Course, Monitor, NonFinite, build_rules
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.metrics import training_means
from jfhpo_core.study.models import steps_at
from jfhpo_core.study.trial import (
    Decision,
    Evaluation,
    FailureKind,
    Outcome,
    Pause,
    Segment,
    SegmentResult,
    StepRecord,
)
from jfhpo_core.trainers.base import Job, Trainer

logger = logging.getLogger(__name__)

COMPANIONS = "jfhpo.companions"
"""Entry-point group of context managers around the run of a segment; each is called with the job."""


class Cancelled(Exception):  # noqa: N818  not an error: the driver asked for it
    """The driver withdrew the job; nothing of it counts."""


@dataclass(frozen=True)
class Staged:
    """A segment that was trained to its end and whose checkpoint is still to be stored, which takes no devices.

    Plain data: it may be stored by another process than the one that trained it.

    Attributes:
        result: What came of the segment, without the checkpoint.
        key: Of the trial.
        store: Root folder of the checkpoint store.
        stage: Folder with what the trainer wrote, perhaps on a disk of `node` alone.
        start: Folder of the checkpoint that the segment started from, if from one.
        size_bytes: Of what is to be stored.
        node: Where it was trained; "" where nodes are not told apart.
    """

    result: SegmentResult
    key: str
    store: Path
    stage: Path
    start: Path | None
    size_bytes: int
    node: str = ""


def run_job(
    job: Job, trainer: Trainer, on_record: Callable[[StepRecord], None], cancelled: Callable[[], bool] = lambda: False
) -> SegmentResult:
    """Train a segment, store its checkpoint and say what came of it; see `train_job` and `store_staged`."""
    came = train_job(job, trainer, on_record, cancelled)
    return store_staged(came) if isinstance(came, Staged) else came


def store_staged(staged: Staged, *, again: bool = False) -> SegmentResult:
    """Commit the stage, and keep beside it only the checkpoint that the segment started from.

    The ledger learns of the new one later: if this process dies in between, the segment is trained again from `start`.
    From then on `start` is the one that serves if the new one turns out damaged.

    Args:
        staged: What is to be stored.
        again: Whether it will be tried again if it fails, so that the stage has to stay then.

    Raises:
        CheckpointError: The checkpoint could not be stored.
    """
    store, result, stored = CheckpointStore(staged.store), staged.result, False
    try:
        checkpoint = store.commit(staged.key, staged.stage, result.end_step, result.end_prompts)
        stored = True
    finally:
        if stored or not again:
            shutil.rmtree(staged.stage, ignore_errors=True)
    store.prune(staged.key, [store.root / checkpoint.path, *([staged.start] if staged.start is not None else [])])
    return result.model_copy(update={"checkpoint": checkpoint})


def train_job(
    job: Job, trainer: Trainer, on_record: Callable[[StepRecord], None], cancelled: Callable[[], bool] = lambda: False
) -> SegmentResult | Staged:
    """Train a segment and say what came of it.

    What a segment is charged ends here, when the trainer has returned: what follows needs no devices.

    Failures that are the configuration's fault become an infeasible result. Anything else that goes wrong is raised:
    it says nothing about the configuration, and the dispatcher tries again.

    Args:
        job: The segment with all that is needed to train it.
        trainer: Who trains.
        on_record: Called with every step record as it comes.
        cancelled: Asked after every step; True abandons the segment.

    Raises:
        Cancelled: `cancelled` said so.
        Paused: The job's deadline came first; the next call with this segment goes on from there.
        CheckpointError: What was paused could not be stored.
        InfrastructureError: The trainer broke its contract.
    """
    began = time.perf_counter()
    segment = job.segment
    store = CheckpointStore(Path(job.store), local_stages(job))
    found = find_part(store, job)
    if found is None:
        start, job, note = _starting_point(store, job)
        before, kept = None, start
    else:
        (start, before), note = found, None
        kept = next((store.root / checkpoint.path for checkpoint in job.start_checkpoints), None)
        job = after_part(job, before)
    pauses = getattr(trainer, "pauses", False)
    job = job if pauses else cut(job)
    records = list(before.records) if before is not None else []
    for record in records:
        on_record(record)
    floors = {floor.step: floor.score for floor in segment.floors}
    course = Course(
        job.total_steps,
        job.base,
        list(job.history),
        list(job.evaluations),
        floors,
        groups=job.prompts_per_step,
        completions=job.prompts_per_step * int(job.configuration.get("n_samples", 1)),
    )
    monitor = Monitor(build_rules(job.study.stopping, measured=job.measured), course)
    countdown = Countdown(job.deadline)
    decision: Decision | None = None
    paused = job.segment.stop_step < segment.stop_step

    def charge(simulated: float | None = None) -> float:
        return simulated if simulated is not None else time.perf_counter() - began

    def failed(kind: FailureKind, message: str, seconds: float) -> SegmentResult:
        result = _infeasible(segment, job, monitor, kind, message, seconds)
        return result if before is None else before.followed_by(result)

    def observe(event: StepRecord | Evaluation) -> Decision | Pause | None:
        nonlocal decision, paused
        late = countdown.over()
        if isinstance(event, StepRecord):
            on_record(event)
            records.append(event)
        if cancelled():
            raise Cancelled(job.trial_key)
        found = monitor.update(event)
        # The first one stands: an evaluation that follows it takes nothing back.
        decision = decision or found
        if late and pauses and decision is None and isinstance(event, StepRecord) and event.step < segment.stop_step:
            paused = True
            return Pause()
        return decision

    stage = store.stage(job.trial_key)
    with ExitStack() as unless_staged:
        unless_staged.callback(shutil.rmtree, stage, ignore_errors=True)
        try:
            with _surroundings(job):
                result = trainer.run(job, start, stage, observe)
        except TrialFailure as failure:
            return failed(FailureKind(failure.kind), str(failure), charge(failure.seconds))
        except MemoryError as error:
            message = f"the trainer ran out of memory: {error or 'MemoryError'}"
            return failed(FailureKind.OUT_OF_MEMORY, message, charge())
        if decision is not None and decision.rule == NonFinite.name:
            return failed(FailureKind.NON_FINITE, decision.explain(), charge(result.seconds))
        ended = SegmentResult(
            segment=segment,
            outcome=Outcome.REACHED if decision is None else Outcome.STOPPED,
            end_step=result.end_step,
            end_prompts=result.end_prompts,
            evaluations=tuple(_with_means(job, course.records, one) for one in result.evaluations),
            seconds=charge(result.seconds),
            startup_seconds=result.startup_seconds,
            evaluation_seconds=result.evaluation_seconds,
            devices=job.devices,
            decision=decision,
            message=note,
            moved_to=job.segment.start_step if job.segment.start_step != segment.start_step else None,
        )
        ended = ended if before is None else before.followed_by(ended)
        if decision is not None:
            return ended
        if paused and result.end_step < segment.stop_step:
            save_part(store, job, stage, Part(result=ended, records=tuple(records)), kept)
            raise Paused(result.end_step)
        if result.end_step != job.segment.stop_step:
            raise InfrastructureError(
                f"trainer {job.study.trainer.name!r} returned at step {result.end_step} without a stopping decision; "
                f"it must train up to step {job.segment.stop_step}"
            )
        size_bytes = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
        unless_staged.pop_all()
        return Staged(ended, job.trial_key, store.root, stage, kept, size_bytes)


def local_stages(job: Job) -> Path | None:
    """Folder on a disk of this node for the stages of a job's store; None if the study names none.

    Raises:
        InfrastructureError: This node makes no absolute path of what the study names.
    """
    named = job.study.cluster.local_folder
    if named is None:
        return None
    folder = Path(os.path.expandvars(named))
    if not folder.is_absolute():
        raise InfrastructureError(
            f"cluster.local_folder: {named!r} is {str(folder)!r} on this node, which is no absolute path; set the "
            "variable on every node, or name a folder that all of them have"
        )
    # Studies of one name in different workspaces have the same trial keys.
    return folder / f"jfhpo-{hashlib.sha256(job.store.encode()).hexdigest()[:16]}"


def _with_means(job: Job, records: Sequence[StepRecord], evaluation: Evaluation) -> Evaluation:
    """An evaluation with what the steps since the rung before were measured by, and whether they had any reward."""
    rungs = [steps_at(level, job.prompts_per_step) for level in job.study.fidelity.levels]
    before = max((rung for rung in rungs if rung < evaluation.step), default=0)
    since = [record for record in records if before < record.step <= evaluation.step]
    rewarded = any(record.reward != 0 or record.reward_std != 0 for record in since) if since else None
    means = training_means(since, job.devices, job.total_steps)
    return evaluation.model_copy(update={"training": means, "rewarded": rewarded})


@contextmanager
def _surroundings(job: Job) -> Iterator[None]:
    """The job's environment variables, and the companions that are installed."""
    before = {name: os.environ.get(name) for name in job.environment}
    os.environ.update(job.environment)
    try:
        with ExitStack() as stack:
            for companion in _companions():
                stack.enter_context(companion(job))
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@cache  # reading the metadata of all installed packages takes a tenth of a second
def _companions() -> tuple[Callable[[Job], AbstractContextManager[None]], ...]:
    return tuple(point.load() for point in entry_points(group=COMPANIONS))


def _starting_point(store: CheckpointStore, job: Job) -> tuple[Path | None, Job, str | None]:
    """The newest checkpoint that verifies, the job with its segment moved back to it if need be, and a note if so.

    With every checkpoint damaged the trial starts again at step 0: slower, but the same run.
    """
    faults = []
    for checkpoint in job.start_checkpoints:
        try:
            folder = store.verify(checkpoint)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        return folder, _moved(job, checkpoint.step), _note(job, checkpoint.step, faults)
    return None, _moved(job, 0), _note(job, 0, faults)


def _note(job: Job, step: int, faults: list[str]) -> str | None:
    if not faults and step == job.segment.start_step:
        return None
    reasons = "; ".join(faults) or "the checkpoint there was not stored"
    note = f"trained again from step {step} instead of {job.segment.start_step}: {reasons}"
    logger.warning("trial #%d: %s", job.trial_number, note)
    return note


def _moved(job: Job, step: int) -> Job:
    if step == job.segment.start_step:
        return job
    return job.model_copy(
        update={
            "segment": job.segment.model_copy(update={"start_step": step}),
            "history": tuple(record for record in job.history if record.step <= step),
            "evaluations": tuple(evaluation for evaluation in job.evaluations if evaluation.step <= step),
        }
    )


def _infeasible(
    segment: Segment, job: Job, monitor: Monitor, kind: FailureKind, message: str, seconds: float
) -> SegmentResult:
    step = monitor.course.records[-1].step if monitor.course.records else job.segment.start_step
    return SegmentResult(
        segment=segment, outcome=Outcome.INFEASIBLE, end_step=step, end_prompts=step * job.prompts_per_step,
        seconds=seconds, devices=job.devices, failure=kind, message=message,
    )  # fmt: skip
