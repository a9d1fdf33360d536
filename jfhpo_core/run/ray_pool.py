"""The workers of a Ray dispatcher: started where their devices are, taken by jobs, kept warm, ended.

Where devices are not counted there may be more slots than the cluster has resources for; Ray then lets workers wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run.ray_worker import WorkerProcess
from jfhpo_core.run.scheduler import POOL
from jfhpo_core.run.worker import Cancelled
from jfhpo_core.study.spec import ClusterSpec
from jfhpo_core.trainers import Job

PLACEMENT_NOTICE_SECONDS = 60.0
"""Say that a job waits for resources this often."""

POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Worker:
    """An actor on a node; `ready` once it has had its resources and its imports."""

    actor: Any
    devices: int
    node: str
    ready: bool = False


class WorkerPool:
    """Workers that are idle, or on their way to a job. Those that train belong to their jobs.

    Args:
        ray: The module.
        cluster: What a device is.
        private: Whether the instance is a private one: it has no CPUs to count, and no node joins it.
        free: Devices of a node that no running job holds; None where devices are not counted. It is called with the
            lock held.
        lock: Guards the pool and what `free` reads.
    """

    def __init__(
        self, ray: Any, cluster: ClusterSpec, private: bool, free: Callable[[str], int | None], lock: threading.Lock
    ) -> None:
        self._ray = ray
        self._cluster = cluster
        self._private = private
        self._free = free
        self._lock = lock
        self._idle: list[Worker] = []
        self._placing: list[Worker] = []

    def warm_up(self, trainer: str, count: int) -> None:
        """Start workers of one device that import a trainer, before the first job comes."""
        self._idle += [self._start(trainer, 1, POOL) for _ in range(count)]

    def close(self) -> None:
        """End the idle workers."""
        for worker in self._idle:
            self.kill(worker)

    def take(self, job: Job, node: str, cancelled: threading.Event) -> Worker:
        """A worker that is ready for a job: an idle one, or a fresh one, whichever comes first.

        There may be more slots than the cluster has resources for where devices are not counted; a worker without them
        goes on waiting among the idle ones, and its job takes the next one that is free.

        Raises:
            InfrastructureError: Ray has nothing left that could run it.
            SpecError: This machine has not what it needs.
            Cancelled: The driver withdrew the job.
        """
        while True:
            with self._lock:
                worker = self._idle_worker(job.devices, node) or self._idle_worker(job.devices, node, ready=False)
                fresh = worker is None
                if worker is None:
                    self._make_room(node)
                    worker = self._start(job.study.trainer.name, job.devices, node)
                else:
                    self._idle.remove(worker)
                self._placing.append(worker)
            try:
                self._await(worker, job, cancelled)
            except BaseException as error:
                self.kill(worker)
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

    def release(self, worker: Worker) -> None:
        """Keep a worker for the next job, unless, with nobody counting, one of another shape may need its resources."""
        with self._lock:
            uncounted = self._free(worker.node) is None
            if uncounted and any(other.devices != worker.devices for other in self._placing):
                self.kill(worker)
            else:
                self._idle.append(worker)

    def kill(self, worker: Worker) -> None:
        """End a worker, with whatever it runs."""
        self._ray.kill(worker.actor)

    def check_machine(self, job: Job) -> None:
        """Refuse what this machine can never give to a worker; a cluster may grow.

        Raises:
            SpecError: It has too few GPUs.
        """
        gpus = self._resources(job.devices)["num_gpus"]
        if self._private and gpus > self._ray.cluster_resources().get("GPU", 0.0):
            raise self.too_few_gpus(f"a trial of model {job.model!r}", gpus)

    def too_few_gpus(self, who: str, needed: float) -> SpecError:
        """Says that this machine has fewer GPUs than `who` needs."""
        there = self._ray.cluster_resources().get("GPU", 0.0)
        return SpecError(
            f"cluster.gpus_per_device: {who} needs {needed:g} GPUs and this machine has {there:g}; lower it (0 trains "
            "on CPUs), or give the address of a cluster (cluster.address, or RAY_ADDRESS in the environment)"
        )

    def near(self, node: str) -> dict[str, Any]:
        """Options of Ray for what is to run on a node; none where nodes are not told apart."""
        if node == POOL:
            return {}
        # Soft: the node may have gone since, and then any other one will do.
        affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        return {"scheduling_strategy": affinity(node, soft=True)}

    def _make_room(self, node: str) -> None:
        """End idle workers that hold devices which a job on their node has been granted; the lock is held.

        Where devices are not counted, any of them may hold what is needed.
        """
        free = self._free(node)
        for worker in [item for item in self._idle if item.node == node]:
            if free is not None and sum(item.devices for item in self._idle if item.node == node) <= free:
                return
            self._idle.remove(worker)
            self.kill(worker)

    def _idle_worker(self, devices: int, node: str, *, ready: bool = True) -> Worker | None:
        """An idle worker of a shape, on a node, that is ready, or is not yet."""
        wanted = (devices, node, ready)
        return next((item for item in self._idle if (item.devices, item.node, item.ready) == wanted), None)

    def _await(self, worker: Worker, job: Job, cancelled: threading.Event) -> None:
        """Wait until a worker has its resources and its imports, or another one of its shape is free.

        Raises:
            InfrastructureError: Ray has nothing left that could run it.
            SpecError: This machine has not what it needs.
            Cancelled: The driver withdrew the job.
        """
        ray = self._ray
        self.check_machine(job)
        ready = worker.actor.ready.remote()
        notice = time.monotonic() + PLACEMENT_NOTICE_SECONDS
        while not ray.wait([ready], timeout=POLL_SECONDS)[0]:
            if cancelled.is_set():
                raise Cancelled(job.trial_key)
            with self._lock:
                if self._idle_worker(worker.devices, worker.node) is not None:
                    return
            # Ray itself would wait for ever: another node might join, though not a private instance.
            if self._private and not any(node["Alive"] for node in ray.nodes()):
                raise InfrastructureError(
                    "Ray has lost the raylet of its private instance on this machine, by a crash or for want of "
                    "memory; run the same command again, it goes on from here"
                )
            if time.monotonic() > notice:
                notice += PLACEMENT_NOTICE_SECONDS
                logger.warning(
                    "trial #%d waits for its worker: Ray has to find %s for it (it has %s), and the worker has to "
                    "import trainer %r", job.trial_number, self._resources(worker.devices), ray.cluster_resources(),
                    job.study.trainer.name,
                )  # fmt: skip
        ray.get(ready)
        worker.ready = True

    def _start(self, trainer: str, devices: int, node: str) -> Worker:
        threads = max(1, int(self._cluster.cpus_per_device * devices))
        options = {
            **self._resources(devices),
            "max_concurrency": 2,  # `cancel` must get through while `train` runs
            "max_restarts": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            **self.near(node),
        }
        return Worker(self._ray.remote(WorkerProcess).options(**options).remote(trainer), devices, node)

    def _resources(self, devices: int) -> dict[str, float]:
        """What Ray counts for a worker; a private instance has no CPUs to count."""
        cpus = 0.0 if self._private else self._cluster.cpus_per_device * devices
        return {"num_cpus": cpus, "num_gpus": self._cluster.gpus_per_device * devices}
