"""Running jobs on Ray: a private instance on this machine, or a cluster.

Workers are Ray actors that stay warm from job to job, so that imports are paid once. When a job gets its devices, and
on which node, is decided here (`jfhpo_core.run.scheduler`): Ray would let small jobs overtake a large one without end.
One thread per job follows it from the driver: it waits for its turn, takes a worker, passes the step records on as they
stream in, watches for silence, and starts again on a fresh worker after an infrastructure failure. No worker outlives
the driver: a private instance dies with the process that started it (also by SIGKILL), and a cluster ends the actors of
a driver that is gone.

On a cluster every node needs jfhpo of the same version, and the study's workspace, prompts and reward file under the
same paths (a shared file system). `ray://` addresses (Ray Client) cannot stream and are refused.

`ray_instance` starts Ray or joins it, `ray_pool` holds the workers, `ray_worker` is what runs in them.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run.dispatch import Event, Finished, Streamed, Suspended, request, too_large
from jfhpo_core.run.ray_instance import check_address, import_ray, last_line, start
from jfhpo_core.run.ray_pool import PLACEMENT_NOTICE_SECONDS, POLL_SECONDS, Worker, WorkerPool
from jfhpo_core.run.ray_versions import version_mismatch
from jfhpo_core.run.ray_worker import Ending, Loss, StorageProcess
from jfhpo_core.run.scheduler import POOL, Load, Opening, Request, Scheduler
from jfhpo_core.run.worker import Cancelled, Staged
from jfhpo_core.study.spec import DEFAULT_PARALLEL, ClusterSpec
from jfhpo_core.study.trial import FailureKind, Outcome, SegmentResult, StepRecord
from jfhpo_core.trainers import Job
from jfhpo_core.watchdog import Watchdog

HANG_SECONDS = 1800.0
"""A job that has delivered two steps may always be silent for this long: evaluation and checkpoint take their time, and
trainers that watch processes of their own come first with limits that are half as long."""

HANG_STARTUP_SECONDS = 3600.0
"""Silence allowed until two steps have shown a job's speed (loading, first evaluation, a step of a large model); longer
if the whole segment is expected to be."""

CANCEL_GRACE_SECONDS = 5.0
"""Time for a cancelled job to end at its next step before its worker is killed."""

HAND_OVER_BYTES = 4 * 2**30
"""A checkpoint of this size or more is stored by a process without devices, after they were given back. A smaller one
takes the worker seconds: its score is known before what comes next is chosen, and no process has to start for it."""

STORED_BYTES_PER_SECOND = 50e6
"""A process that stores a large checkpoint more slowly than this is taken to hang; shared file systems are faster."""

NODES_SECONDS = 10.0
"""How often Ray is asked whether nodes have come or gone."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """A submitted job.

    Attributes:
        thread: Follows it.
        cancelled: Set once the driver has withdrawn it.
        granted: Set once its devices are free, on `node`.
        submitted: When it began to wait for its devices, in monotonic seconds; `waited`: how long it had to, in all.
    """

    job: Job
    thread: threading.Thread = field(init=False)
    cancelled: threading.Event = field(default_factory=threading.Event)
    granted: threading.Event = field(default_factory=threading.Event)
    node: str = POOL
    submitted: float = field(default_factory=time.monotonic)
    waited: float = 0.0


def _watchdog(job: Job) -> Watchdog:
    """What is allowed to a job; more if its study allows its trainer more than usual."""
    own = job.study.trainer.settings
    startup, hang = (2.0 * float(own.get(name, 0.0)) for name in ("startup_seconds", "hang_seconds"))
    expected = (job.segment.suggestion.expected_cost_seconds or 0.0) / job.devices
    return Watchdog(max(HANG_STARTUP_SECONDS, startup, expected), max(HANG_SECONDS, hang))


class RayDispatcher:
    """Runs jobs on warm Ray workers. See `Dispatcher`.

    The constructor returns while Ray starts in the background, so that the driver can go on importing. If Ray does not
    start, the next `wait` raises.

    A private instance listens on the loopback interface only and demands a random token. Its CPUs are not counted:
    `slots` alone bounds how many trials run without GPUs, also on a machine with fewer cores. Each worker uses
    `cpus_per_device` x devices threads.

    A job gives its devices back when its trainer has returned; a large checkpoint is hashed and stored after that, by a
    process that holds none, and only then the job finishes. If the driver dies before, the segment is trained again; if
    that process does, another one stores it. If none of them can, what was measured counts without a checkpoint, and
    the trial goes on from the one before; only a run at full length, whose weights may be wanted, is trained again.

    What becomes of a job whose attempts all fail: infeasible if each of them hung (`hung`) or was killed by Ray for
    the host's memory (`out-of-memory`), and then the last attempt is charged; else lost, free of charge.

    Args:
        cluster: Where to run, what a device is, how often to try again.
        slots: How many jobs run at the same time; None: as many as the cluster has devices for, and 2 where devices are
            not counted.
        trainer: Without GPUs, start all workers at once and have them import this trainer; None starts them with the
            first jobs.

    Raises:
        SpecError: The address cannot be used.
    """

    def __init__(self, cluster: ClusterSpec, slots: int | None, trainer: str | None = None) -> None:
        self._cluster = cluster
        self._address = (os.environ.get("RAY_ADDRESS") or "local") if cluster.address == "auto" else cluster.address
        check_address(self._address)
        self._ray = import_ray(private=self._address == "local")
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._fatal: BaseException | None = None
        self._told_nodes = cluster.devices is None and cluster.gpus_per_device > 0
        if self._told_nodes:
            nodes: dict[str, int] | None = {}  # until Ray has told what there is
        else:
            nodes = None if cluster.devices is None else {POOL: cluster.devices}
            slots = DEFAULT_PARALLEL if nodes is None and slots is None else slots
        self._scheduler: Scheduler[_Ticket] = Scheduler(nodes, slots)
        self._tickets: dict[str, _Ticket] = {}
        self._lock = threading.Lock()
        self._workers = WorkerPool(self._ray, cluster, self._address == "local", self._scheduler.free, self._lock)
        self._started = threading.Event()
        self._closing = threading.Event()
        warm = slots if nodes is None and trainer is not None else 0
        self._keeper = threading.Thread(target=self._keep, args=(trainer, warm), name="ray-keeper", daemon=True)
        self._keeper.start()

    def opening(self) -> Opening | None:
        """See `Dispatcher.opening`."""
        with self._lock:
            return self._scheduler.opening(time.monotonic())

    def load(self) -> Load:
        """See `Dispatcher.load`."""
        with self._lock:
            waiting = self._scheduler.waiting(time.monotonic())
            seconds = {ticket.job.trial_key: left for ticket, left in waiting.items()}
            return Load(self._scheduler.busy, self._scheduler.devices, seconds)

    def listen(self, hear: Callable[[Streamed], None]) -> None:
        """See `Dispatcher.listen`."""

    def submit(self, job: Job) -> None:
        """See `Dispatcher.submit`."""
        # An earlier job of the same trial may still be ending, and a trial has one writer.
        self.cancel(job.trial_key)
        previous, ticket = self._tickets.get(job.trial_key), _Ticket(job)
        ticket.thread = threading.Thread(
            target=self._attend, args=(ticket, previous), name=f"trial-{job.trial_key}", daemon=True
        )
        self._tickets[job.trial_key] = ticket
        self._line_up(ticket)
        ticket.thread.start()

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `Dispatcher.wait`.

        Raises:
            InfrastructureError: Ray did not start, or has died.
            SpecError: This machine cannot give a worker what the study asks for.
        """
        events: list[Event] = []
        try:
            item = self._fatal or self._events.get(timeout=timeout_seconds)
            while not isinstance(item, BaseException):
                events.append(item)
                item = self._events.get_nowait()
        except queue.Empty:
            return events
        self._fatal = item
        if not events:
            raise item
        return events

    def now(self) -> float:
        """See `Dispatcher.now`."""
        return time.monotonic()

    def cancel(self, key: str) -> None:
        """See `Dispatcher.cancel`."""
        if key in self._tickets:
            self._tickets[key].cancelled.set()

    def close(self) -> None:
        """See `Dispatcher.close`."""
        running = list(self._tickets.values())
        for ticket in running:
            ticket.cancelled.set()
        for ticket in running:
            ticket.thread.join()
        self._closing.set()
        self._keeper.join()

    def _keep(self, trainer: str | None, warm: int) -> None:
        """Hold Ray from start to end. The kernel ends a private instance together with the thread that started it."""
        ray = self._ray
        owned = not ray.is_initialized()
        try:
            if owned:
                start(ray, self._address)
            self._look_at_nodes()
            self._refuse_without_gpus()
            self._workers.warm_up(str(trainer), warm)
        except SpecError as error:
            self._events.put(error)
        except BaseException as error:  # noqa: BLE001  whatever it is, the driver must hear of it
            remedy = "try again, or run without Ray by `cluster: {address: inline}`"
            why = version_mismatch(error) or f"{last_line(error)}; {remedy}"
            self._events.put(InfrastructureError(f"Ray did not start (cluster.address {self._address!r}): {why}"))
        else:
            self._started.set()
            while not self._closing.wait(NODES_SECONDS):
                self._look_at_nodes()
            self._workers.close()
        if owned:
            ray.shutdown()

    def _refuse_without_gpus(self) -> None:
        """Refuse a private instance without a single device, for which nothing would ever be begun; a cluster may grow.

        Raises:
            SpecError: There is none.
        """
        if self._address == "local" and self._told_nodes and self._scheduler.largest == 0:
            raise self._workers.too_few_gpus("a trial", self._cluster.gpus_per_device)

    def _look_at_nodes(self) -> None:
        """Tell the scheduler how many devices each node has, if Ray is to say so."""
        if not self._told_nodes:
            return
        try:
            nodes = self._ray.nodes()
        except self._ray.exceptions.RayError as error:
            logger.warning("Ray does not say which nodes it has: %s", last_line(error))
            return
        share = self._cluster.gpus_per_device
        devices = {node["NodeID"]: int(node["Resources"].get("GPU", 0) / share) for node in nodes if node["Alive"]}
        with self._lock:
            self._scheduler.resize(devices)
            self._start()

    def _start(self) -> None:
        """Let run what the scheduler lets start; the lock is held."""
        now = time.monotonic()
        for ticket, node in self._scheduler.start(now):
            ticket.node = node
            ticket.waited += now - ticket.submitted
            ticket.granted.set()

    def _line_up(self, ticket: _Ticket) -> None:
        """Have a job wait for its devices."""
        wanted, ticket.submitted = request(ticket.job), time.monotonic()
        with self._lock:
            self._scheduler.submit(Request(ticket, wanted.devices, wanted.seconds))
            self._start()

    def _give_back(self, ticket: _Ticket) -> None:
        """Let others have a job's devices."""
        with self._lock:
            self._scheduler.finish(ticket)
            ticket.granted.clear()
            self._start()

    def _attend(self, ticket: _Ticket, previous: _Ticket | None) -> None:
        """Follow a job to its end; runs in a thread of its own."""
        try:
            if previous is not None:
                previous.thread.join()
            event = self._finish(ticket)
            if isinstance(event, Finished):
                event = replace(event, waiting_seconds=ticket.waited)
            self._forget(ticket)
            self._events.put(event)
        except Cancelled:
            self._forget(ticket)
        except BaseException as error:  # noqa: BLE001  a thread's exception would vanish; the driver raises it
            self._events.put(error)

    def _await_turn(self, ticket: _Ticket) -> None:
        """Wait until a job has its devices.

        Raises:
            Cancelled: The driver withdrew the job.
            SpecError: No node will ever have as many devices.
        """
        job, notice = ticket.job, time.monotonic() + PLACEMENT_NOTICE_SECONDS
        while not ticket.granted.wait(POLL_SECONDS):
            if ticket.cancelled.is_set():
                raise Cancelled(job.trial_key)
            with self._lock:
                largest, load = self._scheduler.largest, self._scheduler.busy
            if self._started.is_set() and job.devices > largest:
                self._workers.check_machine(job)
                raise too_large(job, largest)
            if time.monotonic() > notice:
                notice += PLACEMENT_NOTICE_SECONDS
                logger.info("trial #%d waits for %d devices; %d are busy", job.trial_number, job.devices, load)

    def _await_start(self, ticket: _Ticket) -> None:
        """Wait until Ray has started.

        Raises:
            Cancelled: The driver withdrew the job.
        """
        while not self._started.wait(POLL_SECONDS):
            if ticket.cancelled.is_set():
                raise Cancelled(ticket.job.trial_key)

    def _forget(self, ticket: _Ticket) -> None:
        """Give a job's devices back, and strike it off the list unless its trial has been submitted again meanwhile."""
        self._give_back(ticket)
        if self._tickets[ticket.job.trial_key] is ticket:
            del self._tickets[ticket.job.trial_key]

    def _finish(self, ticket: _Ticket) -> Finished | Suspended:
        job = ticket.job
        losses: list[Loss] = []
        while True:
            records: list[StepRecord] = []
            self._await_turn(ticket)
            outcome, seconds = self._attempt(ticket, records)
            if isinstance(outcome, Staged):
                self._give_back(ticket)
                outcome = self._store(ticket, outcome)
            if isinstance(outcome, Suspended):
                return outcome
            if isinstance(outcome, SegmentResult):
                result = outcome.model_copy(update={"attempts": len(losses) + 1})
                return Finished(job.trial_key, result, tuple(records))
            losses.append(outcome)
            logger.warning("trial #%d: attempt %d was lost: %s", job.trial_number, len(losses), outcome.reason)
            if outcome.details is not None:
                logger.info("trial #%d: %s", job.trial_number, outcome.details)
            if len(losses) > self._cluster.segment_retries:
                return _give_up(job, losses, records, seconds)
            if not ticket.granted.is_set():
                self._line_up(ticket)

    def _store(self, ticket: _Ticket, staged: Staged) -> SegmentResult | Loss:
        """Have a checkpoint stored, in as many attempts as a segment has; what came of the segment.

        Raises:
            Cancelled: The driver withdrew the job.
        """
        loss = Loss("its checkpoint was not stored")
        for left in reversed(range(self._cluster.segment_retries + 1)):
            stored = self._try_to_store(ticket, staged, again=left > 0)
            if isinstance(stored, SegmentResult):
                return stored
            loss = stored
            logger.warning("trial #%d: %s", ticket.job.trial_number, loss.reason)
        if staged.result.end_step >= ticket.job.total_steps:
            return loss
        what = f"{loss.reason}; what was measured counts, and the trial can go on from the checkpoint before"
        notes = [note for note in (staged.result.message, what) if note]
        return staged.result.model_copy(update={"message": "; ".join(notes)})

    def _try_to_store(self, ticket: _Ticket, staged: Staged, *, again: bool) -> SegmentResult | Loss:
        """Have a checkpoint stored by a process without devices, on the node where it was written.

        Raises:
            Cancelled: The driver withdrew the job.
        """
        ray = self._ray
        # An actor, not a task: the driver aborts if a task is cancelled that is just about to end (seen with Ray 2.55).
        # Ray must not try again by itself: if it dies after the stage has become a checkpoint, no stage is left.
        options = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0, **self._workers.near(staged.node)}
        actor = ray.remote(StorageProcess).options(**options).remote()
        storing = actor.store.remote(staged, again)
        limit = max(HANG_SECONDS, staged.size_bytes / STORED_BYTES_PER_SECOND)
        deadline = time.monotonic() + limit
        try:
            while not ray.wait([storing], timeout=POLL_SECONDS)[0]:
                if ticket.cancelled.is_set():
                    raise Cancelled(ticket.job.trial_key)
                if time.monotonic() > deadline:
                    return Loss(f"its checkpoint was not stored within {limit:.0f} s")
            result: SegmentResult = ray.get(storing)
        except ray.exceptions.RayError as error:
            return Loss(f"its checkpoint was not stored: {last_line(error)}", details=str(error))
        finally:
            # A trial has one writer at a time: nothing happens to it before this one has ended.
            ray.kill(actor)
            ray.wait([storing], timeout=CANCEL_GRACE_SECONDS)
        return result

    def _attempt(self, ticket: _Ticket, records: list[StepRecord]) -> tuple[Ending, float]:
        """Run a job once, on one worker, which survives only if the job ended in good order.

        Returns:
            What came of it, and for how many seconds it had a worker.

        Raises:
            Cancelled: The driver withdrew the job.
        """
        job = ticket.job
        outcome: Ending = Loss("the worker ended without a result")
        worker: Worker | None = None
        began: float | None = None
        first: float | None = None
        try:
            self._await_start(ticket)
            worker = self._workers.take(job, ticket.node, ticket.cancelled)
            began = time.monotonic()
            for item in self._stream(job, worker, ticket.cancelled):
                if isinstance(item, StepRecord):
                    records.append(item)
                    first = time.monotonic() if first is None else first
                    self._expect(ticket, records, first)
                    self._events.put(Streamed(job.trial_key, (item,)))
                elif isinstance(item, SegmentResult | Staged | Suspended):
                    self._workers.release(worker)
                    worker = None
                    return item, time.monotonic() - began
                else:
                    outcome = item
        except TimeoutError as error:
            outcome = Loss(str(error), FailureKind.HUNG)
        except self._ray.exceptions.RayError as error:
            # A worker that did not even come up has not seen the configuration.
            exhausted = worker is not None and isinstance(error, self._ray.exceptions.OutOfMemoryError)
            outcome = Loss(last_line(error), FailureKind.OUT_OF_MEMORY if exhausted else None)
        finally:
            if worker is not None:
                self._workers.kill(worker)
        return outcome, 0.0 if began is None else time.monotonic() - began

    def _expect(self, ticket: _Ticket, records: list[StepRecord], first: float) -> None:
        """Tell the scheduler when a job should end, by the pace of its steps since the `first` was heard of."""
        done = records[-1].step - records[0].step
        if done > 0:
            now = time.monotonic()
            left = (ticket.job.segment.stop_step - records[-1].step) * (now - first) / done
            with self._lock:
                self._scheduler.expect(ticket, now + left)

    def _stream(self, job: Job, worker: Worker, cancelled: threading.Event) -> Iterator[StepRecord | Ending]:
        """What a worker yields for a job, as it comes.

        Raises:
            TimeoutError: It has been silent for too long.
            Cancelled: The driver withdrew the job, and it has ended or had its time to.
        """
        ray = self._ray
        stream = worker.actor.train.remote(job, HAND_OVER_BYTES)
        watchdog = _watchdog(job)
        deadline: float | None = None
        while True:
            if cancelled.is_set() and deadline is None:
                worker.actor.cancel.remote()
                deadline = time.monotonic() + CANCEL_GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                raise Cancelled(job.trial_key)
            if not ray.wait([stream], timeout=POLL_SECONDS)[0]:
                if watchdog.too_long:
                    raise TimeoutError(str(watchdog))
                continue
            try:
                item = ray.get(next(stream))
            except StopIteration:
                if cancelled.is_set():
                    raise Cancelled(job.trial_key) from None
                return
            watchdog.hear()
            if not cancelled.is_set():
                yield item


def _give_up(job: Job, losses: list[Loss], records: list[StepRecord], seconds: float) -> Finished:
    """The verdict on a job whose attempts all failed."""
    kinds = {loss.kind for loss in losses}
    kind = kinds.pop() if len(kinds) == 1 else None
    reason = losses[-1].reason
    if kind is None:
        records, seconds = [], 0.0
        message = (
            f"lost after {len(losses)} attempts, which says nothing about the configuration: {reason}; check memory, "
            "disk and network of the machines and Ray's logs (by default in /tmp/ray/session_latest/logs)"
        )
    else:
        message = f"each of {len(losses)} attempts ended like this: {reason}"
    step = records[-1].step if records else job.segment.start_step
    result = SegmentResult(
        segment=job.segment,
        outcome=Outcome.LOST if kind is None else Outcome.INFEASIBLE,
        end_step=step,
        end_prompts=step * job.prompts_per_step,
        seconds=seconds,
        devices=job.devices,
        failure=kind,
        message=message,
        attempts=len(losses),
    )
    return Finished(job.trial_key, result, tuple(records))
