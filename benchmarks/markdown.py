"""Tables of the pages that the benchmark writes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
