"""The benchmark's figures and tables: plain text for tuning, SVG and Markdown for the docs."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks import analysis, runner
from benchmarks.analysis import GRID, Interval, Results
from benchmarks.landscapes import FEW_TRAININGS, LANDSCAPES, TRAININGS
from benchmarks.markdown import markdown_table
from benchmarks.store import Key, Result

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
PAGE = "optimizer.md"
CURVES = "optimizer-landscapes.svg"
GROUPS = "optimizer-groups.svg"

FIRST_SEED = 1000
"""Seeds below it may have been used for tuning, and are not published."""

SEEN = (1000, 1001, 1002)
"""Seeds whose results led to a change of `jfhpo` afterwards; they are not published either."""

SINGLE_FIDELITY = "gp"
"""Bayesian optimization on the target alone."""

AGREEING = 0.5
"""Landscapes whose proxies rank like the target by this correlation or more are what transfer is for."""

MISLEADING = 0.1
"""On landscapes below this correlation transfer can only do harm."""

AGREE, DISAGREE = f"correlation of {AGREEING} and above", "correlation 0"

COST_AIM = 1 / 3
REGRET_AIM = 1.3

AGREEMENT_SEEDS = 5
"""Instances over which the correlation of a landscape is averaged."""

EVERY = 8
"""Every so many points of the grid of costs are drawn."""

COLOURS = {
    "jfhpo": "#d1242f",
    "paper": "#8250df",
    "random": "#8c959f",
    "gp": "#0969da",
    "tpe": "#54aeff",
    "smac3": "#0a3069",
    "successive-halving": "#7d4e00",
    "asha": "#bf8700",
    "hyperband": "#d4a72c",
    "bohb": "#1a7f37",
    "dehb": "#4ac26b",
    "fastbo": "#bf3989",
}
"""Blues search the target alone, browns halve, greens halve with a model."""

OTHER_COLOUR = "#57606a"

INTRODUCTION = f"""\
A run searches one landscape with one seed for the price of {TRAININGS} full runs of the target ({FEW_TRAININGS} on
`distant`). All strategies get the same space, the same cost law, the same credit for checkpoints and the same seeds.
The incumbent is, for all of them, what the search would deliver if it ended: the configuration that the strategy ranks
first (before there is one, the trainer's defaults), at the cost spent plus what its full run on the target still
needs. It counts with its noise-free score. Regret is what that lacks to the best score in the space.
Intervals are 95 % bootstrap intervals over seeds."""

BEFORE = """\
From [decision 23](../decisions/0023-scores-without-units.md) on the optimizer was changed for [data that nobody here
made](foreign.md), and got better there. Here it got worse: before, on the seeds 1003 to 1022, `jfhpo` had the lowest
mean regret on eleven of twelve landscapes, and 0.1958 on average where `fastbo` had 0.3105. It ran 87 segments of a
search on proxies then. Why it got worse was not found out. On the recorded RL tables it is told [what is
shipped](prior.md), less what was recorded of the same task; the others are not."""

LIMITS = """\
Rank correlations are over random configurations at full length, collapsed runs included. The regret of the proxy's best
is what the configuration lacks on the target that is truly the best of 1024 random ones on the proxy, without noise:
where it is above the best peer's final regret, no search of that proxy alone comes there, and what is missing has to be
learned on the target, at the target's price."""

COST_RATIO = """\
Regrets that are averaged over several landscapes are divided by the mean regret of the defaults on each landscape.
Cost ratio: cost at which `{own}` first reaches the best peer's final mean regret, over the cost at which that peer
does; `inf` where it never does."""

WHY_NOT_LESS = """\
What keeps the cost ratio up: a configuration is delivered only with a full run on the target, a twentieth of the
budget each, and what the proxies say leads near the optimum and not to it (`regret of the proxy's best` below). The
last part of the way is learned on the target, where a model of proxies saves little."""

STYLE = {
    "svg.hashsalt": "jfhpo",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eaeef2",
}


def text_table(results: Results, own: str, seeds: Sequence[int] | None = None) -> str:
    """Mean final regret per strategy and landscape over the seeds that all have done, and `own`'s cost ratios."""
    names = list(results)
    if not names:
        return "no results"
    rows = [["landscape", "seeds", *names, "best peer: cost ratio"]]
    everything: list[Key] = []
    for landscape in (*LANDSCAPES, None):
        keys = analysis.common_keys(results, names, [landscape]) if landscape else everything
        keys = [key for key in keys if seeds is None or key[1] in seeds]
        if not keys:
            continue
        finals = [f"{analysis.final_regret(results, name, keys).value:.4f}" for name in names]
        row = [landscape or "all", str(len(keys)), *finals]
        if own in names and len(names) > 1:
            peer = analysis.best_peer(results, own, names, keys)
            row.append(f"{peer}: {_text(analysis.cost_ratio(results, own, peer, keys), 2)}")
        rows.append(row)
        everything += keys if landscape else []
    if everything:
        ranks = analysis.ranks(results, names, everything)
        rows.append(["mean rank", "", *(f"{ranks[name]:.2f}" for name in names)])
        for label, figures in _per_run().items():
            rows.append([label, "", *(f"{_mean(results, name, everything, figures):.2f}" for name in names)])
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)


@dataclass(frozen=True)
class Evidence:
    """Everything that the page shows.

    Attributes:
        results: Of the published seeds.
        own: The strategy that is compared with all others.
        timing: What `python -m benchmarks timing` has found, as a sentence; None if it has not run.
    """

    results: Results
    own: str
    timing: str | None = None

    @cached_property
    def landscapes(self) -> list[str]:
        """Those for which there are results of `own`."""
        return [name for name in LANDSCAPES if any(key[0] == name for key in self.results[self.own])]

    @cached_property
    def agreements(self) -> dict[str, dict[str, float]]:
        """Rank correlation of each proxy with the target, by landscape."""
        found = {}
        for name in self.landscapes:
            measured = [LANDSCAPES[name](FIRST_SEED + number).agreement() for number in range(AGREEMENT_SEEDS)]
            found[name] = {proxy: float(np.mean([one[proxy] for one in measured])) for proxy in measured[0]}
        return found

    @cached_property
    def proxy_regrets(self) -> dict[str, dict[str, float]]:
        """Mean regret of what is truly the best on each proxy, by landscape."""
        found = {}
        for name in self.landscapes:
            measured = [LANDSCAPES[name](FIRST_SEED + number).proxy_regret() for number in range(AGREEMENT_SEEDS)]
            found[name] = {proxy: float(np.mean([one[proxy] for one in measured])) for proxy in measured[0]}
        return found

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Landscapes by what their proxies are worth."""
        means = {name: float(np.mean(list(proxies.values()))) for name, proxies in self.agreements.items()}
        groups = {
            AGREE: [name for name in means if means[name] >= AGREEING],
            DISAGREE: [name for name in means if abs(means[name]) < MISLEADING],
            "all landscapes": list(means),
        }
        return {label: names for label, names in groups.items() if names}

    def strategies(self, landscapes: Sequence[str]) -> list[str]:
        """Those with results on all of these landscapes, `own` first."""
        having = [
            name
            for name, by_key in self.results.items()
            if set(landscapes) <= {key[0] for key in by_key} and name != self.own
        ]
        return [self.own, *having]

    def keys(self, landscapes: Sequence[str]) -> list[Key]:
        """Runs that these strategies share on these landscapes."""
        return analysis.common_keys(self.results, self.strategies(landscapes), landscapes)


def write(results: Results, own: str, folder: Path = EVIDENCE, timing: str | None = None) -> None:
    """Write the figures and the page of the published seeds; see `Evidence`."""
    published = {
        name: {key: result for key, result in by_key.items() if key[1] >= FIRST_SEED and key[1] not in SEEN}
        for name, by_key in results.items()
    }
    evidence = Evidence({name: by_key for name, by_key in published.items() if by_key}, own, timing)
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        panels = {name: [name] for name in evidence.landscapes}
        _save(draw(evidence, panels, columns=3), folder / CURVES)
        _save(draw(evidence, evidence.groups, columns=len(evidence.groups)), folder / GROUPS)
    (folder / PAGE).write_text(page(evidence), encoding="utf-8")


def draw(evidence: Evidence, panels: dict[str, list[str]], columns: int) -> Figure:
    """Mean regret against cost, one panel per title and its landscapes."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Artist] = {}
    for axis, (title, landscapes) in zip(axes, panels.items(), strict=False):
        handles |= _panel(axis, evidence, landscapes)
        axis.set_title(title, fontsize=9, loc="left")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("cost, in trainings of the target")
    for axis in axes[::columns]:
        axis.set_ylabel("mean regret")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=7, frameon=False)
    return figure


def _panel(axis: Axes, evidence: Evidence, landscapes: Sequence[str]) -> dict[str, Artist]:
    """Curves of all strategies with a band for `own`; returns the lines by name."""
    keys = evidence.keys(landscapes)
    lines: dict[str, Artist] = {}
    costs = GRID[::EVERY]
    for name in reversed(evidence.strategies(landscapes)):
        curve, low, high = analysis.mean_curve(evidence.results, name, keys)
        mine = name == evidence.own
        colour = COLOURS.get(name, OTHER_COLOUR)
        (lines[name],) = axis.plot(
            costs, np.round(curve[::EVERY], 5), color=colour, linewidth=2.0 if mine else 1.0,
            linestyle="--" if name == "random" else "-", zorder=3 if mine else 2,
        )  # fmt: skip
        if mine:
            axis.fill_between(costs, low[::EVERY], high[::EVERY], color=colour, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlim(0, TRAININGS)
    return dict(reversed(lines.items()))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def page(evidence: Evidence) -> str:
    """The Markdown page."""
    results, own = evidence.results, evidence.own
    seeds = {name: sorted(key[1] for key in evidence.keys([name])) for name in evidence.landscapes}
    sections = [
        "# The optimizer, measured",
        "Generated by `python -m benchmarks report`; do not edit.",
        INTRODUCTION,
        BEFORE,
        "## Averages",
        f"![Mean regret against cost, averaged over groups of landscapes]({GROUPS})",
        _comparison(evidence, evidence.groups),
        COST_RATIO.format(own=own),
        *_aims(evidence),
        "## Each landscape",
        f"![Mean regret against cost on each landscape]({CURVES})",
        _comparison(evidence, {name: [name] for name in evidence.landscapes}),
        "## What the landscapes are",
        markdown_table(
            ["landscape", "what it is", "rank correlation with the target", "regret of the proxy's best", "seeds"],
            [
                [
                    name,
                    _purpose(name),
                    ", ".join(f"{proxy} {value:.2f}" for proxy, value in evidence.agreements[name].items()),
                    ", ".join(f"{proxy} {value:.3f}" for proxy, value in evidence.proxy_regrets[name].items()),
                    _range(seeds[name]),
                ]
                for name in evidence.landscapes
            ],
        ),
        LIMITS,
        "## Regret at the end",
        _finals(evidence),
        f"## Wins and losses of `{own}`",
        "Runs that end with a lower, an equal and a higher regret than the peer's run on the same instance.",
        _wins(evidence),
        "## Ranks, seconds, and what was trained",
        _behaviour(evidence),
        "With 8 hyperparameters, 3 sizes and 15 levels: " + (evidence.timing or "not timed") + ".",
        "## How it was made",
        _provenance(results),
    ]
    return "\n\n".join(sections) + "\n"


def _comparison(evidence: Evidence, panels: dict[str, list[str]]) -> str:
    """`own` against the best peer and against single-fidelity Bayesian optimization."""
    results, own, rows = evidence.results, evidence.own, []
    for title, landscapes in panels.items():
        names, keys = evidence.strategies(landscapes), evidence.keys(landscapes)
        if len(names) < 2 or not keys:
            continue
        peer = analysis.best_peer(results, own, names, keys)
        single = "-"
        if SINGLE_FIDELITY in names:
            single = _text(analysis.regret_ratio(results, own, SINGLE_FIDELITY, keys), 2)
        rows.append(
            [
                title,
                str(len(keys)),
                _text(analysis.final_regret(results, own, keys), 4),
                peer,
                _text(analysis.final_regret(results, peer, keys), 4),
                _text(analysis.cost_ratio(results, own, peer, keys), 2),
                single,
            ]
        )
    head = ["", "runs", f"final regret of `{own}`", "best peer", "its final regret", "cost ratio"]
    return markdown_table([*head, f"regret over that of `{SINGLE_FIDELITY}`"], rows)


def _aims(evidence: Evidence) -> list[str]:
    """What was asked of `own`, and whether it holds."""
    results, own, lines, why = evidence.results, evidence.own, list[str](), list[str]()
    for title, landscapes in evidence.groups.items():
        names, keys = evidence.strategies(landscapes), evidence.keys(landscapes)
        if not keys or SINGLE_FIDELITY not in names:
            continue
        if title == AGREE:
            peer = analysis.best_peer(results, own, names, keys)
            found, limit = analysis.cost_ratio(results, own, peer, keys), COST_AIM
            lines.append(f"- {title}: the best peer's final regret for at most {limit:.2f} of that peer's cost")
        elif title == DISAGREE:
            found, limit = analysis.regret_ratio(results, own, SINGLE_FIDELITY, keys), REGRET_AIM
            lines.append(f"- {title}: at most {limit:g} times the regret of single-fidelity Bayesian optimization")
        else:
            continue
        met = found.value <= limit
        lines[-1] += f". {'Met' if met else '**Missed**'}: {_text(found, 2)}."
        if title == AGREE and not met:
            why = [WHY_NOT_LESS]
    return ["What was asked of it:", "\n".join(lines), *why] if lines else []


def _finals(evidence: Evidence) -> str:
    names = evidence.strategies([])
    rows = []
    for landscape in evidence.landscapes:
        keys, here = evidence.keys([landscape]), evidence.strategies([landscape])
        finals = {name: _text(analysis.final_regret(evidence.results, name, keys), 4) for name in here if keys}
        rows.append([landscape, *(finals.get(name, "-") for name in names)])
    return markdown_table(["", *names], rows)


def _wins(evidence: Evidence) -> str:
    rows = []
    for peer in evidence.strategies([])[1:]:
        row, total = [peer], np.zeros(3, dtype=int)
        for landscape in evidence.landscapes:
            keys = analysis.common_keys(evidence.results, [evidence.own, peer], [landscape])
            counts = analysis.wins(evidence.results, evidence.own, peer, keys)
            total += counts
            row.append(" / ".join(map(str, counts)) if keys else "-")
        rows.append([*row, " / ".join(map(str, total))])
    return markdown_table(["", *evidence.landscapes, "all"], rows)


def _behaviour(evidence: Evidence) -> str:
    landscapes = evidence.landscapes
    names, keys = evidence.strategies(landscapes), evidence.keys(landscapes)
    ranks = analysis.ranks(evidence.results, names, keys)
    rows = [
        [
            name,
            f"{ranks[name]:.2f}",
            *(f"{_mean(evidence.results, name, keys, figure):.3g}" for figure in _per_run().values()),
        ]
        for name in sorted(names, key=lambda name: ranks[name])
    ]
    return markdown_table(["", "mean rank", *_per_run()], rows)


def _per_run() -> dict[str, str]:
    """Columns that are means over runs, by title: attributes of `Result`."""
    return {
        "regret of the recommendation": "recommended_regret",
        "CPU seconds per suggestion": "cpu_seconds_per_suggestion",
        "suggestions": "suggestions",
        "segments on proxies": "proxy_segments",
        "infeasible segments": "infeasible",
    }


def _mean(results: Results, name: str, keys: Sequence[Key], attribute: str) -> float:
    return float(np.mean([getattr(results[name][key], attribute) for key in keys]))


def _provenance(results: Results) -> str:
    """Machine, commands and commits."""
    return (
        f"{environment()} CPU seconds were taken beside other work on that machine. Durations of trainings are "
        "simulated.\n\n"
        "    python -m benchmarks run --strategies ... --seeds 1023:1028 --workers 2\n"
        "    python -m benchmarks report\n\n"
    ) + commits(results)


def environment() -> str:
    """A sentence on versions and machine."""
    versions = f"Python {platform.python_version()}, PyTorch {_version('torch')}, BoTorch {_version('botorch')}"
    return f"{versions}; {machine()}; one thread per run."


def commits(results: Results) -> str:
    """Table of the code that made the results, with a sentence on how to read it."""
    rows = []
    for name, by_key in sorted(results.items()):
        stale = sum(_is_stale(result) for result in by_key.values())
        shown = ", ".join(sorted({result.commit for result in by_key.values()}))
        rows.append([name, str(len(by_key)), shown, str(stale)])
    return (
        "A commit with a plus sign had changes on top. Out of date means that strategy or landscape have changed "
        "since; `run --redo` makes these again.\n\n"
    ) + markdown_table(["strategy", "runs", "commits", "out of date"], rows)


def _is_stale(result: Result) -> bool:
    return result.stamp != runner.stamp(
        result.base_strategy, result.settings, result.landscape, result.seed, result.changes
    )


def machine() -> str:
    """Processor and number of cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _purpose(landscape: str) -> str:
    """First line of the docstring of what makes a landscape."""
    builder = LANDSCAPES[landscape]
    documented = getattr(builder, "func", builder).__doc__ or ""
    return documented.splitlines()[0]


def _range(seeds: Sequence[int]) -> str:
    """'1000-1019 (20)'."""
    return f"{seeds[0]}-{seeds[-1]} ({len(seeds)})" if seeds else "none"


def _text(interval: Interval, digits: int) -> str:
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
