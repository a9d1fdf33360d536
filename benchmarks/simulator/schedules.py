"""Schedules of faults: drawn from a seed, run, shrunk to what is needed, and replayed from one line of text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.simulator.world import FITS, Fault, World, Wrong

SPAN = 420
"""Faults come within so many operations; a search that is left in peace needs about 300."""
MOST_FAULTS = 5


@dataclass(frozen=True)
class Schedule:
    """What goes wrong, and when.

    Attributes:
        seed: Of everything that the faults leave open.
    """

    seed: int
    faults: tuple[Fault, ...] = ()

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        """One to `MOST_FAULTS` faults of any kind at any operation."""
        draw = random.Random(seed)
        kinds = list(FITS)
        faults = [
            Fault(draw.randrange(SPAN), draw.choice(kinds), draw.randrange(10))
            for _ in range(draw.randint(1, MOST_FAULTS))
        ]
        return cls(seed, tuple(sorted(faults, key=lambda fault: fault.at)))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """From its text.

        Raises:
            ValueError: It is none.
        """
        seed, *words = text.split()
        faults = []
        for word in words:
            at, kind, amount = word.split(":")
            faults.append(Fault(int(at), next(known for known in FITS if known == kind), int(amount)))
        return cls(int(seed), tuple(faults))

    def __str__(self) -> str:
        return " ".join([str(self.seed), *(f"{fault.at}:{fault.kind}:{fault.amount}" for fault in self.faults)])


@dataclass(frozen=True)
class Finding:
    """A schedule after which something does not hold."""

    schedule: Schedule
    what: str


@dataclass
class Tally:
    """What a number of schedules came to.

    Attributes:
        operations: Of the schedules that hold.
        happened: Faults by kind that found their operation before the study was complete.
        known: What was suggested after which commits, in all schedules.
    """

    schedules: int = 0
    operations: int = 0
    happened: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    known: dict[Any, Any] = field(default_factory=dict)

    def sentence(self) -> str:
        """For people."""
        rate = 3600 * self.schedules / max(self.seconds, 1e-9)
        return (
            f"{self.schedules} schedules, {sum(self.happened.values())} faults, {self.operations} operations, "
            f"{len(self.findings)} findings; {1000 * self.seconds / self.schedules:.0f} ms of CPU each, "
            f"{rate:,.0f} an hour"
        )


def run(schedule: Schedule, known: dict[Any, Any] | None = None) -> World:
    """Run a schedule; to be held against what the search does in peace.

    Raises:
        Wrong: Something does not hold.
    """
    world = World(schedule.seed, schedule.faults, known if known is not None else {}).run()
    if not world.harmed:
        calm, mine = _history(World(0, (), {}).run()) if not _CALM else _CALM[0], _history(world)
        if not _CALM:
            _CALM.append(calm)
        if mine != calm:
            first = next((pair for pair in zip(mine, calm, strict=False) if pair[0] != pair[1]), (mine[-1:], calm[-1:]))
            raise Wrong(f"the study ends with {first[0]} where it has {first[1]} if it is left in peace")
    return world


_CALM: list[Any] = []


def _history(world: World) -> list[Any]:
    """Committed segments in their order: trial, index, last step, charge, score."""
    rows = [
        (result.committed, trial.key, result.segment.index, result.end_step, result.seconds,
         result.evaluations[-1].score if result.evaluations else None)
        for trial in world.trials
        for result in trial.segments
    ]  # fmt: skip
    return sorted(rows)


def fault_of(schedule: Schedule, known: dict[Any, Any] | None = None) -> str | None:
    """What does not hold after a schedule; None if everything does."""
    try:
        run(schedule, known)
    except Wrong as wrong:
        return str(wrong)
    return None


def explore(
    schedules: int, first: int = 0, findings: int = 1,
    say: Callable[[Tally], None] | None = None,
) -> Tally:  # fmt: skip
    """Run schedule after schedule.

    Args:
        schedules: How many.
        first: Seed of the first.
        findings: Stop after so many.
        say: Called after every thousandth.
    """
    tally, began = Tally(), time.process_time()
    for seed in range(first, first + schedules):
        schedule = Schedule.drawn(seed)
        try:
            world = run(schedule, tally.known)
        except Wrong as wrong:
            tally.findings.append(Finding(schedule, str(wrong)))
        else:
            tally.operations += world.operations
            for fault in schedule.faults:
                if fault not in world.left:
                    tally.happened[fault.kind] = tally.happened.get(fault.kind, 0) + 1
        tally.schedules += 1
        tally.seconds = time.process_time() - began
        if say is not None and tally.schedules % 1000 == 0:
            say(tally)
        if len(tally.findings) >= findings:
            break
    return tally


def shrink(schedule: Schedule) -> Finding:
    """The simplest schedule near a failing one that still fails: fewer faults, earlier, of smaller amounts."""
    what = fault_of(schedule)
    if what is None:
        raise ValueError(f"schedule {schedule} shows nothing")
    found = Finding(schedule, what)
    while True:
        for simpler in _simpler(found.schedule):
            what = fault_of(simpler)
            if what is not None:
                found = Finding(simpler, what)
                break
        else:
            return found


def _simpler(schedule: Schedule) -> Iterator[Schedule]:
    for index, fault in enumerate(schedule.faults):
        before, after = schedule.faults[:index], schedule.faults[index + 1 :]
        yield replace(schedule, faults=(*before, *after))
        for at in sorted({0, fault.at // 2, fault.at - 8, fault.at - 1}):
            if 0 <= at < fault.at:
                moved = (*before, replace(fault, at=at), *after)
                yield replace(schedule, faults=tuple(sorted(moved, key=lambda one: one.at)))
        if fault.amount:
            yield replace(schedule, faults=(*before, replace(fault, amount=fault.amount // 2), *after))
