"""The foreign benchmark's figures and tables: plain text for tuning, SVG and Markdown for the docs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.analysis import Results
from benchmarks.foreign import figures


def text_table(results: Results, settings: Sequence[str], cost: float, own: str, seeds: Sequence[int]) -> str:
    """Mean regrets ± standard errors at a cost by setting, those of `own` first, each over the seeds that it has done.

    The last column is `own`'s mean over that of the best peer. Last rows: means over the settings that every strategy
    has done, as multiples of the recipe's regret.
    """
    names = [own, *(name for name in results if name != own)]
    rows = [["", "recipe", *names, "own / best peer"]]
    shares: dict[str, list[float]] = {name: [] for name in names}
    for setting in settings:
        found = {name: figures.mean_regret(results, name, setting, cost, seeds) for name in names}
        some = next((figures.runs(results, name, setting, cost, seeds) for name in names if found[name]), [])
        if not some:
            continue
        recipe = figures.recipe_regret(some[0])
        for name, mean in found.items():
            if mean is not None:
                shares[name].append(mean.value / recipe)
        peers = [mean.value for name, mean in found.items() if name != own and mean is not None]
        mine = found[own]
        ratio = f"{mine.value / min(peers):.2f}" if mine and peers else "-"
        cells = [f"{mean} ({mean.seeds})" if mean else "-" for mean in found.values()]
        rows.append([setting, f"{recipe:.4f}", *cells, ratio])
    if len(rows) == 1:
        return f"no results at a cost of {cost:g} full runs of the target"
    complete = [name for name in names if len(shares[name]) == len(rows) - 1]
    means = [f"{np.mean(shares[name]):.3f}" if name in complete else "-" for name in names]
    rows.append(["mean regret / recipe's", "1", *means, ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"Regret at a cost of {cost:g} full runs of the target, mean ± standard error (seeds):", *lines])
