"""The batch script for SLURM, with stand-ins for SLURM's commands, Ray and jfhpo that note how they are called."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deployments" / "slurm" / "search.sbatch"

SLURM = {
    "scontrol": """case "$*" in
        "show hostnames"*) printf "one\\ntwo\\n" ;;
        "show job"*) echo "JobId=7 StartTime=x EndTime=$END Partition=gpu" ;;
        esac""",
    "srun": """while [ "${1#--}" != "$1" ]; do
        case $1 in --nodelist=*) export NODE=${1#*=} ;; esac
        shift
        done
        exec "$@\"""",
    "hostname": "echo 10.0.0.1",
}
OURS = {
    "ray": "echo $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} >> $NOTES; exec sleep ${RAY_SECONDS:-600}",
    "python": "echo ${NODES:-$(grep -c ' ray start' $NOTES)}",
    "jfhpo": "exit $STATUS",
}


def submit(folder: Path, status: int, minutes: int, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script in a job of two nodes; returns how it ended, and the calls."""
    notes = folder / "notes"
    for place, programs in (("slurm", SLURM), ("venv/bin", OURS)):
        (folder / place).mkdir(parents=True)
        for name, body in programs.items():
            file = folder / place / name
            file.write_text(f'#!/usr/bin/env bash\necho "${{NODE:-head}} {name} $*" >> $NOTES\n{body}\n')
            file.chmod(0o755)
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 60 * minutes))
    environment = {
        "PATH": f"{folder / 'slurm'}:{os.environ['PATH']}", "NOTES": str(notes), "STATUS": str(status), "END": end,
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "JFHPO_VENV": str(folder / "venv"),
        **more,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), "study.yaml"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    return done, notes.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (4, True)])
def test_ray_starts_on_all_nodes_and_an_unfinished_search_is_queued_again(
    tmp_path: Path, status: int, *, again: bool
) -> None:
    done, calls = submit(tmp_path, status, minutes=120)
    assert done.returncode == status, done.stderr
    assert calls.count("token 64") == 2
    (search,) = [call for call in calls if " jfhpo search" in call]
    limit = int(search.rpartition("=")[2])
    assert 120 * 60 - 900 - 60 < limit <= 120 * 60 - 900
    assert ("head scontrol requeue 7" in calls) is again
    assert any(call.startswith("one ray start --head --node-ip-address=10.0.0.1 --port=6379") for call in calls)
    assert any(call.startswith("two ray start --address=10.0.0.1:6379") for call in calls)


@pytest.mark.slow
def test_a_job_without_time_for_a_search_says_so(tmp_path: Path) -> None:
    done, calls = submit(tmp_path, 0, minutes=10)
    assert done.returncode == 1
    assert "raise --time" in done.stderr
    assert not any(" jfhpo" in call for call in calls)


def test_a_node_on_which_ray_does_not_start_is_noticed_at_once(tmp_path: Path) -> None:
    done, calls = submit(tmp_path, 0, minutes=120, RAY_SECONDS="0", NODES="1")
    assert done.returncode == 1
    assert "Ray did not start on one of one two" in done.stderr
    assert not any(" jfhpo" in call for call in calls)
