"""Searches on the stores of a team: a server with authentication that dies and comes back, and PostgreSQL."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks.tracking_server import TrackingServer
from jfhpo_core.errors import LedgerError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.store.outbox import Outbox
from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers import Job
from mlflow_plugin.ledger import MlflowLedger
from tests.mlflow_plugin.conftest import PASSWORD
from tests.studies import simulated_study

DIES_AT, BACK_AT = 3, 7
"""Numbers of submitted segments."""


SMALL = {"trial_seconds": 300, "max_parallel": 2}


def study_on(uri: str, folder: Path) -> Study:
    tracking = {"workspace": str(folder), "uri": uri, "experiment": "on a server"}
    return simulated_study(folder, tracking=tracking, budget=SMALL)


def seen(ledger: Ledger) -> list[object]:
    drop = {"segments": {"__all__": {"checkpoint": {"digest"}}}}
    return [trial.model_dump(exclude=drop) for trial in ledger.trials()]


@pytest.fixture
def calm(tmp_path: Path) -> MemoryLedger:
    """What a search that nothing disturbs leaves."""
    ledger = MemoryLedger()
    run_search(simulated_study(tmp_path / "calm", budget=SMALL), ledger, InlineDispatcher(2))
    return ledger


def check(study: Study, calm: MemoryLedger) -> None:
    """The store holds what `calm` does, once."""
    ledger = MlflowLedger()
    ledger.open(study.spec)
    assert seen(ledger) == seen(calm)
    for trial in calm.trials():
        assert ledger.step_records(trial.key) == calm.step_records(trial.key)
    runs = ledger.client.search_runs([ledger.experiment_id], "tags.`jfhpo.trial_key` != ''", max_results=1000)
    assert Counter(run.data.tags["jfhpo.trial_key"] for run in runs) == Counter(one.key for one in calm.trials())
    assert "RUNNING" not in {run.info.status for run in runs}
    trial = max(calm.trials(), key=lambda one: one.step)
    history = ledger.client.get_metric_history(ledger.run_id(trial.key), "train/reward")
    assert [point.step for point in history] == list(range(1, trial.step + 1))


@pytest.mark.slow
def test_a_guarded_server_that_dies_delays_and_loses_nothing(
    guarded_server: TrackingServer, calm: MemoryLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_on(guarded_server.url, tmp_path / "work")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(LedgerError, match="MLFLOW_TRACKING_PASSWORD"):
        MlflowLedger().open(study.spec)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)

    path = study.folder / "outbox.jsonl"
    submitted: list[str] = []
    waited = False

    def on_submit(job: Job) -> None:
        nonlocal waited
        submitted.append(job.trial_key)
        if len(submitted) == DIES_AT:
            guarded_server.kill()
        if len(submitted) == BACK_AT:
            waited = path.exists()
            guarded_server.start()

    assert sum(len(trial.segments) for trial in calm.trials()) > BACK_AT, "the server would stay away"
    outbox = Outbox(MlflowLedger(), path)
    run_search(study, outbox, InlineDispatcher(2, on_submit))
    outbox.deliver()
    assert waited
    assert not path.exists()
    check(study, calm)


@pytest.mark.slow
def test_postgresql_holds_a_study(postgres: str, calm: MemoryLedger, tmp_path: Path) -> None:
    # Artifacts would go to ./mlruns.
    client = MlflowClient(tracking_uri=postgres)
    client.create_experiment("on a server", artifact_location=(tmp_path / "files").as_uri())
    study = study_on(postgres, tmp_path / "work")
    run_search(study, MlflowLedger(), InlineDispatcher(2))
    check(study, calm)
