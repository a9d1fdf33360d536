"""Tables of the pages that the benchmark writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def joined(parts: Iterable[str]) -> str:
    """Parts of a sentence: 'a', 'a and b', 'a, b and c'."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


BEFORE_REWRITE = (
    "**Measured with the optimizer as it was before 2026-11-29** (decisions "
    "[23](../decisions/0023-scores-without-units.md) and [24](../decisions/0024-stopping-on-the-target.md)), and not "
    "again since. What the present one does is measured on [foreign data](foreign.md)."
)
"""Stands on pages whose results are older than the optimizer; to be removed with the next measurement."""


def mean_text(values: NDArray[np.floating]) -> str:
    """Mean and standard error of values, one for each seed."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{values.mean():.4f} ± {error:.4f}"
