"""What the tests of this folder share. Those marked `openrlhf` need the trainer's environment: `make test-openrlhf`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core import embedded
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Configuration, Segment, Suggestion
from jfhpo_core.trainers import Job
from jfhpo_core.trainers.external.memory import Shape
from jfhpo_core.trainers.external.placement import Demand, Placement, place
from jfhpo_core.trainers.external.settings import ExternalSettings
from jfhpo_core.trainers.openrlhf.hyperparameters import OpenRlhfHyperparameters
from jfhpo_core.trainers.openrlhf.settings import PYTHON_VARIABLE

KEY = "0123456789abcdef"


@pytest.fixture(scope="session")
def trainer_python() -> str:
    """Python of the trainer's environment."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python or shutil.which(python) is None:
        pytest.skip(f"needs OpenRLHF's environment: `make test-openrlhf` builds it and sets {PYTHON_VARIABLE}")
    return python


def study(**changes: Any) -> StudySpec:
    """A study on CPU with two tiny models."""
    family = embedded.family_members("instruct")
    return StudySpec.model_validate(
        {
            "study": "on-cpu",
            "family": [
                {"name": "m", "path": str(family["m"]), "parameters": 600_000},
                {"name": "l", "path": str(family["l"]), "parameters": 1_800_000},
            ],
            "target": "l",
            "task": "instruct",
            "trainer": {
                "name": "openrlhf",
                "fixed": {"prompts_per_step": 8, "n_samples": 4},
                "settings": {"device": "cpu", "max_prompt_tokens": 16, "hang_seconds": 300.0},
            },
            "space": {"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True}},
            "fidelity": {"horizon_prompts": 48, "rungs": 3},
            "evaluation": {"prompts": 32},
            "budget": {"trial_seconds": 3600, "max_parallel": 1, "top_k": 1},
            "seeds": {"training": [0]},
            **changes,
        }
    )


def placed(settings: ExternalSettings, gpus: int = 1, parameters: int = 600_000, *, critic: bool = False) -> Placement:
    """Where a typical model goes."""
    return place(settings, Demand(Shape.typical(parameters), gpus, tokens=1536, reference=True, critic=critic))


def job(spec: StudySpec, folder: Path, *, start: int = 0, stop: int = 2, devices: int = 1, **hyper: Any) -> Job:
    """A job of a study on its smaller model, six steps in all."""
    full: Configuration = OpenRlhfHyperparameters.model_validate({**spec.trainer.fixed, **hyper}).model_dump()
    return Job(
        study=spec,
        trial_key=KEY,
        trial_number=0,
        model="m",
        model_path=spec.family.models[0].path,
        parameters=600_000,
        target_parameters=1_800_000,
        devices=devices,
        configuration=full,
        seed=7,
        total_steps=6,
        prompts_per_step=int(full["prompts_per_step"]),
        segment=Segment(
            index=int(start > 0), start_step=start, stop_step=stop, suggestion=Suggestion(source="test", explanation="")
        ),
        evaluation_steps=(0, stop) if start == 0 else (stop,),
        store=str(folder / "checkpoints"),
    )
