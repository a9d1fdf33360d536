from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tracking_server import Tethered
from tests.run.support import all_gone, wait_until

SERVER = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
unfinished = pathlib.Path("unfinished")
unfinished.write_text(f"{os.getpid()} {child.pid}")
unfinished.rename("pids")
time.sleep(600)
"""
OWNER = """
import os, pathlib, sys, time
from benchmarks.tracking_server import Tethered
Tethered([sys.executable, "-c", sys.argv[1]], pathlib.Path(sys.argv[2]), os.environ)
time.sleep(600)
"""


def started(folder: Path) -> set[int]:
    """The server and its child, which is a daemon, as soon as they are there."""
    wait_until((folder / "pids").exists, "the start of the server")
    return set(map(int, (folder / "pids").read_text().split()))


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_does_not_outlive_its_owner(tmp_path: Path, blow: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, SERVER, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        pids = started(tmp_path)
        owner.send_signal(blow)
        assert all_gone(pids)
    finally:
        owner.kill()
        owner.wait()


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    server = Tethered([sys.executable, "-c", SERVER], tmp_path, os.environ)
    pids = started(tmp_path)
    assert server.processes()[0] in pids
    server.kill()
    assert server.ended
    assert all_gone(pids)
