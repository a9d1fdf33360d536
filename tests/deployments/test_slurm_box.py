"""The batch script on a real SLURM: a controller and a node on this machine, with two GPUs that it pretends to have."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deployments" / "slurm" / "search.sbatch"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="needs slurmctld and slurmd (Debian: slurm-wlm), and root, as whom slurmd runs",
    ),
]

CONFIGURATION = """
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=100 Gres=gpu:2
PartitionName=box Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

STUDY = """
study: in-a-box
family:
  - {{name: s, path: simulated, parameters: 1000000, devices: 1}}
  - {{name: l, path: simulated, parameters: 10000000, devices: 2}}
target: l
task: instruct
trainer: {{name: simulated, fixed: {{n_samples: 8}}, settings: {{seconds_per_step: 1.0}}}}
space: {{learning_rate: {{type: float, low: 1.0e-5, high: 1.0e-3, log: true}}}}
fidelity: {{horizon_prompts: 160, rungs: 2}}
stopping: {{rules: none}}
strategy: {{name: random}}
budget: {{trial_seconds: 60, top_k: 1, validation_share: 0.0}}
seeds: {{training: [0]}}
cluster: {{gpus_per_device: 1}}
tracking: {{uri: "sqlite:///{folder}/mlflow.db", workspace: {folder}/workspace}}
"""

# The first run of the job has one second, which is what a time limit comes to.
JFHPO = """#!/usr/bin/env bash
[ -n "${{SLURM_RESTART_COUNT:-}}" ] || exec {jfhpo} "$@" --set budget.wall_seconds=1
exec {jfhpo} "$@"
"""


@dataclass(frozen=True)
class Box:
    """A SLURM cluster of one node."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    for name in ("state", "spool", "venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    host, ports = socket.gethostname().partition(".")[0], free_ports(3)
    text = CONFIGURATION.format(host=host, ports=ports, folder=tmp_path, cpus=os.cpu_count())
    (tmp_path / "slurm.conf").write_text(text)
    (tmp_path / "gres.conf").write_text(f"NodeName={host} Name=gpu File={tmp_path}/gpu[0-1]\n")
    for number in (0, 1):
        (tmp_path / f"gpu{number}").touch()
    own = Path(sys.executable).parent
    programs = {"jfhpo": JFHPO.format(jfhpo=own / "jfhpo")}
    programs |= {name: f'#!/usr/bin/env bash\nexec {own / name} "$@"\n' for name in ("python", "ray")}
    for name, text in programs.items():
        (tmp_path / "venv" / "bin" / name).write_text(text)
        (tmp_path / "venv" / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "SLURM_CONF": str(tmp_path / "slurm.conf"), "JFHPO_VENV": str(tmp_path / "venv"),
        "JFHPO_RAY_PORT": str(ports[2]), "RAY_OVERRIDE_RESOURCES": '{"GPU": 2}',
        "RAY_raylet_start_wait_time_s": "300",  # CPUs that others use as well are slow
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }  # fmt: skip
    daemons = []
    for name, command in {"slurmctld": ["slurmctld", "-D"], "slurmd": ["slurmd", "-D", "-N", host]}.items():
        with (tmp_path / f"{name}.log").open("w") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    found = Box(tmp_path, environment)
    try:
        yield found
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, check=False, timeout=60)
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(60)


def test_a_search_is_queued_again_until_it_is_complete(box: Box) -> None:
    (box.folder / "study.yaml").write_text(STUDY.format(folder=box.folder))
    log = box.folder / "job.log"
    deadline = time.monotonic() + 60
    while box.call("sinfo", "--noheader", "--format=%T").strip() != "idle" and time.monotonic() < deadline:
        time.sleep(0.5)
    submitted = box.call(
        "sbatch", "--parsable", "--gpus-per-node=2", "--time=60", f"--output={log}", str(SCRIPT),
        str(box.folder / "study.yaml"),
    ).strip()  # fmt: skip

    def state() -> dict[str, str]:
        fields = box.call("scontrol", "show", "job", submitted, "--oneliner").split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    while state()["JobState"] not in {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}:
        time.sleep(2)
    said = log.read_text(errors="replace")
    assert state()["JobState"] == "COMPLETED", said[-3000:]
    assert state()["Restarts"] == "1", said[-3000:]
    assert (box.folder / "workspace" / "in-a-box" / "report.html").is_file()
