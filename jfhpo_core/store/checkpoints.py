"""The checkpoint store: a folder of committed training states that survive a crash at any moment.

A checkpoint is staged, listed in a manifest with the SHA-256 of every file, flushed to disk, and only then renamed to
its final place; whatever lies there is complete. The ledger keeps the SHA-256 of the manifest, so a checkpoint is
verified as a whole before it is used; one that does not match is moved to `quarantine/` and the one before it serves.

Stages may lie on another disk, which the node that trains has to itself and writes to faster: then committing copies
them to the store's, and what is hashed is what was read for it.

Equal files are kept once: `objects/` holds each of some size under its SHA-256, and the checkpoints have hard links to
it. A checkpoint stays a folder of plain files, and where the file system has no hard links each has its own copy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jfhpo_core.errors import CheckpointError
from jfhpo_core.study.trial import Checkpoint

MANIFEST = "jfhpo-manifest.json"
KEY = re.compile(r"[0-9a-f]{16}")

STEP = re.compile(r"step-(\d{8})")
STAGING = "staging"
QUARANTINE = "quarantine"
OBJECTS = "objects"
PARALLEL_BYTES = 64 * 2**20
"""Less than this is hashed faster than threads start."""

HASHING_THREADS = 16
"""At most; a disk that reads faster than so many cores hash is rare."""

COPIED_BYTES = 16 * 2**20
"""A file is read, hashed and written in pieces of this size."""

SHARED_BYTES = 64 * 2**10
"""Smaller files are not shared: they save little, and damage to a shared one hits all checkpoints that have it."""

logger = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints of one study under a root folder, which all workers share.

    Layout: `<root>/<trial key>/step-00000012/` with the trainer's files and a manifest; `<root>/staging/` holds what is
    being written or deleted, `<root>/quarantine/` what turned out damaged (kept for inspection, never read again),
    `<root>/objects/` files that checkpoints share.

    Args:
        root: Created if missing.
        local: Folder of this store alone on a disk of this node, for stages; None: `staging/` of the store.
    """

    def __init__(self, root: Path, local: Path | None = None) -> None:
        self.root = root
        self.local = local

    def stage(self, key: str) -> Path:
        """A new empty folder to write a checkpoint into.

        A trial has one writer at a time, so what interrupted ones left half written or half deleted goes first.
        """
        shared = self._trial(key).parent / STAGING
        staging = self.local or shared
        for folder in {shared, staging}:
            make_folder(folder)
            for leftover in folder.glob(f"{key}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        stage = staging / f"{key}-{uuid.uuid4().hex}"
        stage.mkdir()
        return stage

    def commit(self, key: str, stage: Path, step: int, prompts: int) -> Checkpoint:
        """Make a staged folder a checkpoint, atomically; committing the same step again replaces it.

        A stage on another disk stays there, to be committed again if this fails.

        Raises:
            CheckpointError: The stage is empty or holds anything but plain files and folders, or the disk refuses.
        """
        final = self._trial(key) / f"step-{step:08d}"
        try:
            # A trainer that copies its starting checkpoint also copies that one's manifest, which says nothing here.
            (stage / MANIFEST).unlink(missing_ok=True)
            files = _files(stage)
            if not files:
                raise CheckpointError(f"{stage}: the trainer wrote no checkpoint into its stage")
            if stage.parent == self.root / STAGING:
                digests = file_digests(files)
            else:
                stage, digests = self._copied(stage, files)
                files = {name: stage / name for name in files}
            size = sum(path.stat().st_size for path in files.values())
            text = json.dumps({"step": step, "prompts": prompts, "files": digests}, indent=1, sort_keys=True)
            (stage / MANIFEST).write_text(text, encoding="utf-8")
            for name, path in files.items():
                if path.stat().st_size >= SHARED_BYTES:
                    self._share(path, digests[name])
            # Content before the names that lead to it, from the leaves to the root; then the rename, then its folders.
            for parent, _, names in os.walk(stage, topdown=False):
                for path in (*(Path(parent, name) for name in names), Path(parent)):
                    flush(path)
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                self._discard(final)
            stage.rename(final)
            for folder in (final.parent, stage.parent, self.root):
                flush(folder)
        except OSError as error:
            raise CheckpointError(f"{final}: the checkpoint could not be stored: {error}") from error
        return Checkpoint(
            step=step,
            prompts=prompts,
            path=final.relative_to(self.root).as_posix(),
            digest=hashlib.sha256(text.encode()).hexdigest(),
            size_bytes=size,
        )

    def verify(self, checkpoint: Checkpoint) -> Path:
        """Check a checkpoint against what the ledger knows of it and return its folder.

        Raises:
            CheckpointError: It is missing, unreadable or damaged; a damaged one has been moved to quarantine.
        """
        folder = (self.root / checkpoint.path).resolve()
        if not folder.is_relative_to(self.root.resolve()):
            raise CheckpointError(f"{checkpoint.path!r} points outside the checkpoint store {self.root}")
        try:
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: there is no such checkpoint")
            fault = _fault(folder, checkpoint.digest)
            if fault is not None:
                quarantine = self.root / QUARANTINE / f"{folder.parent.name}-{folder.name}-{uuid.uuid4().hex[:8]}"
                quarantine.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(quarantine)
                raise CheckpointError(f"{folder}: {fault}; it was moved to {quarantine}")
        except OSError as error:
            # Perhaps only the file system is out of reach for now: no verdict, so it stays where it is.
            raise CheckpointError(f"{folder}: the checkpoint cannot be read: {error}") from error
        return folder

    def prune(self, key: str, keep: Collection[Path]) -> None:
        """Delete a trial's checkpoints except `keep`. What cannot be deleted is logged: it only costs space."""
        kept = {folder.name for folder in keep}
        for folder in self._trial(key).glob("step-*"):
            if folder.name not in kept:
                try:
                    self._discard(folder)
                except OSError as error:
                    logger.warning("%s: the old checkpoint could not be deleted: %s", folder, error)

    def folders(self) -> list[Path]:
        """All checkpoints, by trial and step."""
        found = sorted(self.root.glob("*/step-*"))
        return [folder for folder in found if KEY.fullmatch(folder.parent.name) and STEP.fullmatch(folder.name)]

    def quarantined(self) -> list[Path]:
        """Checkpoints that were found damaged."""
        return [folder for folder in sorted((self.root / QUARANTINE).glob("*")) if STEP.search(folder.name)]

    def unfinished(self) -> list[Path]:
        """What is being written or deleted, or was when its process died; the name begins with the trial's key."""
        return [folder for folder in sorted((self.root / STAGING).glob("*")) if KEY.match(folder.name)]

    def delete(self, folder: Path) -> None:
        """Delete the folder of a checkpoint, or of an unfinished one, with the shared files that no other has.

        Raises:
            CheckpointError: It is no checkpoint of this store, or cannot be deleted.
        """
        if folder not in (*self.folders(), *self.quarantined(), *self.unfinished()):
            raise CheckpointError(f"{folder} is no checkpoint of {self.root}")
        try:
            self._discard(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: the checkpoint could not be deleted: {error}") from error

    def _copied(self, stage: Path, files: Mapping[str, Path]) -> tuple[Path, dict[str, str]]:
        """A stage of the store's own with copies of files, and what they were read as."""
        copy = self.root / STAGING / stage.name
        shutil.rmtree(copy, ignore_errors=True)
        for folder in {(copy / name).parent for name in files}:
            folder.mkdir(parents=True, exist_ok=True)
        return copy, _digests(files, lambda name: copy_file(files[name], copy / name))

    def _share(self, path: Path, digest: str) -> None:
        """Make a staged file one with the equal one in `objects/`, or the first of its kind there."""
        shared = self.root / OBJECTS / digest[:2] / digest
        try:
            shared.parent.mkdir(parents=True, exist_ok=True)
            if shared.exists() and file_digest(shared) == digest:
                link = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
                os.link(shared, link)
                link.replace(path)
            else:
                shared.unlink(missing_ok=True)
                os.link(path, shared)
        except OSError as error:
            # No hard links here, or another worker was faster: the file stays a copy of its own.
            logger.debug("%s is not shared: %s", path, error)

    def _trial(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise CheckpointError(f"{key!r} is not a trial key")
        return self.root / key

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint so that a half-deleted one is never taken for a whole one."""
        key = KEY.match(folder.name) or KEY.match(folder.parent.name)
        assert key is not None
        trash = self.root / STAGING / f"{key[0]}-discarded-{uuid.uuid4().hex}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(trash)
        digests = _listed(trash)
        shutil.rmtree(trash, ignore_errors=True)
        for digest in digests:
            shared = self.root / OBJECTS / digest[:2] / digest
            # A worker that links to it just now keeps its link, so at worst the next equal file is not shared with it.
            if shared.is_file() and shared.stat().st_nlink == 1:
                shared.unlink(missing_ok=True)


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of several files, by the same names. Large ones are read by several threads: hashing one takes a core."""
    return _digests(files, lambda name: file_digest(files[name]))


def _digests(files: Mapping[str, Path], digest: Callable[[str], str]) -> dict[str, str]:
    """What `digest` says of each name, by several threads if the files are large."""
    if sum(path.stat().st_size for path in files.values()) < PARALLEL_BYTES:
        return {name: digest(name) for name in files}
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(files, threads.map(digest, files), strict=True))


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's content; the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as written:
        while piece := read.read(COPIED_BYTES):
            digest.update(piece)
            written.write(piece)
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Create a folder with those above it so that a loss of power does not take it, and what is in it, away."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        flush(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> set[str]:
    """Digests in a checkpoint's manifest; empty if it cannot be read."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].values()
    except (OSError, ValueError, KeyError, AttributeError):
        return set()
    return {digest for digest in digests if re.fullmatch("[0-9a-f]{64}", str(digest))}


def _files(folder: Path) -> dict[str, Path]:
    """Plain files under a folder by relative POSIX name, the manifest excepted.

    Raises:
        CheckpointError: There is a link or another special file, whose content a manifest cannot vouch for.
    """
    files = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                files[path.relative_to(folder).as_posix()] = path
            elif not stat.S_ISDIR(mode):
                raise CheckpointError(f"{path} is a link or special file; a checkpoint holds plain files only")
    files.pop(MANIFEST, None)
    return files


def _fault(folder: Path, digest: str) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    manifest = folder / MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        return "its manifest is missing"
    if file_digest(manifest) != digest:
        return "its manifest is not the one that was committed"
    return manifest_fault(folder)


def manifest_fault(folder: Path) -> str | None:
    """What of a checkpoint contradicts its own manifest, if anything."""
    manifest = folder / MANIFEST
    digests = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    try:
        files = _files(folder)
    except CheckpointError as error:
        return str(error)
    for name in sorted(digests.keys() | files.keys()):
        if name not in files:
            return f"{name} is missing"
        if name not in digests:
            return f"{name} does not belong to it"
    found = file_digests(files)
    wrong = next((name for name in sorted(files) if found[name] != digests[name]), None)
    return None if wrong is None else f"{wrong} does not match its checksum"


def flush(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; their renames are ordered by the server.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
