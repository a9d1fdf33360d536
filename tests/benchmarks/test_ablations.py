from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ablations, runner
from benchmarks.landscapes import load_problem
from benchmarks.runner import run_one
from tests.benchmarks.test_report import results, run


def test_a_variant_changes_the_study_and_nothing_else(tmp_path: Path) -> None:
    problem = load_problem("aligned", 0)
    usual = problem.study(tmp_path).spec
    alone = problem.study(tmp_path, changes=ablations.VARIANTS["no-proxies"].changes).spec
    assert [model.name for model in problem.study(tmp_path).ladder.models] == ["0.5b", "1.5b", "7b"]
    assert alone.fidelity.proxies == []
    assert alone.model_copy(update={"fidelity": usual.fidelity}) == usual
    unstopped = problem.study(tmp_path, changes=ablations.VARIANTS["no-stopping"].changes).spec
    assert unstopped.stopping.rules == "none"
    assert unstopped.model_copy(update={"stopping": usual.stopping}) == usual


def test_changes_make_another_result() -> None:
    changes = ablations.VARIANTS["no-stopping"].changes
    assert runner.stamp("random", {}, "aligned", 0, changes) != runner.stamp("random", {}, "aligned", 0)
    assert runner.stamp("random", {}, "aligned", 0, {}) == runner.stamp("random", {}, "aligned", 0)


@pytest.mark.slow
def test_without_proxies_everything_is_trained_on_the_target() -> None:
    result = run_one("random", {}, "aligned", 0, "no-proxies", ablations.VARIANTS["no-proxies"].changes)
    assert list(result.segments) == ["7b"]
    assert (result.strategy, result.changes) == ("no-proxies", {"fidelity": {"proxies": []}})


def test_the_page_compares_on_the_same_instances(tmp_path: Path) -> None:
    found = results(
        run("full", 1000, (2.0, 0.1)),
        run("full", 1001, (2.0, 0.2)),
        run("full", 1002, (2.0, 0.0)),
        run("no-proxies", 1000, (2.0, 0.2)),
        run("no-proxies", 1001, (2.0, 0.3)),
        run("no-proxies", 7, (2.0, 0.0)),
    )
    ablations.write(found, tmp_path)
    page = (tmp_path / "ablations.md").read_text()
    assert "## aligned, 2 seeds" in page
    assert "| full method | 0.850 [0.800, 0.900] |  | 7.0 |" in page
    assert (
        "| without proxies: every trial on the target | 0.750 [0.700, 0.800] | -0.100 [-0.100, -0.100] | 7.0 |" in page
    )
