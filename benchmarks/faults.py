"""Fault injection: searches that are disturbed at random moments, and what must hold after each disturbance.

A search runs in a process of its own, with real checkpoints and a real MLflow store, and is killed, starved of disk or
lied to; then it is started again, until the study is complete. It is compared with the same search undisturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.runner import commit
from benchmarks.tracking_server import TrackingServer
from jfhpo.session import OUTBOX
from jfhpo_core.errors import JfhpoError
from jfhpo_core.run.dispatch import Dispatcher, Event, Finished, InlineDispatcher, Streamed
from jfhpo_core.run.scheduler import Load, Opening
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.store.outbox import Outbox, waiting
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Outcome, SegmentResult, Trial
from jfhpo_core.trainers import Job
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.tags import HEADER, SEGMENT

FILE = Path(__file__).parent / "results" / "faults" / "faults.jsonl"

Kind = Literal[
    "driver-kill", "driver-term", "disk-full", "checkpoint-damaged", "clock-jump", "duplicates", "late-result",
    "worker-kill", "raylet-kill", "mlflow-kill",
]  # fmt: skip

Place = Literal["inline", "ray", "server"]
"""Where a search runs: in one process, with Ray workers, or in one process with its ledger on an MLflow server."""

KINDS: dict[Kind, str] = {
    "driver-kill": "kill -9 of the process that searches (and, without Ray, trains)",
    "driver-term": "SIGTERM, and kill -9 after a grace period of 0 to 0.3 s",
    "disk-full": "the file system of checkpoints and database is full for up to 2 s",
    "checkpoint-damaged": "kill -9, and a bit flipped in, or the end cut off, a file of a newest checkpoint",
    "clock-jump": "the wall clock jumps by up to 30 days, forward or back",
    "duplicates": "every event of the dispatcher is delivered twice",
    "late-result": "a segment that is long committed is delivered again, with another bill",
    "worker-kill": "kill -9 of the Ray worker that trains",
    "raylet-kill": "kill -9 of the raylet",
    "mlflow-kill": "kill -9 of the MLflow server, which is started again after 0 to 6 s and then takes some more",
}

DRAWN: dict[Place, tuple[Kind, ...]] = {
    "inline": (
        "driver-kill", "driver-kill", "driver-term", "driver-term", "disk-full", "clock-jump", "duplicates",
        "late-result", "checkpoint-damaged",
    ),
    "ray": ("worker-kill", "raylet-kill", "raylet-kill", "driver-kill"),
    "server": ("mlflow-kill", "mlflow-kill", "driver-kill"),
}  # fmt: skip
"""Faults of a search, drawn without replacement until each was drawn as often as it is named here; then anew."""

DISK_BYTES = 48 * 2**20
LONGEST_DELAY_SECONDS = 1.5
PATIENCE_SECONDS = 300.0
EARLY_SHARE = 0.25
"""Share of the faults that may come before the search has done anything new since it was started."""
LONGEST_ABSENCE_SECONDS = 6.0
"""Between the end of a server and its next start, which takes some seconds itself."""
DELIVERED_SHARE = 0.5
"""Share of the absences after which the search may deliver what it has kept; else the next process has to."""
JUMP_SECONDS = 30 * 24 * 3600.0
ENDING_SECONDS = 30.0
"""Within this time every process of a search that has died must be gone."""

SERVER = multiprocessing.get_context("forkserver")
"""Starts the searches: what takes seconds to import is imported once, and each is a process that can be killed. They
are not forked from this process, whose threads (of Ray, of torch) a fork would cut off in the midst of their work."""
SERVER.set_forkserver_preload(
    [__name__, "jfhpo_core.optimizer.joint_fidelity", "mlflow.store.tracking.sqlalchemy_store"]
)


class Record(BaseModel):
    """One fault and what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    number: int = Field(description="Among the faults of this seed, from 0.")
    kind: Kind
    place: Place
    after_seconds: float = Field(description="Since the process of the search was started.")
    acknowledged: int = Field(description="Segments whose commit had been reported before the fault.")
    recovery_seconds: float | None = Field(description="From the next start to its first commit; None if none came.")
    violations: tuple[str, ...]
    commit: str


@dataclass(frozen=True)
class Piece:
    """A committed segment, as far as it must not depend on what happened around it."""

    key: str
    index: int
    start: int
    stop: int
    outcome: Outcome
    scores: tuple[tuple[int, float], ...]
    charge: float

    @classmethod
    def of(cls, trial: Trial, result: SegmentResult) -> Piece:
        """The piece of a trial."""
        scores = tuple((evaluation.step, evaluation.score) for evaluation in result.evaluations)
        segment = result.segment
        return cls(
            trial.key, segment.index, segment.start_step, segment.stop_step, result.outcome, scores,
            round(result.charge_seconds, 6),
        )  # fmt: skip


def pieces(trials: Sequence[Trial]) -> list[Piece]:
    """All committed segments in the order of their commits."""
    done = [(result.committed, Piece.of(trial, result)) for trial in trials for result in trial.segments]
    return [piece for _, piece in sorted(done, key=lambda item: item[0])]


@dataclass
class Disturbance:
    """What a search's own process does to itself."""

    clock_jump: tuple[float, float] | None = None
    duplicates: bool = False
    late: bool = False


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


def study_of(seed: int, folder: Path, place: Place = "inline", uri: str | None = None) -> StudySpec:
    """A small study that continues trials from checkpoints, stops some and trains on three sizes.

    Args:
        seed: Of the search and of the landscape.
        folder: Takes the workspace.
        place: Where the search runs.
        uri: Of the MLflow store; None for a database in the folder.
    """
    return StudySpec.model_validate(
        {
            "study": f"faults-{seed}",
            "family": [
                {"name": name, "path": "simulated", "parameters": count}
                for name, count in (("small", 100_000), ("medium", 300_000), ("large", 1_000_000))
            ],
            "target": "large",
            "task": "instruct",
            "trainer": {
                "name": "simulated",
                "settings": {"instance": seed, "real_seconds_per_step": 0.1 if place == "ray" else 0.002},
            },
            "space": "tiny",
            "fidelity": {"horizon_prompts": 480, "rungs": 3},
            "budget": {"trial_seconds": 100, "max_parallel": 1},
            "strategy": {"name": "jfhpo", "settings": {"initial_trials": 5, "pool": 64, "fresh": 6, "local": 6}},
            "baselines": [{"name": "recipe", "configuration": {"learning_rate": 1e-4}}],
            "seeds": {"search": seed, "training": [0, 1]},
            "cluster": {"address": "local" if place == "ray" else "inline", "segment_retries": 5},
            "tracking": {"workspace": str(folder / "work"), "uri": uri or f"sqlite:///{folder / 'mlflow.db'}"},
        }
    )


def undisturbed(seed: int) -> list[Piece]:
    """What the study of a seed comes to when nothing happens."""
    with tempfile.TemporaryDirectory(prefix="jfhpo-calm-") as folder:
        calm = study_of(seed, Path(folder))
        settings = {**calm.trainer.settings, "real_seconds_per_step": 0.0}
        calm = calm.model_copy(update={"trainer": calm.trainer.model_copy(update={"settings": settings})})
        ledger = MemoryLedger()
        run_search(resolve(calm), ledger, InlineDispatcher(1))
        return pieces(ledger.trials())


def search(spec: StudySpec, journal: Path, how: Disturbance) -> None:
    """Run or continue a study in this process; note every segment as soon as its commit has returned."""
    _interrupt_on_sigterm()
    if how.clock_jump is not None:
        _jump(*how.clock_jump)
    study = resolve(spec)
    ledger = Outbox(MlflowLedger(), study.folder / OUTBOX)
    inner: Dispatcher = InlineDispatcher(1)
    if spec.cluster.address != "inline":
        from jfhpo_core.run.ray_dispatch import RayDispatcher

        inner = RayDispatcher(spec.cluster, 1, trainer=spec.trainer.name)
    noted = len(_read(journal))

    def note(progress: Progress) -> None:
        nonlocal noted
        done = pieces(progress.trials)
        with journal.open("a", encoding="utf-8") as file:
            file.writelines(f"{time.monotonic()} {_digest(piece)}\n" for piece in done[noted:])
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


def _digest(piece: Piece) -> str:
    return hashlib.sha256(repr(piece).encode()).hexdigest()[:16]


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
        )
        itself = how.clock_jump is not None or how.duplicates or how.late
        hits: list[tuple[Kind, float]] = []
        began, known = time.monotonic(), len(self._noted())
        process = SERVER.Process(target=_own_session, args=(spec, self._journal, how))
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
                _until(lambda: len(self._noted()) > known or not process.is_alive())
            process.join(delay)
            started |= _session(process.pid)
            if itself and kind is not None:
                hit(kind)
                if process.exitcode:
                    self._seen.append(f"the search ended by itself with exit code {process.exitcode}")
            if not process.is_alive():
                return hits
            if kind == "disk-full":
                hit(kind)
                with _full(self.folder):
                    process.join(draw.uniform(0.0, 2.0))
            elif kind == "driver-term":
                hit(kind)
                _signal(process.pid, signal.SIGTERM)
                process.join(draw.uniform(0.0, 0.3))
                return hits
            elif kind in ("worker-kill", "raylet-kill"):
                hit(kind)
                known = len(self._noted())
                _kill_part(process.pid, "_WorkerProcess" if kind == "worker-kill" else "raylet/raylet")
                # Workers train on for some seconds without their raylet; the search has to feel that it is gone.
                felt = kind == "worker-kill"
                _until(lambda: (felt and len(self._noted()) > known) or not process.is_alive())
            elif kind == "mlflow-kill" and self.server is not None:
                hit(kind)
                opened, known = len(self._noted()) > known, len(self._noted())
                self.server.kill()
                process.join(draw.uniform(0.0, LONGEST_ABSENCE_SECONDS))
                self.server.start()
                if draw.random() < DELIVERED_SHARE:
                    outbox = resolve(spec).folder / OUTBOX
                    _until(lambda: not (process.is_alive() and (outbox.exists() or len(self._noted()) <= known)))
                if opened and process.exitcode:
                    self._seen.append(f"the search ended with exit code {process.exitcode} for want of its server")
            if process.is_alive():
                hit("checkpoint-damaged" if kind == "checkpoint-damaged" else "driver-kill")
            return hits
        finally:
            started |= _session(process.pid)
            _signal(process.pid, signal.SIGKILL)
            process.join()
            if kind == "checkpoint-damaged":
                _damage(self.folder / "work" / spec.study / "checkpoints", draw)
            self._seen += [f"a process is left: {command}" for command in _left(started)]

    def _violations(self, spec: StudySpec, calm: list[Piece] | None) -> list[str]:
        """What does not hold of the ledger and the machine as they are now.

        Args:
            spec: The study.
            calm: Segments of the undisturbed search; None if this one may differ from it.
        """
        found, self._seen = self._seen, []
        trials, runs = _in_process(_look, spec)
        done = pieces(trials)
        digests = [_digest(piece) for piece in done]
        missing = {digest for _, digest in self._noted()} - set(digests)
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


def _own_session(spec: StudySpec, journal: Path, how: Disturbance) -> None:
    os.setsid()
    log = os.open(journal.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Anything that a full disk, a lost worker or a signal may raise ends this process; the next one goes on.
    with contextlib.suppress(KeyboardInterrupt):
        search(spec, journal, how)


def _look(spec: StudySpec) -> tuple[list[Trial], list[str]]:
    """Trials as ledger and outbox have them, and the trial key of each run in MLflow that has been charged."""
    ledger = MlflowLedger()
    if not ledger.look(spec):
        return [], []
    runs = ledger.client.search_runs([ledger.experiment_id], max_results=1000)
    charged = [run.data.tags for run in runs if SEGMENT.format(0) in run.data.tags]
    whole = MemoryLedger(ledger.trials())
    for entry in waiting(resolve(spec).folder / OUTBOX):
        entry.deliver(whole)
    return whole.trials(), [json.loads(tags[HEADER])["key"] for tags in charged]


def _in_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, so that no connection to a database is carried into the next one."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_send, args=(there, call, arguments))
    process.start()
    if not here.poll(PATIENCE_SECONDS):
        raise JfhpoError("the ledger cannot be read")
    result = here.recv()
    process.join()
    return result


def _send(there: Connection, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
    there.send(call(*arguments))


def _signal(pid: int, number: signal.Signals) -> None:
    """Send a signal; the process may have ended a moment ago."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _until(condition: Callable[[], bool]) -> None:
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


def _session(leader: int) -> set[int]:
    """A process and what it and its children have started, also in sessions of their own."""
    parents = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
    table = [tuple(map(int, line.split())) for line in parents.splitlines()]
    found, frontier = {leader}, {leader}
    while frontier:
        frontier = {pid for pid, parent in table if parent in frontier} - found
        found |= frontier
    return found | {pid for pid, session, _ in _processes() if session == leader}


def _left(started: set[int]) -> list[str]:
    """Commands of those processes that do not end."""
    deadline = time.monotonic() + ENDING_SECONDS
    while left := [command for pid, _, command in _processes() if pid in started]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def _kill_part(leader: int, name: str) -> None:
    mine = _session(leader)
    for pid, _, command in _processes():
        if pid in mine and name in command:
            _signal(pid, signal.SIGKILL)


@contextlib.contextmanager
def _full(folder: Path) -> Iterator[None]:
    """Fill the file system of a folder."""
    ballast = folder / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1))
        yield
    finally:
        ballast.unlink(missing_ok=True)


def _damage(store: Path, draw: random.Random) -> None:
    """Flip a bit of a file of a newest checkpoint, or cut its end off."""
    newest = [max(folder.glob("step-*"), default=None) for folder in sorted(store.glob("[0-9a-f]*"))]
    folders = [folder for folder in newest if folder is not None]
    if not folders:
        return
    folder = draw.choice(folders)
    path = draw.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content = content[: len(content) // 2]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@contextlib.contextmanager
def disk() -> Iterator[Path | None]:
    """A small file system of its own; None where the user may not mount one."""
    with tempfile.TemporaryDirectory(prefix="jfhpo-faults-") as folder:
        place = Path(folder) / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
        if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            yield None
            return
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def disturb_seed(seed: int, place: Place = "inline", most: int = 1000) -> list[Record]:
    """All faults of one seed.

    Args:
        seed: Of the study and of the faults.
        place: Where the search runs.
        most: Faults after which the study is left in peace.
    """
    kinds = DRAWN[place]
    with disk() as small, tempfile.TemporaryDirectory(prefix="jfhpo-faults-") as name:
        if place == "inline" and small is not None:
            return Campaign(seed, small, place, kinds).run(most)
        plain = Path(name) / "disk"
        plain.mkdir()
        if place != "server":
            return Campaign(seed, plain, place, [kind for kind in kinds if kind != "disk-full"]).run(most)
        server = TrackingServer(plain)
        try:
            server.start()
            return Campaign(seed, plain, place, kinds, server).run(most)
        finally:
            server.kill()


def load(path: Path = FILE) -> list[Record]:
    """All recorded faults."""
    if not path.exists():
        return []
    return [Record.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(records: Sequence[Record], path: Path = FILE) -> None:
    """Add the faults of a seed, in place of those that it may have had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        fresh = {(record.place, record.seed) for record in records}
        kept = [record for record in load(path) if (record.place, record.seed) not in fresh]
        merged = sorted([*kept, *records], key=lambda record: (record.place, record.seed, record.number))
        path.write_text("".join(f"{record.model_dump_json()}\n" for record in merged), encoding="utf-8")


def run(faults: int, seeds: Sequence[int], place: Place, path: Path = FILE, say: Callable[[str], None] = print) -> int:
    """Disturb seed after seed until so many faults are on record; returns the number of violations among them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for seed in seeds:
        mine = [record for record in load(path) if record.place == place]
        if len(mine) >= faults:
            break
        if any(record.seed == seed for record in mine):
            continue
        records = disturb_seed(seed, place)
        save(records, path)
        bad = [violation for record in records for violation in record.violations]
        say(f"seed {seed}: {len(records)} faults, {len(bad)} violations{''.join(f'{chr(10)}  {text}' for text in bad)}")
    return sum(len(record.violations) for record in load(path) if record.place == place)


def write(records: Sequence[Record], folder: Path) -> None:
    """Write the page of the docs."""
    rows = []
    for kind, what in KINDS.items():
        mine = [record for record in records if record.kind == kind]
        if not mine:
            continue
        seconds = sorted(record.recovery_seconds for record in mine if record.recovery_seconds is not None)
        bad = sum(bool(record.violations) for record in mine)
        median = f"{seconds[len(seconds) // 2]:.1f} s" if seconds else ""
        rows.append(f"| `{kind}` | {what} | {len(mine)} | {bad} | {median} |")
    searches = {(record.place, record.seed) for record in records}
    places = Counter(place for place, _ in searches)
    commits = ", ".join(f"`{name}`" for name in sorted({record.commit for record in records}))
    damaged = {
        key: min((one.number for one in records if (one.place, one.seed) == key and one.kind == "checkpoint-damaged"),
                 default=len(records))
        for key in searches
    }  # fmt: skip
    exact = sum(record.number < damaged[record.place, record.seed] for record in records)
    broken = [f"- seed {one.seed}, fault {one.number}, `{one.kind}`: {'; '.join(one.violations)}" for one in records
              if one.violations]  # fmt: skip
    text = PAGE.format(
        faults=len(records), exact=exact, searches=len(searches), on_ray=places["ray"],
        on_server=places["server"], rows="\n".join(rows), commits=commits,
        broken="None." if not broken else "\n".join(broken),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.md").write_text(text, encoding="utf-8")


PAGE = """# Faults

{faults} faults at random moments in {searches} searches ({on_ray} of them on Ray, {on_server} with their ledger on an
MLflow server), each search in a process of its own with real checkpoints and a real MLflow store. After a fault the
search is started again, until its study is complete.
Made by `python -m benchmarks faults`, from commit {commits}.

| Fault | What happens | Times | Times that something did not hold | Median time to the next new result |
|---|---|---:|---:|---:|
{rows}

The time to the next new result is that from the next start of the search, imports excluded, and includes the repeated
part of the segment that was cut off; the machine had much other work to do meanwhile. A search that survives a fault is
killed at the end of it, which counts as a fault of its own; the checks then follow both.

After the loss of the raylet, workers train on for some seconds; a search that is not complete by then ends with an
infrastructure error, and the next start goes on. While the MLflow server is away the search goes on, and what it has
acknowledged waits in the outbox; after half of those absences the search is killed before it has delivered it.

Tested elsewhere are: a training process of its own that is killed below its worker, in
`tests/trainers/openrlhf/test_search.py`; a Prefect server that is killed while a flow run searches, in
`tests/orchestration/test_study_lock.py`; a guarded MLflow server that is killed, in
`tests/mlflow_plugin/test_stores.py`; a flow run that is cancelled, in `tests/flows/test_search.py`.

## What must hold after each fault

- No result is missing whose commit had been reported before the fault, and none has changed.
- No segment is charged twice: neither within a trial nor by a second run of it in MLflow.
- The search goes on as if nothing had happened: its committed segments are, in their order, with their configurations,
  scores and charges, those of the same search undisturbed, and the one it begins next is the next one of that search.
  After a checkpoint was damaged this is not asked of a search any more: a segment may be trained again from further
  back, and cost more. {exact} of the faults came before that and were held to it.
- A search that is told something twice, or late, or whose clock jumps does not end by it.
- 30 seconds later no process of a search that has died is left.

## Where it did not hold

{broken}

Four faults of jfhpo that were found on the way are mended, and the runs that showed them were repeated: a search whose
raylet had died waited for ever; a search ended when its MLflow server was killed while records were read; a line of the
outbox that a crash had cut off spoilt the next one; when the Prefect server was killed, a study stayed held for ever,
and a flow run could fail at its very end.
"""
