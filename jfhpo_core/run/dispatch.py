"""Running jobs somewhere: the dispatcher protocol, and the one that runs them in this very process.

The Ray dispatcher lives in `jfhpo_core.run.ray_dispatch`.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from jfhpo_core.errors import SpecError
from jfhpo_core.run.parts import Paused
from jfhpo_core.run.scheduler import Load, Opening, Request, Scheduler
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
    """A job is over.

    Attributes:
        records: All step records of its segment.
        waiting_seconds: Time from its submission until it had its devices.
    """

    key: str
    result: SegmentResult
    records: tuple[StepRecord, ...]
    waiting_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Suspended:
    """A job has come to its deadline and was saved; its segment goes on from `step` when it is submitted again."""

    key: str
    step: int


Event = Streamed | Finished | Suspended

TELL_SECONDS = 0.5
"""Listeners hear of a job that runs in this process at most this often."""


class Dispatcher(Protocol):
    """Runs jobs, several at a time, each as soon as its devices are free; see `jfhpo_core.run.scheduler`.

    Infrastructure failures are retried by the dispatcher; a job that fails too often finishes with outcome 'lost'.
    """

    def opening(self) -> Opening | None:
        """What one more job may be; None if there is no room for any."""
        ...

    def load(self) -> Load:
        """How busy the devices are, and which trials wait for some."""
        ...

    def listen(self, hear: Callable[[Streamed], None]) -> None:
        """Have a job told of while `submit` runs it: without records when it starts, then with those that came.

        A dispatcher whose `submit` returns before the job has run tells it all by `wait` alone.
        """
        ...

    def submit(self, job: Job) -> None:
        """Start a job, or let it wait for its devices; its trial must not have another one running."""
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


def request(job: Job) -> Request[str]:
    """What a job asks of the scheduler, by its trial's key."""
    expected = job.segment.suggestion.expected_cost_seconds
    return Request(job.trial_key, job.devices, math.inf if expected is None else expected / job.devices)


def too_large(job: Job, largest: int) -> SpecError:
    """What to say of a job that no node can hold."""
    return SpecError(
        f"family: a trial of model {job.model!r} needs {job.devices} devices, and the largest node has {largest}; "
        "lower the model's `devices`, or, where the cluster grows on demand or the trainer spreads a trial over nodes, "
        "give `cluster.devices` (how many the study may use at a time)"
    )


@dataclass(order=True)
class _Completed:
    at: float
    order: int
    event: Finished | Suspended = field(compare=False)
    records: tuple[StepRecord, ...] = field(compare=False)


@dataclass(frozen=True)
class _Submitted:
    at: float
    seconds: float
    event: Finished | Suspended
    records: tuple[StepRecord, ...]


class InlineDispatcher:
    """Runs each job at once in this process and delivers results in the order of a simulated clock.

    With a trainer that reports simulated seconds, an asynchronous parallel search of hours takes seconds, and the
    order of events is that of a real one.

    Args:
        slots: Simulated jobs that run at the same time; None: as many as the nodes have devices for.
        on_submit: For tests: called with every job before it runs.
        trainer: Runs the jobs; None: the one that their study names.
        nodes: Devices of each simulated node; None: devices are not counted.
    """

    def __init__(
        self,
        slots: int | None = 1,
        on_submit: Callable[[Job], None] | None = None,
        trainer: Trainer | None = None,
        nodes: Mapping[str, int] | None = None,
    ) -> None:
        self._scheduler: Scheduler[str] = Scheduler(nodes, slots)
        self._trainer = trainer
        self._clock = 0.0
        self._order = 0
        self._submitted: dict[str, _Submitted] = {}
        self._running: list[_Completed] = []
        self._on_submit = on_submit
        self._hear: Callable[[Streamed], None] | None = None
        self._here: Job | None = None

    def opening(self) -> Opening | None:
        """See `Dispatcher.opening`."""
        return self._scheduler.opening(self._clock)

    def load(self) -> Load:
        """See `Dispatcher.load`."""
        here = self._here.devices if self._here is not None else 0
        return Load(self._scheduler.busy + here, self._scheduler.devices, self._scheduler.waiting(self._clock))

    def listen(self, hear: Callable[[Streamed], None]) -> None:
        """See `Dispatcher.listen`."""
        self._hear = hear

    def submit(self, job: Job) -> None:
        """See `Dispatcher.submit`.

        Raises:
            SpecError: No node has as many devices.
        """
        if job.devices > self._scheduler.largest:
            raise too_large(job, self._scheduler.largest)
        if self._on_submit is not None:
            self._on_submit(job)
        records: list[StepRecord] = []
        told, told_at = 0, -math.inf

        def tell() -> None:
            nonlocal told, told_at
            if self._hear is not None and time.monotonic() - told_at > TELL_SECONDS:
                news = tuple(records[told:])
                told, told_at = len(records), time.monotonic()
                self._hear(Streamed(job.trial_key, news))

        def record(step: StepRecord) -> None:
            records.append(step)
            tell()

        began = time.perf_counter()
        event: Finished | Suspended
        self._here = job
        try:
            tell()
            result = run_job(job, self._trainer or load_trainer(job.study.trainer.name), record)
        except Paused as pause:
            seconds, event = 0.0, Suspended(job.trial_key, pause.step)
        else:
            seconds, event = result.seconds, Finished(job.trial_key, result, tuple(records))
        finally:
            self._here = None
        seconds = max(seconds, 0.0) or time.perf_counter() - began
        self._submitted[job.trial_key] = _Submitted(self._clock, seconds, event, tuple(records[told:]))
        self._scheduler.submit(request(job))
        self._start()

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `Dispatcher.wait`; moves the clock to the next completion."""
        if not self._running:
            return []
        completed = heapq.heappop(self._running)
        self._clock = max(self._clock, completed.at)
        self._scheduler.finish(completed.event.key)
        self._start()
        return [Streamed(completed.event.key, completed.records), completed.event]

    def now(self) -> float:
        """See `Dispatcher.now`."""
        return self._clock

    def cancel(self, key: str) -> None:
        """See `Dispatcher.cancel`."""
        self._running = [completed for completed in self._running if completed.event.key != key]
        heapq.heapify(self._running)
        self._submitted.pop(key, None)
        self._scheduler.finish(key)
        self._start()

    def close(self) -> None:
        """See `Dispatcher.close`."""
        self._running.clear()
        self._submitted.clear()

    def _start(self) -> None:
        """Let run what the scheduler lets start."""
        for key, _ in self._scheduler.start(self._clock):
            job = self._submitted.pop(key)
            self._order += 1
            event = job.event
            if isinstance(event, Finished):
                event = replace(event, waiting_seconds=self._clock - job.at)
            ends = self._clock + job.seconds
            self._scheduler.expect(key, ends)  # its first steps show it
            heapq.heappush(self._running, _Completed(ends, self._order, event, job.records))
