"""Locks that a process leaves behind when it is killed while torch compiles an extension (DeepSpeed's optimizers).

Torch's `FileBaton` creates a file `lock`, keeps it open, and waits for ever while another one's exists.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

COMPILE_SECONDS = 300.0
"""A younger lock may be held on another machine that shares the folder; compiling takes one or two minutes."""

logger = logging.getLogger(__name__)


def remove_stale_locks(variables: Mapping[str, str]) -> list[Path]:
    """Remove the locks that no process holds; returns them.

    Args:
        variables: Environment of the run that is about to start.
    """
    cache = Path(variables.get("XDG_CACHE_HOME") or Path(variables.get("HOME") or Path.home()) / ".cache")
    folder = Path(variables.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    removed = []
    for lock in folder.rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            if time.time() - lock.stat().st_mtime > COMPILE_SECONDS and not _is_held(lock):
                lock.unlink()
                removed.append(lock)
                logger.warning("removed %s, which a killed process had left: every later one would wait for it", lock)
    return removed


def _is_held(file: Path) -> bool:
    """Whether a process of this machine has the file open."""
    wanted = str(file.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if str(descriptor.readlink()) == wanted:
                return True
    return False
