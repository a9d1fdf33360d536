"""What MLflow finds by the entry points of the installed package: nothing here hands it our classes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from jfhpo.project_backend import project_study
from jfhpo_core.errors import SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.resolved import resolve
from jfhpo_core.trainers import Job, Observer, TrainingResult
from jfhpo_core.trainers.simulated import SimulatedTrainer
from mlflow_plugin.artifacts import checkpoint_uri
from mlflow_plugin.ledger import MlflowLedger
from tests.studies import simulated_study

KEY = "0123456789abcdef"


class Chatty(SimulatedTrainer):
    """A trainer that logs to MLflow itself, as TRL and OpenRLHF do when they are asked to."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        with mlflow.start_run(run_name="mine"):
            mlflow.log_metric("loss", 0.5)
            with mlflow.start_run(run_name="inner", nested=True):
                time.sleep(0.5)
        return super().run(job, start, stage, observe)


@pytest.mark.slow
def test_a_trainers_own_runs_belong_to_the_trial(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    study = simulated_study(tmp_path, budget={"trial_seconds": 1, "max_parallel": 1}, baselines=[])
    client = MlflowClient(tracking_uri=tracking_uri)
    ledger = MlflowLedger(client)
    run_search(study, ledger, InlineDispatcher(trainer=Chatty()))
    trial = ledger.trials()[0]
    mine = client.search_runs([ledger.experiment_id], "run_name = 'mine'", order_by=["start_time ASC"])[0]
    inner = client.search_runs([ledger.experiment_id], "run_name = 'inner'", order_by=["start_time ASC"])[0]
    assert mine.data.tags["mlflow.parentRunId"] == ledger.run_id(trial.key)
    assert mine.data.tags["jfhpo.in_trial"] == trial.key
    assert mine.data.tags["jfhpo.in_study"] == "test"
    assert inner.data.tags["mlflow.parentRunId"] == mine.info.run_id
    assert client.get_run(ledger.run_id(trial.key)).data.metrics["system/cpu_utilization_percentage"] >= 0
    # They are not taken for trials or studies.
    again = MlflowLedger(client)
    again.open(study.spec)
    assert again.trials() == ledger.trials()
    # Outside of a trial nothing is tagged.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    with mlflow.start_run() as run:
        pass
    outside = client.get_run(run.info.run_id)
    assert outside.info.experiment_id == "0"
    assert not [name for name in outside.data.tags if name.startswith("jfhpo.")]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "check points")
    stage = store.stage(KEY)
    (stage / "weights").mkdir()
    (stage / "weights" / "model.safetensors").write_bytes(b"weights")
    (stage / "state.json").write_text("{}")
    return store.root / store.commit(KEY, stage, 12, 192).path


def test_checkpoints_are_artifacts(checkpoint: Path, tmp_path: Path) -> None:
    uri = checkpoint_uri(checkpoint)
    assert [file.path for file in _repository(checkpoint).list_artifacts("weights")] == ["weights/model.safetensors"]
    (tmp_path / "out").mkdir()
    copy = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "out")))
    assert (copy / "weights" / "model.safetensors").read_bytes() == b"weights"
    assert (copy / "state.json").read_text() == "{}"


def test_a_damaged_checkpoint_is_not_handed_out(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "state.json").write_text("[]")
    with pytest.raises(MlflowException, match=r"state\.json does not match its checksum"):
        mlflow.artifacts.download_artifacts(checkpoint_uri(checkpoint), dst_path=str(tmp_path))


def test_nothing_outside_of_a_checkpoint_is_handed_out(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "state.json").unlink()
    (checkpoint / "state.json").symlink_to(tmp_path / "secret")
    for uri in (f"{checkpoint_uri(checkpoint)}/../../../secret", f"{checkpoint_uri(checkpoint)}/state.json"):
        with pytest.raises(MlflowException):
            mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path))
    with pytest.raises(MlflowException, match="written by the search only"):
        _repository(checkpoint).log_artifact(str(tmp_path / "secret"))


def _repository(checkpoint: Path) -> mlflow.store.artifact.artifact_repo.ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(checkpoint_uri(checkpoint))


SPACE = {"lr": {"type": "float", "low": 1e-3, "high": 1.0, "log": True}}
PROJECT = """
name: quadratic
entry_points:
  main:
    parameters:
      lr: float
      depth: {type: int, default: 1}
    command: "python train.py --lr {lr} --depth {depth}"
"""
TRAIN = """
import argparse, math, mlflow
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--depth", type=int)
given = parser.parse_args()
with mlflow.start_run():
    mlflow.log_metric("loss", (math.log10(given.lr) + 1) ** 2 + given.depth)
"""


def test_the_study_of_a_project(tmp_path: Path) -> None:
    config = {"metric": "loss", "goal": "minimize", "space": SPACE, "budget": {"trial_seconds": 9}, "SYNCHRONOUS": True}
    spec = project_study(str(tmp_path), "main", {"depth": "010"}, None, config, {"uri": "sqlite:///x.db"})
    # What the project is given is what the user wrote.
    assert spec.trainer.fixed == {"depth": "010", "prompts_per_step": 1}
    assert spec.trainer.settings["uri"] == str(tmp_path)
    assert resolve(spec).complete({"lr": 0.1}) == {"lr": 0.1, "depth": "010", "prompts_per_step": 1}
    for change, message in {
        "metric": "`metric` is missing",
        "space": "space: Field required",
        "budget": "budget: .*either trial_seconds or gpu_hours",
    }.items():
        with pytest.raises(SpecError, match=message):
            project_study("there", "main", {}, None, {k: v for k, v in config.items() if k != change}, {})
    with pytest.raises(SpecError, match="the space searches it"):
        project_study("there", "main", {"lr": "1"}, None, config, {})


@pytest.mark.slow
def test_mlflow_run_searches_over_a_project(tracking_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text(PROJECT)
    (folder / "train.py").write_text(TRAIN)
    config = {
        "metric": "loss",
        "goal": "minimize",
        "space": SPACE,
        "budget": {"trial_seconds": 5},
        "strategy": "random",
        "tracking": {"uri": tracking_uri, "experiment": "projects", "registered_model": "", "workspace": str(tmp_path)},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable, "-m", "mlflow", "run", ".", "--backend", "jfhpo", "--backend-config", "../config.json",
        "--env-manager", "local", "-P", "depth=3", "--run-name", "over lr",
    ]  # fmt: skip
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment_by_name("projects").experiment_id
    (study,) = client.search_runs([experiment], "tags.`jfhpo.study` = 'project-main'")
    assert (study.info.run_name, study.info.status) == ("over lr", "FINISHED")
    assert study.data.tags["mlflow.project.backend"] == "jfhpo"
    trials = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{study.info.run_id}'")
    assert trials
    for trial in trials:
        (own,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{trial.info.run_id}'")
        assert own.info.status == "FINISHED"
        assert own.data.params == {"lr": trial.data.params["lr"], "depth": "3"}
        assert trial.data.metrics["eval/score"] == pytest.approx(-own.data.metrics["loss"])
    assert study.data.metrics["study/recommended_score"] == max(trial.data.metrics["eval/score"] for trial in trials)
