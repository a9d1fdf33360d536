"""Faults that a person causes or meets at the command line.

Runs deleted in MLflow, a locked or damaged database, a second driver, data of an old version, a study of 1,000 trials.
Each is one study, run by the real command in a process of its own: it is begun, disturbed, and run to its end. Besides
what holds after every fault, the exit code has to be the documented one and the message has to say what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from benchmarks.faults.processes import PATIENCE_SECONDS, SERVER, in_process, left, session, signal_to, until
from benchmarks.faults.records import Kind, Record
from benchmarks.faults.studies import Piece, calm_pieces, look, pieces, study_data
from benchmarks.runner import commit
from benchmarks.tracking_server import TrackingServer
from jfhpo.cli import INFRASTRUCTURE, REFUSED
from jfhpo.testing.samples import trained
from jfhpo_core.errors import JfhpoError
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import load_study
from jfhpo_core.study.trial import Trial
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.presentation import StudyState

COMMITTED = re.compile(r" spent, about .* \| #\d+ ")
"""A line of `jfhpo search --plain` about a segment that is committed."""

LOCKED_SECONDS = (55.0, 65.0)
RECORDING_SECONDS = 3600.0
"""For writing down 1,000 trials, which takes minutes on a machine that is busy."""

MANY_TRIALS = 1000
MANY_SECONDS = 3.0
"""What such a trial has cost."""
MORE_SECONDS = 30
UPGRADED = Path(__file__).parents[2] / "tests" / "upgrade" / "c5cb37e.tar.xz"
"""Database, artifacts and workspace of a simulated study of an earlier version, cut off by Ctrl-C within its budget."""
UPGRADED_SEGMENTS = 4
ORIGIN = "/tmp/upgrade"
"""Where the archive was made: MLflow keeps absolute paths of artifacts."""
PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


@dataclass
class Running:
    """A command that runs."""

    process: Any
    log: Path

    @property
    def said(self) -> str:
        """All that it has printed, as one line."""
        return " ".join(self.log.read_text(encoding="utf-8", errors="replace").split()) if self.log.exists() else ""

    @property
    def committed(self) -> int:
        """Segments that it has reported."""
        if not self.log.exists():
            return 0
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(COMMITTED.search(line) is not None for line in lines)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        signal_to(self.process.pid, number)

    def end(self) -> int | None:
        """Its exit code, once it has ended; None if it does not."""
        self.process.join(PATIENCE_SECONDS)
        code: int | None = self.process.exitcode
        return code


@dataclass
class Scenario:
    """One study at the command line.

    Args:
        seed: Of the study and of the fault.
        folder: Empty; takes study file, database and workspace.
        data: The study.
    """

    seed: int
    folder: Path
    data: dict[str, Any]
    found: list[str] = field(default_factory=list)
    runs: list[Running] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    hit_after: float = 0.0
    acknowledged: int = 0
    recovery: float | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.began = time.monotonic()
        self.file = self.folder / "study.yaml"
        self.file.write_text(json.dumps(self.data), encoding="utf-8")

    @property
    def spec(self) -> StudySpec:
        """The study."""
        return load_study(self.file)

    def start(self, *options: str) -> Running:
        """Begin `jfhpo search`."""
        log = self.folder / f"{len(self.runs):02d}.log"
        process = SERVER.Process(target=_command, args=([*_arguments(self.file), *options], self.folder, log))
        process.start()
        assert process.pid is not None
        self.pids.add(process.pid)
        self.runs.append(Running(process, log))
        return self.runs[-1]

    def start_up_to(self, most: int = 6) -> Running:
        """Begin a search and wait until it has committed a few segments more."""
        run, wanted = self.start(), self.draw.randint(1, most)
        until(lambda: run.committed >= wanted or not run.process.is_alive())
        time.sleep(self.draw.uniform(0.0, 0.3))
        self.pids |= session(run.process.pid)
        return run

    def hit(self) -> None:
        """The fault comes now."""
        self.hit_after, self.acknowledged = time.monotonic() - self.began, sum(one.committed for one in self.runs)

    def kill(self, run: Running) -> None:
        """End a search without a chance to clean up."""
        self.pids |= session(run.process.pid)
        run.signal(signal.SIGKILL)
        run.process.join()

    def expect(self, run: Running, codes: tuple[int, ...], *words: str) -> int | None:
        """The exit code of a search, which has to be one of these, with all words in what it said."""
        code = run.end()
        if code not in codes:
            self.found.append(f"exit code {code} instead of {codes}: {run.said[-300:]}")
        elif code != 0:
            self.found += [f"it does not say {word!r}: {run.said[-300:]}" for word in words if word not in run.said]
        return code

    def finish(self, *options: str) -> Running:
        """Run the study to its end."""
        began = time.monotonic()
        run = self.start(*options)
        until(lambda: run.committed > 0 or not run.process.is_alive())
        self.recovery = time.monotonic() - began
        self.expect(run, (0,))
        return run

    def ledger(self) -> tuple[list[Trial], list[str]]:
        """What is recorded now."""
        trials, runs = in_process(look, self.spec)
        return trials, runs

    def compare(self, calm: list[Piece], before: list[Piece] | None = None, *, trained_again: bool = False) -> None:
        """Hold the ledger against the undisturbed search.

        Args:
            calm: Its segments.
            before: What has to be in the ledger still.
            trained_again: Whether something was to be trained again.
        """
        trials, runs = self.ledger()
        done = pieces(trials)
        if before is not None and not set(before) <= set(done):
            self.found.append(f"{len(set(before) - set(done))} recorded segment(s) are missing or changed")
        twice = [f"{key} {index}" for (key, index), n in Counter((p.key, p.index) for p in done).items() if n > 1]
        twice += [key for key, count in Counter(runs).items() if count > 1]
        self.found += [f"charged twice: {name}" for name in twice]
        if done != calm:
            self.found.append(f"{len(done)} segments, not the {len(calm)} of the undisturbed search")
        trained = sum(run.committed for run in self.runs)
        if not trained_again and trained > len(calm):
            self.found.append(f"{trained} segments were trained for {len(calm)}")

    def record(self, kind: Kind, number: int = 0) -> Record:
        """What came of it."""
        for run in self.runs:
            if run.process.is_alive():
                self.kill(run)
        self.found += [f"a process is left: {command}" for command in left(self.pids)]
        return Record(
            seed=self.seed, number=number, kind=kind, place="command", after_seconds=round(self.hit_after, 2),
            acknowledged=self.acknowledged,
            recovery_seconds=None if self.recovery is None else round(self.recovery, 2),
            violations=tuple(self.found), commit=commit(),
        )  # fmt: skip


def _arguments(file: Path) -> list[str]:
    return ["jfhpo", "search", str(file), "--plain"]


def _command(arguments: list[str], folder: Path, log: Path) -> None:
    """The console script, in a process that has imported it already."""
    os.setsid()
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.chdir(folder)
    sys.argv = arguments
    from jfhpo.cli import main

    main()


def trial_deleted(scenario: Scenario) -> None:
    """A finished trial's run is deleted in MLflow's UI."""
    run = scenario.start_up_to()
    scenario.kill(run)
    scenario.hit()
    trials, _ = scenario.ledger()
    paid = [trial for trial in trials if trial.segments]
    gone = scenario.draw.choice(paid)
    run_id = in_process(_delete_trial, scenario.spec, gone.key)
    before = pieces(trials)
    scenario.expect(scenario.start(), (REFUSED,), f"restore --run-id {run_id}", "--forget")
    if scenario.draw.random() < 0.5:
        in_process(_restore, scenario.spec, run_id)
        scenario.finish()
        scenario.compare(_calm(scenario), before)
        return
    scenario.finish("--forget")
    kept = [piece for piece in before if piece.key != gone.key]
    after, runs = scenario.ledger()
    if not set(kept) <= set(pieces(after)):
        scenario.found.append("another trial's segments are missing or changed")
    scenario.found += [f"charged twice: {key}" for key, count in Counter(runs).items() if count > 1]


def study_deleted(scenario: Scenario) -> None:
    """The study's run is deleted in MLflow's UI while it is searched."""
    run = scenario.start_up_to(3)
    scenario.hit()
    run_id, trials = in_process(_delete_study, scenario.spec)
    before = pieces(trials)
    scenario.expect(run, (REFUSED,), "deleted", "restore", "--forget")
    scenario.expect(scenario.start(), (REFUSED,), f"restore --run-id {run_id}", "--forget")
    again = scenario.draw.random() < 0.5
    if again:
        scenario.finish("--forget")
    else:
        in_process(_restore, scenario.spec, run_id)
        scenario.finish()
    scenario.compare(_calm(scenario), before, trained_again=again)


def store_locked(scenario: Scenario) -> None:
    """Another program locks the database for a minute."""
    run = scenario.start_up_to()
    scenario.hit()
    with contextlib.closing(sqlite3.connect(scenario.folder / "mlflow.db", timeout=30)) as database:
        database.isolation_level = None
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(scenario.draw.uniform(*LOCKED_SECONDS))
        database.execute("ROLLBACK")
    before = pieces(scenario.ledger()[0])
    if scenario.expect(run, (0, INFRASTRUCTURE), "same command") != 0:
        scenario.finish()
    scenario.compare(_calm(scenario), before)


def two_drivers(scenario: Scenario) -> None:
    """A second driver of the same study on one MLflow server: refused, or in place of a first that stands still."""
    server = TrackingServer(scenario.folder)
    server.start()
    try:
        scenario.data["tracking"]["uri"] = server.url
        scenario.file.write_text(json.dumps(scenario.data), encoding="utf-8")
        first = scenario.start_up_to(3)
        scenario.hit()
        elsewhere = scenario.folder / "elsewhere"
        away = f"tracking.workspace={elsewhere}"
        if scenario.draw.random() < 0.5:
            scenario.expect(scenario.start(), (REFUSED,), "is being run by another process")
            second = scenario.start("--set", away)
            # It watches the first for half a minute; one that has ended by then is no obstacle.
            scenario.expect(second, (0, REFUSED), "is being run by process")
            scenario.expect(first, (0,))
        else:
            first.signal(signal.SIGSTOP)
            shutil.copytree(scenario.folder / "work", elsewhere, ignore=shutil.ignore_patterns("*.lock"))
            second = scenario.start("--set", away)
            until(lambda: second.committed > 0 or not second.process.is_alive())
            first.signal(signal.SIGCONT)
            scenario.expect(first, (REFUSED,), "taken over")
            scenario.expect(second, (0,))
        scenario.compare(_calm(scenario), trained_again=True)
    finally:
        server.kill()


def database_cut(scenario: Scenario) -> None:
    """The database file is cut off, down to nothing, and comes back from a copy later."""
    run = scenario.start_up_to()
    scenario.kill(run)
    scenario.hit()
    before = pieces(scenario.ledger()[0])
    database = scenario.folder / "mlflow.db"
    shutil.copy(database, scenario.folder / "copy.db")
    share = 0.0 if scenario.draw.random() < 0.2 else scenario.draw.random()
    os.truncate(database, int(share * database.stat().st_size))
    scenario.expect(scenario.start(), (REFUSED, INFRASTRUCTURE), "restore")
    shutil.copy(scenario.folder / "copy.db", database)
    scenario.finish()
    scenario.compare(_calm(scenario), before)


def _gone_on_with(scenario: Scenario, kind: Kind, before: list[Piece]) -> None:
    """Go on with a study that has pieces on record, kill the search, finish it and compare."""
    run = scenario.start_up_to(3)
    scenario.hit()
    scenario.kill(run)
    scenario.finish()
    scenario.compare(_calm_after(kind), before)


def upgrade(scenario: Scenario) -> None:
    """A study of commit c5cb37e is gone on with, and killed meanwhile."""
    unpack_upgrade(scenario.folder)
    before = pieces(scenario.ledger()[0])
    if len(before) != UPGRADED_SEGMENTS:
        scenario.found.append(f"{len(before)} segments are read of {UPGRADED_SEGMENTS}")
    _gone_on_with(scenario, "upgrade", before)


def many_trials(scenario: Scenario) -> None:
    """A study with 1,000 trials on record is gone on with, and killed meanwhile."""
    _copy_many(scenario.folder)
    before = pieces(scenario.ledger()[0])
    if len({piece.key for piece in before}) < MANY_TRIALS:
        scenario.found.append(f"only {len(before)} segments of {MANY_TRIALS} trials are read")
    _gone_on_with(scenario, "many-trials", before)


SCENARIOS: Mapping[Kind, Callable[[Scenario], None]] = {
    "trial-deleted": trial_deleted,
    "study-deleted": study_deleted,
    "store-locked": store_locked,
    "two-drivers": two_drivers,
    "database-cut": database_cut,
    "upgrade": upgrade,
    "many-trials": many_trials,
}


def disturb_command(seed: int, kind: Kind, folder: Path) -> list[Record]:
    """One study at the command line, disturbed once.

    Args:
        seed: Of the study and of the fault.
        kind: Of `SCENARIOS`.
        folder: Empty.
    """
    data = study_data(seed, folder) | {"strategy": "random"}
    if kind == "upgrade":
        data = _upgraded_data(folder)
    elif kind == "many-trials":
        data = _many_data(folder, more=True)
    elif kind in ("two-drivers", "study-deleted"):
        # The search has to last, also on a machine that is so busy that the fault comes late.
        data["trainer"]["settings"]["real_seconds_per_step"] = 0.2
    scenario = Scenario(seed, folder, data)
    try:
        SCENARIOS[kind](scenario)
    except JfhpoError as error:
        scenario.found.append(str(error))
    return [scenario.record(kind)]


def _calm(scenario: Scenario) -> list[Piece]:
    return calm_pieces(scenario.data)


@cache
def _calm_after(kind: Kind) -> list[Piece]:
    """What a study that is on record already comes to when nothing happens."""
    with tempfile.TemporaryDirectory(prefix="jfhpo-calm-") as name:
        folder = Path(name)
        if kind == "upgrade":
            unpack_upgrade(folder)
            data = _upgraded_data(folder)
        else:
            _copy_many(folder)
            data = _many_data(folder, more=True)
        file = folder / "study.yaml"
        file.write_text(json.dumps(data), encoding="utf-8")
        trials, _ = in_process(look, load_study(file))
        return calm_pieces(data, trials)


def _upgraded_data(folder: Path) -> dict[str, Any]:
    """The study of commit c5cb37e, with more to do than it had."""
    with tarfile.open(UPGRADED) as archive:
        file = archive.extractfile("./study.yaml")
        assert file is not None
        data: dict[str, Any] = yaml.safe_load(file.read())
    settings = {"real_seconds_per_step": 0.002}
    trainer = {"name": "simulated", "settings": settings}
    return data | {"budget": {"trial_seconds": 300, "max_parallel": 1}, "trainer": trainer} | _here(folder)


def _here(folder: Path) -> dict[str, Any]:
    return {"tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "workspace": str(folder / ".jfhpo")}}


def _many_data(folder: Path, *, more: bool) -> dict[str, Any]:
    """A study of 1,000 short trials and, then, some more."""
    data = study_data(0, folder)
    data["trainer"]["settings"]["real_seconds_per_step"] = 0.0
    seconds = MANY_TRIALS * MANY_SECONDS + (MORE_SECONDS if more else 0)
    return (
        data
        | {
            "study": "many",
            "strategy": "random",
            "fidelity": {"horizon_prompts": 48, "rungs": 1},
            "budget": {"trial_seconds": seconds, "max_parallel": 1},
            "seeds": {"search": 0, "training": [0]},
        }
        | _here(folder)
    )


@cache
def _many() -> tempfile.TemporaryDirectory[str]:
    """A folder with 1,000 trials on record: searched in memory, and written down as a search writes them."""
    kept = tempfile.TemporaryDirectory(prefix="jfhpo-many-")
    in_process(_record_many, Path(kept.name), patience_seconds=RECORDING_SECONDS)
    return kept


def _record_many(folder: Path) -> None:
    study = resolve(StudySpec.model_validate(_many_data(folder, more=False)))
    ledger = MlflowLedger()
    ledger.open(study.spec)
    scores = random.Random(0)
    for number, configuration in enumerate(fresh_configurations(study, (), 0, MANY_TRIALS)):
        trial = trained(study, configuration, "large", [0.1, scores.uniform(0.1, 0.8)], number, seconds=MANY_SECONDS)
        (result,) = trial.segments
        ledger.begin(trial, result.segment)
        ledger.commit(trial.key, result, [])
    ledger.end(StudyState.INTERRUPTED)


def _copy_many(folder: Path) -> None:
    kept = _many().name
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    relocate(folder / "mlflow.db", kept, folder)


def unpack_upgrade(folder: Path) -> None:
    """Lay out the study of commit c5cb37e."""
    with tarfile.open(UPGRADED) as archive:
        archive.extractall(folder, [part for part in archive if part.name != "./study.yaml"], filter="data")
    relocate(folder / "mlflow.db", ORIGIN, folder)


def relocate(database: Path, before: str | Path, folder: Path) -> None:
    """Tell MLflow's database where its files lie now."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for table, column in PLACES:
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(before), str(folder)))


def _delete_trial(spec: StudySpec, key: str) -> str:
    ledger = _ledger(spec)
    run_id = ledger.run_id(key)
    ledger.client.delete_run(run_id)
    return run_id


def _delete_study(spec: StudySpec) -> tuple[str, list[Trial]]:
    ledger = _ledger(spec)
    ledger.client.delete_run(ledger.study_run_id)
    return ledger.study_run_id, ledger.trials()


def _restore(spec: StudySpec, run_id: str) -> None:
    MlflowClient(tracking_uri=spec.tracking.uri).restore_run(run_id)


def _ledger(spec: StudySpec) -> MlflowLedger:
    ledger = MlflowLedger()
    assert ledger.look(spec)
    return ledger
