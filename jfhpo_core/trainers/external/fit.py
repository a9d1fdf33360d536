"""The placement of a job, and what is learned where it was too hopeful.

Estimates of memory can be wrong. A run that is out of GPU memory is first the placement's fault: the next runs of that
model are placed with less memory than there is, and only where that changes nothing the configuration is infeasible.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jfhpo_core.errors import InfrastructureError, SpecError, TrialFailure
from jfhpo_core.files import replace_file
from jfhpo_core.study.models import Model, build_ladder
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import FailureKind
from jfhpo_core.trainers.base import TRAININGS, Job
from jfhpo_core.trainers.external.memory import Shape
from jfhpo_core.trainers.external.placement import Demand, Placement, place, safer, whole_gpus
from jfhpo_core.trainers.external.settings import ExternalSettings

MOST_CAREFUL = 2
"""Levels of safety above the first placement."""

logger = logging.getLogger(__name__)


def demand_of(
    study: StudySpec, settings: ExternalSettings, model: Model, *, reference: bool, critic: bool = False
) -> Demand:
    """What a run of a model asks for.

    Args:
        study: The study.
        settings: Its trainer settings.
        model: The model.
        reference: Whether a reference model is kept.
        critic: Whether a value model is trained.

    Raises:
        SpecError: Its devices are no whole number of GPUs.
    """
    gpus, share = whole_gpus(model.devices, study.cluster.gpus_per_device)
    tokens = settings.max_prompt_tokens + study.task.max_completion_tokens
    return Demand(Shape.of(model.path, model.parameters), gpus, tokens, reference, critic, share)


def check_models(study: StudySpec, settings: ExternalSettings) -> None:
    """Refuse settings for models that the family does not have.

    Raises:
        SpecError: There are some.
    """
    names = [model.name for model in build_ladder(study).models]
    for name in settings.models:
        if name not in names:
            raise SpecError(f"trainer.settings.models: there is no model {name!r}; the study has {', '.join(names)}")


@dataclass(frozen=True)
class Fit:
    """A job's placement.

    Attributes:
        safety: Level of safety that it was made with.
        memo: File that the workers of a study share, with the level for the job's model.
        most: Highest level that is tried.
    """

    settings: ExternalSettings
    demand: Demand
    placement: Placement
    safety: int
    memo: Path
    most: int

    @classmethod
    def of(cls, job: Job, settings: ExternalSettings, *, critic: bool = False) -> Self:
        """Place a job.

        Args:
            job: The job.
            settings: As they apply to its model.
            critic: Whether it trains a value model.

        Raises:
            SpecError: It does not fit.
        """
        model = Model(job.model, job.model_path, job.parameters, job.devices)
        reference = float(job.configuration["kl_coefficient"]) > 0
        demand = demand_of(job.study, settings, model, reference=reference, critic=critic)
        memo = Path(job.store).absolute().parent / TRAININGS / f"{job.model}-memory.json"
        most = min(MOST_CAREFUL, job.study.cluster.segment_retries)
        for safety in range(_read(memo), 0, -1):
            try:
                return cls(settings, demand, place(settings, demand, safety), safety, memo, most)
            except SpecError:  # what did for another configuration does not for this one
                continue
        return cls(settings, demand, place(settings, demand), 0, memo, most)

    @contextmanager
    def answering_for_memory(self) -> Iterator[None]:
        """Turn an out-of-memory that a safer placement may avoid into a fault of the placement.

        Raises:
            InfrastructureError: The run was out of GPU memory, and the next attempt is placed more safely.
        """
        try:
            yield
        except TrialFailure as failure:
            if failure.kind != FailureKind.OUT_OF_MEMORY or self.safety >= self.most:
                raise
            if not safer(self.settings, self.demand, self.safety):
                raise
            self._remember(self.safety + 1)
            raise InfrastructureError(
                f"{failure}; this was the placement's fault, and the next attempt leaves more memory free"
            ) from failure

    def _remember(self, safety: int) -> None:
        if safety <= _read(self.memo):
            return
        self.memo.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.memo, json.dumps({"safety": safety}))
        logger.warning("runs of this model are placed more safely from now on (%s)", self.memo)


def _read(memo: Path) -> int:
    try:
        return min(MOST_CAREFUL, int(json.loads(memo.read_text(encoding="utf-8"))["safety"]))
    except (OSError, ValueError, KeyError):
        return 0
