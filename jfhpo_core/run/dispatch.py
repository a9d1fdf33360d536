"""Running jobs somewhere: the dispatcher protocol, and the one that runs them in this very process.

The Ray dispatcher lives in `jfhpo_core.run.ray_dispatch`, the only module that imports ray.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from jfhpo_core.run.parts import Paused
from jfhpo_core.run.worker import run_job
from jfhpo_core.study.trial import SegmentResult, StepRecord
from jfhpo_core.trainers import Job, Trainer, load_trainer


@dataclass(frozen=True)
class Streamed:
    """Step records of a running job, as they come."""

    key: str
    records: tuple[StepRecord, ...]


@dataclass(frozen=True)
class Finished:
    """A job is over; `records` holds all step records of its segment."""

    key: str
    result: SegmentResult
    records: tuple[StepRecord, ...]


@dataclass(frozen=True)
class Suspended:
    """A job has come to its deadline and was saved; its segment goes on from `step` when it is submitted again."""

    key: str
    step: int


Event = Streamed | Finished | Suspended


class Dispatcher(Protocol):
    """Runs jobs, several at a time.

    Infrastructure failures are retried by the dispatcher; a job that fails too often finishes with outcome 'lost'.
    """

    slots: int
    """How many jobs run at the same time."""

    def submit(self, job: Job) -> None:
        """Start a job; its trial must not have another one running."""
        ...

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Events since the last call; waits for the first one up to the timeout."""
        ...

    def now(self) -> float:
        """Seconds on the clock that trials run by (simulated or real), from an arbitrary origin."""
        ...

    def cancel(self, key: str) -> None:
        """Abandon a trial's running job, if it has one: nothing of it counts, and it never finishes."""
        ...

    def close(self) -> None:
        """Abandon running jobs and release all workers; none of their processes is left."""
        ...


@dataclass(order=True)
class _Completed:
    at: float
    order: int
    event: Finished | Suspended = field(compare=False)
    records: tuple[StepRecord, ...] = field(compare=False)


class InlineDispatcher:
    """Runs each job at once in this process and delivers results in the order of a simulated clock.

    With a trainer that reports simulated seconds, an asynchronous parallel search of hours takes seconds, and the
    order of events is that of a real one.

    Args:
        slots: Simulated parallel workers.
        on_submit: For tests: called with every job before it runs.
        trainer: Runs the jobs; None: the one that their study names.
    """

    def __init__(
        self, slots: int = 1, on_submit: Callable[[Job], None] | None = None, trainer: Trainer | None = None
    ) -> None:
        self.slots = slots
        self._trainer = trainer
        self._clock = 0.0
        self._order = 0
        self._running: list[_Completed] = []
        self._on_submit = on_submit

    def submit(self, job: Job) -> None:
        """See `Dispatcher.submit`."""
        if self._on_submit is not None:
            self._on_submit(job)
        records: list[StepRecord] = []
        began = time.perf_counter()
        event: Finished | Suspended
        try:
            result = run_job(job, self._trainer or load_trainer(job.study.trainer.name), records.append)
        except Paused as pause:
            seconds, event = 0.0, Suspended(job.trial_key, pause.step)
        else:
            seconds, event = result.seconds, Finished(job.trial_key, result, tuple(records))
        seconds = max(seconds, 0.0) or time.perf_counter() - began
        self._order += 1
        heapq.heappush(self._running, _Completed(self._clock + seconds, self._order, event, tuple(records)))

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `Dispatcher.wait`; moves the clock to the next completion."""
        if not self._running:
            return []
        completed = heapq.heappop(self._running)
        self._clock = max(self._clock, completed.at)
        return [Streamed(completed.event.key, completed.records), completed.event]

    def now(self) -> float:
        """See `Dispatcher.now`."""
        return self._clock

    def cancel(self, key: str) -> None:
        """See `Dispatcher.cancel`."""
        self._running = [completed for completed in self._running if completed.event.key != key]
        heapq.heapify(self._running)

    def close(self) -> None:
        """See `Dispatcher.close`."""
        self._running.clear()
