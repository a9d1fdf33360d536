"""Each segment of a study as a Prefect task run: visible while it trains, and with its verdict as its state."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from jfhpo.display.words import describe_end
from jfhpo.orchestration.events import trial_ended
from jfhpo_core.run.dispatch import Dispatcher, Event, Finished, Streamed, Suspended
from jfhpo_core.run.scheduler import Load, Opening
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.trial import Outcome, StepRecord, Trial
from jfhpo_core.trainers import Job

LOG_SECONDS = 10.0
"""Shortest time between two lines about the steps of a segment."""

STATES = {
    Outcome.REACHED: (StateType.COMPLETED, "Completed"),
    Outcome.STOPPED: (StateType.COMPLETED, "Stopped"),
    Outcome.INFEASIBLE: (StateType.FAILED, "Infeasible"),
    Outcome.LOST: (StateType.CRASHED, "Lost"),
}
"""State of a task run, by the outcome of its segment. Only a lost segment says something about the machines."""


@dataclass(frozen=True)
class _TaskRun:
    """A segment's task run: it waits in a thread of its own for what the driver hears about the segment."""

    job: Job
    future: PrefectFuture[Any]
    heard: queue.SimpleQueue[StepRecord | State[None]]
    ended: list[Finished] = field(default_factory=list)


class TaskRuns:
    """A dispatcher that shows each segment of another dispatcher as a task run.

    A task run ends when its segment is committed: one that is shown as ended never has to be trained again.

    Args:
        study: Name of the study.
        inner: Runs the jobs, retries infrastructure failures and ends what hangs.
        ledger: Holds the study, open.
        gate: Called with every job and its trial before it is started; may raise to end the flow run.
    """

    def __init__(
        self, study: str, inner: Dispatcher, ledger: Ledger, gate: Callable[[Job, Trial], None] = lambda *_: None
    ) -> None:
        self._study = study
        self._inner = inner
        self._ledger = ledger
        self._gate = gate
        self._runs: dict[str, _TaskRun] = {}

    def opening(self) -> Opening | None:
        """See `Dispatcher.opening`."""
        return self._inner.opening()

    def load(self) -> Load:
        """See `Dispatcher.load`."""
        return self._inner.load()

    def listen(self, hear: Callable[[Streamed], None]) -> None:
        """See `Dispatcher.listen`."""

        def follow(event: Streamed) -> None:
            self._pass_on(event)
            hear(event)

        self._inner.listen(follow)

    def submit(self, job: Job) -> None:
        """See `Dispatcher.submit`."""
        self._settle()
        trial = self._trial(job.trial_key)
        self._gate(job, trial)
        heard: queue.SimpleQueue[StepRecord | State[None]] = queue.SimpleQueue()

        @task(name="segment", task_run_name=task_run_name(trial, job), cache_policy=NO_CACHE)
        def segment() -> State[None]:
            return _follow(job, heard)

        self._runs[job.trial_key] = _TaskRun(job, segment.submit(), heard)
        self._inner.submit(job)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `Dispatcher.wait`."""
        self._settle()
        events = self._inner.wait(timeout_seconds)
        for event in events:
            run = self._runs.get(event.key)
            if run is None:
                continue
            if isinstance(event, Finished):
                run.ended.append(event)
            elif isinstance(event, Suspended):
                message = f"the wall-clock limit came; the next run goes on from step {event.step}"
                self._end(event.key, State(type=StateType.COMPLETED, name="Paused", message=message))
            else:
                self._pass_on(event)
        return events

    def now(self) -> float:
        """See `Dispatcher.now`."""
        return self._inner.now()

    def cancel(self, key: str) -> None:
        """See `Dispatcher.cancel`."""
        self._inner.cancel(key)
        if key in self._runs:
            self._end(key, _cancelled("the search withdrew it"))

    def close(self) -> None:
        """See `Dispatcher.close`."""
        self._settle()
        for key in list(self._runs):
            self._end(key, _cancelled("the flow run ended; the next run of the study trains this segment again"))
        self._inner.close()

    def _pass_on(self, event: Streamed) -> None:
        for record in event.records:
            self._runs[event.key].heard.put(record)

    def _settle(self) -> None:
        """End the task runs whose segments have been committed since the last call."""
        for key, run in list(self._runs.items()):
            trial = self._trial(key)
            if run.ended and len(trial.segments) > run.job.segment.index:
                result = trial.segments[run.job.segment.index]
                kind, name = STATES[result.outcome]
                trial_ended(self._study, trial, result)
                self._end(key, State(type=kind, name=name, message=describe_end(trial, result)))

    def _end(self, key: str, state: State[None]) -> None:
        run = self._runs.pop(key)
        run.heard.put(state)
        run.future.wait()

    def _trial(self, key: str) -> Trial:
        return next(trial for trial in self._ledger.trials() if trial.key == key)


def task_run_name(trial: Trial, job: Job) -> str:
    """What is trained and who chose it: '#7 large, steps 12 to 24 of 60 (jfhpo/knowledge-gradient)'."""
    segment = job.segment
    label = trial.label or segment.suggestion.source
    seed = f", seed {trial.seed}" if trial.purpose == "confirmation" else ""
    steps = f"steps {segment.start_step} to {segment.stop_step} of {trial.total_steps}"
    return f"#{trial.number} {trial.model}, {steps} ({label}{seed})"


def _cancelled(message: str) -> State[None]:
    return State(type=StateType.CANCELLED, name="Cancelled", message=message)


def _follow(job: Job, heard: queue.SimpleQueue[StepRecord | State[None]]) -> State[None]:
    """Log what is heard of a segment until it ends; runs in the task run's thread."""
    log = get_run_logger()
    values = ", ".join(f"{name}={value}" for name, value in job.configuration.items())
    log.info("%s; with %s", job.segment.suggestion.explanation, values)
    last: StepRecord | None = None
    shown, logged_at = 0, time.monotonic()
    while isinstance(item := heard.get(), StepRecord):
        last = item
        if time.monotonic() - logged_at >= LOG_SECONDS:
            log.info(_step_line(last, job))
            shown, logged_at = last.step, time.monotonic()
    if last is not None and last.step > shown:
        log.info(_step_line(last, job))
    return item


def _step_line(record: StepRecord, job: Job) -> str:
    kl = "" if record.kl is None else f", KL {record.kl:.4g}"
    return f"step {record.step} of {job.segment.stop_step}: reward {record.reward:.4g}{kl}"
