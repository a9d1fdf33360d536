"""The best runs of the table, as what is known of hyperparameters: `jfhpo_core/optimizer/known_optima.json`."""

from __future__ import annotations

import json
from pathlib import Path

from jfhpo_core.optimizer.known_optima import FILE, Optimum
from jfhpo_core.trainers.replay_table import Recording, read_table, recorded_tasks

BEST = 5
"""Runs of each task and size that count as good."""

SOURCE = "benchmarks/rl_table"


def write(data: Path, file: Path = FILE) -> None:
    """Replace what the file has from tables; what it has from published recipes stays."""
    known = json.loads(file.read_text(encoding="utf-8"))
    known["recorded"] = [item.model_dump(exclude_none=True) for item in recorded(data)]
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def recorded(data: Path, *, worst: bool = False) -> list[Optimum]:
    """The best first-seed runs by their final score, of every task and size; or the worst, to mislead."""
    found = []
    for task in sorted(recorded_tasks(str(data))):
        table = read_table(str(data), task)
        for size in table.sizes:
            complete = [item for item in table.of_size(size) if item.completed and item.seed == 0]
            best = sorted(complete, key=lambda item: item.evaluations[-1].score, reverse=not worst)[:BEST]
            found += [_optimum(task, item) for item in best]
    return found


def _optimum(task: str, run: Recording) -> Optimum:
    values = {name: value for name, value in run.configuration.items() if isinstance(value, int | float)}
    return Optimum(source=SOURCE, task=task, parameters=run.parameters, weight=1 / BEST, values=values)
