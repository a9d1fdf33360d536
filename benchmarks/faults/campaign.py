"""Searches that are disturbed from fault to fault until their study is complete."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.faults.disks import damage, full
from benchmarks.faults.processes import (
    PATIENCE_SECONDS,
    SERVER,
    in_process,
    is_alive,
    left,
    part,
    session,
    signal_to,
    until,
)
from benchmarks.faults.records import Kind, Place, Record
from benchmarks.faults.studies import Piece, digest, look, pieces, study_of, undisturbed
from benchmarks.runner import commit
from benchmarks.tracking_server import TrackingServer
from jfhpo.session import OUTBOX
from jfhpo_core.run.dispatch import Dispatcher, Event, Finished, InlineDispatcher, Streamed
from jfhpo_core.run.scheduler import Load, Opening
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.store.outbox import Outbox
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers import Job
from mlflow_plugin.ledger import MlflowLedger

LONGEST_DELAY_SECONDS = 1.5
EARLY_SHARE = 0.25
"""Share of the faults that may come before the search has done anything new since it was started."""
LONGEST_ABSENCE_SECONDS = 6.0
"""Between the end of a server and its next start, which takes some seconds itself."""
DELIVERED_SHARE = 0.5
"""Share of the absences after which the search may deliver what it has kept; else the next process has to."""
JUMP_SECONDS = 30 * 24 * 3600.0
WORKER = "WorkerProcess"
"""In the command of a Ray worker that trains."""
HUNG_SECONDS = 15.0
"""Silence after which a worker counts as hung, instead of half an hour."""
MEMORY_SHARE = 0.1
"""Of the machine's memory, above what is in use when a search begins: from there on Ray ends workers."""
HOG_SHARE = 0.13
HOG_BYTES = 64 * 2**20


@dataclass
class Disturbance:
    """What a search's own process does to itself."""

    clock_jump: tuple[float, float] | None = None
    duplicates: bool = False
    late: bool = False
    memory_share: float | None = None


class Unreliable:
    """A dispatcher that delivers twice, or again what was delivered before. See `Dispatcher`."""

    def __init__(self, inner: Dispatcher, ledger: Ledger, how: Disturbance) -> None:
        self._inner, self._ledger, self._how = inner, ledger, how

    def opening(self) -> Opening | None:
        """See `Dispatcher.opening`."""
        return self._inner.opening()

    def load(self) -> Load:
        """See `Dispatcher.load`."""
        return self._inner.load()

    def listen(self, hear: Callable[[Streamed], None]) -> None:
        """See `Dispatcher.listen`."""
        self._inner.listen(hear)

    def submit(self, job: Job) -> None:
        """See `Dispatcher.submit`."""
        self._inner.submit(job)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `Dispatcher.wait`."""
        events = self._inner.wait(timeout_seconds)
        if self._how.duplicates:
            events = [event for event in events for _ in range(2)]
        if self._how.late:
            done = [(trial.key, result) for trial in self._ledger.trials() for result in trial.segments]
            events = [
                *(Finished(key, result.model_copy(update={"seconds": 1e6}), ()) for key, result in done[:3]),
                *events,
            ]
        return events

    def now(self) -> float:
        """See `Dispatcher.now`."""
        return self._inner.now()

    def cancel(self, key: str) -> None:
        """See `Dispatcher.cancel`."""
        self._inner.cancel(key)

    def close(self) -> None:
        """See `Dispatcher.close`."""
        self._inner.close()


def search(spec: StudySpec, journal: Path, how: Disturbance) -> None:
    """Run or continue a study in this process; note every segment as soon as its commit has returned."""
    _interrupt_on_sigterm()
    if how.clock_jump is not None:
        _jump(*how.clock_jump)
    study = resolve(spec)
    ledger = Outbox(MlflowLedger(), study.folder / OUTBOX)
    inner: Dispatcher = InlineDispatcher(1)
    if spec.cluster.address != "inline":
        from jfhpo_core.run import ray_dispatch

        ray_dispatch.HANG_SECONDS = ray_dispatch.HANG_STARTUP_SECONDS = HUNG_SECONDS
        if how.memory_share is not None:
            os.environ |= {"RAY_memory_usage_threshold": f"{how.memory_share:.3f}"}
        inner = ray_dispatch.RayDispatcher(spec.cluster, 1, trainer=spec.trainer.name)
    noted = len(_read(journal))

    def note(progress: Progress) -> None:
        nonlocal noted
        done = pieces(progress.trials)
        with journal.open("a", encoding="utf-8") as file:
            file.writelines(f"{time.monotonic()} {digest(piece)}\n" for piece in done[noted:])
        noted = len(done)

    try:
        run_search(study, ledger, Unreliable(inner, ledger, how), note)
    finally:
        inner.close()
    ledger.deliver()
    journal.with_suffix(".complete").touch()


def _interrupt_on_sigterm() -> None:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _jump(after_seconds: float, by_seconds: float) -> None:
    """Let the wall clock of this process jump."""
    real, began = time.time, time.monotonic()
    time.time = lambda: real() + (by_seconds if time.monotonic() - began > after_seconds else 0.0)


def _read(journal: Path) -> list[tuple[float, str]]:
    """When, by the monotonic clock, and what was acknowledged."""
    if not journal.exists():
        return []
    lines = (line.split() for line in journal.read_text(encoding="utf-8").splitlines(keepends=True))
    return [(float(line[0]), line[1]) for line in lines if len(line) == 2]


@dataclass
class Campaign:
    """The searches of one seed, from fault to fault until the study is complete.

    Args:
        seed: Of the study and of the faults.
        folder: Empty; takes the database and the workspace. A file system of its own if its disk is to be filled.
        place: Where the search runs.
        kinds: What is drawn from, see `DRAWN`.
        server: Holds the ledger, running; None for a database in the folder.
    """

    seed: int
    folder: Path
    place: Place
    kinds: Sequence[Kind]
    server: TrackingServer | None = None
    records: list[Record] = field(default_factory=list)
    _seen: list[str] = field(default_factory=list, init=False)

    def run(self, most: int = 1000) -> list[Record]:
        """Disturb the study until it is complete, at most so often; then let it end in peace."""
        calm = undisturbed(self.seed)
        draw = random.Random(self.seed)
        spec = study_of(self.seed, self.folder, self.place, self.server.url if self.server is not None else None)
        exact = True
        bag: list[Kind] = []
        while not self._complete:
            bag = bag or draw.sample(self.kinds, len(self.kinds))
            kind = bag.pop() if len(self.records) < most else None
            acknowledged, began = len(self._noted()), time.monotonic()
            hits = self._disturb(spec, kind, draw)
            first = next((at for at, _ in self._noted()[acknowledged:]), None)
            if self.records and self.records[-1].recovery_seconds is None and first is not None:
                self._amend(recovery_seconds=round(first - began, 2))
            if kind == "checkpoint-damaged":
                # From here on a segment may be trained again from further back, and cost more than in peace.
                exact = False
            found = tuple(self._violations(spec, calm if exact else None))
            for name, after in hits:
                self.records.append(
                    Record(
                        seed=self.seed, number=len(self.records), kind=name, place=self.place,
                        after_seconds=round(after, 2), acknowledged=len(self._noted()), recovery_seconds=None,
                        violations=found, commit=commit(),
                    )
                )  # fmt: skip
            if found and not hits:
                self._amend(violations=(*self.records[-1].violations, *found))
        return self.records

    def _amend(self, **change: Any) -> None:
        """Complete the last record by what was seen after the next start."""
        self.records[-1] = self.records[-1].model_copy(update=change)

    @property
    def _journal(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.journal"

    @property
    def _complete(self) -> bool:
        return self._journal.with_suffix(".complete").exists()

    def _noted(self) -> list[tuple[float, str]]:
        return _read(self._journal)

    def _disturb(self, spec: StudySpec, kind: Kind | None, draw: random.Random) -> list[tuple[Kind, float]]:
        """Start the search and disturb it until it has ended.

        Returns:
            The faults that have hit it, each with the seconds since the start: none if it was complete before. What it
            survives is followed by a kill.
        """
        delay, early = draw.uniform(0.0, LONGEST_DELAY_SECONDS), draw.random() < EARLY_SHARE
        how = Disturbance(
            clock_jump=(delay, draw.uniform(-JUMP_SECONDS, JUMP_SECONDS)) if kind == "clock-jump" else None,
            duplicates=kind == "duplicates",
            late=kind == "late-result",
            memory_share=_used_memory() + MEMORY_SHARE if kind == "memory-hog" else None,
        )
        itself = how.clock_jump is not None or how.duplicates or how.late
        hits: list[tuple[Kind, float]] = []
        began, known = time.monotonic(), len(self._noted())
        process = SERVER.Process(target=_in_own_session, args=(spec, self._journal, how))
        process.start()
        assert process.pid is not None
        started = {process.pid}

        def hit(what: Kind) -> None:
            hits.append((what, time.monotonic() - began))

        try:
            if kind is None:
                process.join(PATIENCE_SECONDS)
            elif self.place == "ray" or itself or not early:
                # Ray has to come up, and what the process does to itself shall be done to a segment at least.
                until(lambda: len(self._noted()) > known or not process.is_alive())
            process.join(delay)
            started |= session(process.pid)
            if itself and kind is not None:
                hit(kind)
                if process.exitcode:
                    self._seen.append(f"the search ended by itself with exit code {process.exitcode}")
            if not process.is_alive():
                return hits
            if kind == "disk-full":
                hit(kind)
                with full(self.folder):
                    process.join(draw.uniform(0.0, 2.0))
            elif kind == "driver-term":
                hit(kind)
                signal_to(process.pid, signal.SIGTERM)
                process.join(draw.uniform(0.0, 0.3))
                return hits
            elif kind in ("worker-kill", "raylet-kill"):
                hit(kind)
                known = len(self._noted())
                for pid in part(process.pid, WORKER if kind == "worker-kill" else "raylet/raylet"):
                    signal_to(pid, signal.SIGKILL)
                # Workers train on for some seconds without their raylet; the search has to feel that it is gone.
                felt = kind == "worker-kill"
                until(lambda: (felt and len(self._noted()) > known) or not process.is_alive())
            elif kind in ("worker-hung", "memory-hog"):
                hit(kind)
                known = len(self._noted())
                if kind == "worker-hung":
                    for pid in part(process.pid, WORKER):
                        signal_to(pid, signal.SIGSTOP)
                else:
                    _hog(part(process.pid, WORKER), how.memory_share or 0.0)
                until(lambda: len(self._noted()) > known or not process.is_alive())
                if process.exitcode:
                    self._seen.append(f"the search ended with exit code {process.exitcode}")
            elif kind == "mlflow-kill" and self.server is not None:
                hit(kind)
                opened, known = len(self._noted()) > known, len(self._noted())
                self.server.kill()
                process.join(draw.uniform(0.0, LONGEST_ABSENCE_SECONDS))
                self.server.start()
                if draw.random() < DELIVERED_SHARE:
                    outbox = resolve(spec).folder / OUTBOX
                    until(lambda: not (process.is_alive() and (outbox.exists() or len(self._noted()) <= known)))
                if opened and process.exitcode:
                    self._seen.append(f"the search ended with exit code {process.exitcode} for want of its server")
            if process.is_alive():
                hit("checkpoint-damaged" if kind == "checkpoint-damaged" else "driver-kill")
            return hits
        finally:
            started |= session(process.pid)
            signal_to(process.pid, signal.SIGKILL)
            process.join()
            if kind == "checkpoint-damaged":
                damage(self.folder / "work" / spec.study / "checkpoints", draw)
            self._seen += [f"a process is left: {command}" for command in left(started)]

    def _violations(self, spec: StudySpec, calm: list[Piece] | None) -> list[str]:
        """What does not hold of the ledger and the machine as they are now.

        Args:
            spec: The study.
            calm: Segments of the undisturbed search; None if this one may differ from it.
        """
        found, self._seen = self._seen, []
        trials, runs = in_process(look, spec)
        done = pieces(trials)
        missing = {noted for _, noted in self._noted()} - {digest(piece) for piece in done}
        found += [f"{len(missing)} acknowledged result(s) are missing or changed"] if missing else []
        twice = [name for name, count in Counter((piece.key, piece.index) for piece in done).items() if count > 1]
        twice += [name for name, count in Counter(runs).items() if count > 1]
        found += [f"charged twice: {name}" for name in twice]
        for trial in trials:
            indices = [result.segment.index for result in trial.segments]
            if indices != list(range(len(indices))):
                found.append(f"trial {trial.key} has segments {indices}")
        if calm is not None:
            count = len(done)
            if done != calm[:count]:
                first = next(i for i, (one, other) in enumerate(zip(done, [*calm, None], strict=False)) if one != other)
                found.append(f"segment {first} differs from that of the undisturbed search: {done[first]}")
            opened = [(trial.key, trial.open_segment.index) for trial in trials if trial.open_segment is not None]
            following = [(piece.key, piece.index) for piece in calm[count : count + 1]]
            if opened and opened != following:
                found.append(f"the next segment is {opened} instead of {following}")
            if self._complete and count != len(calm):
                found.append(f"{count} segments instead of {len(calm)}")
        return found


def _in_own_session(spec: StudySpec, journal: Path, how: Disturbance) -> None:
    os.setsid()
    log = os.open(journal.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Anything that a full disk, a lost worker or a signal may raise ends this process; the next one goes on.
    with contextlib.suppress(KeyboardInterrupt):
        search(spec, journal, how)


def _used_memory() -> float:
    """Share of the machine's memory that is in use."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    known = {line[0]: float(line[1]) for line in lines}
    return 1 - known["MemAvailable:"] / known["MemTotal:"]


def _hog(workers: set[int], share: float) -> None:
    """Take memory until Ray has ended a worker, and give it back."""
    stop = SERVER.Event()
    hog = SERVER.Process(target=_take_memory, args=(share + HOG_SHARE - MEMORY_SHARE, stop))
    hog.start()
    try:
        until(lambda: not all(is_alive(pid) for pid in workers))
    finally:
        stop.set()
        hog.join()


def _take_memory(share: float, stop: Any) -> None:
    held = []
    while not stop.wait(0.05):
        if _used_memory() < share:
            held.append(bytearray(os.urandom(4096) * (HOG_BYTES // 4096)))
