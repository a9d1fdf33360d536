"""One simulated world: drivers that search, a disk, a tracking server, a clock, and the faults that a schedule names.

Everything that a driver does passes `World.point`, one operation after the other: each change of the disk, each request
to the server, each wait for the dispatcher. There a fault of the schedule happens, if one is due.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from benchmarks.simulator.disk import Disk, File, Folder, SimulatedOs, SimulatedPath, SimulatedShutil
from benchmarks.simulator.study import WORKSPACE, Halving, Trainer, study
from benchmarks.simulator.tracking import Artifacts, Client, Server, StoredRun
from jfhpo_core.errors import CheckpointError, InfrastructureError, LedgerError, LedgerUnavailable
from jfhpo_core.run import parts, search, worker
from jfhpo_core.run.dispatch import Event, Finished, InlineDispatcher
from jfhpo_core.store import checkpoints, outbox
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Segment, SegmentResult, StepRecord, Trial
from mlflow_plugin import ledger as ledgers
from mlflow_plugin import owner, runs, trial_runs
from mlflow_plugin.presentation import StudyState
from mlflow_plugin.tags import HEADER, INTERNAL

Kind = Literal["kill", "power", "full", "away", "lost", "twice", "duplicate", "late", "jump", "rival", "stop", "damage"]

DISK, REQUEST, WAIT = {"write", "rename", "flush"}, {"request"}, {"wait"}
FITS: dict[Kind, set[str]] = {
    "kill": DISK | REQUEST | WAIT,
    "power": DISK | REQUEST | WAIT,
    "full": {"write", "rename"},
    "away": REQUEST,
    "lost": REQUEST,
    "twice": REQUEST,
    "duplicate": WAIT,
    "late": WAIT,
    "jump": WAIT,
    "rival": WAIT,
    "stop": WAIT,
    "damage": WAIT,
}
"""Operations at which a fault can happen."""

MOST_OPERATIONS = 40_000
MOST_LIVES = 60
OUTBOX = SimulatedPath(f"{WORKSPACE}/simulated/outbox.jsonl")
STORE = SimulatedPath(f"{WORKSPACE}/simulated/checkpoints")
ALIVE_SECONDS = owner.BEAT_SECONDS * owner.MISSED_BEATS
"""After its last sign of life nobody may take a study from its owner for so long."""
SHARED_BYTES = 8
"""From this size on, files of checkpoints are shared in the simulation."""


@dataclass(frozen=True)
class Fault:
    """Something goes wrong.

    Attributes:
        at: Operation at which it is due; it happens at the next one that it fits.
        amount: How long, how often or which way, from 0 to 9.
    """

    at: int
    kind: Kind
    amount: int = 0


class Crashed(BaseException):
    """The process is dead; nothing that it still does has an effect."""


class Wrong(Exception):  # noqa: N818  the finding, not an error of the simulator
    """Something that must hold does not."""


@dataclass(eq=False)
class Driver:
    """A process that searches.

    Attributes:
        renewed: When it last showed that it owns the study, by the simulated clock.
        fuse: Operations until it is killed; None: it is not.
    """

    host: str
    process: int
    dead: bool = False
    stopped: bool = False
    fuse: int | None = None
    renewed: float = float("-inf")
    beat: Callable[[], None] | None = None
    next_beat: float = float("inf")


class _Event:
    """`threading.Event` of an owner, waited for by the simulated clock."""

    def __init__(self) -> None:
        self._set, self._rounds = False, 0

    def set(self) -> None:
        self._set = True

    def once(self) -> None:
        self._rounds = 1

    def wait(self, seconds: float) -> bool:
        self._rounds -= 1
        return self._set or self._rounds < 0


@dataclass
class World:
    """See the module.

    Args:
        seed: Of everything that is not in the faults: what a loss of power keeps, where damage strikes.
        faults: The schedule.
        known: What was suggested after which commits, of this schedule and all others.
    """

    seed: int
    faults: Sequence[Fault] = ()
    known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.pending = sorted(self.faults, key=lambda fault: fault.at)
        self.operations, self.away, self.full = 0, 0, 0
        self.now, self.jumped = 0.0, 0.0
        self.disk = Disk(self.point)
        self.server = Server(self.on_tags)
        self.driver = Driver("none", 0, dead=True)
        self.drivers: list[Driver] = []
        self.owner: Driver | None = None
        self.committed: dict[tuple[str, int], str] = {}
        self.harmed = False
        self.events: list[Finished] = []
        self.names = 0

    # Time

    def advance(self, seconds: float) -> None:
        """Let time pass: owners that live show that they do."""
        end = self.now + seconds
        while True:
            alive = [one for one in self.drivers if not one.dead and not one.stopped and one.next_beat <= end]
            if not alive:
                break
            first = min(alive, key=lambda one: one.next_beat)
            self.now = max(self.now, first.next_beat)
            first.next_beat = self.now + owner.BEAT_SECONDS
            before, self.driver = self.driver, first
            try:
                assert first.beat is not None
                first.beat()
            except Crashed:
                if before is first:
                    raise
            finally:
                self.driver = before
        self.now = end

    def clock(self) -> Any:
        """Stands for the module `time`."""
        return SimpleNamespace(
            monotonic=lambda: self.now, perf_counter=lambda: self.now, sleep=self.advance,
            time=lambda: 1.8e9 + self.now + self.jumped,
        )  # fmt: skip

    # Faults

    def point(self, kind: str, change: Callable[[], Any]) -> Any:
        """An operation of the present driver: it happens, or what the schedule has in its place."""
        driver = self.driver
        if driver.dead:
            raise Crashed
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise Wrong("the search does not end")
        if driver.fuse is not None:
            driver.fuse -= 1
            if driver.fuse < 0:
                self.end(driver)
                raise Crashed
        if kind == "request" and self.away > 0:
            self.away -= 1
            raise _unavailable()
        if kind in FITS["full"] and self.full > 0:
            self.full -= 1
            raise OSError(errno.ENOSPC, "no space left")
        fault = self._due(kind)
        if fault is None:
            return change()
        match fault.kind:
            case "kill" | "power":
                if fault.amount % 2:
                    change()
                self.end(driver)
                if fault.kind == "power":
                    for other in self.drivers:
                        self.end(other)
                    self.disk.lose_power(self.draw)
                raise Crashed
            case "full":
                self.full = fault.amount
                raise OSError(errno.ENOSPC, "no space left")
            case "away":
                self.away = 3 * fault.amount
                raise _unavailable()
            case "lost":
                change()
                raise _unavailable()
            case "twice":
                change()
                return change()
            case "jump":
                self.jumped += (fault.amount - 4.5) * 86400
            case "damage":
                self._damage()
            case "rival" | "stop":
                self._rival(driver, fault)
            case "duplicate" | "late":
                return self._told_again(change(), fault)
        return change()

    def _due(self, kind: str) -> Fault | None:
        for index, fault in enumerate(self.pending):
            if fault.at > self.operations:
                return None
            if kind in FITS[fault.kind]:
                return self.pending.pop(index)
        return None

    def _told_again(self, events: list[Event], fault: Fault) -> list[Event]:
        if fault.kind == "duplicate":
            return [*events, *events]
        if not self.events:
            return events
        old = self.events[fault.amount % len(self.events)]
        bill = old.result.model_copy(update={"seconds": old.result.seconds + 1.0})
        return [*events, Finished(old.key, bill, old.records)]

    def _damage(self) -> None:
        """Flip bits of a file of a checkpoint."""
        store = SimulatedPath(STORE)
        files = [path for path in store.glob("*/step-*/*") if path.is_file()] if store.exists() else []
        if files:
            self.harmed = True
            node = self.disk.find(self.draw.choice(files))
            assert isinstance(node, File)
            node.content = node.content[:-1] + bytes([node.content[-1] ^ 1]) if node.content else b"?"

    def _rival(self, driver: Driver, fault: Fault) -> None:
        """Another machine searches the same study, while this process is alive or, with 'stop', stands still."""
        if any(other.host == "rival" and not other.dead for other in self.drivers):
            return
        driver.stopped = fault.kind == "stop"
        self.live("rival", fuse=None if fault.amount < 3 else 25 * fault.amount)
        driver.stopped = False
        self.driver = driver

    def end(self, driver: Driver) -> None:
        """A process is dead."""
        driver.dead = True

    # What must hold

    def on_tags(self, run: StoredRun, tags: Mapping[str, str]) -> None:
        """Called before tags of a run change."""
        claim = tags.get(owner.TAG)
        if claim is not None:
            self._claimed(claim)
        counts = [name for name in tags if name.startswith(f"{INTERNAL}segment.") or name == HEADER]
        if counts and self.owner is not None and self.owner is not self.driver:
            raise Wrong(f"{self.driver.host} writes {counts[0]} while {self.owner.host} owns the study")
        for name in counts:
            if name in run.tags and run.tags[name] != tags[name]:
                raise Wrong(f"{name} of {run.name} was {run.tags[name][:200]} and becomes {tags[name][:200]}")

    def _claimed(self, claim: str) -> None:
        if not claim:
            self.owner = None
            return
        other = self.owner
        lives = other is not None and other is not self.driver and not other.dead and not other.stopped
        if other is not None and lives and self.now - other.renewed < ALIVE_SECONDS:
            raise Wrong(f"{self.driver.host} takes the study from {other.host}, which lives")
        self.owner, self.driver.renewed = self.driver, self.now

    def acknowledged(self, key: str, result: SegmentResult) -> None:
        """The driver has been told that a result counts."""
        text = result.model_dump_json()
        before = self.committed.setdefault((key, result.segment.index), text)
        # Two machines that do not see each other may each train a segment; only a damaged checkpoint lets them differ.
        if before != text and not self.harmed:
            raise Wrong(f"segment {result.segment.index} of {key} is acknowledged again with another result: {text}")

    def check(self, trials: Sequence[Trial], where: str) -> None:
        """Every acknowledged result is there, unchanged, once."""
        there: dict[tuple[str, int], str] = {}
        ranks = []
        for trial in trials:
            if [result.segment.index for result in trial.segments] != list(range(len(trial.segments))):
                raise Wrong(f"{where}: trial {trial.key} has segments {[r.segment.index for r in trial.segments]}")
            for result in trial.segments:
                ranks.append(result.committed)
                there[trial.key, result.segment.index] = result.model_dump_json()
        if len(set(ranks)) < len(ranks):
            raise Wrong(f"{where}: two segments have one rank: {ranks}")
        for key, text in self.committed.items():
            if there.get(key) != text and not (self.harmed and key in there):
                raise Wrong(f"{where}: acknowledged {text}, there is {there.get(key)}")

    def begun(self, trials: Sequence[Trial], trial: Trial, segment: Segment) -> None:
        """The suggestion is the one that any driver makes after these commits."""
        if self.harmed:
            return
        done = tuple(
            (one.key, tuple((r.committed, r.end_step, r.seconds) for r in one.segments), one.open_segment is not None)
            for one in trials
        )
        chosen = (trial.key, segment.index, segment.stop_step)
        if self.known.setdefault(done, chosen) != chosen:
            raise Wrong(f"suggests {chosen} where {self.known[done]} was suggested after the same commits")

    # Lives

    def request(self, change: Callable[[], Any]) -> Any:
        """A request of the client."""
        return self.point("request", change)

    def live(self, host: str, fuse: int | None = None) -> bool:
        """One life of a driver; returns whether it has completed the study."""
        self.names += 1
        me = Driver(host, self.names, fuse=fuse)
        self.drivers = [*(one for one in self.drivers if not one.dead), me]
        self.driver = me
        front = Front(self)
        try:
            result = search.run_search(study(), front, Waiting(self), strategy=Halving())
            front.deliver()
            front.store.end(StudyState.FINISHED)
        except Crashed:
            return False
        except (LedgerUnavailable, CheckpointError, InfrastructureError, OSError):
            return False  # it says so and ends; the next one goes on
        except LedgerError as error:
            if self.harmed and "delete this file" in str(error):
                OUTBOX.unlink()  # as a user would who was told so
                return False
            if "is being run by" not in str(error) and "was taken over" not in str(error):
                raise Wrong(f"{type(error).__name__}: {error}") from error
            return False
        else:
            return result.complete
        finally:
            me.dead = True

    def run(self) -> World:
        """Drivers one after the other until the study is complete.

        Raises:
            Wrong: Something does not hold.
        """
        with self._in_place():
            name = WORKSPACE.strip("/")
            self.disk.root.entries[name] = self.disk.root.flushed[name] = Folder()
            for _ in range(MOST_LIVES):
                try:
                    if self.live("main"):
                        break
                except (Wrong, Crashed):
                    raise
                except Exception as error:
                    raise Wrong(f"{type(error).__name__}: {error}") from error
                self.advance(60.0)
            else:
                raise Wrong(f"not complete after {MOST_LIVES} starts")
            self.left = tuple(self.pending)
            self.pending, self.away, self.full = [], 0, 0
            self.driver = Driver("reader", 0)
            reader = ledgers.MlflowLedger(Client(self.server, self.request))
            if not reader.look(study().spec):
                raise Wrong("the study is gone")
            self.check(reader.trials(), "in the end")
            headers = [json.loads(run.tags[HEADER])["key"] for run in self.server.runs.values() if HEADER in run.tags]
            if len(set(headers)) < len(headers) and not any(fault.kind == "twice" for fault in self.faults):
                raise Wrong("a trial has two runs")
            self.trials = reader.trials()
        return self

    def _artifacts(self, uri: str, *, tracking_uri: str) -> Artifacts:
        """In place of MLflow's registry of repositories; a run's address is its id."""
        return Artifacts(self.server.runs[uri], self.request)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put clock, disk and processes of this world in the place of the real ones."""
        SimulatedPath.disk = self.disk
        clock = self.clock()
        process = SimpleNamespace(getpid=lambda: self.driver.process, kill=self._probe)
        threads = SimpleNamespace(Event=_Event, Thread=self._thread)
        swaps: list[tuple[Any, str, Any]] = [
            *((module, "time", clock) for module in (search, outbox, owner, runs, trial_runs, parts, worker)),
            *((module, "Path", SimulatedPath) for module in (checkpoints, worker)),
            *((module, "os", SimulatedOs) for module in (checkpoints, outbox)),
            *((module, "shutil", SimulatedShutil) for module in (checkpoints, worker)),
            (checkpoints, "uuid", SimpleNamespace(uuid4=self._uuid)),
            (checkpoints, "SHARED_BYTES", SHARED_BYTES),
            (worker, "_companions", lambda: ()),
            (worker, "_surroundings", lambda _job: contextlib.nullcontext()),
            (runs, "get_artifact_repository", self._artifacts),
            (owner, "os", process),
            (owner, "threading", threads),
            (owner, "socket", SimpleNamespace(gethostname=lambda: self.driver.host)),
            (trial_runs, "source_tags", dict),
            (ledgers, "environment", dict),
            (trial_runs, "task_data", lambda _task: _NO_DATA),
            (ledgers, "saved_views", lambda *_: {}),
            (StudySpec, "to_yaml", lambda _spec: "a third of the time of a schedule otherwise"),
        ]
        with contextlib.ExitStack() as stack:
            for module, name, value in swaps:
                stack.enter_context(mock.patch.object(module, name, value))
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)
            yield

    def _uuid(self) -> Any:
        self.names += 1
        return SimpleNamespace(hex=f"{self.names:032x}")

    def _probe(self, process: int, _signal: int) -> None:
        if all(one.process != process or one.dead for one in self.drivers):
            raise ProcessLookupError

    def _thread(self, target: Callable[..., None], args: tuple[Any, _Event], **_: object) -> Any:
        """The thread that shows signs of life, as a timer."""
        reference, ended = args
        driver = self.driver

        def beat() -> None:
            ended.once()
            target(reference, ended)

        def start() -> None:
            driver.beat, driver.next_beat = beat, self.now + owner.BEAT_SECONDS

        return SimpleNamespace(start=start)


class Front:
    """The ledger that the search sees, the real outbox before the real MLflow ledger, with what must hold of both."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.store = ledgers.MlflowLedger(Client(world.server, world.request))
        self._outbox = outbox.Outbox(self.store, OUTBOX, patience_seconds=60.0)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outbox, name)

    def open(self, spec: Any) -> None:
        self._outbox.open(spec)
        self._world.check(self._outbox.trials(), "after the start")

    def begin(self, trial: Trial, segment: Segment) -> None:
        before = self._outbox.trials()
        self._outbox.begin(trial, segment)
        self._world.begun(before, trial, segment)

    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        self._outbox.commit(key, result, records)
        self._world.acknowledged(key, result)


class Waiting(InlineDispatcher):
    """The real dispatcher of one process, between whose answers the clock moves and faults happen."""

    def __init__(self, world: World) -> None:
        super().__init__(1, trainer=Trainer())  # type: ignore[arg-type]
        self._world = world

    def wait(self, timeout_seconds: float) -> list[Event]:
        before = self.now()
        events: list[Event] = self._world.point("wait", lambda: super(Waiting, self).wait(timeout_seconds))
        self._world.advance(self.now() - before)
        self._world.events += [event for event in events if isinstance(event, Finished)]
        return events


_NO_DATA = SimpleNamespace(inputs=list, train=None, heldout=None)


def _unavailable() -> MlflowException:
    return MlflowException("simulated: away", TEMPORARILY_UNAVAILABLE)
