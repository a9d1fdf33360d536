"""No final table, report or registry entry has a score of a run that did not reach full length, unless it is marked."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jfhpo.display.result import comparison_table
from jfhpo.orchestration.artifacts import result_rows
from jfhpo.study_facts import facts
from jfhpo_core.optimizer.strategy import RandomSearch
from jfhpo_core.report.findings import NOT_FINISHED
from jfhpo_core.report.page import write_report
from jfhpo_core.report.text import number
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.trial import Decision, Outcome, Trial, TrialState
from mlflow_plugin.presentation import outcome_metrics, study_note
from tests.studies import evaluation, result, simulated_study

AGGRESSIVE: dict[str, Any] = {
    "kl_growth": {"threshold": 0.0, "patience": 1, "window": 1, "floor": 0.0, "warmup": 0, "deviations": 0.0},
    "reward_drop": {"threshold": 0.0, "patience": 1, "window": 1, "warmup": 0, "deviations": 0.0},
    "paper_reward_drop": {"threshold": 0.0, "patience": 1},
    "zero_reward": {"patience": 1, "probability": 1.0},
    "absolute_kl": {"threshold": 0.0, "window": 1, "deviations": 0.0},
    "zero_variance": {"threshold": 0.0, "patience": 1, "window": 1, "reward": 1.0, "deviations": 0.0},
    "gradient_norm": {"threshold": 0.0, "patience": 1, "warmup": 1},
    "truncation": {"threshold": 0.0, "window": 1, "warmup": 0, "deviations": 0.0},
    "below_base": {"threshold": 0.0},
    "no_progress": {"threshold": 1.0, "window": 1, "warmup": 0.0, "deviations": 0.0},
}
"""Rules that fire at the first occasion."""


def measured(outcome: SearchResult) -> dict[str, float]:
    """Label to mean score of the runs at full length, the first of each seed (random search: the best of all).

    Rows without any are left out.
    """
    target, seeds = outcome.study.ladder.target.name, outcome.study.spec.seeds.training
    history = History.of(outcome.study, outcome.trials)
    found = {}
    for row in outcome.rows:
        random = row.label == "random search"
        ended = [
            (trial.seed, trial.evaluations[-1].score)
            for trial in outcome.trials
            if trial.model == target
            and history.canonical(trial.configuration) == history.canonical(row.configuration)
            and (trial.purpose == "random-search") is random
            and (random or trial.seed in seeds)
            and trial.evaluations
            and trial.evaluations[-1].step == trial.total_steps
        ]
        if ended:
            first = dict(reversed(ended))
            found[row.label] = max(score for _, score in ended) if random else fmean(first.values())
    return found


def assert_only_full_length_scores(outcome: SearchResult) -> None:
    true = measured(outcome)
    labels = [row.label for row in outcome.rows]
    shown = {label: number(true[label]) if label in true else NOT_FINISHED for label in labels}
    assert {row.label: row.score for row in outcome.rows if row.seeds} == pytest.approx(true)
    columns = [list(column.cells) for column in comparison_table(outcome).columns]
    assert dict(zip(columns[0], columns[1], strict=True)) == shown
    assert {row["configuration"]: row["score"] for row in result_rows(outcome)} == {
        label: pytest.approx(true[label], abs=1e-4) if label in true else NOT_FINISHED for label in labels
    }
    known = facts(outcome)
    named = {label: f"score.{label.replace(' ', '_')}" for label in labels}
    assert {label: known[name] for label, name in named.items() if name in known} == pytest.approx(true)
    for metric in outcome_metrics(outcome, 0):
        if metric.key == "study/recommended_score":
            assert metric.value == pytest.approx(true["recommended"])
    note = study_note(outcome.study.spec, outcome.trials, outcome)
    assert dict(re.findall(r"^\| ([\w ]+) \| ([\d.]+|not finished) \|", note, re.MULTILINE)) == shown
    if outcome.target_trial is not None:
        assert outcome.target_trial.evaluations[-1].step == outcome.target_trial.total_steps


def assert_report_has_only_full_length_scores(outcome: SearchResult, folder: Path) -> None:
    true = measured(outcome)
    page = write_report(outcome, {}, folder, {}).read_text(encoding="utf-8")
    table = page.partition("Final comparison on")[2].partition("</table>")[0]
    cells = re.findall(r'<th scope="row"[^>]*>([^<]*)</th><td class="n">([^<]*)</td>', table)
    labels = [row.label for row in outcome.rows]
    assert dict(cells) == {label: number(true[label]) if label in true else NOT_FINISHED for label in labels}
    for row in outcome.rows:
        assert page.count(f"without a score: {row.label}") == len(row.unfinished)


@pytest.mark.slow
@pytest.mark.parametrize("instance", [0, *(pytest.param(other, marks=pytest.mark.slow) for other in (1, 2))])
def test_rules_that_fire_at_once_falsify_nothing(tmp_path: Path, instance: int) -> None:
    study = simulated_study(
        tmp_path,
        trainer={
            "name": "simulated",
            "settings": {"instance": instance, "roughness": 0.5, "boundary": 0.1 + 0.3 * instance},
        },
        stopping={"rules": "paper", "override": dict(AGGRESSIVE)},
        seeds={"search": instance, "training": [0, 1]},
        budget={"trial_seconds": 150, "max_parallel": 1},
        random_search=True,
    )
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(1))
    stopped = [trial for trial in outcome.trials if trial.state is TrialState.STOPPED]
    assert stopped, "the rules are not aggressive"
    for trial in stopped:
        assert trial.decision is not None
        assert trial.purpose == "search" or (
            trial.decision.rule == "zero_reward" and 2 * trial.step >= trial.total_steps
        )
    assert_only_full_length_scores(outcome)
    assert_report_has_only_full_length_scores(outcome, tmp_path)


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["search", "confirmation", "baseline", "random-search"]),
            st.sampled_from([1e-4, 1e-3]),
            st.integers(0, 2),
            st.integers(1, 30),
            st.sampled_from([Outcome.STOPPED, Outcome.INFEASIBLE, Outcome.REACHED]),
            st.floats(0.01, 0.99),
        ),
        max_size=8,
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_runs_that_ended_anywhere_are_marked(tmp_path: Path, runs: list[tuple[Any, ...]]) -> None:
    """As in ledgers of jfhpo 0.1 and before, where any rule could end any run."""
    study = simulated_study(tmp_path, seeds={"search": 0, "training": [0, 1]})
    trials: dict[str, Trial] = {}
    for purpose, rate, seed, end, ending, score in runs:
        trial = study.new_trial(len(trials), {"learning_rate": rate}, "large", seed, purpose, "recipe")
        outcome = Outcome.REACHED if end == 30 else ending
        change: dict[str, Any] = {"outcome": outcome, "evaluations": (evaluation(end, round(score, 4)),)}
        if outcome is Outcome.STOPPED:
            change["decision"] = Decision(stop=True, rule="kl_growth", signal="s", value=1, threshold=0, step=end)
        trials.setdefault(trial.key, trial.model_copy(update={"segments": (result(0, 0, end, **change),)}))
    found = conclude(study, list(trials.values()), RandomSearch(), complete=True)
    assert_only_full_length_scores(found)
    assert all(math.isnan(row.score) == (row.seeds == 0) for row in found.rows)


def test_a_report_names_what_did_not_finish(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, seeds={"search": 0, "training": [0, 1]})
    decision = Decision(stop=True, rule="kl_growth", signal="KL", value=1, threshold=0, step=9)
    ended = result(0, 0, 9, outcome=Outcome.STOPPED, decision=decision, evaluations=(evaluation(9, 0.1234),))
    trials = [
        study.new_trial(0, {"learning_rate": 1e-4}, "large", 0, "baseline", "recipe"),
        study.new_trial(1, {"learning_rate": 1e-3}, "large", 0),
        study.new_trial(2, {"learning_rate": 1e-3}, "large", 1, "confirmation", "recommended"),
    ]
    segments = [ended, result(0, 0, 30, evaluations=(evaluation(30, 0.6),)), ended]
    trials = [trial.model_copy(update={"segments": (part,)}) for trial, part in zip(trials, segments, strict=True)]
    found = conclude(study, trials, RandomSearch(), complete=True)
    assert [(row.label, row.seeds, len(row.unfinished)) for row in found.rows] == [
        ("recommended", 1, 1),
        ("recipe", 0, 1),
    ]
    assert_only_full_length_scores(found)
    assert_report_has_only_full_length_scores(found, tmp_path)
