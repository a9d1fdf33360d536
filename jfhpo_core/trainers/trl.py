"""The embedded default trainer: TRL's GRPOTrainer and RLOOTrainer.

A run on one device is trained in the worker's own process, one on several in a process for each, which have copies of
the model and average their gradients; so is a run with vLLM, whose engine would stay in a worker.

This module knows what a study may ask of it and imports nothing heavy; `trl_training` does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, model_validator

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.models import Model, build_ladder
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
        chosen = settings(study)
        task = load_task(study.task)
        check_heldout(task)
        models = build_ladder(study).models
        _check_devices(study, chosen, models)
        for where, prompts, samples, parts in _batchings(study):
            if prompts * samples % parts:
                raise SpecError(
                    f"{where}: prompts_per_step={prompts} x n_samples={samples} = {prompts * samples} completions "
                    f"cannot be parted into mini_batches={parts} equal updates; change one of the three"
                )
            for model in models:
                if prompts * samples // parts % model.devices:
                    raise SpecError(
                        f"{where}: updates of {prompts * samples // parts} completions (prompts_per_step x n_samples / "
                        f"mini_batches) cannot be spread evenly over the {model.devices} devices of model "
                        f"{model.name!r}"
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
        chosen = settings(job.study)
        if job.devices > 1 or chosen.vllm is not None:
            from jfhpo_core.trainers.trl_processes import train_apart

            return train_apart(job, chosen, start, stage, observe)
        from jfhpo_core.trainers.trl_training import train

        return train(job, chosen, start, stage, observe)


def settings(study: StudySpec) -> TrlSettings:
    """The study's trainer settings.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    return read_settings(TrlSettings, study, "trl")


def _check_devices(study: StudySpec, chosen: TrlSettings, models: Sequence[Model]) -> None:
    """Whether each process of a run has a device of its own, of the kind that it needs.

    Raises:
        SpecError: One has none.
    """
    share = study.cluster.gpus_per_device
    if 0 < share < 1 and (several := [model.name for model in models if model.devices > 1]):
        raise SpecError(
            f"cluster.gpus_per_device: with {share:g} the processes of {several[0]!r} would share a GPU, which their "
            "communication does not allow; set 1, or devices: 1"
        )
    if chosen.vllm is None:
        return
    if chosen.device == "cpu" or share == 0:
        raise SpecError(
            "trainer.settings.vllm: trainer 'trl' runs vLLM on GPUs only; set cluster.gpus_per_device: 1 and device: "
            "cuda, or leave vllm out"
        )
    for model in models:
        if model.devices % chosen.vllm.tensor_parallel:
            raise SpecError(
                f"trainer.settings.vllm.tensor_parallel: the {model.devices} devices of model {model.name!r} cannot be "
                f"parted into engines of {chosen.vllm.tensor_parallel}"
            )


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
