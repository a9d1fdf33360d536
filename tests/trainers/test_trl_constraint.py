"""A constraint on a real, tiny training from the study file to the recommendation."""

from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo_core.report import verdict
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec

GENTLE, HASTY = 1e-5, 1e-2
"""Learning rates: the first hardly moves the model, the second moves it far."""


def search(tmp_path: Path, constraints: dict[str, str]) -> SearchResult:
    spec = StudySpec.model_validate(
        {
            "study": "limited",
            "family": "instruct",
            "target": "s",
            "task": "instruct",
            "trainer": {"name": "trl", "fixed": {"prompts_per_step": 8, "n_samples": 4}},
            "space": {"learning_rate": {"type": "choice", "values": [GENTLE, HASTY]}},
            "fidelity": {"horizon_prompts": 96, "rungs": 2},
            "evaluation": {"prompts": 64},
            "budget": {"trial_seconds": 300, "max_parallel": 1},
            "stopping": {"rules": "none"},
            "strategy": "random",
            "seeds": {"training": [0]},
            "constraints": constraints,
            "tracking": {"workspace": str(tmp_path)},
        }
    )
    return run_search(resolve(spec), MemoryLedger(), InlineDispatcher(1))


@pytest.mark.slow
def test_a_limit_on_kl_keeps_to_the_gentle_rate(tmp_path: Path) -> None:
    result = search(tmp_path / "limited", {"kl": "<= 0.01"})
    measured = {item.configuration["learning_rate"]: item for item in result.tried}
    assert set(measured) == {GENTLE, HASTY}
    assert measured[HASTY].measured["kl"] > 0.01 > measured[GENTLE].measured["kl"]
    assert [str(limit) for limit in measured[HASTY].broken] == ["kl <= 0.01"]
    assert result.recommended is not None
    assert result.recommended.configuration["learning_rate"] == GENTLE
    assert "It respects kl <= 0.01" in verdict(result)
    for item in result.tried:
        assert set(item.measured) == {"kl", "entropy", "completion_tokens", "truncated_share", "device_seconds"}
        assert 0 < item.measured["completion_tokens"] <= 8
        assert item.measured["device_seconds"] > 0
