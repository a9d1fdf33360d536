"""Studies of earlier versions are continued. Each archive is a folder with database, artifacts and workspace.

c5cb37e: four finished trials of a simulated study, cut off by Ctrl-C while its budget was not spent.
"""

from __future__ import annotations

import sqlite3
import tarfile
from pathlib import Path

import pytest

from jfhpo.session import run_study
from jfhpo_core.study.study_file import load_study
from mlflow_plugin.ledger import MlflowLedger

ORIGIN = "/tmp/upgrade"
"""Where the archives were made: MLflow keeps absolute paths of artifacts."""
PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(Path(__file__).parent / "c5cb37e.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for table, column in PLACES:
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (ORIGIN, str(tmp_path)))
    database.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.mark.slow
def test_a_study_of_an_earlier_version_goes_on(earlier: Path) -> None:
    spec = load_study(earlier / "study.yaml")
    before = MlflowLedger()
    assert before.look(spec)
    paid = {trial.key: trial.segments for trial in before.trials()}
    assert sum(len(segments) for segments in paid.values()) == 4
    raised = spec.model_copy(update={"budget": spec.budget.model_copy(update={"trial_seconds": 200.0})})
    result = run_study(raised).result
    assert result.complete
    assert result.recommended is not None
    after = {trial.key: trial.segments for trial in result.trials}
    assert all(after[key] == segments for key, segments in paid.items())
    assert len(after) > len(paid)
