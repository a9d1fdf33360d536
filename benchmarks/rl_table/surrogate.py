"""The error of the replay trainer's surrogate, stated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.markdown import markdown_table
from benchmarks.rl_table.generate import SIZES
from jfhpo_core.optimizer.rank_agreement import rank_agreement
from jfhpo_core.report.text import listed
from jfhpo_core.trainers.replay_surrogate import FOLDS, cross_validate, fit
from jfhpo_core.trainers.replay_table import read_table, recorded_tasks


def write(data: Path, folder: Path) -> None:
    """Write `replay.md`.

    Args:
        data: Folder of the table.
        folder: Where it is written.
    """
    rows, noises = [], []
    for task in recorded_tasks(str(data)):
        table = read_table(str(data), task)
        noises.append(f"{fit(table.recordings).seed_noise:.3f} on `{task}`")
        found = cross_validate(table)
        for size in SIZES:
            own = found.only([recording.size == size for recording in table.recordings])
            agreement = rank_agreement(own.predicted.tolist(), own.recorded.tolist())
            rows.append(
                [
                    task, f"`{size}`", str(len(own.recorded)), f"{own.rmse:.3f}", f"{own.noise:.3f}",
                    f"{np.std(own.recorded):.3f}", f"{1 - own.rmse**2 / np.var(own.recorded):.2f}",
                    "" if agreement.spearman is None else f"{agreement.spearman:.2f}",
                ]
            )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    head = ["task", "size", "trainings", "RMSE", "evaluation noise", "spread", "R2", "Spearman"]
    (folder / "replay.md").write_text(
        f"""# The error of the replayed surrogate

The trainer `replay` in mode `surrogate` answers with scores of a model fitted to the recorded table
(`benchmarks/rl_table/data`). Below: how far its final scores are off on configurations that it has not seen on any
size (cross-validation in {FOLDS} parts of the configurations). A perfect surrogate would be off by the evaluation
noise; the spread is the standard deviation of the recorded scores. Made by `python -m benchmarks.rl_table surrogate`.

{markdown_table(head, rows)}

It adds the noise of an evaluation to a trial, and the noise between seeds, which has a standard deviation of
{listed(noises)} (0 as long as the table has no second seeds).
""",
        encoding="utf-8",
    )
