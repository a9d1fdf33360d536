from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.study.resolved import resolve
from jfhpo_core.trainers.base import Finding, Level
from jfhpo_core.trainers.external.memory import GIB
from jfhpo_core.trainers.openrlhf.preflight import cached_sequences
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from tests.trainers.openrlhf.conftest import placed, study


def findings(python: str, **settings: Any) -> list[Finding]:
    base = study().trainer.settings
    trainer = {"name": "openrlhf", "settings": {**base, "python": python, **settings}}
    resolved = resolve(study(trainer=trainer))
    return list(resolved.trainer.preflight(resolved))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_environment_without_openrlhf_fails() -> None:
    found = [finding for finding in findings(sys.executable) if finding.subject == "trainer"]
    assert found[0].level is Level.FAILURE
    assert "openrlhf" in found[0].message


def test_the_cache_is_estimated_from_the_models_configuration() -> None:
    resolved = resolve(
        study(trainer={**study().trainer.model_dump(), "settings": {"device": "cpu", "python": "python3"}})
    )
    model, settings = resolved.ladder.target, OpenRlhfSettings()
    placement = placed(settings, parameters=model.parameters)
    # Four layers, six heads of 32: 2 x 4 x 6 x 32 x 2 bytes per token.
    memory = 80 * GIB * placement.vllm_memory_share - 2 * model.parameters
    assert cached_sequences(model, settings, placement, 100) == pytest.approx(memory / (3072 * 100))
    nowhere = type(model)(model.name, str(Path("no-such-folder")), model.parameters)
    assert cached_sequences(nowhere, settings, placement, 100) is None


@pytest.mark.openrlhf
def test_the_right_environment_is_in_order(trainer_python: str) -> None:
    found = findings(trainer_python)
    assert all(finding.level is Level.OK for finding in found), found
    assert any("openrlhf 0.11.2" in finding.message for finding in found)
