"""Figures of the recorded table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

COLORS = {"s": "#7fb2d9", "sm": "#2f77b0", "m": "#143968"}
"""Of the sizes, light to dark."""

WIDTH = 7.2
"""Inches, of every figure."""

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "jfhpo",
}
"""Text stays text, and equal figures give equal files."""

Pairs = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]]
"""By task and proxy: scores on the proxy, scores on the target, learning rates."""


def draw_sizes(pairs: Pairs, target: str, path: Path) -> None:
    """Final scores on each proxy against those on the target, coloured by learning rate."""
    proxies = list(next(iter(pairs.values())))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9 * len(pairs)), layout="constrained")
        grid = figure.subplots(len(pairs), len(proxies), squeeze=False, sharex=True, sharey=True)
        rates = [rate for by_proxy in pairs.values() for _, _, all_rates in by_proxy.values() for rate in all_rates]
        norm = LogNorm(min(rates), max(rates))
        for row, (task, by_proxy) in zip(grid, pairs.items(), strict=True):
            for axes, (proxy, (x, y, learning_rates)) in zip(row, by_proxy.items(), strict=True):
                axes.axline((0, 0), slope=1, color="#c5ccd4", linewidth=0.8, zorder=0)
                axes.scatter(x, y, c=learning_rates, cmap="viridis", norm=norm, s=14)
                axes.set_title(f"{task}: {proxy} and {target}", fontsize=9, loc="left")
                axes.set_xlabel(f"final score on {proxy}")
                axes.set_ylabel(f"final score on {target}")
        figure.colorbar(ScalarMappable(norm, "viridis"), ax=grid, label="learning rate", shrink=0.6)
        _save(figure, path)


def draw_rates(points: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], path: Path) -> None:
    """Final score against learning rate; `points` by task and size: learning rates, scores."""
    with mpl.rc_context(STYLE):
        figure, row = _row(len(points))
        for axes, (task, by_size) in zip(row, points.items(), strict=True):
            for size, (rates, final) in by_size.items():
                axes.plot(rates, final, "o", markersize=3, alpha=0.7, color=COLORS[size], label=size)
            axes.set_xscale("log")
            axes.set_xlabel("learning rate")
            axes.set_title(task, fontsize=9, loc="left")
        row[0].set_ylabel("final score")
        row[-1].legend(frameon=False, title="size")
        _save(figure, path)


def draw_steps(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Rank correlation with the final score, at equal distances up to the horizon; `curves` by task and size."""
    with mpl.rc_context(STYLE):
        figure, row = _row(len(curves))
        for axes, (task, by_size) in zip(row, curves.items(), strict=True):
            for size, values in by_size.items():
                shares = np.arange(1, len(values) + 1) / len(values)
                axes.plot(shares, values, marker="o", markersize=3, color=COLORS[size], label=size)
            axes.set_ylim(top=1.02)
            axes.set_xlabel("share of the horizon")
            axes.set_title(task, fontsize=9, loc="left")
        row[0].set_ylabel("Spearman's rho with the end")
        row[-1].legend(frameon=False, title="size")
        _save(figure, path)


def _row(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    grid: Any = figure.subplots(1, count, squeeze=False, sharey=True)
    return figure, list(grid[0])


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
