from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from benchmarks import prior, report
from benchmarks.store import Result
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.known_optima import FILE, known_optima


def result(label: str, setting: str, budget: int, seed: int, regret: float) -> Result:
    return Result(
        strategy=label,
        base_strategy="jfhpo",
        settings={},
        landscape=f"{setting}@{budget}",
        seed=seed,
        stamp="",
        commit="",
        best_score=1.0,
        budget_seconds=budget * 100.0,
        training_seconds=100.0,
        spent_seconds=budget * 100.0,
        trace=((0.0, 0.5), (150.0, 1.0 - regret)),
        recommended_score=1.0 - regret,
        segments={"m": 1},
        infeasible=0,
        suggestions=1,
        cpu_seconds_per_suggestion=0.1,
    )


def test_the_misleading_file_has_the_worst_runs(tmp_path: Path) -> None:
    prior.write_misleading(tmp_path / "worst.json")
    assert (tmp_path / "worst.json").read_bytes() == prior.MISLEADING.read_bytes(), "write it anew: write_misleading()"
    shipped, misleading = (
        [item.values["learning_rate"] for item in known_optima(file) if item.task] for file in (FILE, prior.MISLEADING)
    )
    assert 3 * median(shipped) < median(misleading)


def test_the_page_divides_by_a_search_that_knows_nothing(tmp_path: Path) -> None:
    regrets = {"nothing": 0.4, "shipped": 0.1, "misleading": 0.5}
    seeds = (report.FIRST_SEED, report.FIRST_SEED + 1)
    results = {
        label: {
            (f"table-instruct@{budget}", seed): result(label, "table-instruct", budget, seed, regret)
            for budget in prior.BUDGETS
            for seed in seeds
        }
        for label, regret in regrets.items()
    }
    prior.write(results, tmp_path)
    page = (tmp_path / prior.PAGE).read_text(encoding="utf-8")
    assert (
        "| table-instruct | 0.5000 | 3 | 0.4000 ± 0.0000 | 0.1000 ± 0.0000 | 0.5000 ± 0.0000 | 0.25 | 1.25 | 2 |"
        in page
    )
    assert "| table-arithmetic |" not in page


def test_a_file_that_holds_nothing_known_is_refused(tmp_path: Path) -> None:
    for content in ("{", '{"recorded": [{"source": "mine"}]}'):
        (tmp_path / "known.json").write_text(content, encoding="utf-8")
        with pytest.raises(SpecError, match=r"prior: .*known.json is no file of known optima"):
            known_optima(tmp_path / "known.json")
    with pytest.raises(SpecError, match=r"missing\.json"):
        known_optima(tmp_path / "missing.json")
