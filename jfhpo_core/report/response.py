"""Expected scores over hyperparameters: at every size of the family, over a pair, and all trials in one picture.

Curves come from the model of strategy `jfhpo`, fitted to the trials of any strategy; points are what was measured.
Every trial's mark begins with its number: the page highlights a trial in all figures at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.importance import Importance
from jfhpo_core.optimizer.observations import full_length_inputs
from jfhpo_core.optimizer.surrogate import THIS_STUDY
from jfhpo_core.report.figures import LIGHT, POWER_OF_TEN, RATE_BINS, TITLE_PREFIX, canvas, short_label, tooltip
from jfhpo_core.report.text import parameters, setting
from jfhpo_core.report.why import Boundary, Why, collapsed
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.history import History
from jfhpo_core.study.space import ChoiceParameter, FloatParameter, Parameter, Vector
from jfhpo_core.study.trial import Configuration, Trial, Value

DRAWN = 3
"""Hyperparameters whose responses are drawn, the most important ones."""

GRID = 33
"""Values of a numeric hyperparameter at which a curve is computed."""

PAIR_GRID = 25
"""The same along each axis of a pair."""

SAMPLE = 32
"""Configurations over which a partial dependence is averaged."""

DEVIATIONS = 1.2816
"""Half-width of an 80 % interval, in standard deviations."""

FEWEST_LINES = 4
"""Scored configurations that a parallel-coordinates plot needs."""


@dataclass(frozen=True)
class Response:
    """Expected final scores over one hyperparameter on one model, failures included.

    Attributes:
        values: Of the hyperparameter, ascending or in the order of the choice.
        mean, low, high: Expected score with the other hyperparameters as recommended, and its 80 % interval, shape
            (len(values),).
        average: Expected score, averaged over the search space (partial dependence), same shape.
    """

    values: tuple[Value, ...]
    mean: Vector
    low: Vector
    high: Vector
    average: Vector


def response(beliefs: Beliefs, best: Configuration, name: str, model: str) -> Response:
    """Over one hyperparameter on one model of the study, at full length."""
    space = beliefs.history.study.space
    parameter, columns = space[name], space.slices()[name]
    values = parameter.grid(GRID, *([best[name]] if name in best else []))
    places = np.array([parameter.encode(value) for value in values])
    points = np.tile(space.encode(best), (len(values), 1))
    points[:, columns] = places
    mean, low, high = _scores(beliefs, model, space.snap(points))
    others = np.random.default_rng(0).random((SAMPLE, space.dimension))
    spread = np.repeat(others[None], len(values), axis=0)
    spread[:, :, columns] = places[:, None]
    average = _scores(beliefs, model, space.snap(spread.reshape(-1, space.dimension)))[0]
    return Response(tuple(values), mean, low, high, average.reshape(len(values), SAMPLE).mean(1))


def _scores(beliefs: Beliefs, model: str, points: Vector) -> tuple[Vector, Vector, Vector]:
    """Expected score and its 80 % interval of snapped points (m, d) on a model at full length, each of shape (m,)."""
    size = beliefs.history.study.ladder.size_coordinate(model)
    means, deviations = beliefs.expected(full_length_inputs(points, size))
    group = (THIS_STUDY, size, 1.0)
    middle, low, high = (
        beliefs.scale.score(group, (means + side * DEVIATIONS * deviations).tolist()) for side in (0, -1, 1)
    )
    return middle, low, high


def drawn_names(importance: Sequence[Importance]) -> list[str]:
    """The hyperparameters whose responses are drawn."""
    return [item.name for item in importance[:DRAWN]]


def response_figure(result: SearchResult, beliefs: Beliefs, why: Why, best: Configuration) -> Figure:
    """One row per important hyperparameter, one column per size of the family (the four largest)."""
    study, names = result.study, drawn_names(why.importance)
    models = study.ladder.models[-4:]
    heights: list[float] = []
    with canvas(10, 0.5 + 2.25 * len(names)) as figure:
        grid = figure.subplots(len(names), len(models), squeeze=False, sharey=True)
        for row, name in zip(grid, names, strict=True):
            for axes, model in zip(row, models, strict=True):
                found = response(beliefs, best, name, model.name)
                parameter = study.space[name]
                place = _placer(axes, parameter)
                _shade(axes, place, parameter, [item for item in why.boundaries if item.name == name], model.name)
                _draw_response(axes, place, parameter, found)
                heights += [*found.mean, *found.average, *_draw_points(axes, place, result, name, model.name)]
                _draw_markers(axes, place, result, name, best)
                axes.set_xlabel(short_label(name))
            row[0].set_ylabel("final score")
        for axes, model in zip(grid[0], models, strict=True):
            axes.set_title(f"{short_label(model.name)} ({parameters(model.parameters)})")
        # All points and curves are in sight; intervals, which may be much wider, are cut off.
        margin = 0.12 * (max(heights) - min(heights)) or 0.1
        grid[0][0].set_ylim(min(heights) - margin, max(heights) + margin)
    return figure


def _placer(axes: Axes, parameter: Parameter) -> Callable[[Value], float]:
    """Prepare an axis for a hyperparameter; returns where a value lies on it."""
    if isinstance(parameter, ChoiceParameter):
        axes.set_xticks(range(len(parameter.values)), [short_label(setting(value)) for value in parameter.values])
        axes.set_xlim(-0.5, len(parameter.values) - 0.5)
        return lambda value: float(parameter.index(value))
    low, high = float(parameter.extremes[0]), float(parameter.extremes[-1])
    zero = isinstance(parameter, FloatParameter) and parameter.zero
    if parameter.logarithmic:
        least = float(parameter.low) if isinstance(parameter, FloatParameter) else low
        # An exact zero has no place on a logarithmic axis: it is drawn a little below the lowest value.
        edge = least / (high / least) ** 0.08 if zero else least
        axes.set_xscale("log")
        axes.set_xlim(edge / (high / least) ** 0.02, high * (high / least) ** 0.02)
        axes.xaxis.set_major_formatter(POWER_OF_TEN)
        axes.minorticks_off()
        return lambda value: float(value) if float(value) > 0 else edge
    axes.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    return float


def _draw_response(axes: Axes, place: Callable[[Value], float], parameter: Parameter, found: Response) -> None:
    places = [place(value) for value in found.values]
    if isinstance(parameter, ChoiceParameter):
        axes.errorbar(
            places, found.mean, yerr=[found.mean - found.low, found.high - found.mean], fmt="_", color=LIGHT["size2"],
            markersize=16, linewidth=2, zorder=2,
        )  # fmt: skip
        axes.plot(places, found.average, ".", color=LIGHT["muted"], markersize=5, zorder=2)
        return
    axes.fill_between(places, found.low, found.high, color=LIGHT["size0"], alpha=0.2, linewidth=0, zorder=1)
    axes.plot(places, found.mean, color=LIGHT["size2"], linewidth=1.8, zorder=2)
    axes.plot(places, found.average, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 2)), zorder=2)


def _shade(
    axes: Axes, place: Callable[[Value], float], parameter: Parameter, boundaries: Sequence[Boundary], model: str
) -> None:
    """Where most runs collapsed."""
    if isinstance(parameter, ChoiceParameter):
        return
    left, right = axes.get_xlim()
    for boundary in boundaries:
        if boundary.model in (None, model):
            low, high = (place(value) for value in boundary.between)
            ends = (high, right) if boundary.side == "above" else (left, low)
            span = axes.axvspan(*ends, color=LIGHT["accent"], alpha=0.1, linewidth=0, zorder=0)
            span.set_gid(f"{TITLE_PREFIX}{boundary.collapsed} of {boundary.runs} runs collapsed here")


def _draw_points(
    axes: Axes, place: Callable[[Value], float], result: SearchResult, name: str, model: str
) -> list[float]:
    """Final scores of the trials on a model; of a run that went wrong the last score, as a cross. Returns them."""
    drawn: list[float] = []
    for trial in result.trials:
        value = result.study.complete(trial.configuration).get(name)
        if trial.model != model or value is None or not trial.segments or not trial.evaluations:
            continue
        if not result.study.space[name].has(value):  # a recipe outside the space
            continue
        wrong = collapsed(trial)
        last = trial.evaluations[-1]
        if (trial.final is None and not wrong) or last.step == 0:
            continue
        point = axes.plot(
            [place(value)], [last.score], "x" if wrong else "o", color=LIGHT["accent" if wrong else "rival"],
            markersize=4.5, alpha=0.85, zorder=3, clip_on=True,
        )[0]  # fmt: skip
        point.set_gid(f"{TITLE_PREFIX}{tooltip(trial, trial.label)}")
        drawn.append(last.score)
    return drawn


def _draw_markers(
    axes: Axes, place: Callable[[Value], float], result: SearchResult, name: str, best: Configuration
) -> None:
    """The recommended value, and those of the recipes."""
    for baseline in result.study.spec.baselines:
        value = result.study.complete(baseline.configuration).get(name)
        if value is not None and result.study.space[name].has(value):
            line = axes.axvline(place(value), color=LIGHT["rival"], linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
            line.set_gid(f"{TITLE_PREFIX}recipe {baseline.name}: {name} {value}")
    if name in best:
        line = axes.axvline(place(best[name]), color=LIGHT["accent"], linewidth=1.6, zorder=1)
        line.set_gid(f"{TITLE_PREFIX}recommended: {name} {best[name]}")


def pair_figure(result: SearchResult, beliefs: Beliefs, names: tuple[str, str], best: Configuration) -> Figure:
    """Expected score on the target over two hyperparameters, the others as recommended."""
    study = result.study
    space, target = study.space, study.ladder.target.name
    first, second = (space[name] for name in names)
    xs, ys = (parameter.grid(PAIR_GRID) for parameter in (first, second))
    points = np.tile(space.encode(best), (len(xs) * len(ys), 1))
    for index, (y, x) in enumerate((y, x) for y in ys for x in xs):
        points[index, space.slices()[names[0]]] = first.encode(x)
        points[index, space.slices()[names[1]]] = second.encode(y)
    # In corners where nothing was run, the model may go below what scores can be: no level is spent on that.
    measured = [evaluation.score for trial in result.trials for evaluation in trial.evaluations]
    means = _scores(beliefs, target, space.snap(points))[0].reshape(len(ys), len(xs)).clip(min=np.nanmin(measured))
    with canvas(8.4, 4.2) as figure:
        axes = figure.subplots()
        across, up = _placer(axes, first), _vertical(axes, second)
        colors = [LIGHT[f"rate{index}"] for index in range(RATE_BINS)]
        levels = np.linspace(float(means.min()), max(float(means.max()), float(means.min()) + 1e-6), RATE_BINS + 1)
        drawn = axes.contourf(
            [across(x) for x in xs], [up(y) for y in ys], means, levels=levels, colors=colors, alpha=0.75, zorder=0
        )
        bar = figure.colorbar(drawn, ax=axes, aspect=30, pad=0.015, format="%.2f")
        bar.set_label("expected final score", color=LIGHT["muted"])
        bar.outline.set_visible(False)
        for trial in result.trials:
            values = study.complete(trial.configuration)
            if trial.model != target or not trial.segments or any(name not in values for name in names):
                continue
            if not all(space[name].has(values[name]) for name in names):
                continue
            mark = axes.plot(
                [across(values[names[0]])], [up(values[names[1]])], "x" if collapsed(trial) else "o",
                color=LIGHT["ink"], markersize=4.5, markeredgecolor=LIGHT["ink" if collapsed(trial) else "surface"],
                zorder=3,
            )[0]  # fmt: skip
            mark.set_gid(f"{TITLE_PREFIX}{tooltip(trial, trial.label)}")
        if all(name in best for name in names):
            axes.plot(
                [across(best[names[0]])], [up(best[names[1]])], "D", color=LIGHT["accent"], markersize=8,
                markeredgecolor=LIGHT["surface"], zorder=4,
            )  # fmt: skip
        axes.set_xlabel(short_label(names[0]))
        axes.set_ylabel(short_label(names[1]))
        axes.grid(visible=False)
    return figure


def _vertical(axes: Axes, parameter: Parameter) -> Callable[[Value], float]:
    """`_placer` for the other axis."""
    scratch = Figure().subplots()
    place = _placer(scratch, parameter)
    axes.set_yscale(scratch.get_xscale())
    axes.set_ylim(scratch.get_xlim())
    if isinstance(parameter, ChoiceParameter):
        axes.set_yticks(range(len(parameter.values)), [short_label(setting(value)) for value in parameter.values])
    elif parameter.logarithmic:
        axes.yaxis.set_major_formatter(POWER_OF_TEN)
        axes.minorticks_off()
    return place


def parallel_figure(result: SearchResult, model: str, names: Sequence[str]) -> Figure | None:
    """Configurations that finished on one model as lines over all hyperparameters, coloured by score; None if few did.

    Args:
        result: The study.
        model: Name of the model.
        names: Hyperparameters, in the order of their axes.
    """
    space = result.study.space
    lines: list[tuple[float, list[float], Trial]] = []
    for trial in result.trials:
        values = result.study.complete(trial.configuration)
        inside = all(values.get(name) is None or space[name].has(values[name]) for name in names)
        if trial.model == model and trial.final is not None and inside:
            lines.append((trial.final.score, [_height(space[name], values.get(name)) for name in names], trial))
    if len(lines) < FEWEST_LINES:
        return None
    lines.sort(key=lambda line: line[0])
    low, high = lines[0][0], lines[-1][0]
    with canvas(10, 3.6) as figure:
        axes = figure.subplots()
        for score, heights, trial in lines:
            share = (score - low) / (high - low) if high > low else 1.0
            chosen = trial is lines[-1][2]
            line = axes.plot(
                range(len(names) + 1), [*heights, share], linewidth=2.4 if chosen else 1.1,
                color=LIGHT["accent"] if chosen else LIGHT[f"rate{min(RATE_BINS - 1, int(share * RATE_BINS))}"],
                alpha=1.0 if chosen else 0.75, zorder=4 if chosen else 2,
            )[0]  # fmt: skip
            line.set_gid(f"{TITLE_PREFIX}{tooltip(trial, trial.label)}, score {score:.3f}")
        for index, name in enumerate(names):
            ends = [setting(value) for value in (space[name].extremes[0], space[name].extremes[-1])]
            _ends(axes, index, ends)
        _ends(axes, len(names), [f"{low:.3f}", f"{high:.3f}"])
        axes.set_ylim(-0.16, 1.16)
        axes.set_xlim(-0.4, len(names) + 0.4)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0, labelcolor=LIGHT["ink"], labelsize=8)
        axes.set_xticks(range(len(names) + 1), [*(_broken(short_label(name)) for name in names), "score"])
    return figure


def _height(parameter: Parameter, value: Value | None) -> float:
    """Where a value lies on its axis, in [0, 1]; half way up if the configuration lacks it."""
    if value is None:
        return 0.5
    if isinstance(parameter, ChoiceParameter):
        return parameter.index(value) / (len(parameter.values) - 1)
    return parameter.encode(value)[0]


def _ends(axes: Axes, place: int, ends: Sequence[str]) -> None:
    axes.plot([place, place], [0, 1], color=LIGHT["grid"], linewidth=1, zorder=1)
    for height, text, side in ((-0.03, ends[0], "top"), (1.03, ends[1], "bottom")):
        axes.annotate(text, (place, height), ha="center", va=side, fontsize=7.5, color=LIGHT["muted"])


def _broken(name: str) -> str:
    return name.replace("_", "_\n", 1) if len(name) > 10 else name


def importance_figure(why: Why) -> Figure:
    """Shares of the variance, with interactions (bars, 95 % intervals) and alone (dots)."""
    items = why.importance[::-1]
    with canvas(8.4, 0.7 + 0.34 * len(items)) as figure:
        axes = figure.subplots()
        for position, item in enumerate(items):
            bar = axes.barh(position, item.total.value, height=0.6, color=LIGHT["size1"], alpha=0.85)[0]
            bar.set_gid(
                f"{TITLE_PREFIX}{item.name}: {item.total.value:.0%} with interactions ({item.total.low:.0%} to "
                f"{item.total.high:.0%}), {item.first.value:.0%} alone"
            )
            axes.plot([item.total.low, item.total.high], [position] * 2, color=LIGHT["ink"], linewidth=1.4)
            axes.plot([item.first.value], [position], "o", color=LIGHT["surface"], markeredgecolor=LIGHT["ink"])
        axes.set_yticks(range(len(items)), [short_label(item.name) for item in items])
        axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of the variance over the search space; dot: alone")
    return figure


def belief_of(result: SearchResult) -> Beliefs | None:
    """What the trials of a study say; None if nothing was evaluated."""
    return Beliefs.form(History.of(result.study, result.trials))
