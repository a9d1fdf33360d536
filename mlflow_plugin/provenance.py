"""Where a study comes from: who ran it, from which commit, with which versions, on which data.

`MlflowClient.create_run` asks none of MLflow's context providers, so the ledger does.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking.context.registry import resolve_tags

from jfhpo_core.report.page import versions
from jfhpo_core.study.spec import DataSource, HubData, TaskSpec

SOURCE_NAME = "mlflow.source.name"
COMMIT = "mlflow.source.git.commit"
DIRTY = "jfhpo.git_dirty"
OURS = ("mlflow.parentRunId", "jfhpo.in_study", "jfhpo.in_trial", "jfhpo.trial_number", "jfhpo.model")
"""Set by our own context provider where one study runs inside the trial of another; a study is nobody's child."""


def source_tags() -> dict[str, str]:
    """Tags by which MLflow shows user and source, with the git commit of the folder that the study is run in.

    MLflow itself would name the repository that the `jfhpo` script is installed in.
    """
    tags = {
        name: value
        for name, value in resolve_tags().items()
        if not name.startswith("mlflow.source.git.") and name not in OURS
    }
    tags[SOURCE_NAME] = Path(tags.get(SOURCE_NAME, "jfhpo")).name
    return {**tags, **_git_tags(Path.cwd())}


def _git_tags(folder: Path) -> dict[str, str]:
    """Commit of the repository that a folder lies in; empty without git, repository or commit."""
    try:
        import git  # raises if there is no git program
    except ImportError:
        return {}
    try:
        repository = git.Repo(folder, search_parent_directories=True)
        return {COMMIT: repository.head.commit.hexsha, DIRTY: str(repository.is_dirty()).lower()}
    except (ValueError, git.GitError):
        return {}


def environment() -> dict[str, Any]:
    """Python, platform and versions that the driver runs with."""
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions()}


@dataclass(frozen=True)
class TaskData:
    """The files of a task as MLflow dataset inputs; both None if the files are not here."""

    train: Dataset | None
    heldout: Dataset | None

    def inputs(self) -> list[DatasetInput]:
        """What a run takes in, with the use that it makes of it."""
        uses = (("training", self.train), ("evaluation", self.heldout))
        return [
            DatasetInput(dataset, [InputTag("mlflow.data.context", use)])
            for use, dataset in uses
            if dataset is not None
        ]


def task_data(task: TaskSpec) -> TaskData:
    """Name, digest, columns and number of rows of a task's files."""
    if task.embedded is not None:
        from jfhpo_core.embedded import NAMES, task_folder

        if task.embedded not in NAMES:  # a stand-in for a task that only the trainer knows
            return TaskData(None, None)
        folder = task_folder(task.embedded)
        return TaskData(
            _dataset(folder / "train.jsonl", f"{task.embedded}-train"),
            _dataset(folder / "heldout.jsonl", f"{task.embedded}-heldout"),
        )
    return TaskData(*(_source(source) for source in (task.prompts, task.heldout)))


def _source(source: DataSource | None) -> Dataset | None:
    """A data set of the hub is known by name and revision; a file by its content."""
    if not isinstance(source, HubData):
        return None if source is None else _dataset(Path(source), Path(source).stem)
    digest = hashlib.sha256(source.model_dump_json().encode()).hexdigest()[:16]
    return Dataset(source.hub, digest, "hf", source.model_dump_json(exclude_none=True))


def _dataset(path: Path, name: str) -> Dataset | None:
    """None if the file cannot be read: a simulated or replayed study needs none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    lines = [line for line in content.split(b"\n") if line.strip()]
    return Dataset(
        name=name,
        digest=hashlib.sha256(content).hexdigest()[:16],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        schema=_schema(lines[:1]),
        profile=json.dumps({"num_rows": len(lines)}),
    )


def _schema(lines: Sequence[bytes]) -> str | None:
    """Columns of the first row in the form that the UI shows."""
    try:
        row = json.loads(lines[0]) if lines else None
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    kinds = {str: "string", bool: "boolean", int: "long", float: "double"}
    columns = [
        {"name": name, "type": kinds.get(type(value), "object"), "required": True} for name, value in row.items()
    ]
    return json.dumps({"mlflow_colspec": columns})
