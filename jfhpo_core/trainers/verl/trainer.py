"""What a study may ask of the trainer `verl`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

from jfhpo_core.errors import SpecError
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.prompting import Prompting
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import check_heldout, load_task
from jfhpo_core.trainers.base import Finding, Job, Observer, TrainingResult, read_settings
from jfhpo_core.trainers.external.fit import check_models, demand_of
from jfhpo_core.trainers.external.placement import place
from jfhpo_core.trainers.verl.command import to_argv
from jfhpo_core.trainers.verl.settings import PYTHON_VARIABLE, VerlHyperparameters, VerlSettings

if TYPE_CHECKING:
    from jfhpo_core.study.resolved import Study
    from jfhpo_core.trainers.base import Finding


class VerlTrainer:
    """verl 0.9 on Ray with vLLM and FSDP; see `VerlHyperparameters` and `VerlSettings`.

    A run is a process group on the node of its worker. It is held after every step until that step is judged, so a
    rule stops it exactly there, and it is stopped once the checkpoint of its rung is complete.
    """

    name: ClassVar[str] = "verl"
    engine: ClassVar[str] = "vllm"
    hyperparameters: ClassVar[type[BaseModel]] = VerlHyperparameters
    reinforces: ClassVar[bool] = True
    settings: ClassVar[type[BaseModel]] = VerlSettings

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        chosen = settings(study)
        if chosen.interpreter is None or shutil.which(chosen.interpreter) is None:
            raise SpecError(
                f"trainer.settings.python: {chosen.interpreter!r} is no Python here; verl lives in an environment of "
                f"its own: build it (`make verl-env`; for GPUs see the how-to on verl) and name its python, or set "
                f"{PYTHON_VARIABLE}"
            )
        if chosen.device == "cuda" and study.cluster.gpus_per_device == 0:
            raise SpecError(
                "cluster.gpus_per_device: with 0 trials would share GPUs uncounted; set 1, or a fraction to pack "
                "several small trials on a GPU"
            )
        check_models(study, chosen)
        for model in build_ladder(study).models:
            own = chosen.of_model(model.name)
            demand = demand_of(study, own, model, reference=True, critic=_trains_critic(study))
            if demand.gpus > chosen.gpus_per_node:
                raise SpecError(
                    f"family: model {model.name!r} asks for {demand.gpus} GPUs, and a run of trainer 'verl' stays "
                    f"within a node of {chosen.gpus_per_node} (trainer.settings.gpus_per_node)"
                )
            place(own, demand)
        task = load_task(study.task)
        check_heldout(task)
        _check_options(study, chosen)

    def preflight(self, study: Study) -> Iterator[Finding]:
        """See `jfhpo_core.run.preflight`."""
        from jfhpo_core.trainers.verl.preflight import preflight

        return preflight(study, settings(study.spec))

    def prompting(self, study: StudySpec) -> Prompting:
        """See `jfhpo_core.run.preflight`."""
        return Prompting(chat_template=True, max_tokens=settings(study).max_prompt_tokens)

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""
        from jfhpo_core.trainers.verl import training  # noqa: F401

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        from jfhpo_core.trainers.verl.training import train

        return train(job, settings(job.study), start, stage, observe)


def settings(study: StudySpec) -> VerlSettings:
    """The study's trainer settings.

    Raises:
        SpecError: A setting is unknown or out of bounds.
    """
    return read_settings(VerlSettings, study, "verl")


def _trains_critic(study: StudySpec) -> bool:
    """Whether a trial of the study may train a value model."""
    searched = study.space.options("loss_type") if "loss_type" in set(study.space) else ()
    configurations = [study.trainer.fixed, *(baseline.configuration for baseline in study.baselines)]
    return "ppo" in (*searched, *(configuration.get("loss_type") for configuration in configurations))


def _check_options(study: StudySpec, chosen: VerlSettings) -> None:
    """Whether verl's own configuration knows the options that the study sets, fixes or searches.

    Raises:
        SpecError: It does not know one of them.
    """
    from jfhpo_core.trainers.verl.preflight import refusal

    configurations = [
        {name: study.space[name].extremes[0] for name in study.space},
        study.trainer.fixed,
        *(baseline.configuration for baseline in study.baselines),
    ]
    named = {name: value for values in configurations for name, value in values.items() if "." in name}
    options = chosen.extra | named
    if not options:
        return
    assert chosen.interpreter is not None
    refused = refusal(chosen.interpreter, tuple(to_argv(options)))
    if refused is not None:
        raise SpecError(f"verl's configuration refuses an option of {', '.join(options)}: {refused}")
