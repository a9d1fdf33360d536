"""Re-tuning a study night by night: which study tonight's is, and which earlier ones it learns from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count, islice

from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.study.spec import AUTO, NAME, StudySpec, TrackingSpec


@dataclass(frozen=True)
class RecordedStudy:
    """A study in the ledger.

    Attributes:
        identity: See `StudySpec.identity`.
        complete: Whether it has come to its end.
    """

    name: str
    identity: str
    complete: bool


def tonight(
    base: StudySpec, recorded: Sequence[str], look: Callable[[str], RecordedStudy], day: date, learn_from: int = 3
) -> StudySpec:
    """The study to be run.

    The last night's study if it was not finished and means the same as `base` does today, so that nothing that has
    been paid for is lost. Otherwise a new one. Either learns from the newest finished ones. All nights share the
    experiment and the registered model of `base`, so that they stand in one table and compete for one alias.

    Args:
        base: What is tuned every night.
        recorded: Names of the studies in its experiment, oldest first.
        look: Looks a study up by its name.
        day: Names a new study: 'demo-2026-11-23', 'demo-2026-11-23-2', and so on.
        learn_from: How many earlier studies a new one learns from, at most.

    Raises:
        SpecError: The name becomes too long.
    """
    pattern = re.compile(rf"{re.escape(base.study)}-\d{{4}}-\d\d-\d\d(-\d+)?")
    nights = [name for name in recorded if pattern.fullmatch(name)]
    newest = [look(name) for name in nights[-1:]]
    finished = (
        study.name for name in reversed(recorded) if name in (base.study, *nights) and (study := look(name)).complete
    )
    learned = sorted(islice(finished, learn_from), key=recorded.index)
    for last in newest:
        same = _night(base, last.name, learned, len(nights) - 1)
        if not last.complete and same.identity() == last.identity:
            return same
    name = next(name for name in _names(base.study, day) if name not in recorded)
    if not NAME.fullmatch(name):
        raise SpecError(f"study: {name!r}, the name of tonight's study, is too long; shorten {base.study!r}")
    return _night(base, name, learned, len(nights))


def _names(study: str, day: date) -> Iterable[str]:
    yield f"{study}-{day.isoformat()}"
    yield from (f"{study}-{day.isoformat()}-{number}" for number in count(2))


def _night(base: StudySpec, name: str, learned: Sequence[str], number: int) -> StudySpec:
    """A study of its own name that is otherwise `base`; the seed of its search differs from night to night.

    With `warm_start: auto` it learns from the nights alone: they fit best.
    """
    named = [] if base.warm_start == AUTO else base.warm_start
    return base.model_copy(
        update={
            "study": name,
            "warm_start": list(dict.fromkeys([*named, *learned])),
            "seeds": base.seeds.model_copy(update={"search": base.seeds.search + number}),
            "tracking": tracking_beside(base),
        }
    )


def tracking_beside(base: StudySpec) -> TrackingSpec:
    """Where a study that belongs to `base` is written: its experiment, and its name in the model registry."""
    tracking = base.tracking
    return tracking.model_copy(
        update={
            "experiment": tracking.experiment or f"jfhpo/{base.study}",
            "registered_model": base.study if tracking.registered_model is None else tracking.registered_model,
        }
    )


def recorded_studies(base: StudySpec) -> list[str]:
    """Names of the studies in the experiment of `base`, oldest first.

    Raises:
        LedgerError: The tracking store does not answer.
    """
    from mlflow.exceptions import MlflowException

    from mlflow_plugin.runs import search_runs
    from mlflow_plugin.tags import STUDY
    from mlflow_plugin.tracking import connect

    client = connect(base)
    try:
        experiment = client.get_experiment_by_name(str(tracking_beside(base).experiment))
        runs = [] if experiment is None else search_runs(client, experiment.experiment_id, f"tags.`{STUDY}` != ''")
    except MlflowException as error:
        raise LedgerError(f"the earlier nights of study {base.study!r} cannot be read: {error.message}") from error
    return list(dict.fromkeys(run.data.tags[STUDY] for run in runs))


def look_up(base: StudySpec, name: str) -> RecordedStudy:
    """A study in the experiment of `base`.

    Raises:
        LedgerError: There is none of this name.
    """
    from mlflow_plugin.ledger import MlflowLedger

    ledger = MlflowLedger()
    spec = ledger.recall(base.model_copy(update={"tracking": tracking_beside(base)}), name)
    return RecordedStudy(name, spec.identity(), ledger.facts().get("complete") == "true")
