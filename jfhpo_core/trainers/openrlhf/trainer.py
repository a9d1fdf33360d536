"""What a study may ask of the trainer `openrlhf`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ValidationError

from jfhpo_core.errors import SpecError
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.prompting import Prompting
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import check_heldout, load_task
from jfhpo_core.trainers.base import Finding, Job, Observer, TrainingResult, read_settings
from jfhpo_core.trainers.external.fit import check_models, demand_of
from jfhpo_core.trainers.external.placement import place, whole_gpus
from jfhpo_core.trainers.openrlhf.hyperparameters import OpenRlhfHyperparameters
from jfhpo_core.trainers.openrlhf.settings import PYTHON_VARIABLE, OpenRlhfSettings

if TYPE_CHECKING:
    from jfhpo_core.study.resolved import Study

logger = logging.getLogger(__name__)

SEPARATORS = "@,"

BATCHING = ("prompts_per_step", "n_samples", "mini_batches", "loss_type")
"""Hyperparameters that decide whether a step can be laid out at all."""


class OpenRlhfTrainer:
    """OpenRLHF 0.11 on Ray with vLLM and DeepSpeed; see `OpenRlhfHyperparameters` and `OpenRlhfSettings`.

    A step is one rollout of `prompts_per_step` x `n_samples` completions and the updates made on it. A run is a
    process group on the node of its worker, or a Ray job; it is stopped once the checkpoint of its rung is complete and
    continued by the same command. Held-out prompts are scored by the run's own engines.

    Unlike that of the `trl` trainer its continuation is not exact to the bit: bfloat16, and sampling that depends on
    how completions meet in an engine.
    """

    name: ClassVar[str] = "openrlhf"
    engine: ClassVar[str] = "vllm"
    hyperparameters: ClassVar[type[BaseModel]] = OpenRlhfHyperparameters
    reinforces: ClassVar[bool] = True
    settings: ClassVar[type[BaseModel]] = OpenRlhfSettings

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        if "lora" in study.trainer.settings:
            raise SpecError(
                "trainer.settings.lora: OpenRLHF 0.11.2 cannot train adapters with vLLM (it sends the engine the names "
                "of PEFT's modules, which the engine does not know); leave it out, or use trainer 'trl'"
            )
        chosen = settings(study)
        if chosen.interpreter is None or shutil.which(chosen.interpreter) is None:
            raise SpecError(
                f"trainer.settings.python: {chosen.interpreter!r} is no Python here; OpenRLHF lives in an environment "
                f"of its own: build it (`make openrlhf-env{' GPU=1' if chosen.device == 'cuda' else ''}` in a clone) "
                f"and name its python, or set {PYTHON_VARIABLE}"
            )
        check_models(study, chosen)
        _check_gpus(study, chosen)
        workspace = str(Path(study.tracking.workspace).absolute())
        if any(mark in workspace for mark in SEPARATORS):
            raise SpecError(
                f"tracking.workspace: OpenRLHF reads '@' and ',' in the names of data files as separators; choose "
                f"another folder than {workspace}"
            )
        task = load_task(study.task)
        check_heldout(task)
        models = build_ladder(study).models
        for where, hyperparameters in combinations(study):
            for model in models:
                own = chosen.of_model(model.name)
                placement = place(
                    own,
                    demand_of(
                        study,
                        own,
                        model,
                        reference=hyperparameters.kl_coefficient > 0,
                        critic=hyperparameters.recipe.critic,
                    ),
                )
                batch = hyperparameters.completions // hyperparameters.mini_batches
                if batch % placement.training_gpus:
                    raise SpecError(
                        f"{where}: updates of {batch} completions (prompts_per_step x n_samples / mini_batches) cannot "
                        f"be spread evenly over the {placement.training_gpus} GPUs of model {model.name!r}"
                    )
        for name, reason in ineffective(study).items():
            logger.warning("space.%s has no effect: %s", name, reason)

    def preflight(self, study: Study) -> Iterator[Finding]:
        """See `jfhpo_core.run.preflight`."""
        from jfhpo_core.trainers.openrlhf.preflight import preflight

        return preflight(study, settings(study.spec), ineffective(study.spec))

    def prompting(self, study: StudySpec) -> Prompting:
        """See `jfhpo_core.run.preflight`. OpenRLHF adds no special tokens to texts."""
        chosen = settings(study)
        return Prompting(chosen.chat_template, "never", chosen.max_prompt_tokens)

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""
        from jfhpo_core.trainers.openrlhf import training  # noqa: F401

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        from jfhpo_core.trainers.openrlhf.training import train

        return train(job, settings(job.study), start, stage, observe)


def settings(study: StudySpec) -> OpenRlhfSettings:
    """The study's trainer settings.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    return read_settings(OpenRlhfSettings, study, "openrlhf")


def _check_gpus(study: StudySpec, chosen: OpenRlhfSettings) -> None:
    """Who counts the GPUs: Ray for our workers, or for the jobs that they submit, and never both."""
    counted = study.cluster.gpus_per_device
    if chosen.jobs_address is not None and counted > 0:
        raise SpecError(
            f"cluster.gpus_per_device: with {counted:g} a worker would hold the GPUs that the Ray job it submits waits "
            "for; set 0 (trainer.settings.jobs_address is given)"
        )
    if chosen.jobs_address is not None and study.cluster.local_folder is not None:
        raise SpecError(
            f"cluster.local_folder: {study.cluster.local_folder!r} is each node's own, and a Ray job may write its "
            "checkpoint on another node than the worker that takes it; leave it out (trainer.settings.jobs_address is "
            "given)"
        )
    if chosen.jobs_address is None and chosen.device == "cuda" and counted == 0:
        raise SpecError(
            "cluster.gpus_per_device: with 0 trials would share GPUs uncounted; set 1, or a fraction to pack several "
            "small trials on a GPU (or trainer.settings.jobs_address to submit runs as Ray jobs)"
        )
    for model in build_ladder(study).models:
        gpus, _ = whole_gpus(model.devices, counted)
        if chosen.jobs_address is None and gpus > chosen.gpus_per_node:
            raise SpecError(
                f"family: model {model.name!r} asks for {gpus} GPUs, more than a node has "
                f"({chosen.gpus_per_node}, trainer.settings.gpus_per_node); set trainer.settings.jobs_address to train "
                "over several nodes"
            )


def combinations(study: StudySpec) -> Iterator[tuple[str, OpenRlhfHyperparameters]]:
    """Every batching that a trial of the study may have, with where it stands.

    Raises:
        SpecError: One of them is contradictory.
    """
    options = {name: study.space.options(name) for name in BATCHING if name in set(study.space)}
    for values in product(*options.values()):
        yield "space and trainer.fixed", _complete(study, dict(zip(options, values, strict=True)), "space")
    for baseline in study.baselines:
        where = f"baselines.{baseline.name}"
        yield where, _complete(study, baseline.configuration, where)


def _complete(study: StudySpec, configuration: dict[str, Any], where: str) -> OpenRlhfHyperparameters:
    try:
        return OpenRlhfHyperparameters.model_validate({**study.trainer.fixed, **configuration})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise SpecError(f"{where}: {fault['msg'].removeprefix('Value error, ')}") from None


def ineffective(study: StudySpec) -> dict[str, str]:
    """Searched hyperparameters that change nothing in any trial of the study, each with the reason."""
    found = [full.ineffective() for where, full in combinations(study) if where == "space and trainer.fixed"]
    names = set(study.space).intersection(*found) if found else set()
    return {name: found[0][name] for name in sorted(names)}
