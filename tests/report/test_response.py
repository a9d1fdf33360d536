from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.strategy import RandomSearch, fresh_configurations
from jfhpo_core.report.page import write_plots, write_report
from jfhpo_core.report.response import belief_of, pair_figure, parallel_figure, response, response_figure
from jfhpo_core.report.why import why
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.study.space import Vector
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.studies import simulated_study, trained


def result_of(tmp_path: Path, count: int) -> SearchResult:
    """Full runs of Sobol configurations over the sizes in turn."""
    study = simulated_study(tmp_path)
    surface, trials = study_surface(study.spec), []
    for number, configuration in enumerate(fresh_configurations(study, [], 0, count)):
        model = study.ladder.models[number % len(study.ladder.models)]
        ratio = model.parameters / study.ladder.target.parameters
        scores = [true_score(surface, study.complete(configuration), ratio, share) for share in (0, 0.4, 0.8, 1)]
        trials.append(trained(study, configuration, model.name, scores, number))
    return conclude(study, trials, RandomSearch(), complete=False)


@pytest.mark.slow
def test_the_expected_score_follows_the_landscape_at_every_size(tmp_path: Path) -> None:
    result = result_of(tmp_path, 36)
    beliefs = belief_of(result)
    assert beliefs is not None
    best = max((t for t in result.trials if t.model == "large"), key=lambda t: t.evaluations[-1].score).configuration
    surface = study_surface(result.study.spec)
    for model in result.study.ladder.models:
        found = response(beliefs, best, "learning_rate", model.name)
        assert (found.low <= found.mean).all()
        assert (found.mean <= found.high).all()
        ratio = model.parameters / result.study.ladder.target.parameters
        truth = [
            true_score(surface, result.study.complete({**best, "learning_rate": value}), ratio, 1.0)
            for value in found.values
        ]
        assert np.corrcoef(found.mean, truth)[0, 1] > 0.8
    scheduler = response(beliefs, best, "scheduler", "large")
    assert scheduler.values == ("constant", "cosine")


@pytest.mark.slow
def test_a_trial_has_marks_of_one_number_in_all_figures(tmp_path: Path) -> None:
    result = result_of(tmp_path, 36)
    page = why(result)
    text = write_report(result, {}, tmp_path, explained=page).read_text(encoding="utf-8")
    best = max((t for t in result.trials if t.model == "large"), key=lambda t: t.evaluations[-1].score)
    marks = re.findall(rf"<title>#{best.number}\b", text)
    assert len(marks) >= 5  # three responses, the pair, parallel coordinates
    order = [text.index(f'<h2 id="{name}"') for name in ("answer", "sure", "matters", "stopped", "next", "trials")]
    assert order == sorted(order)
    trials = text[text.index('id="trials"') :]
    assert trials.index("<details>") < trials.index("<table")
    assert [path.name for path in write_plots(result, tmp_path / "plots", page)].count("importance.png") == 1


@pytest.mark.slow
def test_no_curve_or_point_of_a_response_is_cut_off(tmp_path: Path) -> None:
    result = result_of(tmp_path, 36)
    explained, beliefs = why(result), belief_of(result)
    assert beliefs is not None
    best = {item.name: item.best for item in explained.importance if item.best is not None}
    for axes in response_figure(result, beliefs, explained, best).axes:
        low, high = axes.get_ylim()
        heights = np.concatenate(
            [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines if line.get_transform() == axes.transData]
        )
        assert low < heights.min()
        assert heights.max() < high


@pytest.mark.slow
def test_contours_do_not_go_below_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(tmp_path, 36)
    beliefs = belief_of(result)
    assert beliefs is not None
    best = result.trials[-1].configuration

    def extrapolated(_beliefs: Beliefs, _model: str, points: Vector) -> tuple[Vector, Vector, Vector]:
        scores = np.linspace(-1.0, 1.0, len(points))
        return scores, scores, scores

    monkeypatch.setattr("jfhpo_core.report.response._scores", extrapolated)
    _, bar = pair_figure(result, beliefs, ("learning_rate", "kl_coefficient"), best).axes
    lowest = min(evaluation.score for trial in result.trials for evaluation in trial.evaluations)
    assert bar.get_ylim() == pytest.approx((lowest, 1.0))


def test_few_lines_are_no_picture(tmp_path: Path) -> None:
    result = result_of(tmp_path, 3)
    assert parallel_figure(result, "large", list(result.study.space)) is None
