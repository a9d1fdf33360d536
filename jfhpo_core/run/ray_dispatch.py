"""Running jobs on Ray: a private instance on this machine, or a cluster. The only module that imports ray.

Workers are Ray actors that stay warm from job to job, so that imports are paid once. When a job gets its devices, and
on which node, is decided here (`jfhpo_core.run.scheduler`): Ray would let small jobs overtake a large one without end.
One thread per job follows it from the driver: it waits for its turn, takes a worker, passes the step records on as they
stream in, watches for silence, and starts again on a fresh worker after an infrastructure failure. No worker outlives
the driver: a private instance dies with the process that started it (also by SIGKILL), and a cluster ends the actors of
a driver that is gone.

On a cluster every node needs jfhpo of the same version, and the study's workspace, prompts and reward file under the
same paths (a shared file system). `ray://` addresses (Ray Client) cannot stream and are refused.

Jobs train in a thread of the worker process. `signal.alarm` works in main threads only, so a reward function must not
use it: with math-verify pass `parsing_timeout=None` and `timeout_seconds=None`, as TRL itself does in threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import queue
import secrets
import signal
import socket
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run.dispatch import Event, Finished, Streamed, Suspended, request, too_large
from jfhpo_core.run.parts import Paused
from jfhpo_core.run.ray_versions import version_mismatch
from jfhpo_core.run.scheduler import POOL, Load, Opening, Request, Scheduler
from jfhpo_core.run.worker import Cancelled, run_job
from jfhpo_core.study.spec import DEFAULT_PARALLEL, ClusterSpec
from jfhpo_core.study.trial import FailureKind, Outcome, SegmentResult, StepRecord
from jfhpo_core.trainers import Job, load_trainer
from jfhpo_core.watchdog import Silence

HANG_SECONDS = 1800.0
"""A job that has delivered two steps may always be silent for this long: evaluation and checkpoint take their time, and
trainers that watch processes of their own come first with limits that are half as long."""

HANG_STARTUP_SECONDS = 3600.0
"""Silence allowed until two steps have shown a job's speed (loading, first evaluation, a step of a large model); longer
if the whole segment is expected to be."""

CANCEL_GRACE_SECONDS = 5.0
"""Time for a cancelled job to end at its next step before its worker is killed."""

PLACEMENT_NOTICE_SECONDS = 60.0
"""Say that a job waits for resources this often."""

OBJECT_STORE_BYTES = 100 * 2**20
"""Step records are all that a private instance has to hold."""

START_ATTEMPTS = 3
"""Tries to start Ray."""

CONNECT_SECONDS = 10.0
"""For a cluster to answer at all."""

MESSAGE_CHARACTERS = 400
"""Of an error are kept; Ray's can fill pages."""

POLL_SECONDS = 0.2

NODES_SECONDS = 10.0
"""How often Ray is asked whether nodes have come or gone."""

logger = logging.getLogger(__name__)

_trainer = functools.cache(load_trainer)


@dataclass(frozen=True)
class _Loss:
    """An attempt that gave no result.

    Attributes:
        kind: Failure kind to record if every attempt fails this way; None if it is never the configuration's fault.
        details: The worker's traceback, if there is one.
    """

    reason: str
    kind: FailureKind | None = None
    details: str | None = None


class _WorkerProcess:
    """What runs in a worker: one job at a time.

    Args:
        trainer: Imported at once, so that the first job finds it warm.
    """

    def __init__(self, trainer: str) -> None:
        _hear_of_children()
        _trainer(trainer).warm_up()
        self._cancelled = threading.Event()

    def ready(self) -> int:
        """Process id; answers as soon as the worker can train."""
        return os.getpid()

    def cancel(self) -> None:
        """End the running job at its next step."""
        self._cancelled.set()

    def train(self, job: Job) -> Iterator[StepRecord | SegmentResult | Suspended | _Loss]:
        """Yield a job's step records as they come, then what came of it; nothing more if cancelled."""
        self._cancelled.clear()
        items: queue.SimpleQueue[StepRecord | SegmentResult | Suspended | _Loss | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                items.put(run_job(job, _trainer(job.study.trainer.name), items.put, self._cancelled.is_set))
            except Cancelled:
                pass
            except Paused as pause:
                items.put(Suspended(job.trial_key, pause.step))
            except Exception as error:  # noqa: BLE001  the driver tries again, and reports what it was
                items.put(_Loss(_last_line(error), details=traceback.format_exc()))
            finally:
                items.put(None)

        threading.Thread(target=work, name=f"trial-{job.trial_key}", daemon=True).start()
        while (item := items.get()) is not None:
            yield item


@dataclass(eq=False)
class _Worker:
    """An actor on a node; `ready` once it has had its resources and its imports."""

    actor: Any
    devices: int
    node: str
    ready: bool = False


@dataclass(eq=False)
class _Ticket:
    """A submitted job.

    Attributes:
        thread: Follows it.
        cancelled: Set once the driver has withdrawn it.
        granted: Set once its devices are free, on `node`.
        submitted: When it was submitted, in monotonic seconds; `waited`: how long it then had to wait.
    """

    job: Job
    thread: threading.Thread = field(init=False)
    cancelled: threading.Event = field(default_factory=threading.Event)
    granted: threading.Event = field(default_factory=threading.Event)
    node: str = POOL
    submitted: float = field(default_factory=time.monotonic)
    waited: float = 0.0


def _silence(job: Job) -> Silence:
    """What is allowed to a job; more if its study allows its trainer more than usual."""
    own = job.study.trainer.settings
    startup, hang = (2.0 * float(own.get(name, 0.0)) for name in ("startup_seconds", "hang_seconds"))
    expected = (job.segment.suggestion.expected_cost_seconds or 0.0) / job.devices
    return Silence(max(HANG_STARTUP_SECONDS, startup, expected), max(HANG_SECONDS, hang))


class RayDispatcher:
    """Runs jobs on warm Ray workers. See `Dispatcher`.

    The constructor returns while Ray starts in the background, so that the driver can go on importing. If Ray does not
    start, the next `wait` raises.

    A private instance listens on the loopback interface only and demands a random token. Its CPUs are not counted:
    `slots` alone bounds how many trials run without GPUs, also on a machine with fewer cores. Each worker uses
    `cpus_per_device` x devices threads.

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
        _check_address(self._address)
        self._ray = _import_ray(private=self._address == "local")
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
        self._idle: list[_Worker] = []
        self._placing: list[_Worker] = []
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
        wanted = request(job)
        with self._lock:
            self._scheduler.submit(Request(ticket, wanted.devices, wanted.seconds))
            self._start()
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
                _start(ray, self._address)
            self._look_at_nodes()
            self._idle += [self._start_worker(str(trainer), 1, POOL) for _ in range(warm)]
        except BaseException as error:  # noqa: BLE001  whatever it is, the driver must hear of it
            remedy = "try again, or run without Ray by `cluster: {address: inline}`"
            why = version_mismatch(error) or f"{_last_line(error)}; {remedy}"
            self._events.put(InfrastructureError(f"Ray did not start (cluster.address {self._address!r}): {why}"))
        else:
            self._started.set()
            while not self._closing.wait(NODES_SECONDS):
                self._look_at_nodes()
            for worker in self._idle:
                self._kill(worker)
        if owned:
            ray.shutdown()

    def _look_at_nodes(self) -> None:
        """Tell the scheduler how many devices each node has, if Ray is to say so."""
        if not self._told_nodes:
            return
        try:
            nodes = self._ray.nodes()
        except self._ray.exceptions.RayError as error:
            logger.warning("Ray does not say which nodes it has: %s", _last_line(error))
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
            ticket.node, ticket.waited = node, now - ticket.submitted
            ticket.granted.set()

    def _attend(self, ticket: _Ticket, previous: _Ticket | None) -> None:
        """Follow a job to its end; runs in a thread of its own."""
        try:
            if previous is not None:
                previous.thread.join()
            self._await_turn(ticket)
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
                self._check_machine(job)
                raise too_large(job, largest)
            if time.monotonic() > notice:
                notice += PLACEMENT_NOTICE_SECONDS
                logger.info("trial %s waits for %d devices; %d are busy", job.trial_key, job.devices, load)

    def _forget(self, ticket: _Ticket) -> None:
        """Give a job's devices back, and strike it off the list unless its trial has been submitted again meanwhile."""
        with self._lock:
            self._scheduler.finish(ticket)
            self._start()
        if self._tickets[ticket.job.trial_key] is ticket:
            del self._tickets[ticket.job.trial_key]

    def _finish(self, ticket: _Ticket) -> Finished | Suspended:
        job = ticket.job
        losses: list[_Loss] = []
        while True:
            records: list[StepRecord] = []
            outcome, seconds = self._attempt(ticket, records)
            if isinstance(outcome, Suspended):
                return outcome
            if isinstance(outcome, SegmentResult):
                result = outcome.model_copy(update={"attempts": len(losses) + 1})
                return Finished(job.trial_key, result, tuple(records))
            losses.append(outcome)
            logger.warning("trial %s: attempt %d was lost: %s", job.trial_key, len(losses), outcome.reason)
            if outcome.details is not None:
                logger.info("trial %s: %s", job.trial_key, outcome.details)
            if len(losses) > self._cluster.segment_retries:
                return _give_up(job, losses, records, seconds)

    def _attempt(self, ticket: _Ticket, records: list[StepRecord]) -> tuple[SegmentResult | Suspended | _Loss, float]:
        """Run a job once, on one worker, which survives only if the job ended in good order.

        Returns:
            What came of it, and for how many seconds it had a worker.

        Raises:
            Cancelled: The driver withdrew the job.
        """
        job, outcome = ticket.job, _Loss("the worker ended without a result")
        worker: _Worker | None = None
        began: float | None = None
        first: float | None = None
        try:
            worker = self._take(ticket)
            began = time.monotonic()
            for item in self._stream(job, worker, ticket.cancelled):
                if isinstance(item, StepRecord):
                    records.append(item)
                    first = time.monotonic() if first is None else first
                    self._expect(ticket, records, first)
                    self._events.put(Streamed(job.trial_key, (item,)))
                elif isinstance(item, SegmentResult | Suspended):
                    self._release(worker)
                    worker = None
                    return item, time.monotonic() - began
                else:
                    outcome = item
        except TimeoutError as error:
            outcome = _Loss(str(error), FailureKind.HUNG)
        except self._ray.exceptions.RayError as error:
            # A worker that did not even come up has not seen the configuration.
            exhausted = worker is not None and isinstance(error, self._ray.exceptions.OutOfMemoryError)
            outcome = _Loss(_last_line(error), FailureKind.OUT_OF_MEMORY if exhausted else None)
        finally:
            if worker is not None:
                self._kill(worker)
        return outcome, 0.0 if began is None else time.monotonic() - began

    def _expect(self, ticket: _Ticket, records: list[StepRecord], first: float) -> None:
        """Tell the scheduler when a job should end, by the pace of its steps since the `first` was heard of."""
        done = records[-1].step - records[0].step
        if done > 0:
            now = time.monotonic()
            left = (ticket.job.segment.stop_step - records[-1].step) * (now - first) / done
            with self._lock:
                self._scheduler.expect(ticket, now + left)

    def _stream(
        self, job: Job, worker: _Worker, cancelled: threading.Event
    ) -> Iterator[StepRecord | SegmentResult | Suspended | _Loss]:
        """What a worker yields for a job, as it comes.

        Raises:
            TimeoutError: It has been silent for too long.
            Cancelled: The driver withdrew the job, and it has ended or had its time to.
        """
        ray = self._ray
        stream = worker.actor.train.remote(job)
        silence = _silence(job)
        deadline: float | None = None
        while True:
            if cancelled.is_set() and deadline is None:
                worker.actor.cancel.remote()
                deadline = time.monotonic() + CANCEL_GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                raise Cancelled(job.trial_key)
            if not ray.wait([stream], timeout=POLL_SECONDS)[0]:
                if silence.too_long:
                    raise TimeoutError(str(silence))
                continue
            try:
                item = ray.get(next(stream))
            except StopIteration:
                if cancelled.is_set():
                    raise Cancelled(job.trial_key) from None
                return
            silence.hear()
            if not cancelled.is_set():
                yield item

    def _take(self, ticket: _Ticket) -> _Worker:
        """A worker that is ready for a job: an idle one, or a fresh one, whichever comes first.

        There may be more slots than the cluster has resources for where devices are not counted; a worker without them
        goes on waiting among the idle ones, and its job takes the next one that is free.
        """
        job, cancelled, node = ticket.job, ticket.cancelled, ticket.node
        while not self._started.wait(POLL_SECONDS):
            if cancelled.is_set():
                raise Cancelled(job.trial_key)
        while True:
            with self._lock:
                worker = self._idle_worker(job.devices, node) or self._idle_worker(job.devices, node, ready=False)
                fresh = worker is None
                if worker is None:
                    self._make_room(node)
                    worker = self._start_worker(job.study.trainer.name, job.devices, node)
                else:
                    self._idle.remove(worker)
                self._placing.append(worker)
            try:
                self._await(worker, job, cancelled)
            except BaseException as error:
                self._kill(worker)
                if fresh or not isinstance(error, self._ray.exceptions.RayError):
                    raise
            else:
                if worker.ready:
                    return worker
                with self._lock:
                    self._idle.append(worker)
            finally:
                with self._lock:
                    self._placing.remove(worker)

    def _make_room(self, node: str) -> None:
        """End idle workers that hold devices which a job on their node has been granted; the lock is held.

        Where devices are not counted, any of them may hold what is needed.
        """
        free = self._scheduler.free(node)
        for worker in [item for item in self._idle if item.node == node]:
            if free is not None and sum(item.devices for item in self._idle if item.node == node) <= free:
                return
            self._idle.remove(worker)
            self._kill(worker)

    def _idle_worker(self, devices: int, node: str, *, ready: bool = True) -> _Worker | None:
        """An idle worker of a shape, on a node, that is ready, or is not yet."""
        wanted = (devices, node, ready)
        return next((item for item in self._idle if (item.devices, item.node, item.ready) == wanted), None)

    def _await(self, worker: _Worker, job: Job, cancelled: threading.Event) -> None:
        """Wait until a worker has its resources and its imports, or another one of its shape is free.

        Raises:
            InfrastructureError: Ray has nothing left that could run it.
            SpecError: This machine has not what it needs.
            Cancelled: The driver withdrew the job.
        """
        ray = self._ray
        self._check_machine(job)
        ready = worker.actor.ready.remote()
        notice = time.monotonic() + PLACEMENT_NOTICE_SECONDS
        while not ray.wait([ready], timeout=POLL_SECONDS)[0]:
            if cancelled.is_set():
                raise Cancelled(job.trial_key)
            with self._lock:
                if self._idle_worker(worker.devices, worker.node) is not None:
                    return
            # Ray itself would wait for ever: another node might join, though not a private instance.
            if self._address == "local" and not any(node["Alive"] for node in ray.nodes()):
                raise InfrastructureError(
                    "Ray has lost the raylet of its private instance on this machine, by a crash or for want of "
                    "memory; run the same command again, it goes on from here"
                )
            if time.monotonic() > notice:
                notice += PLACEMENT_NOTICE_SECONDS
                logger.warning(
                    "trial %s waits for its worker: Ray has to find %s for it (it has %s), and the worker has to "
                    "import trainer %r", job.trial_key, self._resources(worker.devices), ray.cluster_resources(),
                    job.study.trainer.name,
                )  # fmt: skip
        ray.get(ready)
        worker.ready = True

    def _check_machine(self, job: Job) -> None:
        """Refuse what this machine can never give to a worker; a cluster may grow.

        Raises:
            SpecError: It has too few GPUs.
        """
        gpus = self._resources(job.devices)["num_gpus"]
        if self._address == "local" and gpus > (there := self._ray.cluster_resources().get("GPU", 0.0)):
            raise SpecError(
                f"cluster.gpus_per_device: a trial of model {job.model!r} needs {gpus:g} GPUs and this machine has "
                f"{there:g}; lower it (0 trains on CPUs), or give the address of a cluster"
            )

    def _start_worker(self, trainer: str, devices: int, node: str) -> _Worker:
        threads = max(1, int(self._cluster.cpus_per_device * devices))
        options = {
            **self._resources(devices),
            "max_concurrency": 2,  # `cancel` must get through while `train` runs
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        if node != POOL:
            # Soft: the node may have gone since, and then any other one will do.
            affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            options["scheduling_strategy"] = affinity(node, soft=True)
        return _Worker(self._ray.remote(_WorkerProcess).options(**options).remote(trainer), devices, node)

    def _resources(self, devices: int) -> dict[str, float]:
        """What Ray counts for a worker; a private instance has no CPUs to count."""
        cpus = 0.0 if self._address == "local" else self._cluster.cpus_per_device * devices
        return {"num_cpus": cpus, "num_gpus": self._cluster.gpus_per_device * devices}

    def _release(self, worker: _Worker) -> None:
        """Keep a worker for the next job, unless, with nobody counting, one of another shape may need its resources."""
        with self._lock:
            uncounted = self._scheduler.devices is None
            if uncounted and any(other.devices != worker.devices for other in self._placing):
                self._kill(worker)
            else:
                self._idle.append(worker)

    def _kill(self, worker: _Worker) -> None:
        self._ray.kill(worker.actor)


def cluster_resources(address: str) -> dict[str, float]:
    """What a running cluster has in all, by Ray's names ('CPU', 'GPU', ...).

    Raises:
        SpecError: The address cannot be used, or no cluster answers.
    """
    _check_address(address)
    ray = _import_ray(private=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SpecError(
            f"cluster.address: the Ray cluster at {address!r} rejected the connection: {_last_line(error)}"
        ) from error
    try:
        resources: dict[str, float] = ray.cluster_resources()
    finally:
        ray.shutdown()
    return resources


def _check_address(address: str) -> None:
    """Refuse an address in a second that Ray itself would try for minutes, and then end the process."""
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise SpecError(
            f"cluster.address: {address!r} leads to Ray Client or the jobs API, which cannot stream step records; run "
            "on a machine of the cluster and give HOST:6379, or submit the search itself with `ray job submit`"
        )
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise SpecError(
            f"cluster.address: no Ray cluster answers at {address!r} ({error}); check the address and the firewall, or "
            "use 'local'"
        ) from None


def _import_ray(private: bool) -> Any:
    """Import ray, with the settings that it reads from the environment on import."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if private:
        # Ray's workers run at a low priority otherwise, behind everything else on the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # The children of a killed worker (data loaders, engines, launchers) must not train on.
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper", "true")
        # Ray gives its own parts 30 s to come up, and ends them otherwise: short on a machine with much else to do.
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
        os.environ.setdefault("RAY_agent_register_timeout_ms", "180000")
        # So long do Ray's helper processes wait for the rest of the instance once the driver was killed (else 60 s).
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
        # Ray binds to loopback where it knows of no cluster. Whoever reaches its ports can run code, so other users
        # of this machine need to be kept out, too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    import ray.exceptions
    import ray.util.scheduling_strategies

    warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
    return ray


def _start(ray: Any, address: str) -> None:
    """Connect to a cluster, or start a private instance."""
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # No CPUs: they would not be counted (see `RayDispatcher`), and Ray would start a spare worker for each.
        options |= {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(**options)
        except Exception as error:
            logger.warning("attempt %d of %d to start Ray failed: %s", attempt, START_ATTEMPTS, _last_line(error))
            ray.shutdown()
            if attempt == START_ATTEMPTS or version_mismatch(error):
                raise
        else:
            _hear_of_children()
            return


def _hear_of_children() -> None:
    """Restore the default SIGCHLD handler so that child exit codes can be read.

    Where Ray is to end the children of killed workers, it ignores SIGCHLD in driver and workers, and the kernel then
    forgets exit codes: a reward function that runs a program would see every failure as a success. Python's own
    `signal` works in the main thread only, and does not know what Ray has set.
    """
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_handler(signal.SIGCHLD, None)


def _give_up(job: Job, losses: list[_Loss], records: list[StepRecord], seconds: float) -> Finished:
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


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {lines[-1].strip()}", MESSAGE_CHARACTERS, placeholder=" [...]")
