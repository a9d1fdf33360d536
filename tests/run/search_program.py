"""A search as a program of its own, so that a test can kill it: `python search_program.py STUDY.yaml JOURNAL`.

Every job that is submitted, and the end, is noted in the journal.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jfhpo_core.run.ray_dispatch import RayDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.study_file import load_study
from jfhpo_core.trainers import Job
from mlflow_plugin.ledger import MlflowLedger


class Journalling(RayDispatcher):
    """Notes what it is asked to train before it does so."""

    journal: Path

    def submit(self, job: Job) -> None:
        """Note the trial and its segment's index, then submit."""
        note(self.journal, f"{job.trial_key} {job.segment.index}")
        super().submit(job)


def note(journal: Path, line: str) -> None:
    """Append a line."""
    with journal.open("a") as file:
        file.write(line + "\n")


def main() -> None:
    """Run or continue the study to its end."""
    spec = load_study(sys.argv[1])
    dispatcher = Journalling(spec.cluster, spec.budget.max_parallel, trainer=spec.trainer.name)
    dispatcher.journal = Path(sys.argv[2])
    try:
        result = run_search(resolve(spec), MlflowLedger(), dispatcher)
    finally:
        dispatcher.close()
    note(dispatcher.journal, "complete" if result.complete else "incomplete")


if __name__ == "__main__":
    main()
