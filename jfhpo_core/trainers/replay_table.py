"""A table of recorded runs: three Parquet files, as `python -m benchmarks.rl_table pack` writes them.

All recorded configurations lie in the default space `tiny`; whatever that space does not search was at the trainer's
default, and the batch was `PROMPTS_PER_STEP` prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import default_spaces
from jfhpo_core.study.space import Space, Vector
from jfhpo_core.study.trial import Configuration, Evaluation, StepRecord

SPACE = Space.model_validate(default_spaces()["tiny"])
"""The space of the recorded configurations."""

FILES = ("trainings", "steps", "evaluations")

COMPLETED = "completed"
"""Outcome of a run that reached the full horizon; the others were cut short because they had collapsed."""


@dataclass(frozen=True)
class Recording:
    """A recorded run.

    Attributes:
        size: Name of its model.
        parameters: Parameter count of the model.
        number: Number of the configuration in the table.
        configuration: The configuration, in `SPACE`.
        point: Its coordinates in the unit cube, shape (SPACE.dimension,).
        seed: Its training seed.
        completed: Whether it reached the full horizon.
        steps: Step records, from step 1 without a gap.
        evaluations: At step 0 and at each rung, by step.
        test_score: Final score on held-out prompts that no evaluation used; None if not completed.
        startup_seconds: Cost before the first step.
    """

    size: str
    parameters: int
    number: int
    configuration: Configuration
    point: Vector
    seed: int
    completed: bool
    steps: tuple[StepRecord, ...]
    evaluations: tuple[Evaluation, ...]
    test_score: float | None
    startup_seconds: float

    def record(self, step: int) -> StepRecord:
        """The record of a step. After the last recorded one, a collapsed training repeats itself."""
        if step <= len(self.steps):
            return self.steps[step - 1]
        last = self.steps[-1]
        share = step / last.step
        return last.model_copy(
            update={"step": step, "prompts": int(last.prompts * share), "tokens": int(last.tokens * share)}
        )

    def evaluation(self, step: int) -> Evaluation:
        """The evaluation at a step; between two rungs interpolated, after the last recorded one the same again."""
        exact = next((evaluation for evaluation in self.evaluations if evaluation.step == step), None)
        if exact is not None:
            return exact
        steps = [evaluation.step for evaluation in self.evaluations]

        def between(name: str) -> float:
            return float(np.interp(step, steps, [getattr(evaluation, name) for evaluation in self.evaluations]))

        return Evaluation(
            step=step,
            prompts=step * self.steps[0].prompts,
            score=between("score"),
            standard_error=between("standard_error"),
            samples=self.evaluations[0].samples,
            seconds=between("seconds"),
        )


@dataclass(frozen=True)
class Table:
    """The recorded runs of one task.

    Attributes:
        recordings: In the order of the table.
    """

    recordings: tuple[Recording, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Parameter count of each recorded model, by name."""
        return {recording.size: recording.parameters for recording in self.recordings}

    @property
    def total_steps(self) -> int:
        """Steps of the full horizon."""
        return max(len(recording.steps) for recording in self.recordings)

    @property
    def prompts_per_step(self) -> int:
        """Prompts of a step."""
        return self.recordings[0].steps[0].prompts

    def of_size(self, size: str) -> tuple[Recording, ...]:
        """The recordings of a model."""
        return tuple(recording for recording in self.recordings if recording.size == size)

    def nearest(self, size: str, point: Vector, seed: int) -> Recording:
        """The recording of a model whose configuration is nearest to a point of the unit cube.

        A configuration recorded with k seeds answers seed s with the (s mod k)-th of them.
        """
        candidates = self.of_size(size)
        distances = np.linalg.norm(np.array([recording.point for recording in candidates]) - point, axis=1)
        number = candidates[int(np.argmin(distances))].number
        seeds = sorted((recording for recording in candidates if recording.number == number), key=lambda r: r.seed)
        return seeds[seed % len(seeds)]


def recorded_tasks(folder: str) -> list[str]:
    """The tasks of which a table has runs, in its order.

    Raises:
        SpecError: Its file of runs is missing or cannot be read.
    """
    return list(dict.fromkeys(_read(Path(folder) / f"{FILES[0]}.parquet")["task"].to_pylist()))


@cache
def read_table(folder: str, task: str) -> Table:
    """Read the runs of a task.

    Args:
        folder: Where the three files lie.
        task: Name of the task.

    Raises:
        SpecError: A file is missing or not a table of this kind, or it has no run of the task.
    """
    trainings, steps, evaluations = (_read(Path(folder) / f"{name}.parquet") for name in FILES)
    tasks = sorted(recorded_tasks(folder))
    if task not in tasks:
        raise SpecError(f"{folder}: no run of task {task!r}; the table has {', '.join(tasks)}")
    recordings = []
    step = evaluation = 0
    for row in trainings.to_pylist():
        next_step, next_evaluation = step + row["steps"], evaluation + row["evaluations"]
        if row["task"] == task:
            own_steps = steps.slice(step, row["steps"]).to_pylist()
            own_evaluations = evaluations.slice(evaluation, row["evaluations"]).to_pylist()
            recordings.append(_recording(row, own_steps, own_evaluations, folder))
        step, evaluation = next_step, next_evaluation
    return Table(tuple(recordings))


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise SpecError(
            f"{path}: it cannot be read: {error}; a table is made by `python -m benchmarks.rl_table pack`"
        ) from None


_KEY = ("task", "size", "configuration", "seed")


def _recording(
    row: dict[str, Any], steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], folder: str
) -> Recording:
    for other in (*steps, *evaluations):
        if any(other.pop(name) != row[name] for name in _KEY):
            raise SpecError(f"{folder}: its three files do not belong together; pack the table again")
    configuration: Configuration = {name: row[name] for name in SPACE}
    return Recording(
        size=row["size"],
        parameters=row["parameters"],
        number=row["configuration"],
        configuration=configuration,
        point=SPACE.encode(configuration),
        seed=row["seed"],
        completed=row["outcome"] == COMPLETED,
        steps=tuple(StepRecord.model_construct(**step) for step in steps),
        evaluations=tuple(Evaluation.model_construct(**evaluation) for evaluation in evaluations),
        test_score=row["test_score"],
        startup_seconds=row["startup_seconds"],
    )
