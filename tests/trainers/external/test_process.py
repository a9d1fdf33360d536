"""Real processes: nothing of a training outlives it, or its driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jfhpo_core.trainers.external.process import CPU_SHIM, SHARED_SHIM, TrainingProcess, environment
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings

# Starts a daemon in a session of its own, tells its process id, and waits.
PROGRAM = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""

DRIVER = """
import sys, time
from pathlib import Path
from jfhpo_core.trainers.external.process import TrainingProcess
with TrainingProcess([sys.executable, "-c", sys.argv[1], "600", "0"], {}, Path(sys.argv[2])):
    time.sleep(600)
"""


def wait_for(path: Path) -> int:
    """The process id that the program has printed."""
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.05)
    return int(path.read_text())


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "train.log"


def program(seconds: float, code: int) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(seconds), str(code)]


def test_leaving_ends_even_daemons(log: Path) -> None:
    with TrainingProcess(program(600, 0), {}, log) as process:
        daemon = wait_for(log)
        assert process.exit_code is None
        assert alive(daemon)
    assert not alive(daemon)


def test_processes_are_asked_to_end_before_they_are_killed(log: Path) -> None:
    # As torch's compiler does: a lock is released on the way out.
    holder = """
import signal, sys, time
from pathlib import Path
lock = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
lock.touch()
try:
    time.sleep(600)
finally:
    lock.unlink()
"""
    lock = log.with_name("lock")
    with TrainingProcess([sys.executable, "-c", holder, str(lock)], {}, log):
        while not lock.exists():
            time.sleep(0.05)
    assert not lock.exists()


@pytest.mark.slow  # it has some seconds to end by itself
def test_who_does_not_listen_is_killed(log: Path) -> None:
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    with TrainingProcess([sys.executable, "-c", deaf], {}, log):
        pid = wait_for(log)
    assert not alive(pid)


def test_the_exit_code_comes_after_the_last_process(log: Path) -> None:
    with TrainingProcess(program(0, 3), {}, log) as process:
        while process.exit_code is None:
            time.sleep(0.05)
        assert process.exit_code == 3
        assert not alive(wait_for(log))


def test_a_killed_command_is_told_as_such(log: Path) -> None:
    with TrainingProcess([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}, log) as process:
        while process.exit_code is None:
            time.sleep(0.05)
        assert process.exit_code == 128 + signal.SIGKILL


def test_nothing_survives_a_killed_driver(log: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, PROGRAM, str(log)], cwd=Path(__file__).parents[3])
    daemon = wait_for(log)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 60
    while alive(daemon) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(daemon)


def test_the_command_does_not_survive_a_killed_reaper(log: Path) -> None:
    show = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with TrainingProcess([sys.executable, "-c", show], {}, log) as process:
        command = wait_for(log)
        assert process._process is not None
        process._process.kill()
        deadline = time.monotonic() + 60
        while alive(command) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(command)


def test_the_driver_keeps_its_environment_to_itself() -> None:
    base = {
        "PATH": "/bin", "RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "secret", "PYTHONPATH": "/driver",
        "CUDA_VISIBLE_DEVICES": "2,3", "MLFLOW_RUN_ID": "abc", "VIRTUAL_ENV": "/driver",
    }  # fmt: skip
    local = environment(OpenRlhfSettings(environment={"NCCL_DEBUG": "INFO"}), base, 2)
    assert local["RAY_ADDRESS"] == "local"
    assert local["RAY_AUTH_TOKEN"] != "secret"
    assert {"PYTHONPATH", "VIRTUAL_ENV"}.isdisjoint(local)
    assert (local["CUDA_VISIBLE_DEVICES"], local["MLFLOW_RUN_ID"], local["NCCL_DEBUG"]) == ("2,3", "abc", "INFO")
    assert "RAY_OVERRIDE_RESOURCES" not in local

    named = environment(OpenRlhfSettings(python="/env/bin/python"), base, 1)
    assert named["PATH"] == "/env/bin:/bin"

    cluster = environment(OpenRlhfSettings(jobs_address="http://head:8265"), base, 2)
    assert cluster["RAY_AUTH_TOKEN"] == "secret"
    assert "RAY_ADDRESS" not in cluster


def test_the_shim_is_on_the_path_of_cpu_trainings_only() -> None:
    assert str(CPU_SHIM) not in str(environment(OpenRlhfSettings(), dict(os.environ), 1).get("PYTHONPATH"))
    on_cpu = environment(OpenRlhfSettings(device="cpu"), {"CUDA_VISIBLE_DEVICES": ""}, 2)
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu
    assert on_cpu["PYTHONPATH"] == f"{CPU_SHIM}:{SHARED_SHIM}"
    assert on_cpu["RAY_OVERRIDE_RESOURCES"] == '{"GPU": 2, "CPU": 3}'
