"""How long a training may stay silent, on a clock of the test's own."""

from __future__ import annotations

import pytest

from jfhpo_core import watchdog
from jfhpo_core.watchdog import HANG_FACTOR, Watchdog


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def test_the_first_step_says_nothing_of_the_speed(clock: Clock) -> None:
    guard = Watchdog(startup_seconds=1800, hang_seconds=10)
    for _ in range(2):
        assert guard.limit_seconds == 1800
        clock.now += 3
        guard.hear()
    assert guard.limit_seconds == HANG_FACTOR * 3
    assert not guard.too_long
    clock.now += HANG_FACTOR * 3 + 1
    assert guard.too_long
    assert str(guard) == "silent for 60 s after 2 steps of 3.0 s"


def test_quick_steps_leave_time_for_an_evaluation(clock: Clock) -> None:
    guard = Watchdog(startup_seconds=1800, hang_seconds=600)
    for _ in range(5):
        clock.now += 0.1
        guard.hear()
    assert guard.limit_seconds == 600


def test_other_signs_of_life_end_a_silence_and_are_no_steps(clock: Clock) -> None:
    guard = Watchdog(startup_seconds=100, hang_seconds=10)
    clock.now += 90
    guard.hear(step=False)
    clock.now += 90
    assert not guard.too_long
    guard.hear()
    clock.now += 50
    guard.hear(step=False)
    clock.now += 2
    guard.hear()
    # Since it was last heard of, whatever by.
    assert guard.median_seconds == 2
