"""The recorded table of RL trainings: making it, and reading it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PARTS = Path(__file__).parent / "parts"
"""Finished trainings; not in git: on a new machine they are taken from the table."""

DATA = Path(__file__).parent / "data"
"""The table."""

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
"""Where pages and figures are written."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Parts = Annotated[Path, typer.Option(help="Folder of finished trainings.")]
Data = Annotated[Path, typer.Option(help="Folder of the table.")]
Out = Annotated[Path, typer.Option(help="Folder for the page and its figures.")]


@app.command()
def generate(
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 2,
    parts: Parts = PARTS,
    data: Data = DATA,
) -> None:
    """Make every training of the plan that is missing (hours; interrupt it and run it again: it goes on)."""
    from benchmarks.rl_table.generate import generate as make
    from benchmarks.rl_table.pack import unpack

    unpack(data, parts)
    make(parts, workers)


@app.command()
def pack(parts: Parts = PARTS, data: Data = DATA) -> None:
    """Write the finished trainings as Parquet, with a data card."""
    from benchmarks.rl_table.pack import pack as write

    write(parts, data)


@app.command()
def transfer(data: Data = DATA, out: Out = EVIDENCE) -> None:
    """How small models and short runs rank configurations, and what it costs to trust them."""
    from benchmarks.rl_table.transfer import write

    write(data, out)


@app.command()
def rules(data: Data = DATA, out: Out = EVIDENCE) -> None:
    """What each stopping rule would have done to the recorded trainings: errors and compute saved."""
    from benchmarks.rl_table.rules_page import write

    write(data, out)


@app.command()
def surrogate(data: Data = DATA, out: Out = EVIDENCE) -> None:
    """How far the replay trainer's surrogate is off on configurations that it has not seen."""
    from benchmarks.rl_table.surrogate import write

    write(data, out)


@app.command()
def optima(data: Data = DATA) -> None:
    """Write the best recorded runs into what the optimizer knows before a study begins."""
    from benchmarks.rl_table.optima import write

    write(data)


if __name__ == "__main__":
    app()
