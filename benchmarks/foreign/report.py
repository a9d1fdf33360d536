"""The foreign benchmark's figures and tables: plain text for tuning, SVG and Markdown for the docs."""

from __future__ import annotations

import math
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
from scipy.stats import qmc, spearmanr

from benchmarks.analysis import Interval, Results
from benchmarks.foreign import figures, tables
from benchmarks.foreign.settings import (
    BUDGETS,
    PAIRS,
    RECORDED,
    SEEN,
    SETTINGS,
    TUNING,
    UNTOUCHED,
    surface,
)
from benchmarks.foreign.surface import Setting
from benchmarks.markdown import markdown_table
from benchmarks.report import COLOURS, EVIDENCE, OTHER_COLOUR, STYLE, commits, environment

PAGE = "foreign.md"
CURVES = "foreign-curves.svg"

FIRST_SEED = 2001
"""Seeds below it are for tuning, and are not published."""

GROUPS = {"tuning": TUNING, "untouched": UNTOUCHED, "recorded RL runs": RECORDED}
"""Settings by what the optimizer's makers have seen of them."""

COSTS = np.arange(0, BUDGETS[-1] + 0.5, 0.5)
"""Costs at which curves are drawn, in full runs of the target."""

WORST = 4
"""Curves are cut off above this multiple of the recipe's regret."""

AIM, MEAN_AIM = 1.05, 0.67
"""What is asked of the ratio to the best peer on each setting, and of its mean."""

TOP = 0.05
"""Share of random configurations that count as the target's good ones."""

NEAR_SIZE, NEAR_LENGTH = math.log10(2), math.log10(4)
"""Recorded runs are near a target within these factors of its parameters and its length, in decades."""

INTRODUCTION = """\
What `jfhpo` and its peers find on data that nobody here made: recorded runs of
[ScAn-Bench](https://pypi.org/project/scan-bench/) (MIT licence; A. Sermaxhaj et al., NeurIPS 2026), in which model
size, length and hyperparameters vary together. Nothing of the data lies in the repository; `python -m benchmarks
foreign fetch` downloads it. Between recorded runs their losses are interpolated, see
[below](#how-good-the-interpolation-is). The score is the negative loss on held-out data; a run costs parameters times
tokens; budgets are in full runs of the target. The recorded RL runs of [this project](replay.md) stand beside them.

The settings come in pairs of one kind, one of each for tuning, one untouched: `jfhpo` runs on that only for final
measurements. `{seen}` had been looked at before. Of the recorded RL runs two of three have served for tuning. Seeds
from {first} on are published; they draw the noise of evaluations and the strategy's choices, on the same landscape.

The untouched half has been measured four times, each time with other seeds: before [decision
29](../decisions/0029-comparable-runs.md) (2001 to 2010; on average 0.71, 0.49 and 0.36 of the recipe's regret at a
cost of 3, 6 and 10), after its points 1 to 5 (2011 to 2015; 0.77, 0.47 and 0.36), after point 6 and [decision
31](../decisions/0031-arch.md) (2016 to 2020; 0.47, 0.37 and 0.31), and after [decision
33](../decisions/0033-what-is-believed.md) (2036 to 2040), which is what its rows show; those of the tuning half are
from before decision 33. The others' rows are over all of their published seeds. On 2036 to 2040 alone, at a cost of
3, 6, 10 and 20, `jfhpo` has 0.40, 0.36, 0.29 and 0.23, `hyperband` 0.39, 0.34, 0.34 and 0.27, `tpe` 1.28, 0.68,
0.41 and 0.33, `gp` 1.31, 0.74, 0.43 and 0.33, `random` 1.31, 0.74, 0.63 and 0.43; at most 1.05 times the best of
seven others on 16 of 24 settings and budgets (3, 3, 5 and 5 of six), 1.06 times on average. On the recorded RL runs
(2031 to 2035) `jfhpo` is told nothing here; [what is shipped](prior.md) has its own page. Point 6, that the first
run is the middle of the ranges, was suggested by the second measurement: `hyperband` begins there, as SMAC does by
default, and led. So these seeds are new and the half is not untouched any more as regards that point; nothing else
was chosen by a measurement of it."""

RULES = """\
All strategies get the same space, cost law and credit for checkpoints, and may stop and continue runs at the same
rungs. The incumbent is what the search would deliver if it ended: the configuration that the strategy ranks first
(before there is one, the recipe), at the cost spent plus what its full run on the target still lacks. It counts with
its noise-free score. Peers do not know the budget, so one run with a budget of {most} says what they deliver at every
smaller one; `jfhpo` is run once for each. It is told the recipe, and is charged for running it. DEHB needs two rungs
and is left out on settings without curves. A value of 1 in figures that are divided by the recipe's regret means: no
better than not to search."""

COMPARISON = """\
Mean regret of `{own}` over that of the best peer, named after it, with the 95 % bootstrap interval over seeds. The best
peer is chosen after the fact, for each setting and budget, which favours the peers. A star: not better than random
search with 95 % confidence."""

PROXIES = f"""\
Rank correlations with the target are over random configurations, and over the target's best {TOP:.0%} of them. The
regret of a proxy's best is what the configuration lacks on the target that is the best of 1,024 random ones on the
proxy. Published recipes: GPT-3 with a cool-down, DataComp, the README of ScAn-Bench."""

FORECASTS = """\
The [forecast of the final score](../explanation/method.md#the-forecast) is looked at when shares of the budget are
spent. It holds if the true score of what the search recommends in the end lies in the 80 % interval; it is too high if
that score lies below. The error is the distance of the median, in halves of the interval, median over displays. All
budgets are taken together; with small ones there are never enough full runs for a forecast."""

COMMANDS = """\
    python -m benchmarks foreign fetch
    python -m benchmarks foreign run --strategy ... --settings tuning --seeds 2001:2021
    python -m benchmarks foreign report"""

INTERPOLATION = """\
Extremely randomized trees ({trees}, scikit-learn) predict the log loss of a run from its size, length, hyperparameters
and progress, and whether it diverges. Cross-validated over {folds} folds of whole runs. `near` are recorded runs within
a factor of 2 of the target's parameters and 4 of its length; errors of the log loss are relative errors of the loss.
Differences among good configurations that are below the error are those of the interpolation and not of the models:
the landscapes are as rough and as dependent on size as real ones, their optima need not be those of the real models."""


def text_table(results: Results, settings: Sequence[str], cost: float, own: str, seeds: Sequence[int]) -> str:
    """Mean regrets ± standard errors at a cost by setting, those of `own` first, each over the seeds that it has done.

    The last column is `own`'s mean over that of the best peer. The last row are means over the settings, as multiples
    of the recipe's regret, of the strategies that have done all of them.
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


@dataclass(frozen=True)
class Evidence:
    """Everything that the page shows.

    Attributes:
        results: Of the published seeds.
        own: The strategy that is compared with all others; it may have no results yet.
    """

    results: Results
    own: str

    @cached_property
    def seeds(self) -> list[int]:
        """All published seeds."""
        return sorted({seed for by_key in self.results.values() for _, seed in by_key})

    @cached_property
    def peers(self) -> list[str]:
        """Strategies other than `own`."""
        return [name for name in self.results if name != self.own]

    @cached_property
    def settings(self) -> dict[str, list[str]]:
        """Settings with results of peers, by group."""
        done = {key[0].partition("@")[0] for name in self.peers for key in self.results[name]}
        groups = {label: [name for name in names if name in done] for label, names in GROUPS.items()}
        return {label: names for label, names in groups.items() if names}

    def regrets(self, strategy: str, setting: str, cost: float) -> list[float]:
        """Regrets at a cost, over seeds."""
        return figures.regrets(self.results, strategy, setting, cost, self.seeds)

    def recipe(self, setting: str) -> float:
        """Regret of the recipe."""
        some = next(found for name in self.peers if (found := figures.runs(self.results, name, setting, 0, self.seeds)))
        return figures.recipe_regret(some[0])

    def best_peer(self, setting: str, cost: float) -> str:
        """The peer with the lowest mean regret at a cost."""
        found = figures.best_peer(self.results, self.peers, setting, cost, self.seeds)
        assert found is not None, f"no peer has run on {setting}"
        return found[0]

    def share(self, strategy: str, settings: Sequence[str], cost: float) -> float | None:
        """Mean over settings of mean regret over the recipe's; None if the strategy lacks one of the settings."""
        found = [self.regrets(strategy, setting, cost) for setting in settings]
        if not all(found):
            return None
        pairs = zip(settings, found, strict=True)
        return float(np.mean([np.mean(values) / self.recipe(name) for name, values in pairs]))


def write(results: Results, own: str, folder: Path = EVIDENCE) -> None:
    """Write the figure and the page of the published seeds."""
    published = {
        name: {key: result for key, result in by_key.items() if key[1] >= FIRST_SEED}
        for name, by_key in results.items()
    }
    evidence = Evidence({name: by_key for name, by_key in published.items() if by_key}, own)
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        draw(evidence).savefig(folder / CURVES, format="svg", metadata={"Date": None, "Creator": None})
    (folder / PAGE).write_text(page(evidence), encoding="utf-8")


def draw(evidence: Evidence) -> Figure:
    """Regret over the recipe's against cost, one panel per setting."""
    panels = [(label, name) for label, names in evidence.settings.items() for name in names]
    columns = 3
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Artist] = {}
    for axis, (label, name) in zip(axes, panels, strict=False):
        handles |= _panel(axis, evidence, name)
        axis.set_title(f"{name} ({label})", fontsize=9, loc="left")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("cost, in full runs of the target")
    for axis in axes[::columns]:
        axis.set_ylabel("mean regret / recipe's")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6, frameon=False)
    return figure


def _panel(axis: Axes, evidence: Evidence, setting: str) -> dict[str, Artist]:
    """Anytime curves of all strategies, each of its runs with the largest budget; returns the lines by name."""
    recipe = evidence.recipe(setting)
    lines: dict[str, Artist] = {"recipe": axis.axhline(1, color="black", linewidth=1, linestyle=":")}
    for name in (*evidence.peers, evidence.own):
        found = figures.runs(evidence.results, name, setting, BUDGETS[-1], evidence.seeds)
        if not found:
            continue
        means = [np.mean([result.regret_at(cost) for result in found]) / recipe for cost in COSTS]
        mine = name == evidence.own
        (lines[name],) = axis.plot(
            COSTS, np.round(means, 3), color=COLOURS.get(name, OTHER_COLOUR), linewidth=2.0 if mine else 1.0,
            linestyle="--" if name == "random" else "-", zorder=3 if mine else 2,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlim(0, BUDGETS[-1])
    axis.set_ylim(top=WORST)
    return lines


def page(evidence: Evidence) -> str:
    """The Markdown page."""
    sections = [
        "# The optimizer on foreign data",
        "Generated by `python -m benchmarks foreign report`; do not edit.",
        INTRODUCTION.format(seen="`, `".join(SEEN), first=FIRST_SEED),
        *findings(evidence),
        "## What the settings are",
        _settings_table(),
        PROXIES,
        "## How good the interpolation is",
        INTERPOLATION.format(trees=tables.TREES, folds=tables.FOLDS),
        *_interpolation(),
        "## How it was made",
        environment(),
        COMMANDS,
        commits(evidence.results),
    ]
    return "\n\n".join(sections) + "\n"


def findings(evidence: Evidence) -> list[str]:
    """The sections on what the strategies found; they need no tables of scan-bench."""
    regrets = [
        part
        for cost in BUDGETS
        for part in (f"## Regret at a cost of {cost} full runs", "Mean ± standard error.", _regrets(evidence, cost))
    ]
    return [
        "## Averages",
        "Mean over the settings of a group of the mean regret, divided by that of the recipe.",
        _averages(evidence),
        f"## `{evidence.own}` against its peers",
        *_comparison(evidence),
        "## At every cost",
        f"![Mean regret over the recipe's against cost on each setting]({CURVES})",
        RULES.format(most=BUDGETS[-1]),
        "## Forecasts",
        FORECASTS,
        _forecasts(evidence),
        *regrets,
    ]


def _averages(evidence: Evidence) -> str:
    names = [name for name in (evidence.own, *evidence.peers) if name in evidence.results]
    rows = []
    for label, settings in evidence.settings.items():
        for cost in BUDGETS:
            shares = [evidence.share(name, settings, cost) for name in names]
            rows.append([label, str(cost), *("-" if share is None else f"{share:.2f}" for share in shares)])
    return markdown_table(["settings", "cost", *names], rows)


def _comparison(evidence: Evidence) -> list[str]:
    """`own` over the best peer on each setting and budget, what was asked of it, and random search."""
    own = evidence.own
    if own not in evidence.results:
        return [f"`{own}` has no results of published seeds yet."]
    rows, lines = [], []
    for label, settings in evidence.settings.items():
        ratios: list[float] = []
        for setting in settings:
            row = [label, setting]
            for cost in BUDGETS:
                mine = evidence.regrets(own, setting, cost)
                if not mine:
                    row.append("-")
                    continue
                peer = evidence.best_peer(setting, cost)
                found = figures.ratio(mine, evidence.regrets(peer, setting, cost))
                against = figures.ratio(mine, evidence.regrets("random", setting, cost))
                ratios.append(found.value)
                row.append(f"{_text(found)} {peer}{'' if against.high < 1 else ' *'}")
            rows.append(row)
        if ratios:
            met = sum(ratio <= AIM for ratio in ratios)
            lines.append(
                f"- {label}: at most {AIM} on {met} of {len(ratios)} settings and budgets, on average "
                f"{np.mean(ratios):.2f} (asked for: all, and {MEAN_AIM}), at worst {max(ratios):.2f}."
            )
    return [
        COMPARISON.format(own=own),
        markdown_table(["", "setting", *(f"cost {cost}" for cost in BUDGETS)], rows),
        "\n".join(lines),
    ]


def _forecasts(evidence: Evidence) -> str:
    """How often the forecasts of the final score hold, by group of settings and share of the budget spent."""
    own = evidence.results.get(evidence.own, {}).values()
    rows = []
    for label, settings in evidence.settings.items():
        mine = [result for result in own if result.landscape.partition("@")[0] in settings]
        shares = sorted({shown[0] for result in mine for shown in result.forecasts})
        for some in (*([share] for share in shares), shares):
            found = [
                (result.recommended_score, *shown[1:])
                for result in mine
                for shown in result.forecasts
                if shown[0] in some
            ]
            if found:
                truth, low, middle, high = np.array(found).T
                held = (low <= truth) & (truth <= high)
                error = float(np.median(2 * np.abs(truth - middle) / (high - low)))
                rows.append(
                    [
                        label,
                        "all" if some is shares else f"{some[0]:.0%}",
                        f"{len(found)} of {len(mine) * len(some)}",
                        f"{held.mean():.0%}",
                        f"{(truth < low).mean():.0%}",
                        f"{(truth > high).mean():.0%}",
                        f"{error:.2f}",
                    ]
                )
    return markdown_table(["settings", "spent", "shown", "holds", "too high", "too low", "error"], rows)


def _regrets(evidence: Evidence, cost: float) -> str:
    names = [name for name in (evidence.own, *evidence.peers) if name in evidence.results]
    rows = []
    for label, settings in evidence.settings.items():
        for setting in settings:
            found = [figures.mean_regret(evidence.results, name, setting, cost, evidence.seeds) for name in names]
            cells = [str(mean) if mean else "-" for mean in found]
            rows.append([label, setting, f"{evidence.recipe(setting):.4f}", *cells])
    return markdown_table(["", "setting", "recipe", *names], rows)


def _settings_table() -> str:
    rows = []
    for kind, pair in PAIRS.items():
        for setting in pair:
            proxies = _proxies(setting)
            rows.append(
                [
                    setting.name,
                    "tuning" if setting.name in TUNING else "untouched",
                    kind,
                    ", ".join(setting.parameters),
                    f"{setting.length:.3g}",
                    str(setting.rungs),
                    *(", ".join(item[column] for item in proxies) for column in range(3)),
                ]
            )
    head = ["", "half", "kind", "models", "tokens, samples or cells", "rungs"]
    return markdown_table([*head, "rank correlation", f"of the best {TOP:.0%}", "regret of the proxy's best"], rows)


def _proxies(setting: Setting) -> list[tuple[str, str, str]]:
    """Of each proxy: rank correlation with the target, that among the target's best, regret of its best."""
    made = surface(setting.name)
    points = qmc.Sobol(made.space.dimension, rng=np.random.default_rng(1)).random(1024)
    scores = {model: made.scores(model, points) for model in setting.parameters}
    target = scores.pop(setting.target)
    best = np.argsort(-target)[: round(TOP * len(target))]
    return [
        (
            f"{spearmanr(found, target).statistic:.2f}",
            f"{spearmanr(found[best], target[best]).statistic:.2f}",
            f"{made.best_score - target[found.argmax()]:.3f}",
        )
        for found in scores.values()
    ]


def _interpolation() -> list[str]:
    """Errors of each table, final losses and curves, and of the recorded runs near each target."""
    rows, notes = [], []
    for name in tables.LOADERS:
        validation = tables.cross_validate(tables.load(name))
        table = validation.table
        rows.append([f"{name}: all evaluations", *_errors(validation.errors(table.healthy))])
        rows.append([f"{name}: final losses", *_errors(validation.errors(table.last))])
        total = np.log10((10**table.sizes).sum(1))
        for setting in SETTINGS.values():
            if setting.table == name:
                near = np.abs(total - math.log10(setting.parameters[setting.target])) < NEAR_SIZE
                near &= np.abs(table.lengths - math.log10(setting.length)) < NEAR_LENGTH
                rows.append(
                    [f"{name}: final losses near {setting.name}", *_errors(validation.errors(table.last & near))]
                )
        if table.diverged.any():
            runs = table.last
            notes.append(
                f"{name}: {table.diverged[runs].sum()} of {runs.sum()} runs diverged. A diverged run is ranked above "
                f"one that did not diverge with probability {validation.divergence_auc:.3f}; as many runs as diverged "
                f"lie above a predicted probability of {validation.threshold:.2f} ({tables.DIVERGENCE} is used)."
            )
    return [markdown_table(["", "evaluations", "R2 of the log loss", "Spearman", "median error"], rows), *notes]


def _errors(found: tuple[int, float, float, float]) -> list[str]:
    count, explained, rank, error = found
    return [f"{count}", f"{explained:.3f}", f"{rank:.3f}", f"{error:.4f}"]


def _text(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
