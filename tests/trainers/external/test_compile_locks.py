from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jfhpo_core.trainers.external.compile_locks import COMPILE_SECONDS, remove_stale_locks


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
