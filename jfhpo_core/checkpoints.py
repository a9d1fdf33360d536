"""The checkpoint store: a folder of committed training states that survive a crash at any moment.

A checkpoint is staged, listed in a manifest with the SHA-256 of every file, flushed to disk, and only then renamed to
its final place; whatever lies there is complete. It is verified before it is used; one that does not match its
manifest is moved to `quarantine/` and the one before it serves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

from jfhpo_core.errors import CheckpointError
from jfhpo_core.trial import Checkpoint

MANIFEST = "jfhpo-manifest.json"
KEY = re.compile(r"[0-9a-f]{16}")
KEPT = 2
"""Checkpoints kept per trial: the newest, and the one that serves if it turns out damaged."""


class CheckpointStore:
    """Checkpoints of one study under a root folder, which all workers share.

    Layout: `<root>/<trial key>/step-00000012/` with the trainer's files and a manifest.

    Args:
        root: Created if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, key: str) -> Path:
        """A new empty folder on the store's file system to write a checkpoint into."""
        folder = self._trial(key).parent / "staging" / f"{key}-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        return folder

    def commit(self, key: str, stage: Path, step: int, prompts: int) -> Checkpoint:
        """Make a staged folder a checkpoint, atomically; committing the same step again replaces it.

        Raises:
            CheckpointError: The stage is empty, or the disk refuses.
        """
        files = sorted(path for path in stage.rglob("*") if path.is_file())
        if not files:
            raise CheckpointError(f"{stage}: the trainer wrote no checkpoint into its stage")
        manifest = {
            "step": step,
            "prompts": prompts,
            "files": {
                path.relative_to(stage).as_posix(): {"sha256": file_digest(path), "bytes": path.stat().st_size}
                for path in files
            },
        }
        text = json.dumps(manifest, indent=1, sort_keys=True)
        final = self._trial(key) / f"step-{step:08d}"
        try:
            (stage / MANIFEST).write_text(text, encoding="utf-8")
            for path in (*files, stage / MANIFEST):
                _flush(path)
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                self._discard(final)
            stage.rename(final)
            _flush(final.parent)
        except OSError as error:
            raise CheckpointError(f"{final}: the checkpoint could not be stored: {error}") from error
        return self._describe(final, text)

    def verify(self, path: str) -> Path:
        """Check a checkpoint against its manifest and return its folder.

        Raises:
            CheckpointError: It is missing or damaged; a damaged one has been moved to quarantine.
        """
        folder = self._inside(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such checkpoint")
        fault = _fault(folder)
        if fault is not None:
            quarantine = self.root / "quarantine" / f"{folder.parent.name}-{folder.name}-{uuid.uuid4().hex[:8]}"
            quarantine.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(quarantine)
            raise CheckpointError(f"{folder}: {fault}; it was moved to {quarantine}")
        return folder

    def checkpoints(self, key: str) -> list[Checkpoint]:
        """Committed checkpoints of a trial, newest first; not verified."""
        folders = sorted(self._trial(key).glob("step-*"), reverse=True)
        return [self._describe(folder) for folder in folders if (folder / MANIFEST).is_file()]

    def prune(self, key: str, keep: int = KEPT) -> None:
        """Delete all but the newest checkpoints of a trial."""
        for folder in sorted(self._trial(key).glob("step-*"), reverse=True)[keep:]:
            self._discard(folder)

    def clear_staging(self) -> None:
        """Delete what interrupted workers left half written. Only while no worker runs."""
        shutil.rmtree(self.root / "staging", ignore_errors=True)

    def _trial(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise CheckpointError(f"{key!r} is not a trial key")
        return self.root / key

    def _inside(self, path: str) -> Path:
        folder = (self.root / path).resolve()
        if not folder.is_relative_to(self.root.resolve()):
            raise CheckpointError(f"{path!r} points outside the checkpoint store")
        return folder

    def _describe(self, folder: Path, manifest: str | None = None) -> Checkpoint:
        text = (folder / MANIFEST).read_text(encoding="utf-8") if manifest is None else manifest
        content = json.loads(text)
        return Checkpoint(
            step=content["step"],
            prompts=content["prompts"],
            path=folder.relative_to(self.root).as_posix(),
            digest=hashlib.sha256(text.encode()).hexdigest(),
            size_bytes=sum(entry["bytes"] for entry in content["files"].values()),
        )

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint so that a half-deleted one is never taken for a whole one."""
        trash = self.root / "staging" / f"discarded-{uuid.uuid4().hex}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(folder: Path) -> str | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: (entry["sha256"], entry["bytes"]) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    for name, (digest, size) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_digest(path) != digest:
            return f"{name} does not match its checksum"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
