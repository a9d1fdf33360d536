from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import warm_start
from benchmarks.analysis import Results
from benchmarks.foreign import settings
from benchmarks.landscapes import LANDSCAPES, Problem, load_problem
from benchmarks.store import Result
from jfhpo_core.study.trial import Trial


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """First studies of a cheap kind on a cheap landscape."""

    def problem(landscape: str, seed: int) -> Problem:
        name, _, budget = landscape.partition("@")
        return replace(LANDSCAPES[name](seed), trainings=int(budget))

    monkeypatch.setattr(settings, "problem", problem)
    monkeypatch.setattr(warm_start, "STRATEGY", "random")
    monkeypatch.setattr(warm_start, "FIRST_BUDGET", 3)
    warm_start.first_study.cache_clear()


def scores(trials: tuple[Trial, ...]) -> list[float]:
    return [evaluation.score for trial in trials for evaluation in trial.evaluations]


@pytest.mark.usefixtures("small")
def test_second_studies_know_the_first_one_or_its_mirror_image(tmp_path: Path) -> None:
    cold, warm, misled = (
        load_problem(warm_start.name("aligned", 2, start, "shifted"), 3).study(tmp_path, "random")
        for start in warm_start.STARTS
    )
    assert cold.earlier == ()
    (first,), (mirrored,) = warm.earlier, misled.earlier
    assert first.spec.study == "shifted-3"
    assert warm.spec.study == "aligned-3"
    right, wrong = scores(first.trials), scores(mirrored.trials)
    assert len(right) > 10
    assert sorted(range(len(right)), key=right.__getitem__) == sorted(range(len(wrong)), key=lambda i: -wrong[i])
    assert (min(wrong), max(wrong)) == pytest.approx((min(right), max(right)))


def made(landscape: str, seed: int, regret: float, strategy: str = warm_start.STRATEGY) -> Result:
    return Result(
        strategy=strategy, base_strategy=strategy, settings={}, landscape=landscape, seed=seed, stamp="", commit="",
        best_score=1.0, budget_seconds=20.0, training_seconds=1.0, spent_seconds=20.0, segments={}, infeasible=0,
        trace=((0.0, 0.0), (9.0, 1 - regret), (11.0, 1.0)), recommended_score=1 - regret, suggestions=1,
        cpu_seconds_per_suggestion=0.0,
    )  # fmt: skip


def test_the_page_divides_by_the_cold_start_and_names_the_best_peer_after_ten_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = warm_start.PAIRS[0]
    regrets = {"cold": 0.2, "warm": 0.05, "misled": 0.22}
    mine = [
        made(warm_start.name(second, 2, start, first), seed, regret + shift)
        for start, regret in regrets.items()
        for seed, shift in ((2001, 0.0), (2002, 0.01), (1, 0.5))
        if (start, seed) != ("misled", 1)
    ]
    peers: Results = {
        name: {item.key: item for item in [made(f"{second}@20", 2001, regret, name)]}
        for name, regret in (("gp", 0.1), ("tpe", 0.3))
    }
    monkeypatch.setattr("benchmarks.store.load_all", lambda _: peers)
    warm_start.write({warm_start.STRATEGY: {item.key: item for item in mine}}, tmp_path)
    page = (tmp_path / warm_start.PAGE).read_text()
    assert f"| {second} | {first} | 2 | 0.2050 ± 0.0050 | 0.0550 ± 0.0050 | 0.2250 ± 0.0050 | 0.27 | 1.10 | 2 |" in page
    assert f"| {second} | {first} | 0.0550 ± 0.0050 | 0.1000 | gp (1 seeds) | 2 |" in page
