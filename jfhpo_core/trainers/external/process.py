"""A run as a group of processes: started, watched through its log, and gone when it is over."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.trainers.external.settings import ExternalSettings

REAPER = Path(__file__).with_name("reaper.py")
SHARED_SHIM = Path(__file__).with_name("cpu_shim")
CPU_SHIM = Path(__file__).parents[1] / "openrlhf" / "cpu_shim"

STOP_SECONDS = 60.0
"""For the processes of a run to be gone after they were killed."""

JOB_STOP_SECONDS = 120.0
"""For a Ray job to be stopped."""

INHERITED_NOT = ("RAY_", "PYTHON", "VIRTUAL_ENV", "OMP_NUM_THREADS")
"""Beginnings of environment variables that belong to the driver's environment or to its own Ray instance."""

COMMON = {
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_DEDUP_LOGS": "0",  # a line that two actors print is not noise if it is the decisive one
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}

ON_CPU = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "RAY_agent_register_timeout_ms": "300000",  # CPUs that others use as well are slow
    "RAY_raylet_start_wait_time_s": "300",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def shim_path(shim: Path) -> str:
    """Python's search path with which a trainer runs on CPUs, given the folder of its shim."""
    return os.pathsep.join([str(shim), str(SHARED_SHIM)])


def environment(settings: ExternalSettings, base: Mapping[str, str], gpus: int) -> dict[str, str]:
    """The environment of a run's processes.

    Args:
        settings: The study's.
        base: Environment of the worker. Its GPUs (CUDA_VISIBLE_DEVICES) are handed on.
        gpus: How many GPUs a CPU training shall pretend to have.
    """
    # To a worker without GPUs Ray shows none; a job finds its own, and the CPU's are pretended.
    hidden = ("CUDA_VISIBLE_DEVICES",) if settings.device == "cpu" or settings.jobs is not None else ()
    inherited = {name: value for name, value in base.items() if not name.startswith((*INHERITED_NOT, *hidden))}
    if settings.jobs is not None:
        # Of the driver's Ray settings only its credentials count for the cluster.
        ray = {name: value for name, value in base.items() if name.startswith("RAY_AUTH_")}
    else:
        # An instance of its own, with a password of its own, that ends with the run.
        ray = {
            "RAY_ADDRESS": "local",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
        }
    # DeepSpeed compiles its kernels with tools that lie beside the interpreter.
    tools = [] if settings.interpreter is None else [str(Path(settings.interpreter).parent)]
    path = {"PATH": os.pathsep.join([*tools, base.get("PATH", os.defpath)])}
    cpu: dict[str, str] = {}
    if settings.device == "cpu":
        cpu = {**ON_CPU, "PYTHONPATH": shim_path(CPU_SHIM)}
        if settings.jobs is None:
            cpu["RAY_OVERRIDE_RESOURCES"] = f'{{"GPU": {gpus}, "CPU": {gpus + 1}}}'
    return {**inherited, **path, **COMMON, **ray, **cpu, **settings.environment}


class TrainingProcess:
    """Runs a command below a reaper, its output in a file. Leaving the context ends it and all it has started.

    Args:
        argv: The command.
        variables: Its whole environment.
        log: File that takes its output.
        stop: A command to end what runs elsewhere (a Ray job), or None.
    """

    def __init__(
        self, argv: Sequence[str], variables: Mapping[str, str], log: Path, stop: Sequence[str] | None = None
    ) -> None:
        self._argv = argv
        self._variables = dict(variables)
        self._log = log
        self._stop = stop
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  an argument list of ours, no shell
                [sys.executable, "-I", str(REAPER), str(os.getpid()), *self._argv],
                env=self._variables,
                cwd=self._log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    @property
    def exit_code(self) -> int | None:
        """The command's exit code (128 + signal if it was killed); None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def __exit__(self, *_: object) -> None:
        """End the run.

        Raises:
            InfrastructureError: Something of it does not end.
        """
        assert self._process is not None
        if self._stop is not None:
            try:
                subprocess.run(  # noqa: S603
                    self._stop, env=self._variables, stdin=subprocess.DEVNULL, capture_output=True, check=False,
                    timeout=JOB_STOP_SECONDS,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise InfrastructureError(
                    f"the Ray job of this run could not be stopped: {' '.join(self._stop)}; stop it by hand, or "
                    "it keeps its GPUs"
                ) from None
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise InfrastructureError(
                f"processes of a run did not end within {STOP_SECONDS:.0f} s (log: {self._log}); a driver that "
                "hangs holds them, and their GPUs"
            ) from None
