from __future__ import annotations

import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import runner
from benchmarks.foreign import commands, figures, report, settings, tables
from benchmarks.foreign.surface import NOISE, RUN_SECONDS, Setting, Surface
from benchmarks.foreign.tables import Interpolator, Table, cross_validate
from benchmarks.landscapes import Problem
from benchmarks.store import Result
from jfhpo_core.errors import JfhpoError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.space import Space
from jfhpo_core.study.trial import Outcome

SPACE = Space.model_validate(
    {
        "rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "decay": {"type": "float", "low": 0.0, "high": 1.0},
    }
)
SETTING = Setting(
    "synthetic", "synthetic", "a test", ((1e6,), (1e7,)), 1e9, 2, {"rate": 1e-3, "decay": 0.5}, base_loss=9.0
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees and points than the benchmark has."""
    monkeypatch.setattr(tables, "TREES", 40)
    monkeypatch.setattr("benchmarks.foreign.surface.SAMPLE", 512)


@cache
def synthetic(runs: int = 120) -> Table:
    """The loss is lowest at a rate of 1e-3, falls with size and progress; rates above 3e-2 diverge."""
    random = np.random.default_rng(0)
    number = np.repeat(np.arange(runs), 2)
    points = random.random((runs, 2))[number]
    sizes = random.uniform(6, 7, (runs, 1))[number]
    shares = np.tile([0.5, 1.0], runs)
    losses = np.exp(2 * (points[:, 0] - 1 / 3) ** 2 + 1 - 0.2 * (sizes[:, 0] - 6) - 0.2 * shares)
    return Table(SPACE, number, sizes, np.full(2 * runs, 9.0), points, shares, losses, points[:, 0] > 0.83)


@cache
def surface() -> Surface:
    return Surface(SETTING, synthetic(), Interpolator.fit(synthetic()))


def problem(seed: int = 0) -> Problem:
    return replace(settings.foreign_problem(surface(), seed), trainings=3)


def test_cross_validation_tells_how_far_runs_that_were_left_out_are_missed() -> None:
    table = synthetic()
    found = cross_validate(table)
    count, explained, rank, error = found.errors(table.shares == 1)
    assert count == (table.healthy & (table.shares == 1)).sum()
    assert explained > 0.9
    assert rank > 0.9
    assert error < 0.05
    assert found.divergence_auc > 0.95
    above = (found.probabilities > found.threshold)[table.last].sum()
    assert above == pytest.approx(table.diverged[table.last].sum(), abs=2)


def test_curves_and_divergence_are_those_of_the_forests() -> None:
    made, table = Interpolator.fit(synthetic()), synthetic()
    sizes, points, shares = np.array([6.5]), table.points[::20], np.array([0.5, 1.0])
    for index, share in enumerate(shares):
        count = len(points)
        rows = tables.features(np.tile(sizes, (count, 1)), np.full(count, 9.0), points, np.full(count, share))
        assert made.curves(sizes, 9.0, points, shares)[:, index] == pytest.approx(np.exp(made.loss.predict(rows)))
    assert made.divergence is not None
    expected = made.divergence.predict_proba(rows)[:, 1] > tables.DIVERGENCE
    assert made.diverges(sizes, 9.0, points).tolist() == expected.tolist()
    assert 0 < expected.sum() < count


def test_a_surface_has_the_losses_of_the_table_and_no_score_above_its_best() -> None:
    made = surface()
    for rate, low, high in ((1e-3, 1.7, 2.3), (1e-4, 2.1, 2.8)):
        early, final = made.course("10m", {"rate": rate, "decay": 0.5}).losses
        assert low < final < early < high
    scores = [made.score("10m", SPACE.decode(point)) for point in np.random.default_rng(2).random((100, 2))]
    assert max(scores) < made.best_score < max(scores) + 0.1
    assert made.score("1m", SETTING.recipe) < made.score("10m", SETTING.recipe)
    assert made.score("10m", {"rate": 0.09, "decay": 0.5}) == -9.0


def test_a_search_pays_parameters_times_tokens_and_measures_losses_with_noise(tmp_path: Path) -> None:
    study = problem().study(tmp_path)
    result = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=study.trainer))
    healthy = [trial for trial in result.trials if trial.final is not None]
    assert {trial.model for trial in healthy} == {"10m"}
    for trial in healthy:
        assert trial.final is not None
        truth = surface().score(trial.model, trial.configuration)
        assert trial.charge_seconds == pytest.approx(RUN_SECONDS)
        assert 0 < abs(trial.final.score / truth - 1) < 5 * NOISE
    proxy = problem().study(tmp_path, "tpe", {"model": "1m"})
    cheap = run_search(proxy, MemoryLedger(), InlineDispatcher(1, trainer=proxy.trainer))
    small = [trial for trial in cheap.trials if trial.model == "1m" and trial.final is not None]
    assert small[0].charge_seconds == pytest.approx(RUN_SECONDS / 10)


def test_a_run_that_diverges_is_infeasible_and_costs_what_was_trained(tmp_path: Path) -> None:
    made = problem()
    data = {**made.data, "space": {"rate": {"type": "float", "low": 5e-2, "high": 1e-1, "log": True}}}
    study = replace(made, data=data, known_best=0.0).study(tmp_path)
    result = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=study.trainer))
    ends = {segment.outcome for trial in result.trials for segment in trial.segments}
    assert ends == {Outcome.INFEASIBLE}
    share = synthetic().divergence_share
    assert result.trials[0].charge_seconds == pytest.approx(share * RUN_SECONDS)


def test_a_recipe_is_told_to_those_who_use_it_and_they_pay_for_it(tmp_path: Path) -> None:
    told = problem()
    assert told.study(tmp_path, "random").spec.baselines == []
    study = told.study(tmp_path, "jfhpo")
    assert [item.configuration for item in study.spec.baselines] == [{"rate": 1e-3, "decay": 0.5}]
    trainer = InlineDispatcher(1, trainer=study.trainer)
    trials = run_search(told.study(tmp_path, "random"), MemoryLedger(), trainer).trials
    finished = next(trial for trial in trials if trial.final is not None)
    baseline = finished.model_copy(update={"purpose": "baseline"})
    assert runner.delivery(History.of(study, [baseline, finished]), finished.configuration).seconds == 2 * RUN_SECONDS


def test_of_each_pair_one_setting_is_for_tuning() -> None:
    for pair in settings.PAIRS.values():
        assert len({item.name for item in pair} & set(settings.TUNING)) == 1
    assert set(settings.SEEN) <= set(settings.TUNING)
    assert sorted((*settings.TUNING, *settings.UNTOUCHED)) == sorted(settings.SETTINGS)
    for item in settings.SETTINGS.values():
        ratios = [count / item.parameters[item.target] for count in item.parameters.values()]
        assert 1 / 26 < min(ratios) < 1 / 3
        assert ratios == sorted(ratios)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[runner.Run]:
    """Runs that are asked for; none is done."""
    asked: list[runner.Run] = []

    def run(runs: list[runner.Run], *_: Any) -> int:
        asked.extend(runs)
        return 0

    monkeypatch.setattr(runner, "run", run)
    return asked


def test_jfhpo_does_not_run_on_untouched_settings_by_accident(ran: list[runner.Run], tmp_path: Path) -> None:
    def invoke(*arguments: str) -> int:
        return CliRunner().invoke(commands.app, ["run", "--results", str(tmp_path), *arguments]).exit_code

    name = settings.UNTOUCHED[0]
    assert invoke("--strategy", "gp,jfhpo", "--settings", name) != 0
    assert ran == []
    assert invoke("--strategy", "gp", "--settings", name, "--seeds", "2") == 0
    assert [(item.landscape, item.seed) for item in ran] == [(f"{name}@20", 1), (f"{name}@20", 2)]
    ran.clear()
    assert invoke("--strategy", "jfhpo", "--settings", name, "--seeds", "2001:2002", "--final") == 0
    assert [item.landscape for item in ran] == [f"{name}@{budget}" for budget in settings.BUDGETS]


def test_strategies_that_need_rungs_are_not_run_without(ran: list[runner.Run], tmp_path: Path) -> None:
    CliRunner().invoke(commands.app, ["run", "--results", str(tmp_path), "--strategy", "dehb", "--seeds", "1"])
    assert "llm-278m@20" in {item.landscape for item in ran}
    assert "llm-138m@20" not in {item.landscape for item in ran}


def test_an_unknown_setting_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(JfhpoError, match=r"no setting 'nothing'; there are llm-278m"):
        settings.problem("nothing@10", 0)


def result(strategy: str, landscape: str, seed: int, *trace: tuple[float, float]) -> Result:
    return Result(
        strategy=strategy, base_strategy=strategy, settings={}, landscape=landscape, seed=seed, stamp="", commit="",
        best_score=-1.0, budget_seconds=20.0, training_seconds=1.0, spent_seconds=20.0, trace=((0.0, -2.0), *trace),
        recommended_score=-1.0, segments={}, infeasible=0, suggestions=1, cpu_seconds_per_suggestion=0.0,
    )  # fmt: skip


def test_regrets_are_of_the_run_with_the_smallest_budget_that_covers_the_cost() -> None:
    runs = [
        result("gp", "llm-278m@20", 1, (2.0, -1.6), (8.0, -1.2)),
        result("gp", "llm-278m@20", 2, (2.0, -1.8)),
        result("jfhpo", "llm-278m@3", 1, (3.0, -1.5)),
        result("jfhpo", "llm-278m@20", 1, (3.0, -1.9)),
    ]
    found = {
        name: {item.key: item for item in runs if item.strategy == name} for name in dict.fromkeys(["jfhpo", "gp"])
    }
    mean = figures.mean_regret(found, "gp", "llm-278m", 6, [1, 2])
    assert mean is not None
    assert (mean.value, mean.standard_error, mean.seeds) == pytest.approx((0.7, 0.1, 2))
    mine = [figures.mean_regret(found, "jfhpo", "llm-278m", cost, [1, 2]) for cost in (3, 6)]
    assert [item.value for item in mine if item] == pytest.approx([0.5, 0.9])
    assert figures.mean_regret(found, "gp", "llm-138m", 6, [1, 2]) is None
    lines = report.text_table(found, ["llm-278m", "llm-138m"], 3, "jfhpo", [1, 2]).splitlines()
    assert lines[1].split() == ["recipe", "jfhpo", "gp", "own", "/", "best", "peer"]
    assert lines[2].split()[-1] == "0.71"
    assert lines[3].split()[-2:] == ["0.500", "0.700"]


def test_the_page_shows_losses_to_peers_and_whether_random_search_is_beaten() -> None:
    found: dict[str, dict[tuple[str, int], Result]] = {
        name: {
            (setting, seed): result(name, setting, seed, (1.0, -1.0 - regret - 0.001 * (seed - 2000)))
            for setting, regret in regrets.items()
            for seed in range(2001, 2011)
        }
        for name, regrets in {
            "random": {"llm-278m@20": 0.4, "llm-757m@20": 0.2},
            "gp": {"llm-278m@20": 0.3, "llm-757m@20": 0.6},
            "jfhpo": {"llm-278m@20": 0.15, "llm-757m@3": 0.3},
        }.items()
    }
    evidence = report.Evidence(found, "jfhpo")
    text = "\n".join(report.findings(evidence))
    assert "| tuning | 3 | 0.16 | 0.41 | 0.31 |" in text  # the recipe's regret is 1, seeds add 0.001 to 0.010
    assert "| untouched | 3 | 0.31 | 0.21 | 0.61 |" in text
    assert "| untouched | 20 | - | 0.21 | 0.61 |" in text
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith(("| tuning", "| untouched"))}
    assert rows["llm-278m"].startswith("| tuning | llm-278m | 1.0000 | 0.1555 ± 0.0010 | 0.4055")
    compared = [line for line in text.splitlines() if " gp" in line and line.startswith("| tuning | llm-278m |")]
    assert len(compared) == 1
    assert compared[0].count("0.51 [") == 4
    assert "*" not in compared[0]
    (lost,) = [line for line in text.splitlines() if line.startswith("| untouched | llm-757m | 1.49 [")]
    assert " random * | - | - | - |" in lost
    assert "- tuning: at most 1.05 on 4 of 4 settings and budgets, on average 0.51" in text
    assert "- untouched: at most 1.05 on 0 of 1 settings" in text
    assert report.findings(report.Evidence({"gp": found["gp"]}, "jfhpo"))[4].startswith("`jfhpo` has no results")
    figure = report.draw(evidence)
    recipe, *curves = figure.axes[0].lines
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["recipe", "random", "gp", "jfhpo"]
    assert recipe.get_ydata()[0] == 1
    assert len(curves) == 3
    assert curves[-1].get_ydata()[-1] == pytest.approx(0.1555, abs=0.001)
    assert len(figure.axes[1].lines) == 3  # jfhpo has no run with the largest budget


def test_another_file_than_that_of_the_benchmark_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        (Path(command[-2]) / "scan_bench-0.2.3-py3-none-any.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(JfhpoError, match="serves another file"):
        tables.fetch(tmp_path / "cache")
    with pytest.raises(JfhpoError, match="python -m benchmarks foreign fetch"):
        tables.load("llm", tmp_path / "cache")
