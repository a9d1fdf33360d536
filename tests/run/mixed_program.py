"""Trials on 1 to 8 devices on a private Ray instance, as a program of its own: `mixed_program.py FOLDER`.

Ray is told by its environment that there are eight GPUs. Which trial ran when, and on which of them, is noted by the
trainer `fragile`. All checkpoints count as large, so they are stored by processes without GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jfhpo_core.run import ray_dispatch
from jfhpo_core.run.ray_dispatch import RayDispatcher
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.spec import ClusterSpec
from jfhpo_core.study.trial import Suggestion
from jfhpo_core.trainers import Job
from tests.run.support import collect
from tests.studies import simulated_study

SIZES = (4, 2, 8, 2, 1, 1)
"""In the order of submission; nothing is known of their lengths, so nothing may overtake."""


def main() -> None:
    """Run the trials."""
    ray_dispatch.HAND_OVER_BYTES = 0
    folder = Path(sys.argv[1])
    attempts = folder / "attempts"
    attempts.mkdir()
    study = simulated_study(
        folder,
        family=[
            {"name": str(size), "path": "simulated", "parameters": 100_000 * size, "devices": size}
            for size in sorted(set(SIZES))
        ],
        target="8",
        trainer={"name": "fragile", "settings": {"how": "gpu", "times": 1, "folder": str(attempts)}},
    )
    dispatcher = RayDispatcher(ClusterSpec(address="local", gpus_per_device=1), slots=None)
    jobs: list[Job] = []
    try:
        for index, size in enumerate(SIZES):
            trial = study.new_trial(index, {"learning_rate": 1e-4 * (index + 1)}, str(size), seed=0)
            because = Suggestion(source="test", explanation="")
            jobs.append(study.job(trial, study.next_segment(trial, 160, because), (), None))
            dispatcher.submit(jobs[-1])
        _, finished = collect(dispatcher, len(jobs))
    finally:
        dispatcher.close()
    store = CheckpointStore(study.store)
    for job in jobs:
        result = finished[job.trial_key].result
        assert result.attempts == 1
        assert result.checkpoint is not None
        store.verify(result.checkpoint)
        (folder / f"{job.trial_key}.gpu").rename(folder / f"{job.trial_key}.{job.devices}.gpus")


if __name__ == "__main__":
    main()
