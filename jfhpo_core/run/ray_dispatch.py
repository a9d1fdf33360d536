"""Running jobs on Ray: a private instance on this machine, or a cluster. The only module that imports ray.

Workers are Ray actors that stay warm from job to job, so that imports are paid once. One thread per running job follows
it from the driver: it takes a worker, passes the step records on as they stream in, watches for silence, and starts
again on a fresh worker after an infrastructure failure. No worker outlives the driver: a private instance dies with the
process that started it (also by SIGKILL), and a cluster ends the actors of a driver that is gone.

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run.dispatch import Event, Finished, Streamed, Suspended
from jfhpo_core.run.parts import Paused
from jfhpo_core.run.worker import Cancelled, run_job
from jfhpo_core.study.spec import ClusterSpec
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
    """An actor; `ready` once it has had its resources and its imports."""

    actor: Any
    devices: int
    ready: bool = False


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
    `slots` alone bounds how many trials run, also on a machine with fewer cores. Each worker uses
    `cpus_per_device` x devices threads.

    What becomes of a job whose attempts all fail: infeasible if each of them hung (`hung`) or was killed by Ray for
    the host's memory (`out-of-memory`), and then the last attempt is charged; else lost, free of charge.

    Args:
        cluster: Where to run, what a device is, how often to try again.
        slots: How many jobs run at the same time.
        trainer: Start all workers at once and have them import this trainer; None starts them with the first jobs.

    Raises:
        SpecError: The address cannot be used.
    """

    def __init__(self, cluster: ClusterSpec, slots: int, trainer: str | None = None) -> None:
        self.slots = slots
        self._cluster = cluster
        self._address = (os.environ.get("RAY_ADDRESS") or "local") if cluster.address == "auto" else cluster.address
        _check_address(self._address)
        self._ray = _import_ray(private=self._address == "local")
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._fatal: BaseException | None = None
        self._free_slots = threading.Semaphore(slots)
        self._jobs: dict[str, tuple[threading.Thread, threading.Event]] = {}
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._placing: list[_Worker] = []
        self._started = threading.Event()
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, args=(trainer,), name="ray-keeper", daemon=True)
        self._keeper.start()

    def submit(self, job: Job) -> None:
        """See `Dispatcher.submit`."""
        cancelled = threading.Event()
        # A cancelled job of the same trial may still be ending, and a trial has one writer.
        previous, _ = self._jobs.get(job.trial_key, (None, None))
        thread = threading.Thread(
            target=self._attend, args=(job, cancelled, previous), name=f"trial-{job.trial_key}", daemon=True
        )
        self._jobs[job.trial_key] = (thread, cancelled)
        thread.start()

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
        if key in self._jobs:
            self._jobs[key][1].set()

    def close(self) -> None:
        """See `Dispatcher.close`."""
        running = list(self._jobs.values())
        for _, cancelled in running:
            cancelled.set()
        for thread, _ in running:
            thread.join()
        self._closing.set()
        self._keeper.join()

    def _keep(self, trainer: str | None) -> None:
        """Hold Ray from start to end. The kernel ends a private instance together with the thread that started it."""
        ray = self._ray
        owned = not ray.is_initialized()
        try:
            if owned:
                _start(ray, self._address)
            if trainer is not None:
                self._idle += [self._start_worker(trainer, devices=1) for _ in range(self.slots)]
        except BaseException as error:  # noqa: BLE001  whatever it is, the driver must hear of it
            message = f"Ray did not start (cluster.address {self._address!r}): {_last_line(error)}"
            remedy = "try again, or run without Ray by `cluster: {address: inline}`"
            self._events.put(InfrastructureError(f"{message}; {remedy}"))
        else:
            self._started.set()
            self._closing.wait()
            for worker in self._idle:
                self._kill(worker)
        if owned:
            ray.shutdown()

    def _attend(self, job: Job, cancelled: threading.Event, previous: threading.Thread | None) -> None:
        """Follow a job to its end; runs in a thread of its own."""
        try:
            if previous is not None:
                previous.join()
            _acquire(self._free_slots, cancelled)
            try:
                event = self._finish(job, cancelled)
                self._forget(job)
                self._events.put(event)
            finally:
                self._free_slots.release()
        except Cancelled:
            self._forget(job)
        except BaseException as error:  # noqa: BLE001  a thread's exception would vanish; the driver raises it
            self._events.put(error)

    def _forget(self, job: Job) -> None:
        """Strike a job off the list, unless its trial has been submitted again meanwhile."""
        thread, _ = self._jobs[job.trial_key]
        if thread is threading.current_thread():
            del self._jobs[job.trial_key]

    def _finish(self, job: Job, cancelled: threading.Event) -> Finished | Suspended:
        losses: list[_Loss] = []
        while True:
            records: list[StepRecord] = []
            outcome, seconds = self._attempt(job, records, cancelled)
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

    def _attempt(
        self, job: Job, records: list[StepRecord], cancelled: threading.Event
    ) -> tuple[SegmentResult | Suspended | _Loss, float]:
        """Run a job once, on one worker, which survives only if the job ended in good order.

        Returns:
            What came of it, and for how many seconds it had a worker.

        Raises:
            Cancelled: The driver withdrew the job.
        """
        outcome = _Loss("the worker ended without a result")
        worker: _Worker | None = None
        began: float | None = None
        try:
            worker = self._take(job, cancelled)
            began = time.monotonic()
            for item in self._stream(job, worker, cancelled):
                if isinstance(item, StepRecord):
                    records.append(item)
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

    def _take(self, job: Job, cancelled: threading.Event) -> _Worker:
        """A worker that is ready for a job: an idle one, or a fresh one, whichever comes first.

        There may be more slots than the cluster has resources for; a worker without them goes on waiting among the idle
        ones, and its job takes the next one that is free.
        """
        while not self._started.wait(POLL_SECONDS):
            if cancelled.is_set():
                raise Cancelled(job.trial_key)
        while True:
            with self._lock:
                worker = self._idle_worker(job.devices) or self._idle_worker(job.devices, ready=False)
                fresh = worker is None
                if worker is None:
                    # Idle workers of other shapes may hold the very resources that this one needs.
                    while self._idle:
                        self._kill(self._idle.pop())
                    worker = self._start_worker(job.study.trainer.name, job.devices)
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

    def _idle_worker(self, devices: int, *, ready: bool = True) -> _Worker | None:
        """An idle worker of a shape that is ready, or is not yet."""
        return next((item for item in self._idle if item.devices == devices and item.ready is ready), None)

    def _await(self, worker: _Worker, job: Job, cancelled: threading.Event) -> None:
        """Wait until a worker has its resources and its imports, or another one of its shape is free.

        Raises:
            InfrastructureError: Ray has nothing left that could run it.
            SpecError: This machine has not what it needs.
            Cancelled: The driver withdrew the job.
        """
        ray = self._ray
        gpus = self._resources(worker.devices)["num_gpus"]
        if self._address == "local" and gpus > (there := ray.cluster_resources().get("GPU", 0.0)):
            raise SpecError(
                f"cluster.gpus_per_device: a trial of model {job.model!r} needs {gpus:g} GPUs and this machine has "
                f"{there:g}; lower it (0 trains on CPUs), or give the address of a cluster"
            )
        ready = worker.actor.ready.remote()
        notice = time.monotonic() + PLACEMENT_NOTICE_SECONDS
        while not ray.wait([ready], timeout=POLL_SECONDS)[0]:
            if cancelled.is_set():
                raise Cancelled(job.trial_key)
            with self._lock:
                if self._idle_worker(worker.devices) is not None:
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

    def _start_worker(self, trainer: str, devices: int) -> _Worker:
        threads = max(1, int(self._cluster.cpus_per_device * devices))
        options = {
            **self._resources(devices),
            "max_concurrency": 2,  # `cancel` must get through while `train` runs
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        return _Worker(self._ray.remote(_WorkerProcess).options(**options).remote(trainer), devices)

    def _resources(self, devices: int) -> dict[str, float]:
        """What Ray counts for a worker; a private instance has no CPUs to count."""
        cpus = 0.0 if self._address == "local" else self._cluster.cpus_per_device * devices
        return {"num_cpus": cpus, "num_gpus": self._cluster.gpus_per_device * devices}

    def _release(self, worker: _Worker) -> None:
        """Keep a worker for the next job, unless a job of another shape may be waiting for its resources."""
        with self._lock:
            if any(other.devices != worker.devices for other in self._placing):
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
        # So long do Ray's helper processes wait for the rest of the instance once the driver was killed (else 60 s).
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
        # Ray binds to loopback where it knows of no cluster. Whoever reaches its ports can run code, so other users
        # of this machine need to be kept out, too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    import ray.exceptions

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
            # Ray gives its own parts 15 s to come up, which is short on a machine with much else to do.
            logger.warning("attempt %d of %d to start Ray failed: %s", attempt, START_ATTEMPTS, _last_line(error))
            ray.shutdown()
            if attempt == START_ATTEMPTS:
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


def _acquire(slots: threading.Semaphore, cancelled: threading.Event) -> None:
    while not slots.acquire(timeout=POLL_SECONDS):
        if cancelled.is_set():
            raise Cancelled


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {lines[-1].strip()}", MESSAGE_CHARACTERS, placeholder=" [...]")
