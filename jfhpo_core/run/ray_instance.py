"""Ray itself: its import, its addresses, an instance that is started or joined. The only module that imports ray."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import signal
import socket
import textwrap
import warnings
from pathlib import Path
from typing import Any

from jfhpo_core.errors import SpecError
from jfhpo_core.run.ray_versions import version_mismatch
from jfhpo_core.trainers.external.reaper import PR_SET_PDEATHSIG

OBJECT_STORE_BYTES = 100 * 2**20
"""Step records are all that a private instance has to hold."""

START_ATTEMPTS = 3
"""Tries to start Ray."""

CONNECT_SECONDS = 10.0
"""For a cluster to answer at all."""

MESSAGE_CHARACTERS = 400
"""How much of an error message is kept; Ray's can fill pages."""

logger = logging.getLogger(__name__)


def import_ray(private: bool) -> Any:
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


def check_address(address: str) -> None:
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


def start(ray: Any, address: str) -> None:
    """Connect to a cluster, or start a private instance."""
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # No CPUs: they would not be counted (see `RayDispatcher`), and Ray would start a spare worker for each.
        options |= {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(**options)
        except Exception as error:
            logger.warning("attempt %d of %d to start Ray failed: %s", attempt, START_ATTEMPTS, last_line(error))
            ray.shutdown()
            if attempt == START_ATTEMPTS or version_mismatch(error):
                raise
        else:
            hear_of_children()
            return


def cluster_resources(address: str) -> dict[str, float]:
    """What a running cluster has in all, by Ray's names ('CPU', 'GPU', ...).

    Raises:
        SpecError: The address cannot be used, or no cluster answers.
    """
    check_address(address)
    ray = import_ray(private=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SpecError(
            f"cluster.address: the Ray cluster at {address!r} rejected the connection: {last_line(error)}"
        ) from error
    try:
        resources: dict[str, float] = ray.cluster_resources()
    finally:
        ray.shutdown()
    return resources


def hear_of_children() -> None:
    """Restore the default SIGCHLD handler so that child exit codes can be read.

    Where Ray is to end the children of killed workers, it ignores SIGCHLD in driver and workers, and the kernel then
    forgets exit codes: a reward function that runs a program would see every failure as a success. Python's own
    `signal` works in the main thread only, and does not know what Ray has set.
    """
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_handler(signal.SIGCHLD, None)


def end_with_raylet() -> None:
    """Have the kernel end this worker when its raylet dies, where it is Linux and the raylet its parent.

    A worker that hears of its raylet's death ends by itself. One that stands still (SIGSTOP, a frozen device driver)
    hears nothing, and would hold its memory and devices after driver and raylet were killed; SIGKILL reaches it.
    """
    parent = Path(f"/proc/{os.getppid()}/comm")
    if parent.exists() and parent.read_text(encoding="utf-8").strip() == "raylet":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {lines[-1].strip()}", MESSAGE_CHARACTERS, placeholder=" [...]")


def this_node() -> str:
    """Ray's name of the node that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
