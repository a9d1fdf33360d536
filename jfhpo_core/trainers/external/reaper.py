"""Runs a command so that nothing of it outlives it, or the process that asked for it.

    python reaper.py PARENT_PID COMMAND...

Orphans of the command become children of this process (Linux: subreaper). When the command ends, or SIGTERM comes, or
the thread that started this process dies (by SIGKILL, too), everything below is ended (SIGTERM, and SIGKILL after some
seconds: who compiles an extension shall release its lock) and collected; only then does this process end, with the
command's exit code. Should this process itself be killed (Ray does so to the children of a
killed worker), the kernel kills the command, and with it what the command has tied to itself, as Ray's daemons are.
It imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

GRACE_SECONDS = 5.0
"""Time from SIGTERM to SIGKILL."""


class _Stop(BaseException):
    """SIGTERM came."""


def _stop(number: int, _frame: object) -> None:
    raise _Stop(number)


def descendants(pid: int) -> list[int]:
    """Processes below a process, children before grandchildren."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop(0)}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(child) for child in task.read_text().split()]
                found += children
                waiting += children
    return found


def end_descendants() -> None:
    """End all processes below this one and wait until there is none."""
    told: set[int] = set()
    patience = time.monotonic() + GRACE_SECONDS
    while below := descendants(os.getpid()):
        late = time.monotonic() > patience
        for pid in below:
            if late or pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                told.add(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.02)


def main(parent: int, command: list[str]) -> int:
    """Run a command to its end, or ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it tells us
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ray's workers leave it ignored, and exit codes are lost then
    code = 128 + signal.SIGTERM
    try:
        if os.getppid() == parent:
            child = subprocess.Popen(  # noqa: S603
                command,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509  no other threads here
            )
            pid = -1
            while pid != child.pid:
                pid, status = os.waitpid(-1, 0)
            code = os.waitstatus_to_exitcode(status)
    except _Stop:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_descendants()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
