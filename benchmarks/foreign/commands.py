"""The command line of the foreign benchmark: `python -m benchmarks foreign`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import runner, store
from benchmarks.foreign import report, tables
from benchmarks.foreign.settings import BUDGETS, RECORDED, SETTINGS, TUNING, UNTOUCHED
from benchmarks.landscapes import RECIPE_AWARE
from benchmarks.report import EVIDENCE

app = typer.Typer(no_args_is_help=True, help="Recorded runs that nobody here made: scan-bench's, and the RL tables.")

HALVING_ONLY = ("dehb",)
"""Strategies that do not run on settings without curves: they need two rungs."""

RESULTS = store.RESULTS / "foreign"
"""Where published results lie."""

Folder = Annotated[Path, typer.Option("--results", help="Folder of the results.")]
Names = Annotated[str, typer.Option(help="'tuning', 'untouched', or names, with commas.")]


@app.command()
def fetch() -> None:
    """Download the tables into a folder that git ignores."""
    tables.fetch()
    print(f"{', '.join(tables.FILES)} of {tables.PACKAGE} are in {tables.CACHE}")


@app.command()
def run(
    strategy: Annotated[str, typer.Option(help="Names, with commas.")],
    settings: Names = "tuning",
    budget: Annotated[
        int | None, typer.Option(min=1, help="In full runs of the target; None: 3, 6, 10 and 20 for jfhpo, else 20.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="N (1 to N), or FROM:TO (TO excluded). From 2001 on: to publish.")] = "5",
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
    redo: Annotated[bool, typer.Option(help="Replace results that older code has made.")] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, of the strategy.")] = None,
    label: Annotated[str | None, typer.Option(help="Report the one strategy under this name.")] = None,
    final: Annotated[bool, typer.Option(help="Let jfhpo run on untouched settings: the final measurement.")] = False,
    results: Folder = RESULTS,
) -> None:
    """Do the runs that are missing, then print regrets beside those of the peers on the same seeds.

    Peers do not know the budget: one run with the largest says what they deliver at every cost.
    """
    strategies, names = [item for item in strategy.split(",") if item], _settings(settings)
    given = runner.parse_settings(setting or ())
    if (given or label) and len(strategies) != 1:
        raise typer.BadParameter("--set and --label make a variant of one strategy: name that one")
    if given and label is None:
        raise typer.BadParameter("--set makes a variant of a strategy: give it a --label")
    held = [name for name in names if name in UNTOUCHED]
    if held and not final and any(item in RECIPE_AWARE for item in strategies):
        raise typer.BadParameter(
            f"{held[0]} is untouched: jfhpo runs on it only for the final measurement, and is not changed after it. "
            "If this is that measurement, add --final"
        )
    runs = [
        runner.Run(item, f"{name}@{cost}", seed, given, label or item)
        for item in strategies
        for name in names
        if item not in HALVING_ONLY or name in RECORDED or SETTINGS[name].rungs > 1
        for cost in ([budget] if budget else BUDGETS if item in RECIPE_AWARE else BUDGETS[-1:])
        for seed in _seeds(seeds)
    ]
    failed = runner.run(runs, results, workers, redo)
    found = store.load_all(results)
    for cost in [budget] if budget else BUDGETS:
        print(report.text_table(found, names, cost, label or strategies[0], _seeds(seeds)))
    if failed:
        raise typer.Exit(1)


@app.command()
def table(
    settings: Names = "tuning",
    budget: Annotated[int, typer.Option(min=1, help="In full runs of the target.")] = 10,
    own: Annotated[str, typer.Option(help="Strategy that the seeds are taken from.")] = "jfhpo",
    seeds: Annotated[str, typer.Option(help="N (1 to N), or FROM:TO (TO excluded).")] = "5",
    results: Folder = RESULTS,
) -> None:
    """Print mean regrets so far."""
    print(report.text_table(store.load_all(results), _settings(settings), budget, own, _seeds(seeds)))


@app.command("report")
def write_report(
    own: Annotated[str, typer.Option(help="Strategy that is compared with the others.")] = "jfhpo",
    folder: Annotated[Path, typer.Option("--to", help="Where figure and page go.")] = EVIDENCE,
    results: Folder = RESULTS,
) -> None:
    """Write the figure and the page of the docs, from seeds that were not used for tuning."""
    report.write(store.load_all(results), own, folder)


def _settings(text: str) -> list[str]:
    groups = {"tuning": [*TUNING, *RECORDED], "untouched": list(UNTOUCHED)}
    names = [name for part in text.split(",") if part for name in groups.get(part, [part])]
    unknown = [name for name in names if name not in (*SETTINGS, *RECORDED)]
    if unknown:
        raise typer.BadParameter(f"no setting {unknown[0]!r}; there are {', '.join((*SETTINGS, *RECORDED))}")
    return names


def _seeds(text: str) -> list[int]:
    low, colon, high = text.partition(":")
    return list(range(int(low), int(high))) if colon else list(range(1, int(low) + 1))
