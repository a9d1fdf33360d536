"""A real MLflow tracking server that can be killed and started again; servers end with who started them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from jfhpo_core.trainers.external.process import REAPER
from jfhpo_core.trainers.external.reaper import descendants


def free_port() -> int:
    """A port of the loopback interface on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Tethered:
    """A command that ends, with all that it has started, when the thread that started it does, however that ends.

    Args:
        command: The command.
        cwd: Its working directory.
        environment: Its whole environment.
        output: Takes what it prints; None: nothing does.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], output: IO[str] | None = None
    ) -> None:
        self._reaper = subprocess.Popen(
            [sys.executable, str(REAPER), str(os.getpid()), *command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=subprocess.STDOUT,
        )

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._reaper.poll() is not None

    def processes(self) -> list[int]:
        """Ids of the command's own process and of all below it."""
        return descendants(self._reaper.pid)

    def kill(self) -> None:
        """End it, and all that it has started, without a chance to clean up."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._reaper.wait(60)


class TrackingServer:
    """A real tracking server that stores artifacts for its clients. It can be killed and started again.

    Args:
        folder: Where database and artifacts lie.
        options: Further options of `mlflow server`.
        environment: Further environment variables.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options, self._environment = options, environment or {}
        self._process: Tethered | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        folder = self.folder
        self._process = Tethered(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
                "--artifacts-destination", str(folder / "files"), *self._options,
            ],
            folder,
            {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._environment},
            (folder / "log").open("a"),
        )  # fmt: skip
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
            except OSError:
                assert not self._process.ended, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
            else:
                return

    def kill(self) -> None:
        """End it without a chance to clean up."""
        if self._process is not None:
            self._process.kill()
            self._process = None
