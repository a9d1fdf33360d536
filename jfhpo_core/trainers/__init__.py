"""Trainers, by name. Further ones come by the entry-point group `jfhpo.trainers`."""

from __future__ import annotations

from jfhpo_core.plugins import TRAINERS, load_plugin
from jfhpo_core.trainers.base import Job, Observer, Trainer, TrainingResult

ENTRY_POINT_GROUP = TRAINERS

__all__ = ["ENTRY_POINT_GROUP", "Job", "Observer", "Trainer", "TrainingResult", "load_trainer"]


def load_trainer(name: str) -> Trainer:
    """The trainer of this name.

    Raises:
        SpecError: There is none, or it does not import.
    """
    trainer: Trainer = load_plugin(ENTRY_POINT_GROUP, name, "trainer.name")()
    return trainer
