"""Processes that can be killed, and what is left of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from jfhpo_core.errors import JfhpoError

PATIENCE_SECONDS = 900.0
ENDING_SECONDS = 30.0
"""Within this time every process of a search that has died must be gone."""

SERVER = multiprocessing.get_context("forkserver")
"""Starts the searches: what takes seconds to import is imported once, and each is a process that can be killed. They
are not forked from this process, whose threads (of Ray, of torch) a fork would cut off in the midst of their work."""
SERVER.set_forkserver_preload(
    [
        __name__,
        "benchmarks.faults.campaign",
        "jfhpo.cli",
        "jfhpo.display.live",
        "jfhpo.display.result",
        "jfhpo.session",
        "jfhpo_core.optimizer.joint_fidelity",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow_plugin.registry",
        "matplotlib.pyplot",
    ]
)


def signal_to(pid: int, number: signal.Signals) -> None:
    """Send a signal; the process may have ended a moment ago."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def until(condition: Callable[[], bool]) -> None:
    """Wait; a search that does not go on is an error."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise JfhpoError("the search does not go on")
        time.sleep(0.01)


def _processes() -> list[tuple[int, int, str]]:
    """Id, session and command of all running processes."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,sid=,state=,command="], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()]
    return [(int(row[0]), int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")]


def session(leader: int) -> set[int]:
    """A process and what it and its children have started, also in sessions of their own."""
    parents = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
    table = [tuple(map(int, line.split())) for line in parents.splitlines()]
    found, frontier = {leader}, {leader}
    while frontier:
        frontier = {pid for pid, parent in table if parent in frontier} - found
        found |= frontier
    return found | {pid for pid, session, _ in _processes() if session == leader}


def left(started: set[int]) -> list[str]:
    """Commands of those processes that do not end."""
    deadline = time.monotonic() + ENDING_SECONDS
    while left := [command for pid, _, command in _processes() if pid in started]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def part(leader: int, name: str) -> set[int]:
    """Those of a process and of what it has started whose command contains a name."""
    mine = session(leader)
    return {pid for pid, _, command in _processes() if pid in mine and name in command}


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return any(pid == one for one, _, _ in _processes())


def in_process(call: Callable[..., Any], *arguments: Any, patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Call in a process of its own, so that no connection to a database is carried into the next one."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_send, args=(there, call, arguments))
    process.start()
    if not here.poll(patience_seconds):
        process.kill()
        raise JfhpoError(f"the ledger was not read or written within {patience_seconds:.0f} s")
    result = here.recv()
    process.join()
    return result


def _send(there: Connection, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
    there.send(call(*arguments))
