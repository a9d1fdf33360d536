from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.trainers.external.ray_session import KEPT_BYTES, PREFIX, ray_session


def test_it_goes_with_the_run(tmp_path: Path) -> None:
    variables = {"RAY_TMPDIR": str(tmp_path)}
    with ray_session(variables, tmp_path / "run"):
        root = Path(variables["RAY_TMPDIR"])
        assert root.parent == tmp_path
        (root / "ray").mkdir()
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_the_ends_of_its_logs(tmp_path: Path) -> None:
    variables, run = {"RAY_TMPDIR": str(tmp_path)}, tmp_path / "run"
    run.mkdir()

    def fail() -> None:
        with ray_session(variables, run):
            logs = Path(variables["RAY_TMPDIR"]) / "ray" / "session_2026" / "logs"
            logs.mkdir(parents=True)
            (logs / "raylet.err").write_bytes(b"x" * KEPT_BYTES + b"the end")
            (logs / "empty.out").touch()
            raise InfrastructureError("an actor died")

    with pytest.raises(InfrastructureError):
        fail()
    (kept,) = (run / "ray-logs").iterdir()
    assert kept.name == "raylet.err"
    assert kept.stat().st_size == KEPT_BYTES
    assert kept.read_bytes().endswith(b"the end")


def test_what_a_killed_worker_has_left_is_deleted_and_a_living_one_is_not(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from jfhpo_core.trainers.external.ray_session import ray_session
with ray_session({{"RAY_TMPDIR": {str(tmp_path)!r}}}, Path("run")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], check=False, timeout=100)
    (left,) = tmp_path.glob(f"{PREFIX}*")
    first = {"RAY_TMPDIR": str(tmp_path)}
    with ray_session(first, tmp_path / "run"):
        assert not left.exists()
        with ray_session({"RAY_TMPDIR": str(tmp_path)}, tmp_path / "run"):
            assert Path(first["RAY_TMPDIR"]).is_dir()
