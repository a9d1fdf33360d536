"""Jobs, events and processes for the tests of this folder."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from jfhpo_core.run.dispatch import Dispatcher, Finished, Streamed
from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers import Job
from tests.studies import BECAUSE

PATIENCE_SECONDS = 400.0
ENDING_SECONDS = 180.0


def first_job(study: Study, learning_rate: float = 3e-4, stop_prompts: int = 480) -> Job:
    """The first job of a trial on the target."""
    trial = study.new_trial(0, {"learning_rate": learning_rate}, study.ladder.target.name, seed=0)
    return study.job(trial, study.next_segment(trial, stop_prompts, BECAUSE), (), None)


def collect(dispatcher: Dispatcher, count: int) -> tuple[list[Streamed], dict[str, Finished]]:
    """Wait for `count` jobs to finish; returns all that was streamed, and what finished."""
    streamed: list[Streamed] = []
    finished: dict[str, Finished] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(finished) < count:
        assert time.monotonic() < deadline, f"only {len(finished)} of {count} jobs have finished"
        for event in dispatcher.wait(0.5):
            if isinstance(event, Streamed):
                streamed.append(event)
            else:
                assert event.key not in finished, "a job finished twice"
                finished[event.key] = event
    return streamed, finished


def processes() -> dict[int, tuple[int, str]]:
    """All running processes of this machine: id to parent's id and command."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,state=,command="], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()]
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")}


def descendants(pid: int) -> dict[int, str]:
    """A process's children, their children and so on: id to command."""
    table = processes()
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        children = {child: command for child, (parent, command) in table.items() if parent in frontier}
        found |= children
        frontier = set(children)
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.3)  # most conditions ask a server, which has other work to do


def all_gone(pids: set[int]) -> bool:
    """Whether the processes end within a reasonable time."""
    deadline = time.monotonic() + ENDING_SECONDS
    while pids & processes().keys():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
