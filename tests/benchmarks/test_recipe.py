from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import recipe
from benchmarks.recipe import Outcomes


def test_the_page_counts_what_held(tmp_path: Path) -> None:
    found = [
        Outcomes(
            source=source,
            name=f"problem-{source}",
            seed=1,
            beyond=5.0,
            held={"learning_rate": True, "scheduler": source == "simulated"},
            told={"learning_rate": True, "scheduler": False},
            numeric={"learning_rate": True, "scheduler": False},
            recipe=0.1,
            carried=0.2,
        )
        for source in ("simulated", "foreign")
    ]
    recipe.write(found, tmp_path)
    text = (tmp_path / recipe.PAGE).read_text(encoding="utf-8")
    assert "held the best value in 75%** of 4 hyperparameters" in text
    assert "| all | 2 | 75% of 4 | 100% of 2 | 100% of 2 | 50% | 100% of 2 | 0.10 | 0.20 | 2 of 2 |" in text


@pytest.mark.slow
def test_a_case_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RUNS", 8)
    file = tmp_path / "cases.jsonl"
    (outcome,) = recipe.run(1, file)
    assert set(outcome.held) == set(outcome.told)
    assert outcome.held
    assert outcome.carried >= -1e-6
    assert recipe.load(file) == [outcome]
