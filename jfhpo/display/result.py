"""What came of a study: its trials, the recommendation with what it is measured against, and where to look next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfhpo.display.words import duration, show_value
from jfhpo.study_facts import counts
from jfhpo_core.report.findings import (
    caveats,
    contrasts,
    interval,
    interval_text,
    metric_text,
    score_text,
    search_trial_ratio,
    verdict,
)
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.metrics import Limit

if TYPE_CHECKING:
    from jfhpo.session import StudyOutcome

SHORTEST_WAIT_SECONDS = 1.0
LISTED_TRIED = 12
MLFLOW_UI = "http://127.0.0.1:5000/"
"""Where `mlflow ui` listens."""


def comparison_table(result: SearchResult) -> Table:
    """The recommendation and what it is measured against."""
    title = f"Held-out score on {result.study.ladder.target.name}, full length"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading, justify in (
        ("", "left"), ("score", "right"), ("95 % interval", "right"), ("seeds", "right"),
        ("recommended is ahead by", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    secondary = result.study.spec.secondary_metrics
    for name in secondary:
        table.add_column(name, justify="right")
    ahead = {contrast.label: contrast for contrast in contrasts(result)}
    for row in result.rows:
        contrast = ahead.get(row.label)
        least, most = interval(contrast.difference, contrast.standard_error) if contrast else (0.0, 0.0)
        table.add_row(
            row.label,
            score_text(row),
            interval_text(row),
            str(row.seeds),
            f"{contrast.difference:+.3f} ({least:+.3f} to {most:+.3f})" if contrast else "",
            *(_metric(name, row.measured, row.broken) if row.seeds else "" for name in secondary),
        )
    return table


def _metric(name: str, measured: Mapping[str, float], broken: Sequence[Limit]) -> str:
    """A metric's value, marked where it breaks a constraint."""
    return f"{metric_text(name, measured)}{' (breaks)' if any(limit.metric == name for limit in broken) else ''}"


def tried_table(result: SearchResult) -> Table | None:
    """What there was to choose from by score and secondary metrics, the front marked; None without such metrics.

    Beyond `LISTED_TRIED` configurations those on the front and the best others are listed.
    """
    secondary = result.study.spec.secondary_metrics
    if not secondary or not result.tried:
        return None
    limits = ", ".join(map(str, result.study.spec.limits))
    table = Table(
        box=SIMPLE_HEAD,
        title=f"Configurations with full runs on {result.study.ladder.target.name}{f'; {limits}' if limits else ''}",
        title_justify="left",
    )
    table.add_column("trial", justify="right")
    table.add_column("score", justify="right")
    for name in secondary:
        table.add_column(name, justify="right")
    table.add_column("")
    by_need = sorted(result.tried, key=lambda item: (not item.on_front, bool(item.broken)))[:LISTED_TRIED]
    for item in (one for one in result.tried if one in by_need):
        table.add_row(
            str(item.trial),
            f"{item.score:.3f} ± {item.standard_error:.3f}",
            *(_metric(name, item.measured, item.broken) for name in secondary),
            "on the front" if item.on_front else "",
        )
    return table


def result_view(result: SearchResult) -> Group:
    """The final table with what it does and does not say."""
    parts: list[RenderableType] = []
    if not result.complete:
        parts.append(Text("The study is not finished; these are its figures so far.", style="yellow"))
    if result.recommended is not None:
        grid = Table.grid(padding=(0, 2))
        for name, value in result.study.complete(result.recommended.configuration).items():
            searched = name in result.recommended.configuration
            grid.add_row(Text(name, style="bold" if searched else "dim"), Text(show_value(value)))
        parts += [Text("Recommended configuration (searched in bold, fixed or default below)"), grid]
    if result.rows:
        parts.append(comparison_table(result))
    if (table := tried_table(result)) is not None:
        parts.append(table)
    parts.append(Text(verdict(result)))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    if result.recommended is not None:
        item = result.recommended
        belief = f"{item.mean:.3f} ± {item.standard_deviation:.3f} for the recommendation"
        if item.respected is not None:
            belief += f", which respects the constraints with a probability of {item.respected:.0%}"
        facts.add_row("model's belief", belief)
    ratio = search_trial_ratio(result)
    if ratio is not None:
        facts.add_row(
            "cost per trial",
            f"{duration(ratio[0])} on average against {duration(ratio[1])} for a full target trial "
            f"({ratio[0] / ratio[1]:.0%})",
        )
    budget = result.study.spec.budget
    facts.add_row("search trials", counts(result.study, result.trials).sentence())
    facts.add_row(
        "search spent",
        f"{duration(result.spent_seconds)} of {duration(budget.device_seconds)}{budget.in_money(result.spent_seconds)}",
    )
    waits = [(part.waiting_seconds, trial.number) for trial in result.trials for part in trial.segments]
    if waits and max(waits)[0] >= SHORTEST_WAIT_SECONDS:
        longest, number = max(waits)
        total = duration(sum(seconds for seconds, _ in waits))
        facts.add_row("waited for devices", f"{total} in all, the longest {duration(longest)} (#{number})")
    parts += [Text(), facts]
    parts += [Text(f"Note: {note}", style="dim") for note in caveats(result)]
    return Group(*parts)


def server_of(url: str | None) -> str:
    """Address of the MLflow server of a page; without one, that of `mlflow ui`."""
    return MLFLOW_UI if url is None else url.partition("#")[0]


def next_steps(outcome: StudyOutcome) -> dict[str, str]:
    """Where to look next: what to do, and by which command, file or address."""
    return {
        "browse": outcome.url or f"mlflow ui --backend-store-uri {outcome.tracking_uri}",
        "trials": f"{server_of(outcome.url)}{outcome.page}",
        "report": str(outcome.report),
        "model": f"{outcome.model_uri or 'none registered'}, {outcome.model_note}",
    }
