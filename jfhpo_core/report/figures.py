"""The figures of a study, drawn with matplotlib and turned into SVG that follows the page's colours.

Figures are drawn in the colours of the light scheme, so that a PNG is right as it is; `inline_svg` replaces each colour
by the CSS variable of its role, so that the same picture is right in the dark scheme too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from jfhpo_core.optimizer.predicted_front import Predicted
from jfhpo_core.optimizer.rank_agreement import FidelityAgreement
from jfhpo_core.report.findings import (
    PURPOSES,
    cost_by_purpose,
    incumbents,
    interval,
    metric_text,
    same_configuration,
)
from jfhpo_core.report.text import duration, duration_unit, parameters, setting, share
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.models import Model
from jfhpo_core.study.resolved import base_scores
from jfhpo_core.study.trial import StepRecord, Trial, TrialState, configuration_key

LIGHT = {
    "surface": "#fffffe",
    "ink": "#1b2127",
    "muted": "#59636f",
    "grid": "#e3e7ec",
    "accent": "#c8430a",
    "rival": "#4a5560",
    "chance": "#7a4fa3",
}
DARK = {
    "surface": "#14181d",
    "ink": "#e8ecf0",
    "muted": "#9ba6b2",
    "grid": "#2b323a",
    "accent": "#ff8a4c",
    "rival": "#b4bec9",
    "chance": "#c3a1e6",
}
"""Colours by role: accent is the recommendation, rival the recipes, chance random search."""

RATE_BINS = 8
SIZE_BINS = 5
"""Classes of the two ordered scales: learning rate (viridis, safe for the colour-blind) and model size (blues)."""

_SIZES = [f"size{index}" for index in range(SIZE_BINS)]


LIGHT |= dict(zip(_SIZES, ("#2476ae", "#1f6299", "#1a4d82", "#143968", "#0e264d"), strict=True))
DARK |= dict(zip(_SIZES, ("#5b9fd0", "#7cb5de", "#9dc9ea", "#bfddf3", "#e0effb"), strict=True))
for _colors, _low, _high in ((LIGHT, 0.0, 0.72), (DARK, 0.36, 0.97)):
    _positions = np.linspace(_low, _high, RATE_BINS)
    _colors |= {f"rate{index}": to_hex(mpl.colormaps["viridis"](at)) for index, at in enumerate(_positions)}

LONGEST_LABEL = 24
"""Characters of a name in a figure; the tables have it whole."""

DRAWN_TRIALS = 240
"""Curves per figure; of more trials an even selection is drawn, and the caption says so."""

DRAWN_POINTS = 40
"""Points per training curve."""

SMOOTHING = 3
"""Steps averaged in the curves of the training signals."""

LABEL_POINTS = 12.0
"""Distance between two labels at the end of lines."""

BUDGET_ROOM = 0.15
"""Share of the longest bar that its length in words takes up."""

WIDE_RATIO = 10.0
"""A metric whose values differ by more than this factor has a logarithmic axis."""

SMALLEST_KL = 1e-4
"""Lower end of the logarithmic KL axis, nats per token."""

TITLE_PREFIX = "title:"
"""An artist whose id begins so becomes a group with that tooltip."""

POWER_OF_TEN = FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LIGHT["grid"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": LIGHT["surface"],
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure in house style, sizes in inches; pyplot's global state is left alone."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


# --- SVG ---------------------------------------------------------------------------------------------------------


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """SVG to be set into a page whose CSS defines `--ROLE` for every role of `LIGHT`.

    Args:
        figure: The figure.
        name: Unique in the page; keeps the ids of several figures apart.
        label: What a screen reader says.
    """
    buffer = io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r' d="([^"]*)"', lambda match: f' d="{_shorter(match[1])}"', text)
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><")
    text = re.sub(rf'<g id="{TITLE_PREFIX}([^"]*)">', r'<g class="mark"><title>\1</title>', text)
    used = set(re.findall(r"#([\w.-]+)[\")]", text))
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for role, color in LIGHT.items():
        text = text.replace(color, f"var(--{role})")
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        f'<svg role="img" aria-label="{escape(label)}" viewBox="\\1" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def _shorter(path: str) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(path.split()))


def css_variables(colors: Mapping[str, str]) -> str:
    """The declarations of a colour scheme."""
    return "".join(f"--{role}:{color};" for role, color in colors.items())


def save_figure(figure: Figure, path: Path, label: str) -> Path:
    """Write a figure by itself: `.svg` follows the reader's light or dark scheme, `.png` is light.

    Raises:
        ValueError: The suffix is neither.
    """
    if path.suffix == ".png":
        with mpl.rc_context(_STYLE):
            figure.savefig(path, format="png", dpi=200)
        return path
    if path.suffix != ".svg":
        raise ValueError(f"a figure is written as .svg or .png, got {path.name!r}")
    style = (
        f"<style>svg{{{css_variables(LIGHT)}background:var(--surface);font-family:system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{css_variables(DARK)}}}}}</style>"
    )
    body = inline_svg(figure, path.stem, label)
    head = body.index(">") + 1
    path.write_text(body[:head] + style + body[head:] + "\n", encoding="utf-8")
    return path


def short_label(name: str) -> str:
    """A name, cut to `LONGEST_LABEL` characters."""
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


# --- Figures -----------------------------------------------------------------------------------------------------


def headline_figure(result: SearchResult) -> Figure:
    """The outcome in one picture: the final comparison, and the incumbent against cost."""
    with canvas(10, 3.4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        _draw_comparison(left, result)
        _draw_incumbents(right, result)
        left.set_title(f"Score on {result.study.ladder.target.name}, 95 % interval")
        right.set_title("Best score found against cost")
    return figure


def comparison_figure(result: SearchResult) -> Figure:
    """Dot and whisker: each row of the final table with its 95 % interval."""
    # Narrow, so that it can be read on a phone without scrolling.
    with canvas(5.2, 0.9 + 0.42 * max(1, len(result.rows))) as figure:
        _draw_comparison(figure.subplots(), result)
    return figure


def incumbent_figure(result: SearchResult) -> Figure:
    """Best score so far against charged device-time."""
    with canvas(8.4, 3.6) as figure:
        _draw_incumbents(figure.subplots(), result)
    return figure


def _draw_comparison(axes: Axes, result: SearchResult) -> None:
    rows = [row for row in result.rows if math.isfinite(row.score)]
    for position, row in enumerate(rows):
        color = LIGHT[_row_role(row.label)]
        low, high = interval(row.score, row.standard_error)
        title = f"{row.label}: {row.score:.3f} (95 %: {low:.3f} to {high:.3f}), {row.seeds} seed(s)"
        line = axes.plot([row.score], [position], "o", color=color, markersize=8, zorder=3)[0]
        line.set_gid(TITLE_PREFIX + title)
        axes.plot([low, high], [position, position], color=color, linewidth=2.2)
        axes.annotate(
            f"{row.score:.3f}", (high, position), (7, 0), textcoords="offset points", va="center",
            color=color, fontweight="bold",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [short_label(row.label) for row in rows])
    axes.tick_params(axis="y", labelsize=10, labelcolor=LIGHT["ink"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    base = base_scores(result.trials).get(result.study.ladder.target.name)
    if base is not None and math.isfinite(base):
        axes.axvline(base, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "untrained", (base, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", fontsize=8, color=LIGHT["muted"],
        )  # fmt: skip
    axes.set_xlabel(f"held-out score on {result.study.ladder.target.name}")


def _row_role(label: str) -> str:
    return {"recommended": "accent", "random search": "chance"}.get(label, "rival")


def _draw_incumbents(axes: Axes, result: SearchResult) -> None:
    target = result.study.ladder.target.name
    curves = incumbents(result)
    scale, unit = duration_unit(max((curve.end_seconds for curve in curves), default=0.0))
    roles = size_roles(result)
    labels: list[tuple[float, str, str]] = []
    for curve in curves:
        xs, ys = zip(*curve.points, (curve.end_seconds, curve.points[-1][1]), strict=True)
        random = curve.purpose == "random-search"
        leading = curve.model == target
        color = LIGHT["chance" if random else "accent" if leading else roles[curve.model]]
        label = "random search" if random else f"search, {curve.model}" if leading else f"search, {curve.model} (proxy)"
        scaled = [x / scale for x in xs]
        line = axes.step(
            scaled, ys, where="post", color=color, linewidth=2.4 if leading else 1.4,
            linestyle=(0, (3, 1.5)) if random else "-", zorder=3 if leading else 2,
        )[0]  # fmt: skip
        if leading:
            axes.plot(scaled[:-1], ys[:-1], "o", color=color, markersize=5, zorder=3)
        line.set_gid(f"{TITLE_PREFIX}{label}: {ys[-1]:.3f} after {duration(xs[-1])}")
        labels.append((ys[-1], label, color))
    for row in result.rows:
        if _row_role(row.label) == "rival" and math.isfinite(row.score):
            axes.axhline(row.score, color=LIGHT["rival"], linewidth=1.1, linestyle=(0, (4, 2)))
            labels.append((row.score, row.label, LIGHT["rival"]))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"device-{unit} charged, in order of commit")
    axes.set_ylabel("best held-out score so far")
    _end_labels(axes, labels)


def size_roles(result: SearchResult) -> dict[str, str]:
    """Colour role of each model: the larger, the stronger."""
    models = result.study.ladder.models
    spread = np.linspace(0, SIZE_BINS - 1, len(models)).round().astype(int) if len(models) > 1 else [SIZE_BINS - 1]
    return {model.name: f"size{index}" for model, index in zip(models, spread, strict=True)}


def _end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], panel_inches: float = 2.4) -> None:
    """Name lines at the right edge of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = (high - low) * LABEL_POINTS / (panel_inches * 72)
    ordered = sorted(labels)
    positions: list[float] = []
    for value, _, _ in ordered:
        positions.append(max(value, positions[-1] + gap) if positions else value)
    ceiling = high
    for index in reversed(range(len(positions))):
        positions[index] = min(positions[index], ceiling)
        ceiling = positions[index] - gap
    for position, (_, text, color) in zip(positions, ordered, strict=True):
        axes.annotate(
            short_label(text), (1, position), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", color=color, annotation_clip=False,
        )  # fmt: skip


def front_figure(result: SearchResult, predicted: Sequence[Predicted] = ()) -> Figure:
    """Score against each metric of the second objective and the constraints, one panel each, with limit and front.

    Points: configurations with full runs on the target; hollow: they break a constraint.

    Args:
        result: The study.
        predicted: The front that the model expects.
    """
    spec = result.study.spec
    second, best = spec.second_objective, result.recommended.configuration if result.recommended is not None else None
    by_number = {trial.number: trial for trial in result.trials}
    columns = min(3, len(spec.secondary_metrics))
    blocks = math.ceil(len(spec.secondary_metrics) / columns)
    with canvas(min(10.0, 3.6 * columns + 1.2), 3.4 * blocks) as figure:
        panels = list(figure.subplots(blocks, columns, squeeze=False, sharey=True).flat)
        for axes, name in zip(panels, spec.secondary_metrics, strict=False):
            known = [item for item in result.tried if name in item.measured]
            for item in known:
                chosen = item.configuration == best
                color = LIGHT["accent"] if chosen else LIGHT["rival"]
                axes.errorbar(
                    item.measured[name], item.score, yerr=item.standard_error, color=color, elinewidth=0.8, alpha=0.5
                )
                point = axes.plot(
                    item.measured[name], item.score, "D" if chosen else "o", color=color, markersize=7, zorder=3,
                    markerfacecolor=LIGHT["surface"] if item.broken else color,
                )[0]  # fmt: skip
                words = f"{name} {metric_text(name, item.measured)}, score {item.score:.3f}"
                broken = f", breaks {', '.join(map(str, item.broken))}" if item.broken else ""
                point.set_gid(f"{TITLE_PREFIX}{tooltip(by_number[item.trial], None)}; {words}{broken}")
            if second is not None and second.metric == name:
                front = sorted((item.measured[name], item.score) for item in known if item.on_front)
                if front:
                    style = "steps-post" if second.direction == "minimize" else "steps-pre"
                    line = axes.plot(*zip(*front, strict=True), color=LIGHT["accent"], linewidth=1.4, zorder=2)[0]
                    line.set_drawstyle(style)
                _draw_predicted(axes, predicted)
            for limit in spec.limits:
                if limit.metric == name:
                    axes.axvline(limit.bound, color=LIGHT["muted"], linewidth=1.2, linestyle="--")
                    axes.set_title(str(limit), fontsize=9, color=LIGHT["muted"])
            values = [item.measured[name] for item in known]
            if values and min(values) > 0 and max(values) > WIDE_RATIO * min(values):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(POWER_OF_TEN)
            axes.set_xlabel(name)
            axes.margins(0.12)
        for axes in panels[len(spec.secondary_metrics) :]:
            axes.set_visible(False)
        panels[0].set_ylabel(f"held-out score on {result.study.ladder.target.name}")
    return figure


def _draw_predicted(axes: Axes, predicted: Sequence[Predicted]) -> None:
    """The front that the model expects, with the 80 % interval of its scores."""
    items = sorted(predicted, key=lambda item: item.metric)
    metrics = [item.metric for item in items]
    axes.plot(metrics, [item.score for item in items], color=LIGHT["size0"], linewidth=1.6, zorder=1)
    lows, highs = [item.score_low for item in items], [item.score_high for item in items]
    axes.fill_between(metrics, lows, highs, color=LIGHT["size0"], alpha=0.15, linewidth=0, zorder=0)
    for item in items:
        values = ", ".join(f"{name} {setting(value)}" for name, value in item.configuration.items())
        point = axes.plot(
            item.metric, item.score, "s", color=LIGHT["size0"], markersize=4.5, zorder=2,
            markerfacecolor=LIGHT["surface"] if item.trial is None else LIGHT["size0"],
        )[0]  # fmt: skip
        number = "not run" if item.trial is None else f"#{item.trial}"
        point.set_gid(f"{TITLE_PREFIX}{number}, expected: score {item.score:.3f}; {values}")


def bill_figure(result: SearchResult) -> Figure:
    """Device-time by purpose, split by model."""
    table = cost_by_purpose(result)
    roles = size_roles(result)
    with canvas(8.4, 1.1 + 0.42 * max(1, len(table))) as figure:
        axes = figure.subplots()
        longest = max((sum(row.values()) for row in table.values()), default=0.0)
        scale, unit = duration_unit(longest)
        budget = result.study.spec.budget.device_seconds
        for position, (purpose, row) in enumerate(table.items()):
            left = 0.0
            for model, seconds in row.items():
                if seconds > 0:
                    bar = axes.barh(
                        position, seconds / scale, left=left / scale, height=0.62, color=LIGHT[roles[model]],
                        edgecolor=LIGHT["surface"], linewidth=1,
                    )  # fmt: skip
                    bar[0].set_gid(f"{TITLE_PREFIX}{PURPOSES[purpose]} on {model}: {duration(seconds)}")
                    left += seconds
            # The length of a bar that ends just short of the budget is written beyond the budget's mark.
            near = purpose == "search" and left <= budget < left + BUDGET_ROOM * longest
            axes.annotate(
                duration(left), ((budget if near else left) / scale, position), (6, 0), textcoords="offset points",
                va="center", color=LIGHT["ink"],
            )  # fmt: skip
        if "search" in table:
            place = list(table).index("search")
            axes.plot([budget / scale] * 2, [place - 0.42, place + 0.42], color=LIGHT["ink"], linewidth=1.6)
            axes.annotate(
                "budget", (budget / scale, place + 0.42), (0, -1), textcoords="offset points", ha="center", va="top",
                fontsize=8, color=LIGHT["muted"],
            )  # fmt: skip
        axes.set_yticks(range(len(table)), [PURPOSES[purpose].split(",")[0] for purpose in table])
        axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
        axes.set_ylim(len(table) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel(f"device-{unit}")
        handles = [mpl.patches.Patch(color=LIGHT[role], label=name) for name, role in roles.items()]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, labelcolor=LIGHT["muted"],
            handlelength=1.2, handleheight=0.8, borderpad=0,
        )  # fmt: skip
    return figure


class RateColors:
    """Colours of trials by learning rate, on a logarithmic scale of `RATE_BINS` classes."""

    def __init__(self, result: SearchResult) -> None:
        self._study = result.study
        rates = [rate for trial in result.trials if (rate := self.rate(trial)) is not None]
        low, high = (min(rates), max(rates)) if rates else (1.0, 1.0)
        self.norm = LogNorm(low * 0.999, high * 1.001) if low == high else LogNorm(low, high)
        self.known = bool(rates)

    def rate(self, trial: Trial) -> float | None:
        """The trial's learning rate; None if its trainer knows no such hyperparameter."""
        value = self._study.complete(trial.configuration).get("learning_rate")
        usable = isinstance(value, int | float) and math.isfinite(value) and value > 0
        return float(value) if usable and value is not None else None

    def __call__(self, trial: Trial) -> str:
        """The trial's colour."""
        rate = self.rate(trial)
        if rate is None:
            return LIGHT["rival"]
        return LIGHT[f"rate{min(RATE_BINS - 1, int(float(self.norm(rate)) * RATE_BINS))}"]

    def legend(self, figure: Figure, axes: Sequence[Axes]) -> None:
        """Draw the scale beside the figure's axes."""
        if not self.known:
            return
        colors = ListedColormap([LIGHT[f"rate{index}"] for index in range(RATE_BINS)])
        bar = figure.colorbar(
            mpl.cm.ScalarMappable(self.norm, colors), ax=list(axes), aspect=30, pad=0.015, fraction=0.03
        )
        bar.set_label("learning rate", color=LIGHT["muted"])
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(LogLocator(numticks=6))
        bar.ax.yaxis.set_major_formatter(POWER_OF_TEN)
        bar.ax.minorticks_off()


def drawn_trials(result: SearchResult) -> list[Trial]:
    """The trials whose curves are drawn: all, or beyond `DRAWN_TRIALS` those that matter and an even selection."""
    trials = [trial for trial in result.trials if trial.evaluations]
    if len(trials) <= DRAWN_TRIALS:
        return trials
    keys = {configuration_key(row.configuration) for row in result.rows}
    chosen = {trial.key for trial in trials if trial.label or configuration_key(trial.configuration) in keys}
    others = [trial.key for trial in trials if trial.key not in chosen]
    room = max(1, DRAWN_TRIALS - len(chosen))
    chosen |= {others[int(index)] for index in np.linspace(0, len(others) - 1, room)} if others else set()
    return [trial for trial in trials if trial.key in chosen]


def _panels(figure: Figure, result: SearchResult, rows_per_model: int = 1) -> list[list[Axes]]:
    """One column of axes per tried model (in rows of at most four), sharing scales; shape (rows_per_model, models)."""
    models = tried_models(result)
    columns = min(4, len(models))
    blocks = math.ceil(len(models) / columns)
    grid = figure.subplots(
        blocks * rows_per_model, columns, squeeze=False, sharex=True, sharey="all" if rows_per_model == 1 else "row"
    )
    panels: list[list[Axes]] = [[] for _ in range(rows_per_model)]
    for index in range(blocks * columns):
        for row in range(rows_per_model):
            axes = grid[index // columns * rows_per_model + row][index % columns]
            if index < len(models):
                panels[row].append(axes)
            else:
                axes.set_visible(False)
    return panels


def panel_height(result: SearchResult) -> int:
    """Rows of panels."""
    return math.ceil(len(tried_models(result)) / 4)


def tried_models(result: SearchResult) -> list[Model]:
    """The models of the study that a trial was made on, and the target."""
    used = {trial.model for trial in result.trials} | {result.study.ladder.target.name}
    return [model for model in result.study.ladder.models if model.name in used]


def learning_figure(result: SearchResult) -> Figure:
    """Held-out score over training prompts, one panel per model, one curve per trial."""
    colors = RateColors(result)
    with canvas(10, 0.5 + 2.9 * panel_height(result)) as figure:
        (panels,) = _panels(figure, result)
        trials = drawn_trials(result)
        bases = base_scores(result.trials)
        best = result.rows[0] if result.recommended is not None and result.rows else None
        for axes, model in zip(panels, tried_models(result), strict=True):
            mine = [trial for trial in trials if trial.model == model.name]
            count = sum(trial.model == model.name for trial in result.trials)
            axes.set_title(short_label(model.name))
            axes.annotate(
                f"{parameters(model.parameters)} parameters, {count} trial{'s' if count != 1 else ''}",
                (1, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="right", va="bottom",
                fontsize=8, color=LIGHT["muted"],
            )  # fmt: skip
            labels = {}
            base = bases.get(model.name)
            if base is not None and math.isfinite(base):
                axes.axhline(base, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)))
                labels["untrained"] = (base, "untrained", LIGHT["muted"])
            for trial in mine:
                highlighted = best is not None and same_configuration(result.study, best, trial)
                named = _draw_learning_curve(axes, trial, base, colors, highlighted=highlighted)
                if named is not None:
                    labels[named[1]] = named
            if axes is panels[-1]:
                _end_labels(axes, list(labels.values()))
            axes.set_xlim(0, result.study.spec.fidelity.horizon_prompts * 1.03)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel("training prompts")
        panels[0].set_ylabel("held-out score")
        colors.legend(figure, panels)
    return figure


def _draw_learning_curve(
    axes: Axes, trial: Trial, base: float | None, colors: RateColors, highlighted: bool
) -> tuple[float, str, str] | None:
    """Draw one trial from its model's untrained score on; returns the label of its end, if it deserves one."""
    points = [(evaluation.prompts, evaluation.score) for evaluation in trial.evaluations]
    if base is not None and points[0][0] > 0:
        points.insert(0, (0, base))
    label = "recommended" if highlighted else trial.label if trial.purpose in ("baseline", "confirmation") else None
    style: dict[str, Any]
    if highlighted:
        style = {"color": LIGHT["accent"], "linewidth": 2.6, "zorder": 4}
    elif label:
        style = {"color": LIGHT["rival"], "linewidth": 1.6, "linestyle": (0, (4, 2)), "zorder": 3}
    elif trial.purpose == "random-search":
        style = {"color": colors(trial), "linewidth": 0.9, "linestyle": (0, (2, 1.5)), "alpha": 0.8}
    else:
        style = {"color": colors(trial), "linewidth": 1.3, "alpha": 0.85}
    xs, ys = zip(*points, strict=True)
    line = axes.plot(xs, ys, marker="o", markersize=2.2, **style)[0]
    line.set_gid(TITLE_PREFIX + tooltip(trial, label))
    if trial.state is TrialState.STOPPED:
        axes.plot(xs[-1:], ys[-1:], "x", color=style["color"], markersize=6, markeredgewidth=1.8, zorder=5)
    return (ys[-1], label, style["color"]) if label and math.isfinite(ys[-1]) else None


def tooltip(trial: Trial, label: str | None) -> str:
    """What a trial's mark says when it is pointed at; by the number at its beginning the page finds its other marks."""
    values = ", ".join(f"{name} {value}" for name, value in trial.configuration.items())
    return f"#{trial.number}{f' ({label})' if label else ''}, {trial.state.value}: {values}"


def dynamics_figure(result: SearchResult, step_records: Mapping[str, Sequence[StepRecord]]) -> Figure | None:
    """Training reward and KL over training prompts, which the stopping rules watch; None without step records."""
    trials = [trial for trial in drawn_trials(result) if step_records.get(trial.key)]
    if not trials:
        return None
    colors = RateColors(result)
    best = result.rows[0] if result.recommended is not None and result.rows else None
    has_kl = any(record.kl is not None for trial in trials for record in step_records[trial.key])
    with canvas(10, 0.5 + (3.9 if has_kl else 2.3) * panel_height(result)) as figure:
        panels = _panels(figure, result, rows_per_model=1 + has_kl)
        for column, model in enumerate(tried_models(result)):
            panels[0][column].set_title(short_label(model.name))
            for trial in trials:
                if trial.model != model.name:
                    continue
                highlighted = best is not None and same_configuration(result.study, best, trial)
                for row, signal in enumerate(("reward", "kl")[: len(panels)]):
                    xs, ys = _smooth(step_records[trial.key], signal)
                    line = panels[row][column].plot(
                        xs, ys, color=LIGHT["accent"] if highlighted else colors(trial),
                        linewidth=2.2 if highlighted else 1, alpha=0.85, zorder=3 if highlighted else 2,
                    )[0]  # fmt: skip
                    line.set_gid(TITLE_PREFIX + tooltip(trial, None))
                    if trial.state is TrialState.STOPPED:
                        panels[row][column].plot(
                            xs[-1:], ys[-1:], "x", color=colors(trial), markersize=5, markeredgewidth=1.6
                        )
            panels[-1][column].set_xlabel("training prompts")
        for axes, words in zip(panels, (f"reward, {SMOOTHING}-step mean", "KL, nats per token"), strict=False):
            low, high = min(item.get_ylim()[0] for item in axes), max(item.get_ylim()[1] for item in axes)
            for item in axes:
                item.set_ylim(low, high)
                item.xaxis.set_major_locator(MaxNLocator(4))
                item.set_xlim(0, result.study.spec.fidelity.horizon_prompts * 1.03)
            axes[0].set_ylabel(words)
        if has_kl:
            for item in panels[1]:
                item.set_yscale("log")
                item.set_ylim(bottom=SMALLEST_KL)
                item.yaxis.set_major_formatter(POWER_OF_TEN)
                item.minorticks_off()
        colors.legend(figure, [axes for row in panels for axes in row])
    return figure


def _smooth(records: Sequence[StepRecord], signal: str) -> tuple[list[float], list[float]]:
    """A signal's moving mean, thinned to `DRAWN_POINTS`; values that are missing or not finite leave a gap."""
    values = [math.nan if (value := getattr(record, signal)) is None else float(value) for record in records]
    means = [float(np.mean(values[max(0, i + 1 - SMOOTHING) : i + 1])) for i in range(len(values))]
    if signal == "kl":
        means = [max(value, SMALLEST_KL) if math.isfinite(value) else math.nan for value in means]
    keep = sorted({int(index) for index in np.linspace(0, len(records) - 1, min(DRAWN_POINTS, len(records)))})
    return [float(records[i].prompts) for i in keep], [means[i] if math.isfinite(means[i]) else math.nan for i in keep]


def agreement_figure(result: SearchResult, agreements: Sequence[FidelityAgreement]) -> Figure:
    """Scatter of proxy score against target score, one panel per proxy."""
    columns = min(3, len(agreements))
    blocks = math.ceil(len(agreements) / columns)
    by_number = {trial.number: trial for trial in result.trials}
    colors = RateColors(result)
    best = result.rows[0] if result.recommended is not None and result.rows else None
    with canvas(min(10.0, 3.6 * columns + 0.8), 3.3 * blocks) as figure:
        grid = figure.subplots(blocks, columns, squeeze=False, sharey=True)
        panels = [axes for row in grid for axes in row]
        for axes, item in zip(panels, agreements, strict=False):
            model, prompts = item.first
            for first, second in item.pairs:
                trial = by_number[first.trials[0]]
                highlighted = best is not None and same_configuration(result.study, best, trial)
                color = LIGHT["accent"] if highlighted else colors(trial)
                axes.errorbar(
                    first.score, second.score, xerr=first.standard_error, yerr=second.standard_error, color=color,
                    elinewidth=0.8, alpha=0.5,
                )  # fmt: skip
                point = axes.plot(
                    first.score, second.score, "D" if highlighted else "o", color=color, markersize=7,
                    markeredgecolor=LIGHT["surface"], zorder=3,
                )[0]  # fmt: skip
                point.set_gid(TITLE_PREFIX + tooltip(trial, "recommended" if highlighted else None))
            done = share(prompts / result.study.spec.fidelity.horizon_prompts)
            axes.set_title(f"{short_label(model)} against {short_label(item.second[0])}")
            axes.set_xlabel(f"score on {model} at {done} of the horizon")
            axes.margins(0.12)
        for axes in panels[len(agreements) :]:
            axes.set_visible(False)
        panels[0].set_ylabel(f"score on {agreements[0].second[0]}, same share")
        colors.legend(figure, panels[: len(agreements)])
    return figure
