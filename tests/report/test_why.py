from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from jfhpo_core.optimizer.importance import Estimate, Importance
from jfhpo_core.optimizer.strategy import RandomSearch, fresh_configurations
from jfhpo_core.report import write_report
from jfhpo_core.report.text import share
from jfhpo_core.report.why import Why, boundaries, collapsed, why
from jfhpo_core.report.why_records import More
from jfhpo_core.report.why_sentences import sections
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Decision, FailureKind, Outcome, Trial
from tests.studies import simulated_study, trained

COLLAPSE = Decision(stop=True, rule="reward_collapse", signal="reward", value=0.0, threshold=0.1, step=10)
PROMISE = Decision(stop=True, rule="unpromising", signal="score", value=0.1, threshold=0.2, step=10)


def runs(study: Study, limit: float, decision: Decision = COLLAPSE, count: int = 24) -> list[Trial]:
    """Sobol configurations on the target, of which a rule stops those with a learning rate above the limit."""
    found = []
    for number, configuration in enumerate(fresh_configurations(study, [], 0, count)):
        stopped = {"outcome": Outcome.STOPPED, "decision": decision}
        changes = stopped if float(configuration["learning_rate"]) > limit else {}
        found.append(trained(study, configuration, "large", [0.1, 0.2, 0.3, 0.4], number, **changes))
    return found


def test_a_boundary_is_found_where_runs_collapse_and_blamed_on_nothing_else(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trials = runs(study, 1e-3)
    (boundary,) = boundaries(study, trials)
    low, high = boundary.between
    assert (boundary.name, boundary.side, boundary.model) == ("learning_rate", "above", "large")
    assert low <= 1e-3 < high
    assert (boundary.collapsed, boundary.other_collapsed) == (boundary.runs, 0)
    assert boundary.runs == sum(float(trial.configuration["learning_rate"]) > 1e-3 for trial in trials)
    assert boundary.runs + boundary.other_runs == len(trials)


def test_runs_on_a_proxy_tell_where_the_target_has_none(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trials = [trial.model_copy(update={"model": "small"}) for trial in runs(study, 1e-3)]
    assert [boundary.model for boundary in boundaries(study, trials)] == [None]


def test_no_boundary_is_claimed_by_chance_or_of_runs_that_others_beat(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    assert boundaries(study, runs(study, 1e-3, PROMISE)) == []
    assert boundaries(study, runs(study, 1e-3, count=4)) == []
    scattered = runs(study, 1.0)
    for number in range(0, len(scattered), 3):
        (segment,) = scattered[number].segments
        update = {"outcome": Outcome.INFEASIBLE, "failure": FailureKind.NON_FINITE}
        scattered[number] = scattered[number].model_copy(update={"segments": (segment.model_copy(update=update),)})
    assert boundaries(study, scattered) == []


def test_it_says_that_none_collapsed_or_that_nothing_separates_those_that_did(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)

    def said(trials: list[Trial]) -> tuple[str, ...]:
        return why(conclude(study, trials, RandomSearch(), complete=False)).topics["collapse"]

    assert said([]) == ()
    assert said(runs(study, 1e-3, PROMISE, count=6)) == ("None of 6 runs collapsed.",)
    few = runs(study, 1e-3, count=4)
    (ruined,) = (trial for trial in few if float(trial.configuration["learning_rate"]) > 1e-3)
    rest = "no single hyperparameter tells where runs collapse."
    assert said(few) == (f"1 of 4 runs collapsed (trial {ruined.number}); {rest}",)
    again = ruined.model_copy(update={"key": "again", "number": 4})
    assert said([*few, again]) == (f"2 of 5 runs collapsed (trials {ruined.number}, 4); {rest}",)


@pytest.mark.parametrize(
    ("scores", "fell"),
    [
        ([0.4, 0.5, 0.0], True),
        ([0.4, 0.1], True),
        ([0.1, 0.5, 0.3], False),
        ([0.05, 0.0], False),  # within the noise
        ([0.4], False),
        ([-1.0, -0.9, -2.0], True),
    ],
)
def test_a_collapse_is_told_by_the_curve_whatever_ended_the_run(
    tmp_path: Path, scores: list[float], fell: bool
) -> None:
    study = simulated_study(tmp_path)
    trial = trained(study, {"learning_rate": 1e-3}, "large", scores, outcome=Outcome.STOPPED, decision=PROMISE)
    assert collapsed(trial) == fell


def test_what_is_lacking_comes_with_a_way_to_get_it(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trials = runs(study, 1.0, count=4)  # of 20 s each

    def said(*, complete: bool) -> tuple[str, str]:
        topics = why(conclude(study, trials, RandomSearch(), complete=complete)).topics
        return topics["matters"][0], topics["next"][0]

    needed = 2 * len(study.space)
    matters, following = said(complete=False)
    assert matters == f"What matters cannot be told: 4 configurations have been evaluated; {needed} are needed."
    assert f"takes {needed - 4} more configurations. The study is not finished" in following
    assert f"`jfhpo plan --more {20 * (needed - 4)}s`" in said(complete=True)[1]


def test_an_undecided_comparison_asks_for_further_seeds(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, baselines=[{"name": "recipe", "configuration": {"learning_rate": 1e-4}}])

    def following(recipe: float) -> str:
        chosen = trained(study, study.space.middle(learning_rate=2e-4), "large", [0.1, 0.2, 0.3, 0.5], 0)
        other = trained(study, study.spec.baselines[0].configuration, "large", [0.1, 0.2, 0.3, recipe], 1)
        other = other.model_copy(update={"purpose": "baseline", "label": "recipe"})
        return " ".join(why(conclude(study, [chosen, other], RandomSearch(), complete=True)).topics["next"])

    assert "The comparison with recipe is not decided: further training seeds" in following(0.49)
    assert "not decided" not in following(0.1)


def test_runs_out_of_memory_have_not_collapsed(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trials = []
    for trial in runs(study, 1.0):
        (segment,) = trial.segments
        if float(trial.configuration["learning_rate"]) > 1e-3:
            update = {"outcome": Outcome.INFEASIBLE, "failure": FailureKind.OUT_OF_MEMORY}
            segment = segment.model_copy(update=update)
        trials.append(trial.model_copy(update={"segments": (segment,)}))
    assert boundaries(study, trials) == []


def searched(tmp_path: Path, **changes: object) -> SearchResult:
    study = simulated_study(tmp_path, **changes)
    return run_search(study, MemoryLedger(), InlineDispatcher(2))


@pytest.mark.slow
def test_a_search_is_explained_from_what_matters_to_what_more_would_bring(tmp_path: Path) -> None:
    result = searched(tmp_path, budget={"trial_seconds": 900, "max_parallel": 2})
    page = why(result)
    assert page.importance[0].name == "learning_rate"
    assert page.sentences[0].startswith("learning_rate matters most")
    (boundary,) = page.boundaries
    assert boundary.between[0] / 1.5 < 5e-4 * 10**0.6 < 1.5 * boundary.between[1]
    assert f"{boundary.collapsed} of {boundary.runs} runs on large collapsed" in " ".join(page.sentences)
    assert page.choice is not None
    assert page.choice.difference.low <= page.choice.difference.value <= page.choice.difference.high
    assert f"trial {page.choice.trial}" in " ".join(page.sentences)
    assert page.more is not None
    assert page.more.seconds == 900
    assert page.proxies == ()  # random search has run none
    report = write_report(result, {}, tmp_path).read_text(encoding="utf-8")
    section = report[report.index('id="matters"') : report.index('id="stopped"')]
    assert section.count("<tr>") == 1 + len(page.importance)
    assert section.count("<li>") == len(page.topics["matters"])
    assert section.count("<svg") == 4
    assert all(escape(sentence) in report for sentence in page.sentences)
    assert [sentence for said in page.topics.values() for sentence in said] == list(page.sentences)
    assert page.metrics()["importance/learning_rate"] == page.importance[0].total.value
    assert Why.model_validate_json(page.model_dump_json()) == page


def test_what_is_not_told_is_named_and_what_to_do_next_can_be_done(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    shares = {"learning_rate": (0.2, 0.6), "n_samples": (0.02, 0.4), "kl_coefficient": (0.0, 0.2)}
    importance = tuple(
        Importance.model_construct(name=name, first=part, total=part, best=None, harmless=None)
        for name, (low, high) in shares.items()
        for part in [Estimate(value=high / 2, low=low, high=high)]
    )
    more = More(seconds=600, now=0.6, score=0.7, low=0.65, high=0.75)
    page = Why(study="first", configurations=14, standard_error=0.02, more=more, edges=("n_samples",))
    topics = sections(study, page.model_copy(update={"importance": importance}))
    assert topics["matters"][-1] == (
        f"Whether n_samples and kl_coefficient matter is not told: their intervals begin below {share(0.05)}."
    )
    budget, edge = topics["next"]
    assert "raise the budget in the study file by as much and run the search again" in budget
    assert "`warm_start: [first]`" in edge


@pytest.mark.parametrize("count", [0, 1, 4])
def test_of_few_trials_it_says_that_they_are_few(tmp_path: Path, count: int) -> None:
    study = simulated_study(tmp_path)
    page = why(conclude(study, runs(study, 1e-3, count=4)[:count], RandomSearch(), complete=False))
    assert page.importance == ()
    assert page.choice is None
    assert f"{count} configurations have been evaluated; 14 are needed" in page.sentences[0]
    assert Why.model_validate_json(page.model_dump_json()) == page


@pytest.mark.slow
def test_a_study_in_which_everything_scores_alike_or_collapses_is_explained(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, strategy="jfhpo")
    for limit in (1.0, 1e-6):
        page = why(conclude(study, runs(study, limit, count=15), RandomSearch(), complete=False))
        assert page.boundaries == ()
        assert "nan" not in " ".join(page.sentences)
        assert Why.model_validate_json(page.model_dump_json()) == page


@pytest.mark.parametrize(
    ("leading", "sentence"),
    [
        ((1.0, 0.98, 0.98, 0.04), "The hyperparameters that matter most are a, b and c."),
        ((1.0, 0.97, 0.6, 0.43), "a and b are among the three that matter most; the third is c or d."),
        ((0.97, 0.97, 0.6, 0.46), "a is among the three that matter most; the other two are among b, c and d."),
        ((0.9, 0.8, 0.7, 0.6), "Which three matter most cannot be told: they are among a, b, c and d."),
        ((1.0, 0.97, 0.97, 0.06), "a and b are among the three that matter most; the third is c or d."),
    ],
)
def test_the_most_important_are_named_as_far_as_the_draws_agree(
    tmp_path: Path, leading: tuple[float, ...], sentence: str
) -> None:
    share = Estimate(value=0.2, low=0.1, high=0.3)
    importance = tuple(
        Importance(name=name, first=share, total=share, leading=item, best=None, harmless=None)
        for name, item in zip("abcd", leading, strict=True)
    )
    study = simulated_study(tmp_path)
    known: dict[str, Any] = {"study": study.spec.study, "configurations": 20, "standard_error": None}
    assert sections(study, Why(**known, importance=importance))["matters"][-1] == sentence
    few = tuple(item.model_copy(update={"total": Estimate(value=0.2, low=0.0, high=0.3)}) for item in importance[:2])
    assert sentence not in sections(study, Why(**known, importance=(*few, *importance[2:])))["matters"]
