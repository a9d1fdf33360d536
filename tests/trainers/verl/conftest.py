"""What the tests of this folder share. Those marked `verl` need the trainer's environment: `make test-verl`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core import embedded
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers.verl.settings import PYTHON_VARIABLE

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def trainer_python() -> str:
    """Python of the trainer's environment."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python or shutil.which(python) is None:
        pytest.skip(f"needs verl's environment: `make test-verl` builds it and sets {PYTHON_VARIABLE}")
    return python


def chat_model(size: str, folder: Path) -> Path:
    """A copy of a tiny model that verl takes: with a chat template, and a token for the end of a line."""
    target = folder / size
    shutil.copytree(embedded.family_members("instruct")[size], target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["\u010a"] = len(tokenizer["model"]["vocab"])
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": PLAIN}))
    return target


def cpu_study(folder: Path, python: str, **changes: Any) -> StudySpec:
    """A study on CPU with two tiny models."""
    return StudySpec.model_validate(
        {
            "study": "verl-on-cpu",
            "family": [
                {"name": "m", "path": str(chat_model("m", folder)), "parameters": 600_000},
                {"name": "l", "path": str(chat_model("l", folder)), "parameters": 1_800_000},
            ],
            "target": "l",
            "task": "instruct",
            "trainer": {
                "name": "verl",
                "fixed": {"prompts_per_step": 8, "n_samples": 4},
                "settings": {
                    "python": python, "device": "cpu", "workers": 1, "max_prompt_tokens": 16,
                    "startup_seconds": 900.0, "hang_seconds": 600.0,
                },
            },
            "space": {"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True}},
            "fidelity": {"horizon_prompts": 48, "rungs": 3},
            "evaluation": {"prompts": 32},
            "budget": {"trial_seconds": 3600, "max_parallel": 1, "top_k": 1},
            "seeds": {"training": [0]},
            **changes,
        }
    )  # fmt: skip
