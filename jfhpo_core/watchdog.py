"""How long a run may stay silent before it is taken for hung: learned from its own speed."""

from __future__ import annotations

import statistics
import time

HANG_FACTOR = 20.0
"""A silence of so many of the run's own median steps counts as hung, if it also exceeds `hang_seconds`."""


class Watchdog:
    """Measures the silence since a run was last heard of.

    Args:
        startup_seconds: Silence allowed until two steps have shown its speed.
        hang_seconds: Silence always allowed after that.
    """

    def __init__(self, startup_seconds: float, hang_seconds: float) -> None:
        self._startup_seconds = startup_seconds
        self._hang_seconds = hang_seconds
        self._heard = time.monotonic()
        self._started = False
        self._intervals: list[float] = []

    def hear(self, *, step: bool = True) -> None:
        """The run has shown progress: a step, or something else that takes as long as it takes."""
        now = time.monotonic()
        if step and self._started:
            self._intervals.append(now - self._heard)
        self._started |= step
        self._heard = now

    @property
    def median_seconds(self) -> float:
        """Median duration of a step; 0 before the second one."""
        return statistics.median(self._intervals or [0.0])

    @property
    def limit_seconds(self) -> float:
        """Longest silence that is no hang."""
        limit = max(self._hang_seconds, HANG_FACTOR * self.median_seconds)
        return limit if self._intervals else max(limit, self._startup_seconds)

    @property
    def too_long(self) -> bool:
        """Whether the run must be taken for hung."""
        return time.monotonic() - self._heard > self.limit_seconds

    def __str__(self) -> str:
        steps = len(self._intervals) + self._started
        return f"silent for {self.limit_seconds:.0f} s after {steps} steps of {self.median_seconds:.1f} s"
