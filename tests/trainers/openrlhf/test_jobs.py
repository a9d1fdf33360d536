"""A training as a Ray job on a cluster that asks for a token."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jfhpo_core.run.worker import run_job
from jfhpo_core.study.trial import Outcome, StepRecord
from jfhpo_core.trainers.base import Level
from jfhpo_core.trainers.external.process import TrainingProcess
from jfhpo_core.trainers.openrlhf import OpenRlhfTrainer
from jfhpo_core.trainers.openrlhf.preflight import _jobs
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from tests.trainers.openrlhf.conftest import job, study

pytestmark = [pytest.mark.openrlhf, pytest.mark.slow, pytest.mark.timeout(1800)]


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.fixture
def cluster(trainer_python: str, tmp_path: Path) -> Iterator[str]:
    """Address of the job server of a cluster with one pretended GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        head, dashboard, *agents = free_ports(7)
        options = {
            "port": head, "dashboard-port": dashboard, "dashboard-agent-listen-port": agents[0],
            "dashboard-agent-grpc-port": agents[1], "metrics-export-port": agents[2],
            "runtime-env-agent-port": agents[3], "ray-client-server-port": agents[4], "dashboard-host": "127.0.0.1",
            "node-ip-address": "127.0.0.1", "num-gpus": "1", "num-cpus": "3", "object-store-memory": "200000000",
        }  # fmt: skip
        command = [trainer_python, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        variables = {**own, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "PYTHONPATH": ""}
        address = f"http://127.0.0.1:{dashboard}"
        with TrainingProcess(command, variables, tmp_path / "head.log") as process:
            settings = OpenRlhfSettings(python=trainer_python, jobs_address=address)
            while _jobs(settings, address).level is not Level.OK:
                assert process.exit_code is None, (tmp_path / "head.log").read_text()[-2000:]
                time.sleep(1)
            yield address


def test_a_training_as_a_job(cluster: str, trainer_python: str, tmp_path: Path) -> None:
    base = study().trainer
    settings = {**base.settings, "python": trainer_python, "jobs_address": cluster, "startup_seconds": 1200.0}
    spec = study(trainer={"name": "openrlhf", "fixed": base.fixed, "settings": settings})
    trainer = OpenRlhfTrainer()
    trainer.check(spec)
    records: list[StepRecord] = []
    result = run_job(job(spec, tmp_path, stop=2), trainer, records.append)
    assert result.outcome is Outcome.REACHED
    assert [record.step for record in records] == [1, 2]
    assert [evaluation.step for evaluation in result.evaluations] == [0, 2]
    assert result.checkpoint is not None
    # It was stopped, and no job of it runs on.
    jobs = subprocess.run(
        [trainer_python, "-m", "ray.scripts.scripts", "job", "list", "--address", cluster],
        env=dict(os.environ), capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip
    assert "JobStatus.STOPPED" in jobs
    assert "JobStatus.RUNNING" not in jobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        refused = _jobs(OpenRlhfSettings(python=trainer_python, jobs_address=cluster), cluster)
        assert refused.level is Level.FAILURE
        assert "token" in refused.message
