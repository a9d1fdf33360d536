"""Trainings on a private Ray instance, as a program of its own: `gpu_program.py GPUS_PER_DEVICE AT_ONCE FOLDER`.

Ray is told by its environment how many GPUs there are. The trainer `fragile` goes on once AT_ONCE trainings have begun,
and notes in the folder when each of them ran and which GPU it was given.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jfhpo_core.run.ray_dispatch import RayDispatcher
from jfhpo_core.study.spec import ClusterSpec
from tests.run.support import collect, first_job
from tests.studies import simulated_study

TRIALS = 6


def main() -> None:
    """Train as many trials as possible side by side."""
    share, at_once, folder = float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    attempts = folder / "attempts"
    attempts.mkdir()
    cluster = ClusterSpec(address="local", gpus_per_device=share)
    settings = {"how": "gpu", "times": at_once, "folder": str(attempts)}
    study = simulated_study(folder, trainer={"name": "fragile", "settings": settings})
    dispatcher = RayDispatcher(cluster, slots=TRIALS)
    try:
        for index in range(TRIALS):
            dispatcher.submit(first_job(study, 1e-4 * (index + 1)))
        collect(dispatcher, TRIALS)
    finally:
        dispatcher.close()


if __name__ == "__main__":
    main()
