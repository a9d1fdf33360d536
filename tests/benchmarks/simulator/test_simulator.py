from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from benchmarks.simulator.disk import Disk, SimulatedPath
from benchmarks.simulator.schedules import Schedule, explore, fault_of, run, shrink
from tests.benchmarks.simulator.planted import PLANTED, Plant, a_study_that_was_released_counts_as_ours

FINDING_SCHEDULES = 3000
"""Schedules within which a planted bug is found; most need fewer than a hundred, the rarest some 200."""
FIRST = {"name_of_the_outbox_is_not_flushed": 190}
"""Where to begin with the bugs that few schedules show: shortly before one that does, at the time of writing."""


@pytest.mark.slow
def test_nothing_is_found_in_some_schedules() -> None:
    tally = explore(40, first=100_000)
    assert tally.findings == []
    assert len(tally.happened) >= 10


def test_a_schedule_is_replayed_from_its_text() -> None:
    schedule = Schedule.drawn(7)
    assert Schedule.parse(str(schedule)) == schedule
    one, other = run(schedule), run(Schedule.parse(str(schedule)))
    assert one.operations == other.operations
    assert one.trials == other.trials


@pytest.mark.parametrize(
    "finding",
    [
        pytest.param("500012 22:away:1 85:power:1", id="power is lost while the outbox grows"),
        pytest.param("1218 6:twice:0", id="the run of the study is created twice"),
        pytest.param("4746 4:power:8 39:away:9 89:power:0 139:away:6 371:late:8", id="a character is cut off"),
    ],
)
def test_what_was_found_holds_now(finding: str) -> None:
    assert fault_of(Schedule.parse(finding)) is None


def left_by_a_loss_of_power(change: Callable[[SimulatedPath], object], monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """What a hundred losses of power leave of a file whose content `old` was flushed before the change."""
    left = set()
    for seed in range(100):
        disk = Disk(lambda _kind, apply: apply())
        monkeypatch.setattr(SimulatedPath, "disk", disk, raising=False)
        path = SimulatedPath("/file")
        path.write_bytes(b"old")
        disk.flush(path)
        disk.flush(path.parent)
        change(path)
        disk.lose_power(random.Random(seed))
        left.add(path.read_bytes())
    return left


def test_a_loss_of_power_takes_nothing_that_was_flushed_before_more_was_appended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def append(path: SimulatedPath) -> None:
        with path.open("a") as file:
            file.write("new")

    assert left_by_a_loss_of_power(append, monkeypatch) == {b"old", b"oldn", b"oldne", b"oldnew"}


def test_a_loss_of_power_may_take_what_was_flushed_from_a_file_that_is_written_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = left_by_a_loss_of_power(lambda path: path.write_bytes(b"new"), monkeypatch)
    assert left == {b"old", b"", b"n", b"ne", b"new"}


def test_a_finding_is_shrunk_to_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule.parse("13 115:stop:2 148:stop:2 333:away:2")
    assert fault_of(schedule) is None
    a_study_that_was_released_counts_as_ours(monkeypatch)
    found = shrink(schedule)
    assert [fault.kind for fault in found.schedule.faults] == ["stop"]
    assert fault_of(found.schedule) == found.what


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Schedule(0))  # the calm search, before there is a bug
    plant(monkeypatch)
    tally = explore(FINDING_SCHEDULES, first=FIRST.get(plant.__name__, 0))
    assert tally.findings, f"not found in {tally.schedules} schedules"
