"""File systems that are full, and files that are damaged."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

DISK_BYTES = 48 * 2**20


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the file system of a folder."""
    ballast = folder / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1))
        yield
    finally:
        ballast.unlink(missing_ok=True)


def damage(store: Path, draw: random.Random) -> None:
    """Flip a bit of a file of a newest checkpoint, or cut its end off."""
    newest = [max(folder.glob("step-*"), default=None) for folder in sorted(store.glob("[0-9a-f]*"))]
    folders = [folder for folder in newest if folder is not None]
    if not folders:
        return
    folder = draw.choice(folders)
    path = draw.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content = content[: len(content) // 2]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@contextlib.contextmanager
def disk() -> Iterator[Path | None]:
    """A small file system of its own; None where the user may not mount one."""
    with tempfile.TemporaryDirectory(prefix="jfhpo-faults-") as folder:
        place = Path(folder) / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
        if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            yield None
            return
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
