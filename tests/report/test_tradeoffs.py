"""Constraints and the front in report, terminal, JSON and `jfhpo why`, on full runs whose truth is known."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from jfhpo.answers import show_answer
from jfhpo.display.result import result_view, tried_table
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.report import write_report
from jfhpo_core.report.page import write_plots
from jfhpo_core.report.why import why
from jfhpo_core.report.why_sentences import sections
from jfhpo_core.run.outcome import SearchResult, conclude
from tests.optimizer.test_constraints import full_runs, limited
from tests.optimizer.test_predicted_front import runs as simulated_runs

RUNS = ((0.7, 0.3), (0.6, 0.09), (0.5, 0.07), (0.4, 0.02), (0.35, 0.05))


@pytest.fixture
def result(tmp_path: Path) -> SearchResult:
    study = limited(tmp_path, strategy="random", second_objective="kl")
    return conclude(study, full_runs(study, *RUNS), load_strategy(study), complete=True)


def test_why_says_what_a_constraint_costs_and_where_the_front_ends(result: SearchResult) -> None:
    page = why(result)
    (constraint,) = page.constraints
    assert (constraint.broken_by, constraint.configurations) == (2, 5)
    cost, front = page.topics["tradeoffs"]
    assert cost == (
        "2 of 5 configurations with a full run on large break kl <= 0.08. Without this constraint trial 0 would lead: "
        "0.700 (kl 0.3), against 0.500 of the best that respects it."
    )
    assert front == (
        "The Pareto front of score and kl (minimize) has 2 configurations: from a score of 0.500 with kl 0.07 to 0.400 "
        "with 0.02."
    )
    assert page.sentences[:2] == page.topics["tradeoffs"]


@pytest.mark.slow
def test_what_is_expected_above_the_front_is_named_drawn_and_listed(tmp_path: Path) -> None:
    study = limited(tmp_path, strategy="random", second_objective="kl", constraints={})
    trials = simulated_runs(study, 32)
    # The best runs with a KL between 0.05 and 0.2 are taken away: there the model has to say what could be had.
    left = [t for t in trials if t.final is not None and not 0.05 < t.final.training["kl"] < 0.2]
    result = conclude(study, left, load_strategy(study), complete=True)
    page = why(result)
    assert page.promise is not None
    assert page.promise.predicted in page.predicted_front
    assert page.promise.predicted.trial is None
    sentence = page.topics["tradeoffs"][-1]
    assert f"expected above the front: a score of {page.promise.predicted.score:.3f}" in sentence
    assert f"scores {page.promise.measured:.3f}: learning_rate" in sentence
    report = write_report(result, {}, tmp_path, explained=page).read_text(encoding="utf-8")
    section = report.split('aria-labelledby="tradeoffs"')[1].split("</section>")[0]
    assert section.count(", expected: score ") == len(page.predicted_front)
    table = section.split("The front that the model expects")[-1]
    assert table.count("<tr><td") == len(page.predicted_front)
    # Nothing is promised of a configuration that is expected to be no better than what was measured.
    level = page.promise.model_copy(update={"measured": page.promise.predicted.score})
    said = sections(study, page.model_copy(update={"promise": level}))["tradeoffs"]
    assert said[-1].startswith("No configuration without a full run is expected to lie above the measured front")


@pytest.mark.slow
def test_the_report_has_the_front_and_marks_what_breaks_a_limit(result: SearchResult, tmp_path: Path) -> None:
    text = write_report(result, {}, tmp_path).read_text(encoding="utf-8")
    section = text.split('aria-labelledby="tradeoffs"')[1].split("</section>")[0]
    assert "What is it traded against?" in section
    rows = re.findall(r'<tr><th scope="row" class="n">(\d)</th>(.*?)</tr>', section)
    assert [number for number, _ in rows] == ["0", "1", "2", "3", "4"]
    assert [">breaks<" in row for _, row in rows] == [True, True, False, False, False]
    assert ["<td>yes</td>" in row for _, row in rows] == [False, False, True, True, False]
    assert len(re.findall(r"score 0\.\d+, breaks kl &lt;= 0\.08|score 0\.\d+", section)) >= len(RUNS)
    assert tmp_path / "plots" / "front.png" in write_plots(result, tmp_path / "plots")


def test_the_terminal_lists_what_there_is_to_choose_from(result: SearchResult) -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(result_view(result))
    text = console.export_text()
    assert "Configurations with full runs on large; kl <= 0.08" in text
    assert "0.3 (breaks)" in text
    assert text.count("on the front") == 2
    assert "It respects kl <= 0.08 (0.07)" in text


def test_the_answer_has_constraints_and_front(result: SearchResult) -> None:
    answer = show_answer(result, None)
    assert answer.constraints == ["kl <= 0.08"]
    assert [line.trial for line in answer.tried if line.on_front] == [2, 3]
    assert [line.breaks for line in answer.tried][:3] == [["kl <= 0.08"], ["kl <= 0.08"], []]
    assert answer.comparison[0].measured["kl"] == pytest.approx(0.07)
    assert answer.comparison[0].breaks == []


def test_without_constraints_and_second_objective_none_of_it_is_shown(tmp_path: Path) -> None:
    study = limited(tmp_path, strategy="random", constraints={})
    plain = conclude(study, full_runs(study, *RUNS), load_strategy(study), complete=True)
    assert plain.recommended is not None
    assert plain.recommended.mean == 0.7
    assert tried_table(plain) is None
    assert show_answer(plain, None).tried == []
    assert why(plain).topics["tradeoffs"] == ()
    assert "traded against" not in write_report(plain, {}, tmp_path).read_text(encoding="utf-8")
