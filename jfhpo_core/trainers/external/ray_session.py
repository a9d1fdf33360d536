"""The folder of a run's private Ray instance: sockets and logs, some 10 MB each, which Ray itself never deletes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jfhpo_core.errors import JfhpoError

PREFIX = "jfhpo-ray-"
"""Prefix of the folders' names; short, because paths of sockets may have 107 characters."""

LOCK = "held"
"""File that is locked while the run lives, whatever becomes of its process."""

KEPT_BYTES = 1_000_000
"""How much of the end of each log of a failed run is kept."""


@contextmanager
def ray_session(variables: dict[str, str], folder: Path) -> Iterator[None]:
    """Give a run's Ray instance a folder of its own, which is deleted with the run; failed ones leave their logs.

    Args:
        variables: Environment of the run; `RAY_TMPDIR` is set, below the one that it names if there is one.
        folder: The run's own, which takes the logs (`ray-logs/`).
    """
    parent = Path(variables.get("RAY_TMPDIR") or tempfile.gettempdir())
    _prune(parent)
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    variables["RAY_TMPDIR"] = str(root)
    with (root / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except JfhpoError:
            _keep_logs(root, folder / "ray-logs")
            raise
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _prune(parent: Path) -> None:
    """Delete the folders that killed workers have left."""
    for root in parent.glob(f"{PREFIX}*"):
        try:
            with (root / LOCK).open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root, ignore_errors=True)
        except OSError:  # it is alive, has just been made, or is another user's
            continue


def _keep_logs(root: Path, target: Path) -> None:
    for log in root.glob("ray/session_2*/logs/*.*"):
        if log.is_file() and log.stat().st_size > 0:
            target.mkdir(exist_ok=True)
            with log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - KEPT_BYTES))
                (target / log.name).write_bytes(file.read())
