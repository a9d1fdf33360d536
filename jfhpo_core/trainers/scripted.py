"""What trainers that train nothing have in common: a segment of a course that is known, played back step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jfhpo_core.study.trial import Evaluation, Pause, StepRecord
from jfhpo_core.trainers.base import Job, Observer, TrainingResult

STATE = "state.json"
"""File of a checkpoint; it holds the step."""


def play(
    job: Job,
    start: Path | None,
    stage: Path,
    observe: Observer,
    record: Callable[[int], StepRecord],
    evaluate: Callable[[int], Evaluation],
    startup_seconds: float,
) -> TrainingResult:
    """Show a segment's steps and evaluations as a trainer does, and write its checkpoint.

    Args:
        job: See `Trainer.run`; so are the next three.
        start: Checkpoint to continue from.
        stage: Takes the checkpoint.
        observe: Takes the records and may stop the run.
        record: What a step shows, from 1 on.
        evaluate: What an evaluation after a step shows.
        startup_seconds: What it costs to begin.

    Returns:
        With seconds as records and evaluations tell them.
    """
    step = first = 0 if start is None else int(json.loads((start / STATE).read_text(encoding="utf-8"))["step"])
    evaluations: list[Evaluation] = []
    trained, stopped, paused = 0.0, False, False

    def stops(event: StepRecord | Evaluation) -> bool:
        nonlocal paused
        decision = observe(event)
        paused = paused or isinstance(decision, Pause)
        return decision is not None and decision.stop

    if first == 0 and 0 in job.evaluation_steps:
        evaluations.append(evaluate(0))
        stopped = stops(evaluations[-1])
    while step < job.segment.stop_step and not stopped and not paused:
        step += 1
        shown = record(step)
        trained += shown.generation_seconds + shown.training_seconds
        stopped = stops(shown)
        if stopped or step in job.evaluation_steps:
            evaluations.append(evaluate(step))
            stopped = stopped or stops(evaluations[-1])
    if not stopped:
        (stage / STATE).write_text(json.dumps({"step": step}), encoding="utf-8")
    spent = sum(evaluation.seconds for evaluation in evaluations)
    return TrainingResult(
        end_step=step,
        end_prompts=step * job.prompts_per_step,
        evaluations=tuple(evaluations),
        startup_seconds=startup_seconds,
        evaluation_seconds=spent,
        seconds=startup_seconds + trained + spent,
    )
