"""One process of a run of the `trl` trainer on several devices; see `jfhpo_core.trainers.trl_processes`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from jfhpo_core.errors import TrialFailure
from jfhpo_core.files import replace_file
from jfhpo_core.trainers.base import Job
from jfhpo_core.trainers.trl import settings
from jfhpo_core.trainers.trl_processes import Talk
from jfhpo_core.trainers.trl_rollout import Ranks
from jfhpo_core.trainers.trl_training import train


def main(folder: Path) -> None:
    """Train what the plan in a folder says.

    Raises:
        TrialFailure: The configuration's fault; it is left in the folder as well.
    """
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    os.chdir(plan["folder"])  # the study's paths may be relative
    job, talk = Job.model_validate_json(plan["job"]), Talk(folder)
    start, ranks = plan["start"], Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        result = train(
            job, settings(job.study), None if start is None else Path(start), Path(plan["stage"]), talk.ask, ranks
        )
    except TrialFailure as failure:
        replace_file(talk.failure, json.dumps({"kind": failure.kind, "message": str(failure)}))
        raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # all of them have come to the same end
        torch.distributed.destroy_process_group()
    if ranks.first:
        replace_file(talk.result, result.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
