from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# Read by torch and NumPy when they are first imported. The tests fill the cores with processes; more threads than cores
# wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Dozens of processes are started. Compiling what each of them imports takes twice as long as what most are started for,
# so the first one that imports a module keeps it compiled, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# MLflow writes thousands of times to databases in the folders of tests, and each time a disk would be waited for.
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 8 * 2**30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# A loaded machine is slow, not wrong.
settings.register_profile("jfhpo", deadline=None)
settings.load_profile("jfhpo")


# A shell starts what runs in the background with Ctrl-C ignored, and the processes of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


WAITING = ("faults", "test_driver_death.py", "flows", "test_study_lock.py", "test_own_study.py", "test_ray_dispatch.py")
"""Files and folders with tests that wait for other processes for minutes; others use the processor meanwhile."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, so that no process is left alone with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (not set(WAITING) & set(item.path.parts) or not slow[item.path], -slow[item.path]))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without content. Creating one takes seconds, so all processes of a run share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "empty.db"
    with (folder / "empty.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            from mlflow import MlflowClient

            unfinished = path.with_suffix(".unfinished")
            MlflowClient(tracking_uri=f"sqlite:///{unfinished}").search_experiments()
            unfinished.rename(path)
    return path


@pytest.fixture
def tracking_uri(empty_database: Path, tmp_path: Path) -> str:
    """Of an MLflow database without content, `mlflow.db` in the test's folder."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(empty_database, path)
    return f"sqlite:///{path}"
