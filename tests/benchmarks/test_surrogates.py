from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import surrogates
from benchmarks.landscapes import load_problem
from benchmarks.surrogates import LEVELS, QUESTIONS, SURROGATES, Fit, fit_one, judge, load, load_task, run, train, write
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Outcome, configuration_key


def study(landscape: str, workspace: Path) -> Study:
    return load_problem(landscape, 0).study(workspace)


def made_up(surrogate: str, seed: int, regret: float = 0.1) -> Fit:
    coverage = tuple(LEVELS)
    return Fit(
        surrogate=surrogate, design="24/4/3", landscape="aligned", seed=seed, commit="hand", observations=50,
        first_regret=regret, shortlist_regret=0.05, rmse=0.1, nll=-1.0, spearman=0.9, coverage=coverage,
        best_coverage=coverage, cpu_seconds=0.5,
    )  # fmt: skip


def test_a_design_takes_the_best_to_larger_models(tmp_path: Path) -> None:
    known = study("aligned", tmp_path)
    trials = train(known, (6, 3, 2))
    assert [trial.model for trial in trials] == ["0.5b"] * 6 + ["1.5b"] * 3 + ["7b"] * 2
    horizon = known.spec.fidelity.horizon_prompts
    asked = [trial.segments[0].segment.stop_step * trial.prompts_per_step for trial in trials]
    assert asked == [horizon, horizon // 2] * 3 + [horizon, horizon // 2, horizon] + [horizon] * 2
    for smaller, larger in ((trials[:6], trials[6:9]), (trials[6:9], trials[9:])):
        healthy = [trial for trial in smaller if trial.segments[0].outcome is Outcome.REACHED]
        ranked = sorted(healthy, key=lambda trial: -trial.evaluations[-1].score)
        chosen = [configuration_key(trial.configuration) for trial in larger]
        assert chosen == [configuration_key(trial.configuration) for trial in ranked[: len(larger)]]


def test_questions_are_feasible_and_new() -> None:
    known, data, base, inputs, truth = load_task("unstable", 0, "12/2/1")
    dimension = known.space.dimension
    assert inputs.shape == (QUESTIONS, dimension + 4)
    assert truth.shape == (QUESTIONS,)
    assert truth.min() > base / 2, "a collapsed training would score next to nothing"
    asked = {tuple(row) for row in inputs[:, :dimension].tolist()}
    assert not asked & {tuple(row) for row in data.inputs[:, :dimension].tolist()}


def test_judgement_of_predictions_that_are_right() -> None:
    random = np.random.default_rng(0)
    means, deviations = random.normal(size=20_000), random.uniform(0.5, 2.0, 20_000)
    figures = judge(means, deviations, means + deviations * random.normal(size=20_000))
    assert figures["coverage"] == pytest.approx(LEVELS, abs=0.015)
    assert figures["best_coverage"] == pytest.approx(LEVELS, abs=0.05)
    assert figures["rmse"] == pytest.approx(np.sqrt((deviations**2).mean()), rel=0.02)
    assert figures["nll"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e) + np.log(deviations).mean(), abs=0.02)


def test_judgement_of_choices() -> None:
    truth = np.linspace(0, 1, 100)
    order = np.roll(np.arange(100), 1)
    figures = judge(-order / 100, np.full(100, 0.1), truth)
    assert figures["first_regret"] == pytest.approx(1 - truth[np.argmin(order)], abs=1e-4)
    assert figures["shortlist_regret"] == pytest.approx(1 - truth[order < surrogates.SHORTLIST].max(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SURROGATES))
def test_every_surrogate_ranks_better_than_chance(name: str) -> None:
    assert fit_one(name, "24/4/3", "aligned", 0).spearman > 0.3


def test_what_is_fitted_is_not_fitted_again(tmp_path: Path) -> None:
    path = tmp_path / "fits" / "fits.jsonl"
    run(path, ["plain ARD"], ["12/2/1"], ["aligned"], [0])
    written = path.read_text()
    run(path, ["plain ARD"], ["12/2/1"], ["aligned"], [0])
    assert path.read_text() == written
    assert list(load(path)) == [("plain ARD", "12/2/1", "aligned", 0)]


def test_page_shows_published_seeds_that_all_share(tmp_path: Path) -> None:
    fits = [
        made_up("ours", 0, regret=0.9),
        made_up("ours", 1000, 0.10),
        made_up("ours", 1001, 0.20),
        made_up("ours", 1002, 0.70),
        made_up("plain ARD", 1000, 0.30),
        made_up("plain ARD", 1001, 0.50),
    ]
    write({fit.key: fit for fit in fits}, tmp_path)
    text = (tmp_path / surrogates.PAGE).read_text(encoding="utf-8")
    assert "seeds 1000 to 1001 of aligned" in text
    assert "| ours | 0.150 ± 0.050 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| plain ARD | 0.400"))
    assert row.endswith("| 0.250 ± 0.050 |")
    assert (tmp_path / surrogates.RELIABILITY).read_text(encoding="utf-8").startswith("<?xml")
