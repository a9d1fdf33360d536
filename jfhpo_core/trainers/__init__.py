"""Trainers, by name. Further ones come by the entry-point group `jfhpo.trainers`."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from jfhpo_core.errors import SpecError
from jfhpo_core.trainers.base import Job, Observer, Trainer, TrainingResult

ENTRY_POINT_GROUP = "jfhpo.trainers"

__all__ = ["ENTRY_POINT_GROUP", "Job", "Observer", "Trainer", "TrainingResult", "load_trainer"]


def load_trainer(name: str) -> Trainer:
    """The trainer of this name.

    Raises:
        SpecError: There is none, or it does not import.
    """
    found = _registered()
    if name not in found:
        raise SpecError(f"trainer.name: no trainer {name!r}; there are {', '.join(sorted(found))}")
    try:
        trainer: Trainer = found[name].load()()
    except ImportError as error:
        raise SpecError(f"trainer.name: trainer {name!r} cannot be imported: {error}") from error
    return trainer


@cache  # reading the metadata of all installed packages takes a tenth of a second
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
