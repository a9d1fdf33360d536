"""The small study that is searched: two rungs, a strategy and a trainer that cost nothing, and the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from jfhpo_core.optimizer.strategy import Proposal, Recommendation
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Evaluation, StepRecord, Suggestion, Trial, TrialState
from jfhpo_core.trainers import Job, TrainingResult
from jfhpo_core.trainers.base import Observer

WORKSPACE = "/workspace"
"""On the simulated disk."""
SEGMENT_SECONDS = 4.0
WORDS = "因为计划要求它; " * 800
"""A reason ("because the schedule asks for it") of several bytes a character, longer than a tag of MLflow may be."""


@cache
def study() -> Study:
    """The study."""
    return resolve(
        StudySpec.model_validate(
            {
                "study": "simulated",
                "family": [
                    {"name": "small", "path": "simulated", "parameters": 100_000},
                    {"name": "large", "path": "simulated", "parameters": 1_000_000},
                ],
                "target": "large",
                "task": "instruct",
                "trainer": "simulated",
                "space": "tiny",
                "fidelity": {"horizon_prompts": 64, "rungs": 2},
                "budget": {"trial_seconds": 8 * SEGMENT_SECONDS, "max_parallel": 1},
                "seeds": {"training": [0, 1]},
                "tracking": {"workspace": WORKSPACE},
            }
        )
    )


class Halving:
    """Every second trial of the proxy goes on to the next rung; the target's are left to the validation."""

    name: ClassVar[str] = "halving"

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        if remaining_seconds < SEGMENT_SECONDS:
            return None
        draw = random.Random(seed)
        mine = [trial for trial in trials if trial.purpose == "search"]
        first, full = study.spec.fidelity.levels
        target = study.ladder.target.name
        reason = WORDS if len(mine) == 1 else "because"
        why = Suggestion(source="halving", explanation=reason, expected_cost_seconds=SEGMENT_SECONDS)
        for trial in mine:
            if trial.state is TrialState.PAUSED and trial.number % 2 == 0 and trial.model != target:
                return Proposal(trial.configuration, trial.model, full, why)
        configuration = {"learning_rate": 10 ** draw.uniform(-5, -3)}
        values = {**study.space.decode([0.5] * study.space.dimension), **configuration}
        return Proposal(values, draw.choice([model.name for model in study.ladder.models]), first, why)

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`."""
        scores = {}
        for trial in trials:
            if trial.purpose == "search" and trial.evaluations:
                scores[trial.key] = (trial.evaluations[-1].score, trial.configuration)
        found = sorted(scores.items(), key=lambda item: (-item[1][0], item[0]))
        return [Recommendation(configuration, score, 0.05) for _, (score, configuration) in found]


class Trainer:
    """Writes where it stands into its checkpoint, and looks whether it finds that again."""

    name: ClassVar[str] = "simulated"
    hyperparameters = Hyperparameters

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        segment = job.segment
        if start is not None:
            found = (start / "weights").read_text(encoding="utf-8")
            if found != weights(job.trial_key, segment.start_step):
                raise AssertionError(f"trial {job.trial_key} goes on from {found[:40]!r} at step {segment.start_step}")
            if [record.step for record in job.history] != list(range(1, segment.start_step + 1)):
                raise AssertionError(f"trial {job.trial_key} goes on without the records of its earlier steps")
        evaluations = []
        for step in range(segment.start_step, segment.stop_step + 1):
            if step > segment.start_step:
                observe(record(job, step))
            if step in job.evaluation_steps:
                evaluations.append(evaluation(job, step))
                observe(evaluations[-1])
        (stage / "weights").write_text(weights(job.trial_key, segment.stop_step), encoding="utf-8")
        (stage / "tokenizer").write_text("always the same", encoding="utf-8")
        end = segment.stop_step
        return TrainingResult(
            end_step=end,
            end_prompts=end * job.prompts_per_step,
            evaluations=tuple(evaluations),
            seconds=SEGMENT_SECONDS * (end - segment.start_step) / 2,
        )


def weights(key: str, step: int) -> str:
    """Content of a checkpoint."""
    return f"{key} at step {step} " * 4


def record(job: Job, step: int) -> StepRecord:
    """A step."""
    return StepRecord.model_construct(
        step=step, prompts=step * job.prompts_per_step, tokens=1000 * step, reward=0.5, reward_std=0.4,
        zero_variance_share=0.1, kl=0.01, entropy=0.5, clip_fraction=0.0, grad_norm=0.3, completion_tokens=8.0,
        truncated_share=0.0, generation_seconds=0.5, training_seconds=0.5,
    )  # fmt: skip


def evaluation(job: Job, step: int) -> Evaluation:
    """A held-out score that depends on trial and step alone."""
    score = random.Random(f"{job.trial_key}:{step}").uniform(0.4, 0.6)
    return Evaluation(
        step=step, prompts=step * job.prompts_per_step, score=score, standard_error=0.02, samples=512, seconds=0.1
    )
