"""Segments that a wall-clock limit has cut: they go on in the next call of the search from the step they had reached.

A part is a checkpoint in the study's store with one file more, which holds what the segment has measured and cost so
far. The ledger does not know of it: its segment stays open, and is committed and charged as a whole once the rest is
trained. So a limit changes neither what is trained nor what the search makes of it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from jfhpo_core.store.checkpoints import CheckpointStore, manifest_fault
from jfhpo_core.study.trial import Record, SegmentResult, StepRecord
from jfhpo_core.trainers.base import Job

FILE = "jfhpo-part.json"
RECENT_STEPS = 20
"""Steps from which the speed of a run is judged."""

CUT_MARGIN = 1.3
"""A trainer that cannot be paused is cut at a rung that it reaches in time even if it is slower by this factor."""


logger = logging.getLogger(__name__)


class Part(Record):
    """What an open segment has come to so far: the result that it would have if it ended here, and its step records."""

    result: SegmentResult
    records: tuple[StepRecord, ...]

    def followed_by(self, rest: SegmentResult) -> SegmentResult:
        """The result of the rest as that of the whole segment."""
        return rest.model_copy(
            update={
                "evaluations": (*self.result.evaluations, *rest.evaluations),
                "seconds": self.result.seconds + rest.seconds,
                "startup_seconds": self.result.startup_seconds + rest.startup_seconds,
                "evaluation_seconds": self.result.evaluation_seconds + rest.evaluation_seconds,
                "message": self.result.message or rest.message,
                "moved_to": self.result.moved_to,
            }
        )


class Paused(Exception):  # noqa: N818  not an error: the time is up
    """The segment was saved as a part.

    Args:
        step: Where it stands.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"paused at step {step}")
        self.step = step


def find_part(store: CheckpointStore, job: Job) -> tuple[Path, Part] | None:
    """The newest undamaged part of a job's segment, with its folder."""
    for folder in sorted((store.root / job.trial_key).glob("step-*"), reverse=True):
        try:
            part = Part.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
            mine = part.result.segment.index == job.segment.index and part.result.end_step < job.segment.stop_step
            if mine and manifest_fault(folder) is None:
                return folder, part
        except FileNotFoundError:
            continue  # an ordinary checkpoint
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: what was saved at a wall-clock limit cannot be read: %s", folder, error)
    return None


def save_part(store: CheckpointStore, job: Job, stage: Path, part: Part, keep: Path | None) -> None:
    """Commit a staged checkpoint as a part; `keep` is where its segment began."""
    (stage / FILE).write_text(part.model_dump_json(), encoding="utf-8")
    saved = store.commit(job.trial_key, stage, part.result.end_step, part.result.end_prompts)
    store.prune(job.trial_key, [store.root / saved.path, *([keep] if keep is not None else [])])


def after_part(job: Job, part: Part) -> Job:
    """The job of the rest of a segment."""
    done = part.result
    return job.model_copy(
        update={
            "segment": job.segment.model_copy(update={"start_step": done.end_step}),
            "history": (*(record for record in job.history if record.step <= done.began_step), *part.records),
            "evaluations": (*job.evaluations, *(item for item in done.evaluations if item.step > 0)),
            "evaluation_steps": tuple(step for step in job.evaluation_steps if step > done.end_step),
        }
    )


def cut(job: Job) -> Job:
    """The job up to the last rung that a trainer which cannot be paused should reach before the deadline.

    The whole job if it fits, has no deadline, or passes no rung.
    """
    start, stop = job.segment.start_step, job.segment.stop_step
    rungs = [step for step in job.evaluation_steps if start < step < stop]
    if job.deadline is None or not rungs:
        return job
    recent = [record.generation_seconds + record.training_seconds for record in job.history[-RECENT_STEPS:]]
    expected = (job.segment.suggestion.expected_cost_seconds or 0.0) / job.devices / (stop - start)
    rate = sum(recent) / len(recent) if recent else expected
    within = start + (job.deadline - time.time()) / max(CUT_MARGIN * rate, 1e-9)
    if stop <= within:
        return job
    last = max((rung for rung in rungs if rung <= within), default=rungs[0])
    return job.model_copy(
        update={
            "segment": job.segment.model_copy(update={"stop_step": last}),
            "evaluation_steps": tuple(step for step in job.evaluation_steps if step <= last),
        }
    )


class Countdown:
    """Whether there is time for another step before a deadline, judged by the slowest one so far.

    Args:
        deadline: Seconds since the epoch; None is never.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._last: float | None = None
        self._longest = 0.0

    def over(self) -> bool:
        """Called after every step and evaluation."""
        now = time.time()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return self._deadline is not None and now + self._longest >= self._deadline
