from __future__ import annotations

import pytest

from benchmarks.simulator.schedules import Schedule, explore, fault_of, run, shrink
from tests.benchmarks.simulator.planted import PLANTED, Plant, a_study_that_was_released_counts_as_ours

FINDING_SCHEDULES = 3000
"""Schedules within which a planted bug is found; most need fewer than a hundred, the rarest some 1,200."""
FIRST = {"name_of_the_outbox_is_not_flushed": 190, "damage_is_not_noticed": 1200}
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
