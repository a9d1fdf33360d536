"""Checkpoints as MLflow artifacts: `mlflow artifacts download -u jfhpo-checkpoint:///.../step-00000012`.

The index of checkpoints (`mlflow_plugin.checkpoints`) names each by such an address. What is downloaded has been
checked against the checksums of its manifest first. The search alone writes checkpoints.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from jfhpo_core.store.checkpoints import MANIFEST, manifest_fault

SCHEME = "jfhpo-checkpoint"


def checkpoint_uri(folder: Path) -> str:
    """Address of a checkpoint's folder."""
    return f"{SCHEME}://{quote(str(folder.absolute()))}"


class CheckpointRepository(ArtifactRepository):  # type: ignore[misc]
    """Reads checkpoints. Entry point `mlflow.artifact_repository`.

    Args:
        artifact_uri: `jfhpo-checkpoint://` and a folder: a checkpoint, or one above it.
        tracking_uri: Not used.
        registry_uri: Not used.
    """

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._root = Path(unquote(urlsplit(artifact_uri).path)).resolve()
        self._faults: dict[Path, str | None] = {}

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """Files and folders directly in a folder; empty for a file."""
        folder = self._place(path)
        if not folder.is_dir():
            return []
        inside = sorted(folder.iterdir())
        return [
            FileInfo(one.relative_to(self._root).as_posix(), one.is_dir(), None if one.is_dir() else one.stat().st_size)
            for one in inside
        ]

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        """Copy one file, if its checkpoint is sound.

        Raises:
            MlflowException: It is damaged, or belongs to no checkpoint.
        """
        file = self._place(remote_file_path)
        checkpoint = next((folder for folder in file.parents if (folder / MANIFEST).is_file()), None)
        fault = "it belongs to no checkpoint" if checkpoint is None else self._fault(checkpoint)
        if fault is not None:
            raise MlflowException(f"{file} is not handed out: {fault}")
        shutil.copyfile(file, local_path)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Refused.

        Raises:
            MlflowException: Always.
        """
        raise MlflowException("checkpoints are written by the search only; log this file as an artifact of a run")

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Refused, see `log_artifact`."""
        self.log_artifact(local_dir, artifact_path)

    def _fault(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint; looked for once."""
        if checkpoint not in self._faults:
            self._faults[checkpoint] = manifest_fault(checkpoint)
        return self._faults[checkpoint]

    def _place(self, path: str | None) -> Path:
        """A path in the repository.

        Raises:
            MlflowException: It leads out of it.
        """
        place = self._root.joinpath(*PurePosixPath(path or "").parts).resolve()
        if not place.is_relative_to(self._root):
            raise MlflowException(f"{path!r} points outside {self._root}")
        return place
