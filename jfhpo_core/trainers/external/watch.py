"""Watching a run from outside: its log as it grows, its end, and its silence."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.trainers.external.failures import FATAL, explain
from jfhpo_core.trainers.external.log import LogTail
from jfhpo_core.trainers.external.process import TrainingProcess
from jfhpo_core.watchdog import Watchdog

POLL_SECONDS = 0.1

LAST_WORDS_SECONDS = 5.0
"""After a fatal line: for the rest of what is said about it."""

LOG_LINES = 50_000
"""How many lines of a log are kept to find the cause of a failure in."""


class Watch:
    """Follows a training process.

    Args:
        process: The run.
        log: Everything that it prints.
        startup_seconds: Silence allowed until two steps have shown its speed.
        hang_seconds: Silence always allowed after it.
    """

    def __init__(self, process: TrainingProcess, log: Path, startup_seconds: float, hang_seconds: float) -> None:
        self._process = process
        self._log = str(log)
        self._tail = LogTail(log)
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._lost: float | None = None
        self.watchdog = Watchdog(startup_seconds, hang_seconds)

    def poll(self, *, may_end: bool = False) -> list[str]:
        """New lines of the log, after a short sleep.

        Args:
            may_end: Whether the run may have come to a good end.

        Raises:
            TrialFailure, InfrastructureError: The run has ended, or hangs.
        """
        time.sleep(POLL_SECONDS)
        # In this order: what is printed before the end is read.
        exit_code = self._process.exit_code
        lines = self._tail.read()
        self._lines += lines
        if exit_code is not None and not lines and not (may_end and exit_code == 0):
            raise explain(list(self._lines), exit_code, self._log)
        if self._lost is None and any(FATAL.search(line) for line in lines):
            self._lost = time.monotonic()
        if self._lost is not None and time.monotonic() - self._lost > LAST_WORDS_SECONDS:
            raise explain(list(self._lines), None, self._log)
        if self.watchdog.too_long:
            last = next((line for line in reversed(self._lines) if line.strip()), "nothing was printed")
            raise InfrastructureError(f"the run hangs: {self.watchdog}; last line: {last[:200]} (log: {self._log})")
        return lines
