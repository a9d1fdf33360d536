from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.trainers.external.compile_locks import COMPILE_SECONDS, build_extensions, remove_stale_locks


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "HOME"])
def test_locks_that_nobody_holds_are_removed_and_others_stay(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / (".cache/torch_extensions" if variable == "HOME" else "")
    left, held, young = (folder / name / "lock" for name in ("fused_adam", "cpu_adam", "utils"))
    for lock in (left, held, young):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    for lock in (left, held):
        os.utime(lock, (time.time() - 2 * COMPILE_SECONDS,) * 2)
    with held.open():
        assert remove_stale_locks({variable: str(tmp_path)}) == [left]
    assert (left.exists(), held.exists(), young.exists()) == (False, True, True)
    assert remove_stale_locks({variable: str(tmp_path)}) == [held]


DEEPSPEED = """
from pathlib import Path
class Builder:
    def load(self):
        with Path({notes!r}).open("a") as file:
            file.write("built\\n")
class Broken:
    def load(self):
        raise RuntimeError("nvcc is not there")
"""


def test_extensions_are_built_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    (tmp_path / "deepspeed" / "ops").mkdir(parents=True)
    for package in ("deepspeed", "deepspeed/ops"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "deepspeed" / "ops" / "op_builder.py").write_text(DEEPSPEED.format(notes=str(notes)))
    variables = {"PYTHONPATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    for _ in range(2):
        build_extensions(sys.executable, variables, ["Builder"])
    assert notes.read_text() == "built\n"
    for _ in range(2):
        with pytest.raises(
            InfrastructureError, match="cannot be compiled: RuntimeError: nvcc is not there; nodes need"
        ):
            build_extensions(sys.executable, variables, ["Broken"])
