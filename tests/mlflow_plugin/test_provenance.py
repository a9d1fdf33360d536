from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jfhpo.session import run_study
from jfhpo_core.study.spec import StudySpec, TaskSpec
from mlflow_plugin.provenance import source_tags, task_data
from tests.studies import study_data


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", *arguments],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_commit_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "mlflow.source.git.commit" not in source_tags()
    git(tmp_path, "init", "--quiet")
    assert "mlflow.source.git.commit" not in source_tags()
    (tmp_path / "study.yaml").write_text("study: one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    tags = source_tags()
    assert tags["mlflow.source.git.commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert tags["jfhpo.git_dirty"] == "false"
    (tmp_path / "study.yaml").write_text("study: two")
    assert source_tags()["jfhpo.git_dirty"] == "true"


def test_datasets_have_digest_columns_and_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1, "hard": True}, {"prompt": "b", "answer": 2, "hard": False}]
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"prompts": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl"), "reward": "r.py"}
    data = task_data(TaskSpec.model_validate(files))
    assert data.train is not None
    assert data.heldout is not None
    assert data.train.digest == data.heldout.digest
    assert json.loads(data.train.profile) == {"num_rows": 2}
    columns = {column["name"]: column["type"] for column in json.loads(data.train.schema)["mlflow_colspec"]}
    assert columns == {"prompt": "string", "answer": "long", "hard": "boolean"}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(rows[0]))
    assert task_data(TaskSpec.model_validate(files)).heldout != data.heldout
    # A replayed or simulated study may do without the files.
    (tmp_path / "heldout.jsonl").unlink()
    assert task_data(TaskSpec.model_validate(files)).heldout is None
    assert task_data(TaskSpec(embedded="own-loop")).inputs() == []


@pytest.mark.slow
def test_how_a_call_ends_is_shown(tracking_uri: str, tmp_path: Path) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    def fail(_: object) -> None:
        raise RuntimeError("the disk is full")

    tracking = {"workspace": str(tmp_path), "uri": tracking_uri}
    data = study_data(tmp_path, tracking=tracking, cluster={"address": "inline"}, budget={"trial_seconds": 60})
    spec = StudySpec.model_validate(data)
    client = MlflowClient(tracking_uri=tracking_uri)

    def study_run() -> Run:
        experiment = client.get_experiment_by_name("jfhpo/test").experiment_id
        (run,) = client.search_runs([experiment], "tags.`jfhpo.study` = 'test'")
        return run

    for disturb, error, status in ((interrupt, KeyboardInterrupt, "KILLED"), (fail, RuntimeError, "FAILED")):
        with pytest.raises(error):
            run_study(spec, disturb)
        assert study_run().info.status == status
    run_study(spec)
    done = study_run()
    assert done.info.status == "FINISHED"
    assert "The recommended configuration scores" in done.data.tags["mlflow.note.content"]
    artifacts = {file.path for file in client.list_artifacts(done.info.run_id)}
    assert artifacts == {"environment.json", "plots", "report.html", "study.yaml"}
    # Asking a finished study again changes nothing.
    run_study(spec)
    assert study_run().info.end_time == done.info.end_time
