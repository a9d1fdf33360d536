"""Earlier studies that a study learns from: those that it names, or those in the tracking store that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jfhpo_core.errors import JfhpoError
from jfhpo_core.optimizer.observations import earlier_configurations
from jfhpo_core.study.history import History
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.spec import AUTO, StudySpec

if TYPE_CHECKING:
    from mlflow_plugin.ledger import MlflowLedger

AT_MOST = 3
"""Studies that `auto` learns from: the best fitting ones, of equally fitting ones the newest."""

LOOKED_AT = 30
"""Newest studies of the tracking store that are looked at."""

FEWEST_SHARED = 0.5
"""Share of the searched hyperparameters that a fitting study has searched, too."""

FEWEST_TRIALS = 3
"""Configurations within this study's space that a fitting study has trained."""


@dataclass(frozen=True)
class Found:
    """An earlier study, and why it is learned from.

    Attributes:
        fit: How well it fits; the higher the better.
    """

    name: str
    study: EarlierStudy
    why: str
    fit: tuple[bool, bool, float]


def earlier_studies(study: Study) -> list[Found]:
    """What `warm_start` of a study stands for.

    Raises:
        LedgerError: The ledger does not hold a study that is named, or does not answer.
        SpecError: The models of one of them cannot be found any more.
    """
    wanted = study.spec.warm_start
    if wanted != AUTO:
        return [_found(study, *_recalled(study, name)) for name in wanted]
    fitting = sorted(_fitting(study), key=lambda found: found.fit, reverse=True)
    return fitting[:AT_MOST]


def _fitting(study: Study) -> Iterator[Found]:
    """Studies of the store that fit, newest first; those that began after this one are none of its past.

    The trials, which take long to read, are read only of those whose study file fits.
    """
    from mlflow_plugin.study_run import recorded_before

    for name in recorded_before(study.spec)[:LOOKED_AT]:
        try:
            ledger, spec = _recalled(study, name)
            if spec.trainer.name != study.spec.trainer.name or _shared(study, spec) < FEWEST_SHARED * len(study.space):
                continue
            found = _found(study, ledger, spec)
        except JfhpoError:
            continue  # its models are gone, or it was written by another version: it is not needed
        if len(earlier_configurations(History.of(replace(study, earlier=(found.study,)), []))) >= FEWEST_TRIALS:
            yield found


def _recalled(study: Study, name: str) -> tuple[MlflowLedger, StudySpec]:
    """The ledger of a recorded study, and its study file."""
    from mlflow_plugin.ledger import MlflowLedger

    ledger = MlflowLedger()
    return ledger, ledger.recall(study.spec, name)


def _found(study: Study, ledger: MlflowLedger, spec: StudySpec) -> Found:
    earlier = EarlierStudy(spec, build_ladder(spec), tuple(ledger.trials()))
    shared = _shared(study, spec)
    models = {model.parameters for model in earlier.ladder.models} & {m.parameters for m in study.ladder.models}
    task = spec.task == study.spec.task
    reasons = [
        "same task" if task else "another task",
        f"{len(models)} of {len(study.ladder.models)} models of the same size",
        f"{shared} of {len(study.space)} hyperparameters",
    ]
    return Found(spec.study, earlier, ", ".join(reasons), (task, bool(models), shared / len(study.space)))


def _shared(study: Study, spec: StudySpec) -> int:
    """Hyperparameters of a study that another one has searched, with the same type."""
    return sum(name in spec.space and type(spec.space[name]) is type(study.space[name]) for name in study.space)
