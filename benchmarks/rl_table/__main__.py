"""The commands of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PARTS = Path(__file__).parent / "parts"
"""Finished trainings; not in git."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def generate(
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 2,
    parts: Annotated[Path, typer.Option(help="Folder of finished trainings.")] = PARTS,
) -> None:
    """Make every training of the plan that is missing."""
    from benchmarks.rl_table.generate import generate as make

    make(parts, workers)


@app.callback()
def _table() -> None:
    """Keep `generate` a command while it is the only one."""


if __name__ == "__main__":
    app()
