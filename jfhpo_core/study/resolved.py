"""A study that has been resolved: its models are sized and ordered, its trainer is loaded and has agreed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from jfhpo_core.embedded import task_folder
from jfhpo_core.errors import SpecError
from jfhpo_core.stopping.rules import build_rules
from jfhpo_core.study.models import Ladder, build_ladder, steps_at
from jfhpo_core.study.space import Space
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    VALIDATION,
    Configuration,
    Evaluation,
    Purpose,
    Segment,
    StepRecord,
    Suggestion,
    Trial,
    trial_key,
)
from jfhpo_core.trainers import Job, Trainer, load_trainer

SAMPLES = 256
"""Random configurations of a space that are checked, besides the ends of each parameter."""


@dataclass(frozen=True)
class EarlierStudy:
    """A study that another one learns from.

    Attributes:
        spec: Its study file.
        ladder: Its models.
        trials: Its trials.
    """

    spec: StudySpec
    ladder: Ladder
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Study:
    """What search, strategies and report work with.

    Attributes:
        spec: The study file.
        ladder: Its models, small to large.
        trainer: Its trainer.
        earlier: Studies to learn from (`warm_start`).
        changed: Fields whose files have been changed since the study began, see `jfhpo_core.study.contents`.
    """

    spec: StudySpec
    ladder: Ladder
    trainer: Trainer
    earlier: tuple[EarlierStudy, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def space(self) -> Space:
        """The search space."""
        return self.spec.space

    @cached_property
    def folder(self) -> Path:
        """The study's folder in the workspace."""
        return study_folder(self.spec)

    @property
    def store(self) -> Path:
        """Root of its checkpoint store."""
        return checkpoint_store(self.spec)

    def complete(self, configuration: Configuration) -> Configuration:
        """A configuration with fixed values and the trainer's defaults filled in.

        Raises:
            SpecError: The trainer does not know a name, or refuses a value.
        """
        merged = {**self.spec.trainer.fixed, **configuration}
        try:
            full: Configuration = self.trainer.hyperparameters.model_validate(merged).model_dump()
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in fault["loc"])
            refused = f"{name}={merged.get(name)!r}" if name else f"the configuration {merged}"
            known = ", ".join(self.trainer.hyperparameters.model_fields)
            raise SpecError(
                f"trainer {self.spec.trainer.name!r} refuses {refused}: {fault['msg']}; its hyperparameters are {known}"
            ) from None
        return full

    def new_trial(
        self,
        number: int,
        configuration: Configuration,
        model: str,
        seed: int,
        purpose: Purpose = "search",
        label: str | None = None,
    ) -> Trial:
        """A trial that has not begun."""
        batch = int(self.complete(configuration)["prompts_per_step"])
        return Trial(
            key=trial_key(self.spec.study, configuration, model, seed, purpose),
            number=number,
            configuration=configuration,
            model=model,
            seed=seed,
            purpose=purpose,
            label=label,
            total_steps=steps_at(self.spec.fidelity.horizon_prompts, batch),
            prompts_per_step=batch,
        )

    def next_segment(self, trial: Trial, stop_prompts: int, suggestion: Suggestion) -> Segment:
        """The segment that takes a trial from where it stands to a rung."""
        return Segment(
            index=len(trial.segments),
            # Its newest checkpoint may be an earlier one: then the worker goes back to it.
            start_step=trial.kept_prompts // trial.prompts_per_step,
            stop_step=steps_at(stop_prompts, trial.prompts_per_step),
            suggestion=suggestion,
            changed=self.changed,
        )

    def job(
        self,
        trial: Trial,
        segment: Segment,
        history: Sequence[StepRecord],
        base: Evaluation | None,
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Everything a worker needs for a segment; `base` is the evaluation of the untrained model, if there is one."""
        model = self.ladder[trial.model]
        levels = [steps_at(level, trial.prompts_per_step) for level in self.spec.fidelity.levels]
        evaluations = [step for step in levels if segment.start_step < step <= segment.stop_step]
        if base is None and segment.start_step == 0:
            evaluations.insert(0, 0)
        checkpoints = [result.checkpoint for result in reversed(trial.segments) if result.checkpoint]
        return Job(
            study=self.spec,
            trial_key=trial.key,
            trial_number=trial.number,
            model=model.name,
            model_path=model.path,
            parameters=model.parameters,
            target_parameters=self.ladder.target.parameters,
            devices=model.devices,
            configuration=self.complete(trial.configuration),
            seed=trial.seed,
            total_steps=trial.total_steps,
            prompts_per_step=trial.prompts_per_step,
            segment=segment,
            evaluation_steps=tuple(evaluations),
            history=tuple(history),
            store=str(self.store),
            start_checkpoints=tuple(checkpoints),
            base=base,
            evaluations=tuple(evaluation for evaluation in trial.evaluations if evaluation.step > 0),
            environment=dict(environment or {}),
            measured=trial.purpose != "search" or segment.suggestion.source == VALIDATION,
        )


def study_folder(spec: StudySpec) -> Path:
    """A study's folder in the workspace."""
    return Path(spec.tracking.workspace).absolute() / spec.study


def checkpoint_store(spec: StudySpec) -> Path:
    """Root of a study's checkpoint store."""
    return study_folder(spec) / "checkpoints"


def resolve(spec: StudySpec) -> Study:
    """Check everything that can be checked before money is spent.

    Raises:
        SpecError: A model, the trainer, a hyperparameter, a baseline, a rule or the task is not usable.
    """
    trainer = load_trainer(spec.trainer.name)
    study = Study(spec, build_ladder(spec), trainer)
    build_rules(spec.stopping)
    _check_embedded_task(spec)
    study.complete({})
    trainer.check(spec)
    for name in spec.space:
        for value in spec.space[name].extremes:
            _complete_or_explain(study, spec.space.middle(**{name: value}), f"space.{name}")
    for point in np.random.default_rng(0).random((SAMPLES, spec.space.dimension)):
        _complete_or_explain(study, spec.space.decode(point), "space")
    for number, baseline in enumerate(spec.baselines):
        _complete_or_explain(study, baseline.configuration, f"baselines.{number}.configuration: {baseline.name!r}")
    return study


def _check_embedded_task(spec: StudySpec) -> None:
    """A task by name is shipped with jfhpo, or is the trainer's own and has its name."""
    name = spec.task.embedded
    if name is not None and name != spec.trainer.name:
        try:
            task_folder(name)
        except SpecError as error:
            raise SpecError(f"task: {error}") from None


def _complete_or_explain(study: Study, configuration: Configuration, where: str) -> None:
    try:
        study.complete(configuration)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def base_scores(trials: Sequence[Trial]) -> dict[str, float]:
    """Held-out score of each untrained model, from the evaluations at step 0 that trials have made."""
    return {model: evaluation.score for model, evaluation in base_evaluations(trials).items()}


def base_evaluations(trials: Sequence[Trial]) -> dict[str, Evaluation]:
    """Evaluation of each untrained model, if a trial has made one."""
    return {
        trial.model: evaluation
        for trial in reversed(trials)
        for evaluation in trial.evaluations[:1]
        if evaluation.step == 0
    }
