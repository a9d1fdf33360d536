"""The driver is killed in the middle of a search, or interrupted; the same command goes on. With real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import SegmentResult, Trial
from mlflow_plugin.ledger import MlflowLedger
from tests.run.support import PATIENCE_SECONDS, all_gone, descendants, processes
from tests.studies import study_data

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tracking_uri")]

PROGRAM = Path(__file__).parent / "search_program.py"


def study_of(folder: Path, seconds_per_step: float, parallel: int = 2) -> StudySpec:
    return StudySpec.model_validate(
        study_data(
            folder / "workspace",
            trainer={"name": "simulated", "settings": {"real_seconds_per_step": seconds_per_step}},
            budget={"trial_seconds": 200, "max_parallel": parallel},
            seeds={"training": [0]},
            tracking={"workspace": str(folder / "workspace"), "uri": f"sqlite:///{folder / 'mlflow.db'}"},
            cluster={"address": "local"},
        )
    )


class Search:
    """The program, running in a process of its own."""

    def __init__(self, folder: Path, spec: StudySpec) -> None:
        self.folder, self.spec = folder, spec
        self.journal = folder / "journal"
        (folder / "study.yaml").write_text(spec.to_yaml())

    def __enter__(self) -> Self:
        command = [sys.executable, str(PROGRAM), "study.yaml", str(self.journal)]
        self.log = (self.folder / "log").open("a")
        # A session of its own, as a terminal would give it: Ctrl-C reaches the whole process group.
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to become true while the program runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def submitted(self) -> list[str]:
        """The journal so far."""
        return self.journal.read_text().splitlines() if self.journal.exists() else []


def committed(trials: list[Trial]) -> dict[str, SegmentResult]:
    """Results by trial key and segment index, as the journal names them."""
    return {f"{trial.key} {result.segment.index}": result for trial in trials for result in trial.segments}


def recorded(spec: StudySpec) -> list[Trial]:
    ledger = MlflowLedger()
    ledger.open(spec)
    return ledger.trials()


def trains(search: Search) -> bool:
    """Whether a worker of the program is up."""
    return any("WorkerProcess" in command for command in descendants(search.process.pid).values())


@pytest.mark.parametrize(("blow", "parallel"), [(signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_a_search_whose_driver_dies_goes_on(tmp_path: Path, blow: signal.Signals, parallel: int) -> None:
    spec = study_of(tmp_path, 0.05, parallel)
    search = Search(tmp_path, spec)
    with search:
        search.until(lambda: len(search.submitted()) >= 3 and trains(search))
        started = set(descendants(search.process.pid))
        count = len(search.submitted())
        search.until(lambda: len(search.submitted()) > count)  # so that the last one has only just begun
        (os.killpg if blow == signal.SIGINT else os.kill)(search.process.pid, blow)
        search.process.wait(timeout=PATIENCE_SECONDS)
    assert all_gone(started), "the driver is gone and its workers train on"
    before = committed(recorded(spec))
    first = search.submitted()
    assert before, "the blow came before anything was committed"
    assert set(before) < set(first), "the blow came when nothing was running"

    with search:
        search.until(lambda: trains(search))
        started = set(descendants(search.process.pid))
        search.until(lambda: search.submitted()[-1] == "complete")
        search.process.wait(timeout=PATIENCE_SECONDS)
    assert all_gone(started), "the search is complete and its workers are left"
    trials = recorded(spec)
    after = committed(trials)
    again = search.submitted()[len(first) : -1]
    # Nothing that was committed ran again, or was charged again, or changed.
    assert not set(again) & set(before)
    assert {name: after[name] for name in before} == before
    # What was running ran again, first of all.
    assert set(again[: len(set(first) - set(before))]) == set(first) - set(before)
    assert len(again) == len(set(again))

    # The same configurations in the same order as in a search that nothing disturbed, with the same results.
    ledger = MemoryLedger()
    calm = resolve(study_of(tmp_path / "calm", 0, parallel))
    run_search(calm, ledger, InlineDispatcher(parallel))
    expected = {trial.key: trial for trial in ledger.trials()}
    common = [trial for trial in trials if trial.key in expected]
    for trial in common:
        assert trained(trial) == trained(expected[trial.key])
    if parallel == 1:
        assert [outline(trial) for trial in trials] == [outline(trial) for trial in expected.values()]
    else:
        # Which of two trials ends first is a matter of luck, and with it when exactly the budget is spent.
        mine, theirs = ([t.key for t in of if t.purpose == "search"] for of in (trials, expected.values()))
        shorter = min(len(mine), len(theirs))
        assert mine[:shorter] == theirs[:shorter]
        assert shorter > 3


def test_a_worker_that_stands_still_ends_with_its_driver(tmp_path: Path) -> None:
    search = Search(tmp_path, study_of(tmp_path, 0.05, parallel=1))
    with search:
        search.until(lambda: len(search.submitted()) >= 2 and trains(search))
        started = descendants(search.process.pid)
        workers = {pid for pid, command in started.items() if "WorkerProcess" in command}
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
    try:
        assert all_gone(set(started)), "the driver is gone and a stopped worker is left"
    finally:
        for pid in workers & processes().keys():
            os.kill(pid, signal.SIGKILL)


def trained(trial: Trial) -> tuple[Any, ...]:
    """What a trial learned and cost. The untrained model is scored by whoever comes first, so that is left out."""
    base = sum(evaluation.seconds for evaluation in trial.evaluations if evaluation.step == 0)
    scores = [evaluation for evaluation in trial.evaluations if evaluation.step > 0]
    return trial.state, trial.step, scores, round(trial.charge_seconds - base, 6)


def outline(trial: Trial) -> tuple[Any, ...]:
    """A trial as its study sees it."""
    return trial.number, trial.key, trial.configuration, trial.purpose, trial.evaluations, trial.charge_seconds
