"""What `jfhpo gc` says about a study's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfhpo_core.errors import SpecError
from jfhpo_core.store.retention import Judgement, size_bytes
from jfhpo_core.trainers.base import TRAININGS

UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def parse_size(text: str) -> int:
    """A size in bytes.

    >>> parse_size("1.5GB"), parse_size("800 mb")
    (1500000000, 800000000)

    Raises:
        SpecError: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?B)", text.strip(), re.IGNORECASE)
    if found is None:
        raise SpecError(f"--limit: {text!r} is no size; write a number with its unit, e.g. 500MB or 2TB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def show_size(count: float) -> str:
    """A size for people.

    >>> show_size(0), show_size(1234), show_size(5.6e10)
    ('0 B', '1.2 KB', '56.0 GB')
    """
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if count >= UNITS[unit]), "B")
    return f"{count / UNITS[unit]:.{0 if unit == 'B' else 1}f} {unit}"


def usage_view(judgements: Sequence[Judgement], log_bytes: int, *, delete: bool) -> RenderableType:
    """A table of all checkpoints with their fate, and what it frees. To be made before anything is deleted."""
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "model", "step", "size", "", "why"):
        table.add_column(name, justify="right" if name in ("step", "size") else "left")
    for judgement in sorted(judgements, key=lambda one: (not one.keep, -one.size_bytes, one.folder)):
        trial = judgement.trial
        table.add_row(
            f"{trial.number:03d}" if trial is not None else judgement.folder.parent.name,
            trial.model if trial is not None else "",
            "" if judgement.step is None else str(judgement.step),
            show_size(judgement.size_bytes),
            "keep" if judgement.keep else Text("delete" if delete else "would go", style="yellow"),
            judgement.why,
        )
    kept = [judgement.folder for judgement in judgements if judgement.keep]
    gone = [judgement.folder for judgement in judgements if not judgement.keep]
    freed = show_size(size_bytes(gone, without=kept))
    what = f"{len(gone)} of {len(judgements)} checkpoints"
    ending = f"{what} deleted, {freed} freed" if delete else f"{what} would go, freeing {freed}; --delete does it"
    logs = f" Logs of runs (`{TRAININGS}/`, never deleted here): {show_size(log_bytes)}." if log_bytes else ""
    return Group(table, Text(f"\n{ending}. Kept: {show_size(size_bytes(kept))}.{logs}"))
