"""What a smaller model, or a shorter run, says about the full training of the largest recorded model.

A configuration's score is its held-out score, the mean over its seeds; a collapsed training keeps its last one. What
is chosen by such a score is judged by the test score: other prompts, so that luck in the choice does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from benchmarks.markdown import markdown_table
from benchmarks.rl_table import figures
from benchmarks.rl_table.generate import RUNGS, SIZES
from jfhpo_core.optimizer.rank_agreement import RankAgreement, rank_agreement
from jfhpo_core.report.text import listed
from jfhpo_core.trainers.replay_table import Recording, Table, read_table, recorded_tasks

Scores = dict[int, float]
"""By number of the configuration."""

TOP_SHARE = 0.25
"""The top quarter: of the configurations, ranked by the dearer fidelity."""

PAIRS = (("s", "sm"), ("s", "m"), ("sm", "m"))
"""Sizes that are compared, the dearer one second."""

RESAMPLES = 2000
"""Bootstrap samples of configurations."""

CHOICES = (1, 3)
"""How many of the proxy's best are tried on the target."""

EARLY_RUNGS = (1, 2, 4, 6)
"""Rungs whose ranking is compared with that at the end."""

EARLY = 0.25
"""Share of the horizon of the short proxy runs."""


def scores(table: Table, size: str, share: float = 1.0) -> Scores:
    """Held-out scores on a model after a share of the horizon."""
    step = round(share * table.total_steps)
    return _means(table, size, lambda recording: recording.evaluation(step).score)


def test_scores(table: Table, size: str) -> Scores:
    """Final scores on the prompts that no choice has seen; of a collapsed training its last held-out score."""
    return _means(
        table,
        size,
        lambda recording: recording.evaluations[-1].score if recording.test_score is None else recording.test_score,
    )


def _means(table: Table, size: str, value: Callable[[Recording], float]) -> Scores:
    found: dict[int, list[float]] = {}
    for recording in table.of_size(size):
        found.setdefault(recording.number, []).append(value(recording))
    return {number: fmean(values) for number, values in found.items()}


def base(table: Table, size: str) -> float:
    """Held-out score of the untrained model."""
    return table.of_size(size)[0].evaluations[0].score


def top(dear: Scores) -> set[int]:
    """The configurations of the top quarter."""
    ranked = sorted(dear, key=lambda number: dear[number], reverse=True)
    return set(ranked[: round(TOP_SHARE * len(ranked))])


def agreement(cheap: Scores, dear: Scores, among: Collection[int] | None = None) -> RankAgreement:
    """Rank agreement of two fidelities over the configurations that both have, or over some of these."""
    numbers = [number for number in dear if number in cheap and (among is None or number in among)]
    return rank_agreement([cheap[number] for number in numbers], [dear[number] for number in numbers])


@dataclass(frozen=True)
class Regret:
    """Test score lost by choosing on another fidelity than the target's, with its bootstrap interval (95 %)."""

    value: float
    low: float
    high: float


def regret(cheap: Scores, dear: Scores, test: Scores, choices: int) -> Regret:
    """What it costs to choose on a cheap fidelity.

    The `choices` best of the cheap fidelity are tried on the target; the best of them there is taken. The regret is the
    test score of the configuration that is best among all on the target, minus that of the one taken. The interval
    resamples configurations.

    Args:
        cheap: Scores that the choice is made by.
        dear: Scores on the target at full length.
        test: Scores that the outcome is judged by.
        choices: How many are tried on the target.
    """
    numbers = np.array([number for number in dear if number in cheap])
    x, y, judged = (np.array([values[number] for number in numbers]) for values in (cheap, dear, test))

    def lost(rows: NDArray[np.int64]) -> float:
        tried = rows[np.argsort(-x[rows], kind="stable")[:choices]]
        return float(judged[rows[np.argmax(y[rows])]] - judged[tried[np.argmax(y[tried])]])

    random = np.random.default_rng(0)
    every = np.arange(len(numbers))
    # A configuration drawn twice would be tried twice: samples are made of distinct ones.
    samples = [lost(np.unique(random.choice(every, len(every)))) for _ in range(RESAMPLES)]
    low, high = np.percentile(samples, [2.5, 97.5])
    return Regret(lost(every), float(low), float(high))


def chance_regret(dear: Scores, test: Scores) -> float:
    """Expected regret of a configuration drawn at random."""
    best = max(dear, key=lambda number: dear[number])
    return test[best] - fmean(test[number] for number in dear)


@dataclass(frozen=True)
class LearningRates:
    """Where good learning rates lie on a model: geometric mean over the top quarter, with interval, and the best."""

    mean: float
    low: float
    high: float
    best: float


def learning_rates(table: Table, size: str) -> LearningRates:
    """Learning rates of the top quarter of a model's configurations; the interval resamples configurations."""
    final = scores(table, size)
    rates = _rates(table)
    numbers = np.array(list(final))
    logs = np.log10([rates[number] for number in numbers])
    values = np.array([final[number] for number in numbers])
    count = round(TOP_SHARE * len(numbers))

    def center(rows: NDArray[np.int64]) -> float:
        return float(logs[rows[np.argsort(-values[rows])[:count]]].mean())

    random = np.random.default_rng(0)
    every = np.arange(len(numbers))
    low, high = np.percentile([center(random.choice(every, len(every))) for _ in range(RESAMPLES)], [2.5, 97.5])
    best = rates[max(final, key=lambda number: final[number])]
    return LearningRates(10 ** center(every), 10 ** float(low), 10 ** float(high), best)


def write(data: Path, folder: Path) -> None:
    """Write `transfer.md` and its figures.

    Args:
        data: Folder of the table.
        folder: Where they are written.
    """
    tables = {task: _complete(read_table(str(data), task)) for task in recorded_tasks(str(data))}
    proxies = {task: _pairs(table) for task, table in tables.items()}
    folder.mkdir(parents=True, exist_ok=True)
    figures.draw_sizes(proxies, SIZES[-1], folder / "transfer-sizes.svg")
    figures.draw_rates(
        {task: {size: _by_rate(table, size) for size in SIZES} for task, table in tables.items()},
        folder / "transfer-learning-rate.svg",
    )
    figures.draw_steps(
        {task: {size: _by_share(table, size) for size in SIZES} for task, table in tables.items()},
        folder / "transfer-steps.svg",
    )
    (folder / "transfer.md").write_text(_page(tables), encoding="utf-8")


def _complete(table: Table) -> Table:
    """The configurations that are recorded on all sizes; in a table that is not finished the last one may not be."""
    numbers = set.intersection(*({recording.number for recording in table.of_size(size)} for size in SIZES))
    return Table(tuple(recording for recording in table.recordings if recording.number in numbers))


def _rates(table: Table) -> dict[int, float]:
    return {recording.number: float(recording.configuration["learning_rate"]) for recording in table.recordings}


def _pairs(table: Table) -> dict[str, tuple[list[float], list[float], list[float]]]:
    dear, rates = scores(table, SIZES[-1]), _rates(table)
    pairs = {}
    for proxy in SIZES[:-1]:
        cheap = scores(table, proxy)
        numbers = [number for number in dear if number in cheap]
        columns = [[values[number] for number in numbers] for values in (cheap, dear, rates)]
        pairs[proxy] = (columns[0], columns[1], columns[2])
    return pairs


def _by_rate(table: Table, size: str) -> tuple[list[float], list[float]]:
    final, rates = scores(table, size), _rates(table)
    return [rates[number] for number in final], list(final.values())


def _by_share(table: Table, size: str) -> list[float]:
    final = scores(table, size)
    found = [agreement(scores(table, size, rung / RUNGS), final).spearman for rung in range(1, RUNGS + 1)]
    return [np.nan if value is None else value for value in found]


def _page(tables: Mapping[str, Table]) -> str:
    target = SIZES[-1]
    return f"""# Transfer: what small models and short runs say

Measured on the recorded table of real trainings (`benchmarks/rl_table/data`) by
`python -m benchmarks.rl_table transfer`. Compared are
{_counts(tables)}, each on all sizes; the target is `{target}` at full
length. A score is a mean held-out reward: an accuracy, but on `countdown`, which is graded. A training that collapsed
keeps its last one. Intervals: 95 %, bootstrap over configurations.

Each pair is compared over all configurations, over those that end above the base model on the dearer side, and over
the top quarter of the dearer side. The first is flattered by trainings that collapse or stand still on either side; the
last is what a choice among good candidates needs, and is hard to tell: a selection by score leaves little spread.

## Between sizes, both at full length

The last line of each task compares `{target}` with itself on other held-out prompts: what evaluation noise leaves of a
perfect agreement.

{_sizes_table(tables)}

![Final scores of each configuration on a smaller model and on the target](transfer-sizes.svg)

## Between tasks, on the target at full length

The same configurations on two tasks, of which the second is the one to be tuned. The regret is what the first task's
best configuration, or the best of its best three, lacks on the second.

{_tasks_table(tables)}

## Between lengths, on the same size

{_steps_table(tables)}

![Spearman's rank correlation with the final score, by share of the horizon](transfer-steps.svg)

## Where good learning rates lie

Geometric mean over the top quarter of configurations, and the rate of the single best one.

{_rates_table(tables)}

![Final score by learning rate, for each size](transfer-learning-rate.svg)

## What it costs to choose on a proxy

The best one, or the best three, of a proxy's ranking are trained on the target, and the best there is taken. The regret
is score on the target, judged on prompts that no choice has used, against the configuration that is best on the
target; by luck it can be negative. A configuration drawn at random is given for comparison.

{_regret_table(tables)}
"""


def _counts(tables: Mapping[str, Table]) -> str:
    counts = [f"{len(scores(table, SIZES[-1]))} configurations on `{task}`" for task, table in tables.items()]
    return listed(counts)


def _sizes_table(tables: Mapping[str, Table]) -> str:
    rows = []
    for task, table in tables.items():
        pairs = [
            *((cheap, dear, scores(table, cheap), scores(table, dear)) for cheap, dear in PAIRS),
            (SIZES[-1], SIZES[-1], test_scores(table, SIZES[-1]), scores(table, SIZES[-1])),
        ]
        rows += [
            [task, f"`{first}`", f"`{second}`", *_cells(cheap, dear, base(table, second))]
            for first, second, cheap, dear in pairs
        ]
    return markdown_table(["task", "cheap", "dear", *AGREEMENT_COLUMNS], rows)


def _tasks_table(tables: Mapping[str, Table]) -> str:
    target = SIZES[-1]
    rows = []
    for first, second in permutations(tables, 2):
        cheap, dear = (scores(tables[task], target) for task in (first, second))
        shared = {number: dear[number] for number in dear if number in cheap}
        test = test_scores(tables[second], target)
        costs = [_bounded(regret(cheap, shared, test, choices)) for choices in CHOICES]
        rows.append([first, second, *_cells(cheap, shared, base(tables[second], target)), *costs])
    return markdown_table(["first task", "second task", *AGREEMENT_COLUMNS, *REGRET_COLUMNS], rows)


def _steps_table(tables: Mapping[str, Table]) -> str:
    rows = [
        [
            task,
            f"`{size}`",
            f"{rung}/{RUNGS}",
            *_cells(scores(table, size, rung / RUNGS), scores(table, size), base(table, size)),
        ]
        for task, table in tables.items()
        for size in SIZES
        for rung in EARLY_RUNGS
    ]
    return markdown_table(["task", "size", "share of the horizon", *AGREEMENT_COLUMNS], rows)


AGREEMENT_COLUMNS = (
    "n", "Spearman", "Kendall", "n above base", "Spearman", "Kendall", "n in top quarter", "Spearman", "Kendall",
)  # fmt: skip

REGRET_COLUMNS = tuple(f"regret, top {choices}" for choices in CHOICES)


def _cells(cheap: Scores, dear: Scores, base_score: float) -> list[str]:
    cells = []
    for among in (None, {number for number in dear if dear[number] > base_score}, top(dear)):
        found = agreement(cheap, dear, among)
        cells += [
            str(found.pairs),
            _measured(found.spearman, found.spearman_interval),
            _measured(found.kendall, found.kendall_interval),
        ]
    return cells


def _measured(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.2f}" if interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _rates_table(tables: Mapping[str, Table]) -> str:
    rows = []
    for task, table in tables.items():
        for size in SIZES:
            rates = learning_rates(table, size)
            cell = f"{rates.mean:.1e} [{rates.low:.1e}, {rates.high:.1e}]"
            rows.append([task, f"`{size}`", f"{table.sizes[size]:,}", cell, f"{rates.best:.1e}"])
    return markdown_table(["task", "size", "parameters", "top quarter", "best"], rows)


def _regret_table(tables: Mapping[str, Table]) -> str:
    rows = []
    for task, table in tables.items():
        dear, test = scores(table, SIZES[-1]), test_scores(table, SIZES[-1])
        for size in SIZES:
            for share in (EARLY, 1.0):
                if (size, share) == (SIZES[-1], 1.0):
                    continue
                cheap = scores(table, size, share)
                cells = [_bounded(regret(cheap, dear, test, choices)) for choices in CHOICES]
                rows.append([task, f"`{size}`, {share:.0%} of the horizon", *cells])
        rows.append([task, "at random", f"{chance_regret(dear, test):.3f}", ""])
    return markdown_table(["task", "chosen on", *REGRET_COLUMNS], rows)


def _bounded(found: Regret) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
