"""The trials of a study for a terminal: one row each where there is room, else two short lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from jfhpo.display.words import duration, show_configuration, show_score, show_value
from jfhpo_core.study.trial import Trial

WIDE = 140
"""Columns from which configurations have a column of their own."""

INDENT = 5


class TrialList:
    """All trials, made to fit the console that prints them.

    Args:
        trials: In the order in which they are shown.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = trials

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from [self._table()] if options.max_width >= WIDE else self._lines()

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD)
        for heading, justify in (
            ("#", "right"), ("purpose", "left"), ("model", "left"), ("state", "left"), ("step", "right"),
            ("score", "right"), ("cost", "right"), ("configuration", "left"),
        ):  # fmt: skip
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for trial in self._trials:
            table.add_row(
                str(trial.number),
                f"{trial.purpose}{f' {trial.label}' if trial.label else ''}",
                trial.model,
                _state(trial),
                f"{trial.step}/{trial.total_steps}",
                _score(trial),
                duration(trial.charge_seconds),
                Text(show_configuration(trial.configuration)),  # values may hold what Rich takes for markup
            )
        return table

    def _lines(self) -> Iterable[RenderableType]:
        short = abbreviations(dict.fromkeys(name for trial in self._trials for name in trial.configuration))
        for trial in self._trials:
            what = f"{trial.label or trial.purpose} on {trial.model}, {_state(trial)}"
            figures = f"{trial.step}/{trial.total_steps}  {_score(trial):>13}  {duration(trial.charge_seconds):>12}"
            line = Table.grid(padding=(0, 1), expand=True)
            line.add_column(width=INDENT - 1, justify="right", no_wrap=True)
            line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            line.add_column(justify="right", no_wrap=True)
            line.add_row(str(trial.number), Text(what), figures)
            yield line
            values = " ".join(f"{short[name]}={_short(value)}" for name, value in trial.configuration.items())
            yield Text(" " * INDENT + values, style="dim", no_wrap=True, overflow="ellipsis")
        if short:
            yield Text(f"\n{', '.join(f'{mark} {name}' for name, mark in short.items())}\n", style="dim")


def abbreviations(names: Iterable[str]) -> Mapping[str, str]:
    """Marks of a few letters for hyperparameters, each its own: initials, with more letters where they meet.

    >>> abbreviations(["learning_rate", "n_samples", "loss_reduction", "seed"])
    {'learning_rate': 'lr', 'n_samples': 'ns', 'loss_reduction': 'lore', 'seed': 's'}
    """
    marks: dict[str, str] = {}
    for name in names:
        parts = name.split("_")
        candidates = ("".join(part[:length] for part in parts) for length in range(1, max(map(len, parts)) + 1))
        numbered = (f"{name}{number}" for number in count(2))
        taken = set(marks.values())
        marks[name] = next(mark for mark in (*candidates, name, next(numbered)) if mark not in taken)
    return marks


def _state(trial: Trial) -> str:
    state = f"{trial.state} ({trial.decision.rule})" if trial.decision else str(trial.state)
    return f"{state}, changed {', '.join(trial.changed)}" if trial.changed else state


def _score(trial: Trial) -> str:
    return show_score(trial.evaluations[-1]) if trial.evaluations else ""


def _short(value: bool | float | str) -> str:
    return f"{value:.2g}" if isinstance(value, float) else show_value(value)
