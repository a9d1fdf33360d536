"""The embedded default trainer: TRL's GRPOTrainer and RLOOTrainer in one process, on a CPU or on one GPU.

This module knows what a study may ask of it and imports nothing heavy; `trl_training` does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, model_validator

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.prompting import Prompting
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import check_heldout, load_task
from jfhpo_core.trainers.base import Job, Observer, TrainingResult, model_dump_hyperparameters, read_settings
from jfhpo_core.trainers.trl_settings import TrlSettings


class TrlHyperparameters(Hyperparameters):
    """Those of every trainer; a step's completions are parted into equal mini-batches."""

    @model_validator(mode="after")
    def _equal_parts(self) -> Self:
        completions = self.prompts_per_step * self.n_samples
        if completions % self.mini_batches:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} x n_samples={self.n_samples} = {completions} completions "
                f"cannot be parted into mini_batches={self.mini_batches} equal updates; change one of the three"
            )
        return self


class TrlTrainer:
    """GRPO and its relatives by TRL; see `Hyperparameters` and `TrlSettings` for what can be set.

    A step is one rollout of `prompts_per_step` x `n_samples` completions, followed by `mini_batches` optimizer updates
    on equal parts of it. Advantages are computed over whole groups before the rollout is shuffled and parted. With
    loss type `dr_grpo` advantages are not divided by the group's standard deviation, as in its paper; with `rloo` the
    KL penalty enters the reward and the clip range applies to whole completions.
    """

    name: ClassVar[str] = "trl"
    engine: ClassVar[str] = "transformers"
    pauses: ClassVar[bool] = True
    hyperparameters: ClassVar[type[BaseModel]] = TrlHyperparameters
    reinforces: ClassVar[bool] = True
    settings: ClassVar[type[BaseModel]] = TrlSettings

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        settings(study)
        task = load_task(study.task)
        check_heldout(task)
        for model in build_ladder(study).models:
            if model.devices != 1:
                raise SpecError(
                    f"family: model {model.name!r} asks for {model.devices} devices, but trainer 'trl' trains on one; "
                    "set devices: 1, or use a trainer for clusters"
                )
        for where, prompts, samples, parts in _batchings(study):
            if prompts * samples % parts:
                raise SpecError(
                    f"{where}: prompts_per_step={prompts} x n_samples={samples} = {prompts * samples} completions "
                    f"cannot be parted into mini_batches={parts} equal updates; change one of the three"
                )

    def prompting(self, study: StudySpec) -> Prompting:
        """See `jfhpo_core.run.preflight`."""
        chosen = settings(study)
        return Prompting(chosen.chat_template, chosen.bos)

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""
        from jfhpo_core.trainers import trl_training  # noqa: F401  torch, transformers and TRL take seconds

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        from jfhpo_core.trainers.trl_training import train

        return train(job, settings(job.study), start, stage, observe)


def settings(study: StudySpec) -> TrlSettings:
    """The study's trainer settings.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    return read_settings(TrlSettings, study, "trl")


_BATCHING = ("prompts_per_step", "n_samples", "mini_batches")


def _batchings(study: StudySpec) -> Iterator[tuple[str, int, int, int]]:
    """All combinations of the three batch hyperparameters that a trial of the study may have, with where they stand."""
    fixed = model_dump_hyperparameters(Hyperparameters, study.trainer.fixed)
    for prompts, samples, parts in product(*(_possible(study, name, fixed) for name in _BATCHING)):
        yield "space and trainer.fixed", prompts, samples, parts
    for baseline in study.baselines:
        full = Hyperparameters.model_validate({**study.trainer.fixed, **baseline.configuration})
        yield f"baselines.{baseline.name}", full.prompts_per_step, full.n_samples, full.mini_batches


def _possible(study: StudySpec, name: str, fixed: dict[str, Any]) -> list[int]:
    return [int(value) for value in study.space.options(name)] if name in set(study.space) else [fixed[name]]
