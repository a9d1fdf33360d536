"""Earlier studies that a study learns from: those that it names, or those in the tracking store that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jfhpo_core.errors import JfhpoError
from jfhpo_core.study.history import searched_configuration
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.spec import AUTO, StudySpec

AT_MOST = 3
"""Studies that `auto` learns from: the best fitting ones, of equally fitting ones the newest."""

LOOKED_AT = 30
"""Newest studies of the tracking store that are looked at."""

FEWEST_SHARED = 0.5
"""Share of the searched hyperparameters that a fitting study has searched, too."""

FEWEST_TRIALS = 3
"""Evaluated trials within this study's space that a fitting study has."""


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
        return [_found(study, name) for name in wanted]
    fitting = sorted(_fitting(study), key=lambda found: found.fit, reverse=True)
    return fitting[:AT_MOST]


def _fitting(study: Study) -> Iterator[Found]:
    """Studies of the store that fit, newest first; those that began after this one are none of its past."""
    from mlflow_plugin.study_run import recorded_before

    for name in recorded_before(study.spec)[:LOOKED_AT]:
        try:
            found = _found(study, name)
        except JfhpoError:
            continue  # its models are gone, or it was written by another version: it is not needed
        usable = [
            trial
            for trial in found.study.trials
            if any(evaluation.step for evaluation in trial.evaluations)
            and searched_configuration(study, {**found.study.spec.trainer.fixed, **trial.configuration}) is not None
        ]
        same_trainer = found.study.spec.trainer.name == study.spec.trainer.name
        if same_trainer and found.fit[-1] >= FEWEST_SHARED and len(usable) >= FEWEST_TRIALS:
            yield found


def _found(study: Study, name: str) -> Found:
    from mlflow_plugin.ledger import MlflowLedger

    ledger = MlflowLedger()
    spec = ledger.recall(study.spec, name)
    earlier = EarlierStudy(spec, build_ladder(spec), tuple(ledger.trials()))
    shared = sum(_searches(spec, parameter, study.spec) for parameter in study.space)
    models = {model.parameters for model in earlier.ladder.models} & {m.parameters for m in study.ladder.models}
    task = spec.task == study.spec.task
    reasons = [
        "same task" if task else "another task",
        f"{len(models)} of {len(study.ladder.models)} models of the same size",
        f"{shared} of {len(study.space)} hyperparameters",
    ]
    return Found(name, earlier, ", ".join(reasons), (task, bool(models), shared / len(study.space)))


def _searches(spec: StudySpec, parameter: str, wanted: StudySpec) -> bool:
    """Whether a study has searched a hyperparameter of the same type."""
    return parameter in spec.space and type(spec.space[parameter]) is type(wanted.space[parameter])
