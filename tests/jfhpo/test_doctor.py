from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jfhpo.cli import REFUSED, app
from jfhpo.doctor import _ray, diagnose
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers.base import Level, failing_as
from tests.studies import study_data


def study(folder: Path, **changes: object) -> StudySpec:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracking = {"workspace": str(folder / "work"), "uri": uri}
    return StudySpec.model_validate(study_data(folder, tracking=tracking, **changes))


def write(spec: StudySpec, folder: Path) -> str:
    path = folder / "study.yaml"
    path.write_text(spec.to_yaml())
    return str(path)


def test_a_study_that_is_refused_says_why_and_stops_there(tmp_path: Path) -> None:
    (finding,) = diagnose(study(tmp_path, trainer={"name": "simulated", "fixed": {"learning_rat": 1.0}}))
    assert (finding.level, finding.subject) == (Level.FAILURE, "study")
    assert "learning_rat" in finding.message


@pytest.mark.parametrize("changes", [{"strategy": "nonsense"}, {"warm_start": ["never"]}])
def test_what_a_search_would_refuse_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (finding,) = diagnose(study(tmp_path, **changes))
    assert (finding.level, finding.subject) == (Level.FAILURE, "study")


@pytest.mark.slow
def test_the_command_prints_every_finding_and_writes_no_study(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", write(study(tmp_path), tmp_path)])
    assert result.exit_code == 0, result.output
    for subject in ("study", "data", "reward", "disk", "ledger", "ray"):
        assert f"ok       {subject}" in result.stdout
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_failure_ends_with_the_code_of_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward(prompts, completions, **columns):\n    return []\n")
    for name in ("train", "heldout"):
        rows = [{"prompt": f"{name} {number}"} for number in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"prompts": "train.jsonl", "heldout": "heldout.jsonl", "reward": "reward.py"}
    result = CliRunner().invoke(app, ["doctor", write(study(tmp_path, task=task), tmp_path)])
    assert result.exit_code == REFUSED
    assert "failure  reward" in result.stdout
    assert "returned 0 rewards" in result.stdout


def test_ray_where_none_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (found,) = _ray(resolve(study(tmp_path)))
    assert (found.level, "private instance" in found.message) == (Level.OK, True)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (found,) = failing_as("ray", _ray(resolve(study(tmp_path))))
    assert (found.level, "no Ray cluster answers" in found.message) == (Level.FAILURE, True)


def test_a_cluster_has_what_the_largest_model_that_is_trained_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "a-cluster:6379")
    monkeypatch.setattr("jfhpo_core.run.ray_instance.cluster_resources", lambda _: {"CPU": 16.0, "GPU": 8.0})
    family = [
        {"name": "small", "path": "simulated", "parameters": 100_000},
        {"name": "large", "path": "simulated", "parameters": 1_000_000, "devices": 8},
        {"name": "unused", "path": "simulated", "parameters": 9_000_000, "devices": 64},
    ]
    for cluster, level, message in (
        ({"gpus_per_device": 1}, Level.OK, "8 GPUs and 16 CPUs"),
        ({"gpus_per_device": 2}, Level.FAILURE, "needs 16 GPUs"),
        ({"cpus_per_device": 4}, Level.FAILURE, "needs 32 CPUs"),
    ):
        (found,) = failing_as("ray", _ray(resolve(study(tmp_path, family=family, cluster=cluster))))
        assert (found.level, message in found.message) == (level, True), found
