"""The page of the report: gathers figures and tables, and fills the template.

Names, configurations and messages come from users and their code: the template escapes everything but the figures,
whose texts matplotlib has escaped, and the page's content security policy forbids every request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from jfhpo_core.files import replace_file
from jfhpo_core.optimizer.rank_agreement import FidelityAgreement, length_agreements, most_telling, size_agreements
from jfhpo_core.report import findings, text
from jfhpo_core.report.completions import readings
from jfhpo_core.report.text import without_credentials
from jfhpo_core.report.why import Why, collapsed, why
from jfhpo_core.report.why_records import Topic
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import ChoiceParameter
from jfhpo_core.study.trial import Configuration, StepRecord, Trial, TrialState, Value

REPORT = "report.html"
PLOTS = "plots"

LISTED_TRIALS = 2000
"""Rows of the table of all trials; the newest are left out beyond it, and the page says so."""

PIXELS_PER_INCH = 104.0
"""Of a figure at its natural width: it is shown no larger, so that all figures have letters of one size."""

LONGEST_TEXT = 600
"""Characters of a message or value that are shown."""

DISTRIBUTIONS = ("jfhpo", "torch", "botorch", "trl", "transformers", "ray", "mlflow", "prefect")


def write_report(
    result: SearchResult,
    step_records: Mapping[str, Sequence[StepRecord]],
    folder: Path,
    facts: Mapping[str, str | float] | None = None,
    written: datetime | None = None,
    explained: Why | None = None,
) -> Path:
    """Write the report of a study, finished or not.

    Args:
        result: What `run_search` or `conclude` returned.
        step_records: Step records by trial key; trials without any are shown without training curves.
        folder: Where `report.html` goes; made if need be. An earlier report is replaced, whole or not at all.
        facts: Further facts to show, e.g. `Ledger.facts()`; addresses (http, https) become links.
        written: Date to print; None is now.
        explained: What `why` says of the result; None: it is asked.

    Returns:
        The path of the file.
    """
    page = _template().render(
        _context(result, step_records, facts or {}, written or datetime.now(UTC), explained or why(result))
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    replace_file(path, page)
    return path


def write_plots(result: SearchResult, folder: Path, explained: Why | None = None) -> list[Path]:
    """Write the report's main figures as single pictures (PNG), those of them that there are data for.

    Args:
        result: As for `write_report`.
        folder: Where they go; made if need be.
        explained: What `why` says of the result; None: importance is not drawn.

    Returns:
        The paths of the files.
    """
    from jfhpo_core.report import figures, response

    measured = any(trial.evaluations for trial in result.trials)
    drawn: dict[str, Callable[[SearchResult], Any]] = {}
    if result.rows and findings.incumbents(result):
        drawn["outcome"] = figures.headline_figure
    if measured:
        drawn["learning-curves"] = figures.learning_figure
    if result.study.spec.secondary_metrics and result.tried:
        drawn["front"] = lambda result: figures.front_figure(result, explained.predicted_front if explained else ())
    if explained is not None and explained.importance:
        drawn["importance"] = lambda _: response.importance_figure(explained)
    if result.trials:
        drawn["bill"] = figures.bill_figure
    folder.mkdir(parents=True, exist_ok=True)
    return [
        figures.save_figure(draw(result), folder / f"{name}.png", findings.verdict(result))
        for name, draw in drawn.items()
    ]


def write_headline(result: SearchResult, path: Path) -> Path:
    """Write the outcome as one picture, for a README or a slide.

    Args:
        result: As for `write_report`.
        path: Ends in `.svg` (follows the reader's light or dark scheme) or `.png`.

    Raises:
        ValueError: It ends in something else.
    """
    from jfhpo_core.report import figures

    return figures.save_figure(figures.headline_figure(result), path, findings.verdict(result))


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": text.duration,
        "parameters": text.parameters,
        "share": text.share,
        "number": text.number,
        "figures": text.figures,
        "signed": text.signed,
        "setting": text.setting,
        "clip": clip,
        "prose": prose,
    }
    return environment.get_template("template.html")


def clip(value: object) -> str:
    """Text cut to `LONGEST_TEXT` characters, without credentials."""
    whole = without_credentials(str(value))
    return whole if len(whole) <= LONGEST_TEXT else f"{whole[:LONGEST_TEXT]} … ({len(whole)} characters)"


def prose(sentence: str) -> Markup:
    """A sentence as `clip` leaves it; what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(clip(sentence)))))  # noqa: S704 - escaped here


def _context(
    result: SearchResult,
    step_records: Mapping[str, Sequence[StepRecord]],
    facts: Mapping[str, str | float],
    written: datetime,
    explained: Why,
) -> dict[str, Any]:
    from jfhpo_core.report import figures

    study, trials = result.study, result.trials
    sizes = {model.name: size_agreements(study, trials, model.name) for model in study.ladder.proxies}
    telling = [item for items in sizes.values() if (item := most_telling(items)) is not None]
    measured = any(trial.evaluations for trial in trials)

    def figure(name: str, label: str, draw: Callable[[], Any], wanted: bool = True) -> Markup | None:
        drawn = draw() if wanted else None
        if drawn is None:
            return None
        natural = f'<svg style="--natural:{drawn.get_figwidth() * PIXELS_PER_INCH:.0f}px" '
        return Markup(figures.inline_svg(drawn, name, label).replace("<svg ", natural, 1))  # noqa: S704 - escaped there

    return {
        "study": study,
        "spec": study.spec,
        "result": result,
        "written": written.strftime("%Y-%m-%d %H:%M %Z"),
        "light": figures.css_variables(figures.LIGHT),
        "dark": figures.css_variables(figures.DARK),
        "verdict": findings.verdict(result),
        "contrasts": findings.contrasts(result),
        "caveats": findings.caveats(result),
        "untrained": findings.untrained(result),
        "readings": readings(result),
        "timeouts": findings.timeouts(result, step_records),
        "interval": findings.interval,
        "score_text": findings.score_text,
        "interval_text": findings.interval_text,
        "settings": settings_table(result),
        "why": explained,
        "topics": {topic: explained.topics.get(topic, ()) for topic in get_args(Topic)},
        **_responses(result, explained, figure),
        "choices": [name for name in study.space if isinstance(study.space[name], ChoiceParameter)],
        "comparison": figure(
            "comparison",
            f"Dot and whisker plot. {findings.verdict(result)}",
            lambda: figures.comparison_figure(result),
            wanted=any(math.isfinite(row.score) for row in result.rows),
        ),
        "metric_text": findings.metric_text,
        "breaks": lambda name, limits: any(limit.metric == name for limit in limits),
        "front": figure(
            "front",
            f"Scatter of score against {', '.join(study.spec.secondary_metrics)}; the table below has the numbers.",
            lambda: figures.front_figure(result, explained.predicted_front),
            wanted=bool(study.spec.secondary_metrics and result.tried),
        ),
        "bill": figure(
            "bill",
            "Bars: device-time by purpose and model; the table below has the numbers.",
            lambda: figures.bill_figure(result),
            wanted=bool(trials),
        ),
        "costs": findings.cost_by_purpose(result),
        "purposes": findings.PURPOSES,
        "counts": purpose_counts(trials),
        "ratio": findings.search_trial_ratio(result),
        "activities": findings.activities(result, step_records),
        "activity_names": findings.ACTIVITIES,
        "tokens": sum(records[-1].tokens for records in step_records.values() if records),
        "learning": figure(
            "learning",
            "Learning curves: held-out score over training prompts, one panel per model, one curve per trial; the "
            "table of all trials has the last scores.",
            lambda: figures.learning_figure(result),
            wanted=measured,
        ),
        "dynamics": figure(
            "dynamics",
            "Training reward and KL to the reference over training prompts, one panel per model.",
            lambda: figures.dynamics_figure(result, step_records),
        ),
        "left_out": sum(bool(trial.evaluations) for trial in trials) - len(figures.drawn_trials(result)),
        "incumbent": figure(
            "incumbent",
            "Best score so far against charged device-time: the search on the target and on each proxy, and random "
            "search if there was one; recipes as horizontal lines.",
            lambda: figures.incumbent_figure(result),
            wanted=bool(findings.incumbents(result)),
        ),
        "agreement": figure(
            "agreement",
            "Scatter of the score on each proxy against the score on the target; the table has the correlations.",
            lambda: figures.agreement_figure(result, telling),
            wanted=bool(telling),
        ),
        "telling": telling,
        "believed": findings.believed_shares(result),
        "size_agreements": _with_pairs(sizes),
        "length_agreements": _with_pairs(
            {model.name: length_agreements(study, trials, model.name) for model in study.ladder.models}
        ),
        "share_of": lambda item: share_of(study, item),
        "any_collapsed": any(trial.segments and collapsed(trial) for trial in trials),
        "stopped": [trial for trial in trials if trial.state is TrialState.STOPPED],
        "failed": [trial for trial in trials if trial.state in (TrialState.INFEASIBLE, TrialState.LOST)],
        "sources": findings.sources(trials),
        "rows": [trial_row(trial) for trial in trials[:LISTED_TRIALS]],
        "unlisted": max(0, len(trials) - LISTED_TRIALS),
        "yaml": without_credentials(study.spec.to_yaml()),
        "versions": versions(),
        "model_uri": facts.get("model_uri"),
        "facts": [(name, clip(text.setting(value)), is_address(value)) for name, value in facts.items()],
    }


def _responses(
    result: SearchResult, explained: Why, figure: Callable[[str, str, Callable[[], Any]], Markup | None]
) -> dict[str, Any]:
    """Figures of what matters; None where the data do not tell."""
    from jfhpo_core.report import response

    names = [item.name for item in explained.importance] or list(result.study.space)
    finished = [
        model.name
        for model in result.study.ladder.models
        if sum(trial.final is not None for trial in result.trials if trial.model == model.name) >= response.FEWEST_LINES
    ]
    parallel = None
    if finished:
        parallel = figure(
            "parallel",
            f"Parallel coordinates of the configurations that finished on {finished[-1]}, coloured by score.",
            lambda: response.parallel_figure(result, finished[-1], names),
        )
    found: dict[str, Any] = {"parallel": parallel, "parallel_model": finished[-1] if finished else None}
    beliefs = response.belief_of(result) if explained.importance else None
    if beliefs is None:
        return {**found, "importance": None, "responses": None, "pair": None, "pair_names": ()}
    best = {item.name: item.best for item in explained.importance if item.best is not None}
    drawn = response.drawn_names(explained.importance)
    pair = explained.interactions[0].names if explained.interactions else (drawn[0], drawn[min(1, len(drawn) - 1)])
    words = f"Expected final score over {', '.join(drawn)}, one column for each model."
    return {
        **found,
        "importance": figure(
            "importance",
            "Bars: share of the variance by hyperparameter; the table below has the numbers.",
            lambda: response.importance_figure(explained),
        ),
        "responses": figure("responses", words, lambda: response.response_figure(result, beliefs, explained, best)),
        "pair": figure(
            "pair",
            f"Contours: expected final score over {pair[0]} and {pair[1]}.",
            lambda: response.pair_figure(result, beliefs, pair, best),
        )
        if pair[0] != pair[1] and all(name in best for name in pair)
        else None,
        "pair_names": pair,
    }


def _with_pairs(agreements: Mapping[str, Sequence[FidelityAgreement]]) -> dict[str, list[FidelityAgreement]]:
    """Agreements by model, without those that have no order to compare."""
    found = {model: [item for item in items if item.agreement.pairs > 1] for model, items in agreements.items()}
    return {model: items for model, items in found.items() if items}


def share_of(study: Study, item: FidelityAgreement) -> str:
    """The share of the horizon at which the first fidelity of an agreement was measured."""
    return text.share(item.first[1] / study.spec.fidelity.horizon_prompts)


def is_address(value: object) -> bool:
    """Whether a fact may become a link."""
    return isinstance(value, str) and re.match(r"https?://[^\s]+$", value) is not None


@dataclass(frozen=True)
class Setting:
    """A row of the table of configurations.

    Attributes:
        range: What was searched; None if it was fixed or left at the trainer's default.
        values: One per row of the final table; None where the configuration lacks it.
        edge: Whether the recommended value lies at the edge of its range.
    """

    name: str
    range: str | None
    values: tuple[Value | None, ...]
    edge: bool


def settings_table(result: SearchResult) -> list[Setting]:
    """Complete configurations side by side, in the order of the final table; searched hyperparameters first."""
    study = result.study
    complete = [study.complete(row.configuration) for row in result.rows]
    known = dict.fromkeys(name for configuration in complete for name in configuration)
    searched = [name for name in study.space if name in known]
    names = [*searched, *(name for name in known if name not in searched)]
    return [
        Setting(
            name,
            study.space[name].describe(text.setting) if name in searched else None,
            tuple(configuration.get(name) for configuration in complete),
            result.recommended is not None and _at_edge(study, name, result.rows[0].configuration),
        )
        for name in names
    ]


def _at_edge(study: Study, name: str, configuration: Configuration) -> bool:
    return name in set(study.space) and name in configuration and study.space[name].at_edge(configuration[name])


def purpose_counts(trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """Number of trials by purpose and state."""
    return {
        purpose: dict(findings.states([trial for trial in trials if trial.purpose == purpose]))
        for purpose in findings.PURPOSES
        if any(trial.purpose == purpose for trial in trials)
    }


def trial_row(trial: Trial) -> dict[str, Any]:
    """What the table of all trials shows of one."""
    suggestion = trial.open_segment.suggestion if trial.open_segment is not None else None
    if suggestion is None and trial.segments:
        suggestion = trial.segments[-1].segment.suggestion
    rate = trial.configuration.get("learning_rate", next(iter(trial.configuration.values()), ""))
    return {
        "trial": trial,
        "sort_value": rate,
        "last": trial.evaluations[-1] if trial.evaluations else None,
        "suggestion": suggestion,
    }


def versions() -> dict[str, str]:
    """Versions of the distributions that matter for a repetition; those not installed are left out."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
