"""Extensions that torch compiles on first use (DeepSpeed's optimizers): built once, before anything waits for them.

Torch's `FileBaton` creates a file `lock`, keeps it open, and waits for ever while another one's exists. A process that
is killed while it compiles leaves the file behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jfhpo_core.errors import InfrastructureError

COMPILE_SECONDS = 300.0
"""A younger lock may be held on another machine that shares the folder; compiling takes one or two minutes."""

BUILD_SECONDS = 1800.0

BUILD = """
import sys
from deepspeed.ops import op_builder
for name in sys.argv[1:]:
    getattr(op_builder, name)().load()
"""
"""Loads DeepSpeed's extensions, and so compiles those that have not been."""

logger = logging.getLogger(__name__)


def build_extensions(python: str, variables: Mapping[str, str], builders: Sequence[str]) -> None:
    """Have DeepSpeed's extensions compiled, by one process at a time; quick if they have been.

    Args:
        python: Of the trainer's environment.
        variables: Environment of the run that is about to start.
        builders: Names of classes in `deepspeed.ops.op_builder`.

    Raises:
        InfrastructureError: They cannot be compiled.
    """
    folder = _folder(variables)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"jfhpo-built-{hashlib.sha256(' '.join([python, *builders]).encode()).hexdigest()[:16]}"
    if done.exists():
        return
    with (folder / "jfhpo-builds").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however we end
        remove_stale_locks(variables)
        try:
            built = subprocess.run(  # noqa: S603  an argument list of ours, no shell
                [python, "-c", BUILD, *builders], env=dict(variables), stdin=subprocess.DEVNULL, capture_output=True,
                text=True, check=False, timeout=BUILD_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InfrastructureError(f"DeepSpeed's {', '.join(builders)} cannot be compiled: {error}") from error
    if built.returncode != 0:
        last = (built.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InfrastructureError(
            f"DeepSpeed's {', '.join(builders)} cannot be compiled: {last}; nodes need nvcc, a C++ compiler and ninja"
        )
    done.touch()


def _folder(variables: Mapping[str, str]) -> Path:
    """Where torch puts extensions."""
    cache = Path(variables.get("XDG_CACHE_HOME") or Path(variables.get("HOME") or Path.home()) / ".cache")
    return Path(variables.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def remove_stale_locks(variables: Mapping[str, str]) -> list[Path]:
    """Remove the locks that no process holds; returns them.

    Args:
        variables: Environment of the run that is about to start.
    """
    removed = []
    for lock in _folder(variables).rglob("lock"):
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
