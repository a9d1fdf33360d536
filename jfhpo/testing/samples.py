"""Small simulated studies and hand-made values that several test modules build on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    Configuration,
    Evaluation,
    Outcome,
    Segment,
    SegmentResult,
    StepRecord,
    Suggestion,
    Trial,
)

BECAUSE = Suggestion(source="test", explanation="the test asks for it")


def study_data(workspace: Path, **changes: Any) -> dict[str, Any]:
    """A study file as data: three simulated models, horizon 480 prompts (30 steps of 16), rungs at 160, 320 and 480.

    A full run of the target lasts about 35 simulated seconds.
    """
    return {
        "study": "test",
        "family": [
            {"name": "small", "path": "simulated", "parameters": 100_000},
            {"name": "medium", "path": "simulated", "parameters": 300_000},
            {"name": "large", "path": "simulated", "parameters": 1_000_000},
        ],
        "target": "large",
        "task": "instruct",
        "trainer": "simulated",
        "space": "tiny",
        "fidelity": {"horizon_prompts": 480, "rungs": 3},
        "budget": {"trial_seconds": 300, "max_parallel": 2},
        "strategy": "random",
        "baselines": [{"name": "recipe", "configuration": {"learning_rate": 1e-4}}],
        "tracking": {"workspace": str(workspace)},
        **changes,
    }


def simulated_study(workspace: Path, **changes: Any) -> Study:
    """The study of `study_data`, resolved."""
    return resolve(StudySpec.model_validate(study_data(workspace, **changes)))


def step_record(step: int, **changes: Any) -> StepRecord:
    """A healthy step record."""
    return StepRecord.model_validate(
        {
            "step": step,
            "prompts": 16 * step,
            "tokens": 1024 * step,
            "reward": 0.5,
            "reward_std": 0.5,
            "zero_variance_share": 0.1,
            "kl": 0.01,
            "entropy": 0.5,
            "clip_fraction": 0.01,
            "grad_norm": 0.3,
            "completion_tokens": 8.0,
            "truncated_share": 0.0,
            "generation_seconds": 0.5,
            "training_seconds": 0.5,
            **changes,
        }
    )


def evaluation(step: int, score: float = 0.5, seconds: float = 1.0) -> Evaluation:
    """A held-out score."""
    return Evaluation(step=step, prompts=16 * step, score=score, standard_error=0.02, samples=512, seconds=seconds)


def segment(index: int, start: int, stop: int) -> Segment:
    """A segment."""
    return Segment(index=index, start_step=start, stop_step=stop, suggestion=BECAUSE)


def result(index: int, start: int, end: int, **changes: Any) -> SegmentResult:
    """The result of a segment that reached its end after 10 seconds."""
    return SegmentResult.model_validate(
        {
            "segment": segment(index, start, max(1, end)),
            "outcome": Outcome.REACHED,
            "end_step": end,
            "end_prompts": 16 * end,
            "seconds": 10.0,
            **changes,
        }
    )


def trained(
    study: Study, configuration: Configuration, model: str, scores: list[float], number: int = 0, **changes: Any
) -> Trial:
    """A trial after one segment, with these scores at step 0 and at the first rungs; changes go to its result."""
    trial = study.new_trial(number, configuration, model, 0)
    levels = [0, *study.spec.fidelity.levels][: len(scores)]
    evaluations = tuple(
        evaluation(level // trial.prompts_per_step, score) for level, score in zip(levels, scores, strict=True)
    )
    end = evaluations[-1].step if evaluations else 0
    change = {"evaluations": evaluations, "seconds": 20.0, "committed": number + 1, **changes}
    return trial.model_copy(update={"segments": (result(0, 0, end, **change),)})
