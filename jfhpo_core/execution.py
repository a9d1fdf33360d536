"""Running one job where it stands: start from a verified checkpoint, watch the rules, commit the next checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from jfhpo_core.checkpoints import CheckpointStore
from jfhpo_core.errors import CheckpointError, TrialFailure
from jfhpo_core.stopping import Monitor, NonFinite, build_rules
from jfhpo_core.trainers.base import Job, Trainer
from jfhpo_core.trial import Checkpoint, Decision, FailureKind, Outcome, Segment, SegmentResult, StepRecord


class Cancelled(Exception):  # noqa: N818  not an error: the driver asked for it
    """The driver withdrew the job; nothing of it counts."""


def run_job(
    job: Job, trainer: Trainer, on_record: Callable[[StepRecord], None], cancelled: Callable[[], bool] = lambda: False
) -> SegmentResult:
    """Train a segment and say what came of it.

    Failures that are the configuration's fault become an infeasible result. Anything else that goes wrong is raised:
    it says nothing about the configuration, and the dispatcher tries again.

    Args:
        job: The segment with all that is needed to train it.
        trainer: Who trains.
        on_record: Called with every step record as it comes.
        cancelled: Asked after every step; True abandons the segment.

    Raises:
        Cancelled: `cancelled` said so.
        CheckpointError: No usable checkpoint was left where one is needed, or the new one could not be stored.
    """
    began = time.perf_counter()
    segment = job.segment
    store = CheckpointStore(Path(job.store))
    start, job = _starting_point(store, job)
    monitor = Monitor(build_rules(job.study.stopping), list(job.history))
    decision: Decision | None = None

    def observe(record: StepRecord) -> Decision | None:
        nonlocal decision
        on_record(record)
        if cancelled():
            raise Cancelled(job.trial_key)
        decision = monitor.update(record)
        return decision

    stage = store.stage(job.trial_key)
    try:
        try:
            result = trainer.run(job, start, stage, observe)
        except TrialFailure as failure:
            return _infeasible(
                segment, job, monitor, FailureKind(failure.kind), str(failure), time.perf_counter() - began
            )
        if decision is not None and decision.rule == NonFinite.name:
            seconds = result.seconds if result.seconds is not None else time.perf_counter() - began
            return _infeasible(segment, job, monitor, FailureKind.NON_FINITE, decision.explain(), seconds)
        checkpoint: Checkpoint | None = None
        if decision is None:
            checkpoint = store.commit(job.trial_key, stage, result.end_step, result.end_prompts)
            store.prune(job.trial_key)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return SegmentResult(
        segment=segment,
        outcome=Outcome.REACHED if decision is None else Outcome.STOPPED,
        end_step=result.end_step,
        end_prompts=result.end_prompts,
        evaluations=result.evaluations,
        checkpoint=checkpoint,
        seconds=result.seconds if result.seconds is not None else time.perf_counter() - began,
        startup_seconds=result.startup_seconds,
        evaluation_seconds=result.evaluation_seconds,
        devices=job.devices,
        decision=decision,
    )


def _starting_point(store: CheckpointStore, job: Job) -> tuple[Path | None, Job]:
    """The newest checkpoint that verifies, and the job with its segment moved back to it if need be.

    With every checkpoint damaged the trial starts again at step 0: slower, but the same training.
    """
    for path in job.start_checkpoints:
        try:
            folder = store.verify(path)
        except CheckpointError:
            continue
        step = int(folder.name.removeprefix("step-"))
        return folder, _moved(job, step)
    return None, _moved(job, 0)


def _moved(job: Job, step: int) -> Job:
    if step == job.segment.start_step:
        return job
    return job.model_copy(
        update={
            "segment": job.segment.model_copy(update={"start_step": step}),
            "history": tuple(record for record in job.history if record.step <= step),
        }
    )


def _infeasible(
    segment: Segment, job: Job, monitor: Monitor, kind: FailureKind, message: str, seconds: float
) -> SegmentResult:
    step = monitor.history[-1].step if monitor.history else job.segment.start_step
    return SegmentResult(
        segment=segment, outcome=Outcome.INFEASIBLE, end_step=step, end_prompts=step * job.prompts_per_step,
        seconds=seconds, devices=job.devices, failure=kind, message=message,
    )  # fmt: skip
