from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from jfhpo_core.optimizer.rank_agreement import most_telling, size_agreements
from jfhpo_core.optimizer.strategy import Proposal, RandomSearch, Recommendation, fresh_configurations
from jfhpo_core.report import caveats, contrasts, figures, verdict, write_headline, write_report
from jfhpo_core.report import findings as summary
from jfhpo_core.report.page import clip, settings_table
from jfhpo_core.report.text import share
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import Comparison, SearchResult, conclude
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StrategySpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import (
    Decision,
    Evaluation,
    Example,
    FailureKind,
    Outcome,
    PassAtN,
    StepRecord,
    Suggestion,
    Trial,
    TrialState,
)
from jfhpo_core.trainers.simulated import SimulatedTrainer
from tests import studies

STUDY = """
study: report
family:
  - {name: small, path: simulated, parameters: 100000}
  - {name: medium, path: simulated, parameters: 300000}
  - {name: large, path: simulated, parameters: 600000}
target: large
task: instruct
trainer: {name: simulated, settings: {best_learning_rate: 2.0e-4}}
space: tiny
fidelity: {horizon_prompts: 960, rungs: 5}
budget: {trial_seconds: 900, max_parallel: 2}
random_search: true
baselines:
  - {name: recipe, configuration: {learning_rate: 1.0e-6}}
  - {name: size-appropriate, configuration: {learning_rate: 1.0e-4}}
"""

WRITTEN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)

Finished = tuple[SearchResult, dict[str, list[StepRecord]]]

VOID = {"meta", "br", "img", "input", "link", "hr"}


@dataclass(frozen=True)
class SmallFirst:
    """Six configurations: all on the smallest model, then on the next, to full length and by way of a pause."""

    name: ClassVar[str] = "small-first"

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        levels = study.spec.fidelity.levels
        configurations = fresh_configurations(study, [], study.spec.seeds.search, 6)
        for model in study.ladder.models:
            for level in (levels[0], levels[-1]):
                for configuration in configurations:
                    same = [t for t in trials if (t.model, t.configuration) == (model.name, configuration)]
                    mine = next((trial for trial in same if trial.purpose == "search"), None)
                    if mine is None or (mine.state is TrialState.PAUSED and mine.step * mine.prompts_per_step < level):
                        suggestion = Suggestion(source=f"small-first/{level}", explanation=f"{model.name} to {level}")
                        return Proposal(configuration, model.name, level, suggestion)
        return None

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        return RandomSearch().rank(study, trials)


def search(text: str = STUDY) -> Finished:
    ledger = MemoryLedger()
    result = run_search(resolve(parse_study(text)), ledger, InlineDispatcher(2), strategy=SmallFirst())
    return result, {trial.key: ledger.step_records(trial.key) for trial in result.trials}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workspace = tmp_path_factory.mktemp("workspace")
    return search(f"{STUDY}tracking: {{workspace: {workspace}}}\n")


@pytest.fixture(scope="module")
def report(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    return write_report(*finished, folder, {"url": "http://127.0.0.1:5000/"}, WRITTEN)


def empty(study: Study) -> SearchResult:
    return conclude(study, [], RandomSearch(), complete=False)


def trained(
    trial: Trial, scores: Sequence[float], outcome: Outcome = Outcome.REACHED, **changes: object
) -> Trial:  # fmt: skip
    """The trial after one segment with a score at each of the first rungs."""
    rung = trial.total_steps // 5
    evaluations = tuple(studies.evaluation(rung * number, score) for number, score in enumerate(scores, 1))
    part = studies.result(
        0, 0, rung * len(scores), segment=studies.segment(0, 0, trial.total_steps), outcome=outcome, seconds=30.0,
        evaluations=evaluations, **changes,
    )  # fmt: skip
    return trial.model_copy(update={"segments": (part,)})


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "title"} & set(self.open):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_study_has_every_section(finished: Finished, report: Path) -> None:
    result, _ = finished
    page = page_of(report)
    assert result.complete
    assert "not finished" not in page.text
    assert verdict(result) in page.text
    assert len(page.of("svg")) == 7
    for words in (
        "small against large", "medium against large", "small-first/960", "Reproduction", "botorch",
        "study: report", "untrained", "2026-01-02 03:04 UTC",
    ):  # fmt: skip
        assert words in page.text, words
    for proxy in ("small", "medium"):
        telling = most_telling(size_agreements(result.study, result.trials, proxy))
        assert telling is not None
        assert telling.agreement.explain() in page.text
    for trial in result.trials:
        assert f'<th scope="row" class="n">{trial.number}</th>' in report.read_text(encoding="utf-8")
    assert list(report.parent.iterdir()) == [report]


def test_the_page_is_self_contained_and_accessible(report: Path) -> None:
    text, page = report.read_text(encoding="utf-8"), page_of(report)
    assert not [tag for tag in ("img", "link", "iframe", "object", "embed", "image") if page.of(tag)]
    assert not [name for name, attributes in page.tags if {"src", "srcset", "onload", "onclick"} & set(attributes)]
    assert not re.search(r"@import|url\((?!#)", text)
    outside = {str(attributes["href"]) for attributes in page.of("a") if not str(attributes["href"]).startswith("#")}
    assert outside == {"http://127.0.0.1:5000/"}
    assert "default-src 'none'" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [
        str(value)[1:]
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("href", "xlink:href", "aria-labelledby") and str(value).startswith("#")
    ]
    assert set(targets) <= set(ids)
    assert all(attributes.get("aria-label") and attributes.get("role") == "img" for attributes in page.of("svg"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.of("th"))
    assert len(page.of("h1")) == 1
    assert len(page.of("caption")) == len(page.of("table"))
    variables = set(re.findall(r"var\(--([\w]+)\)", text))
    assert variables <= {*figures.LIGHT, "panel", "warn", "good", "natural"}


@pytest.mark.slow
def test_the_same_study_gives_the_same_bytes(finished: Finished, report: Path, tmp_path: Path) -> None:
    again = write_report(*finished, tmp_path, {"url": "http://127.0.0.1:5000/"}, WRITTEN)
    assert again.read_bytes() == report.read_bytes()


def test_colors_have_one_role_each_so_that_they_can_be_exchanged() -> None:
    assert len(set(figures.LIGHT.values())) == len(figures.LIGHT)
    assert set(figures.LIGHT) == set(figures.DARK)


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colors", [figures.LIGHT, figures.DARK])
def test_text_colors_have_the_contrast_that_wcag_asks_for(colors: dict[str, str]) -> None:
    ground = _luminance(colors["surface"])
    for role in ("ink", "muted", "accent", "rival", "chance", *(f"size{i}" for i in range(figures.SIZE_BINS))):
        light, dark = sorted((_luminance(colors[role]), ground), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, role


SINGLE = STUDY.replace("  - {name: small, path: simulated, parameters: 100000}\n", "").replace(
    "  - {name: medium, path: simulated, parameters: 300000}\n", ""
)
NO_BASELINES = STUDY[: STUDY.index("baselines:")]


def test_a_study_without_a_recommendation_says_why_and_what_to_do() -> None:
    study = resolve(parse_study(STUDY))

    def said(complete: bool, *trials: Trial) -> str:
        return verdict(conclude(study, trials, RandomSearch(), complete=complete))

    new = study.new_trial(0, {"learning_rate": 1e-3}, "small", 0)
    failed = trained(new, [], Outcome.INFEASIBLE, failure=FailureKind.OUT_OF_MEMORY, message="CUDA out of memory.")
    decision = Decision(stop=True, rule="kl_growth", signal="kl", value=2.0, threshold=1.0, step=12)
    stopped = trained(new, [0.1], Outcome.STOPPED, decision=decision)
    paused = trained(new, [0.3])
    for words, text in (
        ("run the same command to continue", said(False, paused)),
        ("The budget of 900 device-seconds pays for none: raise it", said(True)),
        ("1 of 1 trials failed, most often like this (out-of-memory): CUDA out of memory. Remove", said(True, failed)),
        ("Stopping rules ended 1 of 1 trials, kl_growth 1 of them. `jfhpo show`", said(True, stopped)),
        ("raise the budget and run the same command again", said(True, paused)),
    ):
        assert text.startswith("Nothing can be recommended")
        assert words in text


def test_before_the_first_trial(tmp_path: Path) -> None:
    result = empty(resolve(parse_study(STUDY)))
    page = page_of(write_report(result, {}, tmp_path))
    for words in ("This study is not finished", "Nothing can be recommended", "No trial has been trained yet"):
        assert words in page.text
    assert page.of("svg") == []
    write_headline(result, tmp_path / "headline.svg")


def test_what_the_model_believes_of_proxies_stands_beside_what_was_measured(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    other = resolve(study.spec.model_copy(update={"strategy": StrategySpec(name="random")}))
    configurations = fresh_configurations(study, (), 0, 6)
    trials = [
        trained(study.new_trial(number, configuration, model, 0), [0.2, 0.3 + 0.02 * number])
        for number, (configuration, model) in enumerate(zip(configurations, ["small", "large"] * 3, strict=True))
    ]
    result = conclude(study, trials, RandomSearch(), complete=False)
    believed = summary.believed_shares(result)
    assert list(believed) == ["small", "medium"]
    assert 0 < believed["small"] < believed["medium"] < 1
    text = page_of(write_report(result, {}, tmp_path)).text
    assert "no order can be compared" in text
    assert f"small shares {share(believed['small'])}" in text
    assert summary.believed_shares(conclude(other, trials, RandomSearch(), complete=False)) == {}


def test_one_model_and_no_baselines(tmp_path: Path) -> None:
    study = resolve(
        parse_study(NO_BASELINES.replace(STUDY[: STUDY.index("target:")], SINGLE[: SINGLE.index("target:")]))
    )
    trial = trained(study.new_trial(0, {"learning_rate": 1e-4}, "large", 0), [0.2, 0.3, 0.4, 0.4, 0.5])
    result = conclude(study, [trial], RandomSearch(), complete=True)
    page = page_of(write_report(result, {}, tmp_path))
    assert "This study has no proxies" in page.text
    assert "The recommended configuration scores 0.500 on large (0.461 to 0.539, 1 seed)." in page.text
    assert contrasts(result) == []


def test_pass_at_n_stands_beside_the_score(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    trial = trained(study.new_trial(0, {"learning_rate": 1e-4}, "large", 0), [0.5])
    (segment,) = trial.segments
    (plain,) = segment.evaluations
    best = plain.model_copy(update={"pass_at_n": PassAtN(n=8, score=0.75, standard_error=0.0625)})
    several = trial.model_copy(update={"segments": (segment.model_copy(update={"evaluations": (best,)}),)})
    for number, (one, shown) in enumerate([(several, True), (trial, False)]):
        result = conclude(study, [one], RandomSearch(), complete=False)
        page = page_of(write_report(result, {}, tmp_path / str(number)))
        assert "0.500 ± 0.020" in page.text
        assert ("pass@8 0.750 ± 0.062" in page.text) == shown
        assert ("pass@" in page.text) == shown


def test_untrained_models_and_slow_rewards_are_shown(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    trial = trained(study.new_trial(0, {"learning_rate": 1e-4}, "large", 0), [0.5])
    (segment,) = trial.segments
    example = Example(prompt="1+1=", completion="<b>3", reward=0.25)
    base = Evaluation(step=0, prompts=0, score=0.125, standard_error=0.01, samples=512, seconds=1, examples=(example,))
    slow = segment.evaluations[0].model_copy(update={"reward_timeouts": 7})
    told = trial.model_copy(update={"segments": (segment.model_copy(update={"evaluations": (base, slow)}),)})
    result = conclude(study, [told], RandomSearch(), complete=False)
    page = page_of(write_report(result, {told.key: [record(1, reward_timeouts=2)]}, tmp_path / "told"))
    assert "'1+1=' -> '<b>3', reward 0.25" in page.text
    assert "for 2 completions in training and 7 in evaluations" in page.text
    plain = page_of(write_report(conclude(study, [trial], RandomSearch(), complete=False), {}, tmp_path / "plain"))
    assert "Before training" not in plain.text
    assert "Scoring took longer" not in plain.text


def test_only_stopped_and_failed_trials(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    trials = [
        trained(study.new_trial(0, {"learning_rate": 1e-2}, "large", 0), [0.01], Outcome.STOPPED),
        trained(
            study.new_trial(1, {"learning_rate": 2e-2}, "small", 0), [], Outcome.INFEASIBLE,
            failure=FailureKind.OUT_OF_MEMORY, message="CUDA out of memory",
        ),
        trained(
            study.new_trial(2, {"learning_rate": 3e-2}, "small", 0), [], Outcome.LOST, message="node died", attempts=3
        ),
        study.new_trial(3, {"learning_rate": 3e-3}, "medium", 0),
    ]  # fmt: skip
    page = page_of(write_report(conclude(study, trials, RandomSearch(), complete=False), {}, tmp_path))
    for words in (
        "Nothing can be recommended",
        "80\N{NO-BREAK SPACE}%",
        "out-of-memory",
        "CUDA out of memory",
        "node died",
        "pending",
    ):
        assert words in page.text
    write_headline(conclude(study, trials, RandomSearch(), complete=False), tmp_path / "headline.png")


def test_a_model_without_trials_has_no_panel_and_a_stopped_trial_its_configuration(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    stopped = trained(study.new_trial(0, {"learning_rate": 0.0123}, "large", 0), [0.01], Outcome.STOPPED)
    result = conclude(study, [stopped], RandomSearch(), complete=False)
    titles = [axes.get_title(loc="left") for axes in figures.learning_figure(result).axes]
    assert [title for title in titles if title] == ["large"]
    facts = {"spent_seconds": 295.88264110900036, "model_uri": "models:/report/1"}
    text = write_report(result, {}, tmp_path, facts).read_text(encoding="utf-8")
    assert "models:/report/1" in text[text.index('id="next"') : text.index('id="curves"')]
    assert "295.9" in text
    assert "295.88264" not in text
    collapse = text[text.index('id="stopped"') : text.index('id="next"')]
    assert "0.0123" in collapse


def test_scores_that_are_not_numbers(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    nan = math.nan
    trials = [
        trained(study.new_trial(0, {"learning_rate": 1e-4}, "large", 0), [0.2, nan, nan, nan, nan]),
        trained(study.new_trial(1, {"learning_rate": 1e-6}, "large", 0, "baseline", "recipe"), [nan] * 5),
        trained(study.new_trial(2, {"learning_rate": 1e-4}, "small", 0), [nan] * 5),
    ]
    result = conclude(study, trials, RandomSearch(), complete=True)
    path = write_report(result, {}, tmp_path)
    assert "scores nan on large" in page_of(path).text
    assert "not comparable with recipe" in verdict(result)
    write_headline(result, tmp_path / "headline.svg")


HOSTILE = "</script><script>alert('x')</script><b onclick=\"x\">&amp;$x^2$"


class FreeText(Hyperparameters):
    note: str = Field(default="")


class FreeTextTrainer(SimulatedTrainer):
    hyperparameters = FreeText


def test_text_from_users_stays_text(tmp_path: Path) -> None:
    spec = parse_study(STUDY).model_copy(update={"description": HOSTILE})
    study = replace(resolve(spec), trainer=FreeTextTrainer())
    configuration = {"learning_rate": 1e-4, "note": HOSTILE}
    trials = [
        trained(study.new_trial(0, configuration, "large", 0, "search", HOSTILE), [0.1, 0.2, 0.3, 0.4, 0.5]),
        trained(study.new_trial(1, configuration, "small", 0), [], Outcome.INFEASIBLE, message=HOSTILE),
    ]
    records = {trials[0].key: [record(step) for step in range(1, 61)]}
    facts = {HOSTILE: HOSTILE, "link": "javascript:alert(1)", "uri": "http://user:secret@host/x"}
    result = conclude(study, trials, RandomSearch(), complete=True)
    result = replace(result, rows=(replace(result.rows[0], label=HOSTILE), *result.rows[1:]))
    path = write_report(result, records, tmp_path, facts)
    page = page_of(path)
    assert len(page.of("script")) == 1
    assert page.of("b") == []
    assert HOSTILE in page.text
    assert not any(str(attributes.get("href")).startswith("javascript") for attributes in page.of("a"))
    assert "secret" not in path.read_text(encoding="utf-8")
    ET.parse(write_headline(result, tmp_path / "headline.svg"))


def record(step: int, **changes: float | None) -> StepRecord:
    values: dict[str, float | None] = {
        "step": step, "prompts": 16 * step, "tokens": 1000 * step, "reward": 0.5, "reward_std": 0.5,
        "zero_variance_share": 0.1, "kl": 0.01 * step, "entropy": 0.5, "clip_fraction": 0.01, "grad_norm": 1.0,
        "completion_tokens": 8, "truncated_share": 0, "generation_seconds": 0.25, "training_seconds": 0.15,
    }  # fmt: skip
    return StepRecord.model_validate(values | changes)


def test_signals_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY))
    trial = trained(study.new_trial(0, {"learning_rate": 1e-4}, "large", 0), [0.2])
    result = conclude(study, [trial], RandomSearch(), complete=True)
    blind = {trial.key: [record(step, kl=None) for step in range(1, 13)]}
    wild = {trial.key: [record(step, kl=math.inf, reward=math.nan) for step in range(1, 13)]}
    for records in (blind, wild):
        assert "Training signals" in page_of(write_report(result, records, tmp_path)).text


@pytest.mark.slow
def test_a_thousand_trials_stay_below_five_megabytes(tmp_path: Path) -> None:
    study = resolve(parse_study(STUDY + "strategy: {name: random}\n"))
    configurations = fresh_configurations(study, [], 0, 1000)
    models = [model.name for model in study.ladder.models]
    trials = [
        trained(study.new_trial(number, configuration, models[number % 3], 0), [0.1, 0.2, 0.3, 0.4, number / 1000])
        for number, configuration in enumerate(configurations)
    ]
    records = {trial.key: [record(step) for step in range(1, 61)] for trial in trials}
    path = write_report(conclude(study, trials, RandomSearch(), complete=True), records, tmp_path)
    assert path.stat().st_size < 5_000_000
    assert f"{1000 - figures.DRAWN_TRIALS} of 1000 trials are not drawn" in page_of(path).text


def test_long_messages_are_cut() -> None:
    assert clip("x" * 10_000).endswith("… (10000 characters)")


def compared(study: Study, mine: float, other: float, error: float = 0.01) -> SearchResult:
    rows = (
        Comparison("recommended", {"learning_rate": 1e-4}, mine, error, 2, 10.0),
        Comparison("recipe", {"learning_rate": 1e-6}, other, error, 2, 10.0),
    )
    belief = Recommendation({"learning_rate": 1e-4}, mine, 0.02)
    return replace(empty(study), recommended=belief, rows=rows)


@pytest.mark.parametrize(
    ("mine", "other", "error", "words"),
    [
        (0.60, 0.50, 0.01, "clearly better than"),
        (0.52, 0.50, 0.01, "not clearly better than"),
        (0.49, 0.50, 0.01, "not better than"),
        (0.40, 0.50, 0.01, "clearly worse than"),
        (0.50, 0.50, 0.00, "not better than"),
        (0.51, 0.50, 0.00, "clearly better than"),
        (math.nan, 0.50, 0.01, "not comparable with"),
    ],
)
def test_the_verdict_follows_the_interval_of_the_difference(
    mine: float, other: float, error: float, words: str
) -> None:
    result = compared(resolve(parse_study(STUDY)), mine, other, error)
    (contrast,) = contrasts(result)
    assert contrast.verdict == words
    assert f"It is {words} recipe" in verdict(result)
    if error and math.isfinite(mine):
        assert contrast.z == pytest.approx((mine - other) / (error * math.sqrt(2)))


def test_caveats_name_fresh_seeds_single_seeds_and_the_best_of_many(
    finished: Finished,
) -> None:
    result, _ = finished
    notes = " ".join(caveats(result))
    fresh = [
        trial.evaluations[-1].score
        for trial in result.trials
        if trial.purpose == "confirmation" and trial.label == "recommended"
    ]
    assert f"On the other seed alone it scores {fresh[0]:.3f}" in notes
    assert "One seed only: random search" in notes
    assert "best of its full runs" in notes


def test_configurations_side_by_side_flag_the_edge_of_the_space() -> None:
    study = resolve(parse_study(STUDY))
    result = compared(study, 0.5, 0.4)
    at_edge = {"learning_rate": 0.0099, "kl_coefficient": 0.0, "clip_high": 0.1001, "n_samples": 16}
    result = replace(result, rows=(replace(result.rows[0], configuration=at_edge), result.rows[1]))
    table = {item.name: item for item in settings_table(result)}
    assert [name for name, item in table.items() if item.edge] == ["learning_rate", "clip_high"]
    assert table["learning_rate"].values == (0.0099, 1e-6)
    assert table["kl_coefficient"].range == "0 or 0.0001 to 0.1, log scale"
    assert table["temperature"].range is None
    assert list(table)[: len(study.space)] == list(study.space)


def test_incumbents_follow_the_order_of_commit(
    finished: Finished,
) -> None:
    result, _ = finished
    ranks = [segment.committed for _, segment in summary.history(result.trials)]
    assert ranks == list(range(1, len(ranks) + 1))
    curves = {(curve.model, curve.purpose): curve for curve in summary.incumbents(result)}
    assert set(curves) == {
        ("small", "search"),
        ("medium", "search"),
        ("large", "search"),
        ("large", "random-search"),
    }
    for curve in curves.values():
        costs, scores = zip(*curve.points, strict=True)
        assert list(costs) == sorted(costs)
        assert list(scores) == sorted(set(scores))
        assert costs[-1] <= curve.end_seconds
    assert curves["large", "search"].end_seconds == pytest.approx(result.spent_seconds)
    finals = [t.final.score for t in result.trials if t.model == "large" and t.purpose == "search" and t.final]
    assert curves["large", "search"].points[-1][1] == max(finals)


def test_the_bill_adds_up(finished: Finished) -> None:
    result, records = finished
    charged = sum(trial.charge_seconds for trial in result.trials)
    table = summary.cost_by_purpose(result)
    assert sum(sum(row.values()) for row in table.values()) == pytest.approx(charged)
    assert sum(table["search"].values()) == pytest.approx(result.spent_seconds)
    spent = summary.activities(result, records)
    assert sum(sum(row.values()) for row in spent.values()) == pytest.approx(charged)
    assert sum(source.segments for source in summary.sources(result.trials)) == len(summary.history(result.trials))
    ratio = summary.search_trial_ratio(result)
    assert ratio is not None
    assert 0 < ratio[0] < ratio[1]


def test_the_headline_is_a_picture_of_its_own(finished: Finished, tmp_path: Path) -> None:
    result, _ = finished
    svg = write_headline(result, tmp_path / "headline.svg")
    root = ET.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in svg.read_text(encoding="utf-8")
    assert verdict(result) == root.get("aria-label")
    assert write_headline(result, tmp_path / "headline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"as \.svg or \.png, got 'headline.gif'"):
        write_headline(result, tmp_path / "headline.gif")
