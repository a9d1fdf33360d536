"""Stopping rules judged on recorded trainings, which ran without any.

A rule reads a training's step records until it wants to stop. That is right if the training ends in the lower half of
its task and size (`POOR_SHARE`), and a false kill if it ends in the top quarter (`GOOD_SHARE`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest

from benchmarks.markdown import markdown_table
from benchmarks.rl_table.generate import SIZES, TASKS
from jfhpo_core.evidence import milestone, thinned
from jfhpo_core.prospects import gain_floors
from jfhpo_core.stopping import RULE_SETS, RULES, Course, Monitor, StoppingRule, Unpromising
from jfhpo_core.surrogate import ANY_SEED, FIDELITY_COLUMNS, THIS_STUDY, Observations, fitted_surrogate
from jfhpo_core.trainers.replay_table import SPACE, Recording, Table, read_table
from jfhpo_core.trial import Evaluation, StepRecord

POOR_SHARE = 0.5
GOOD_SHARE = 0.25

WARM_UP = SPACE.dimension + 2
"""Trainings before the first for which the model sets floors."""

ORDERS = 2
"""Random orders in which the trainings are made one after another."""

RECENT_STEPS = 8
"""A collapsed training is taken to go on at the cost of its last steps."""


@dataclass(frozen=True)
class Fate:
    """What a rule does to a training, and what the training would have come to.

    Attributes:
        stopped: Step at which the rule stops it; None if it does not.
        poor: Whether it ends in the lower half of its task and size.
        good: Whether it ends in the top quarter.
        best: Whether none ends better.
        collapsed: Whether it was recorded as collapsed.
        seconds: CPU seconds of all its steps up to the full horizon.
        saved_seconds: Of these, the ones after the stop.
    """

    stopped: int | None
    poor: bool
    good: bool
    best: bool
    collapsed: bool
    seconds: float
    saved_seconds: float


@dataclass(frozen=True)
class Verdict:
    """A rule's record over some trainings. Shares without a training to count are None.

    Attributes:
        trainings: How many were watched.
        stopped: How many the rule stopped.
        precision: Share of poor ones among the stopped.
        recall: Share of stopped ones among the poor.
        caught: Share of stopped ones among the collapsed.
        good: How many good ones there were.
        false_kills: How many of these were stopped.
        best: Share of the best ones that was stopped.
        false_kill_interval: Of their share, 95 % (Clopper and Pearson, Biometrika 1934).
        saved: Share of the compute of all full trainings that the rule saves.
        step: Median step at which it stops.
    """

    trainings: int
    stopped: int
    precision: float | None
    recall: float | None
    caught: float | None
    good: int
    false_kills: int
    best: float | None
    false_kill_interval: tuple[float, float]
    saved: float
    step: float | None


def fates(rules: Sequence[StoppingRule], table: Table, size: str) -> list[Fate]:
    """What rules do to each training of a size, all seeds."""
    recordings = table.of_size(size)
    steps = [stopping_step(rules, recording, table.total_steps) for recording in recordings]
    return _fates(recordings, steps, table.total_steps)


def _fates(recordings: Sequence[Recording], steps: Sequence[int | None], total_steps: int) -> list[Fate]:
    finals = np.array([recording.evaluations[-1].score for recording in recordings])
    poor, good = np.quantile(finals, [POOR_SHARE, 1 - GOOD_SHARE])
    found = []
    for recording, final, stopped in zip(recordings, finals, steps, strict=True):
        costs = _step_seconds(recording, total_steps)
        found.append(
            Fate(
                stopped=stopped,
                poor=bool(final < poor),
                good=bool(final >= good),
                best=bool(final == finals.max()),
                collapsed=not recording.completed,
                seconds=sum(costs),
                saved_seconds=0.0 if stopped is None else sum(costs[stopped:]),
            )
        )
    return found


def fates_in_sequence(
    rules: Sequence[StoppingRule], table: Table, size: str, order: int, warm_up: int = WARM_UP
) -> list[Fate]:
    """What rules do to the trainings of a size, first seeds, that are made one after another in a random order.

    Before each one the surrogate of a search on that size alone has seen what was trained of those before it, and sets
    floors for the rule `unpromising`, if that is among the rules.

    Args:
        rules: The rules.
        table: Recorded trainings.
        size: Which of them.
        order: Number of the order.
        warm_up: Trainings at the beginning that have no floors.
    """
    recordings = [recording for recording in table.of_size(size) if recording.seed == 0]
    recordings = [recordings[i] for i in np.random.default_rng(order).permutation(len(recordings))]
    rule = next((rule for rule in rules if isinstance(rule, Unpromising)), None)
    rows: list[tuple[list[float], float, float]] = []
    fitted = 0
    steps: list[int | None] = []
    for number, recording in enumerate(recordings):
        floors: dict[int, float] = {}
        if rule is not None and number >= warm_up:
            if milestone(number) > fitted:
                fitted, basis = milestone(number), len(rows)
            floors = _floors(rule, _observations(rows), _observations(rows[:basis]), recording, number, table)
        stopped = stopping_step(rules, recording, table.total_steps, floors)
        steps.append(stopped)
        seen = [e for e in recording.evaluations if 0 < e.step <= (stopped or table.total_steps)]
        base = recording.evaluations[0].score
        rows += [
            (_input(recording, e.step / table.total_steps, number), e.score - base, e.standard_error**2)
            for e in thinned(seen)
        ]
    return _fates(recordings, steps, table.total_steps)


def _floors(
    rule: Unpromising, known: Observations, basis: Observations, recording: Recording, number: int, table: Table
) -> dict[int, float]:
    """Scores at the rungs before the last one below which a training is not expected to become the best so far."""
    surrogate = fitted_surrogate(known, basis, SPACE.dimension, [])
    target = torch.tensor([_input(recording, 1.0, ANY_SEED)], dtype=torch.double)
    tried = known.inputs.clone()
    tried[:, -FIDELITY_COLUMNS + 1], tried[:, -FIDELITY_COLUMNS + 2] = 1.0, ANY_SEED
    incumbent = float(surrogate.gain_moments(tried)[0].max())
    rungs = [evaluation.step for evaluation in recording.evaluations if 0 < evaluation.step < table.total_steps]
    inputs = torch.tensor([_input(recording, rung / table.total_steps, number) for rung in rungs], dtype=torch.double)
    variance = float(known.variances.mean())
    inflation = surrogate.moments().inflation()
    gains = gain_floors(surrogate, target, inputs, incumbent, rule.probability, variance, inflation)
    base = recording.evaluations[0].score
    return {rung: base + gain for rung, gain in zip(rungs, gains, strict=True) if gain is not None}


def _input(recording: Recording, progress: float, trial: float) -> list[float]:
    return [*(float(value) for value in recording.point), 0.0, progress, float(trial), THIS_STUDY]


def _observations(rows: Sequence[tuple[list[float], float, float]]) -> Observations:
    inputs, gains, variances = zip(*rows, strict=True)
    return Observations(*(torch.tensor(column, dtype=torch.double) for column in (inputs, gains, variances)))


def stopping_step(
    rules: Sequence[StoppingRule], recording: Recording, total_steps: int, floors: Mapping[int, float] | None = None
) -> int | None:
    """The step after which one of the rules stops a training; None if none does."""
    monitor = Monitor(rules, Course(total_steps, floors=dict(floors or {})))
    evaluations = {evaluation.step: evaluation for evaluation in recording.evaluations}
    events: list[StepRecord | Evaluation] = [evaluations[0]]
    for record in recording.steps:
        events += [record, *([evaluations[record.step]] if record.step in evaluations else [])]
    decisions = (monitor.update(event) for event in events)
    return next((decision.step for decision in decisions if decision is not None), None)


def _step_seconds(recording: Recording, total_steps: int) -> list[float]:
    costs = [record.generation_seconds + record.training_seconds for record in recording.steps]
    return costs + [float(np.mean(costs[-RECENT_STEPS:]))] * (total_steps - len(costs))


def judge(found: Sequence[Fate]) -> Verdict:
    """Sum up what a rule has done."""
    stopped = [fate for fate in found if fate.stopped is not None]
    poor = [fate for fate in found if fate.poor]
    good = [fate for fate in found if fate.good]
    collapsed = [fate for fate in found if fate.collapsed]
    false_kills = sum(fate.stopped is not None for fate in good)
    interval = binomtest(false_kills, len(good)).proportion_ci()
    return Verdict(
        trainings=len(found),
        stopped=len(stopped),
        precision=_share([fate.poor for fate in stopped]),
        recall=_share([fate.stopped is not None for fate in poor]),
        caught=_share([fate.stopped is not None for fate in collapsed]),
        good=len(good),
        false_kills=false_kills,
        best=_share([fate.stopped is not None for fate in found if fate.best]),
        false_kill_interval=(float(interval.low), float(interval.high)),
        saved=sum(fate.saved_seconds for fate in found) / sum(fate.seconds for fate in found),
        step=float(np.median([fate.stopped for fate in stopped])) if stopped else None,
    )


def _share(truths: Sequence[bool]) -> float | None:
    return sum(truths) / len(truths) if truths else None


def candidates() -> dict[str, tuple[StoppingRule, ...]]:
    """Each rule with its defaults, alone, and the sets of rules that a study can ask for."""
    # A recorded training has no search around it that would set floors.
    single = {f"`{name}`": (rule(),) for name, rule in RULES.items() if name != Unpromising.name}
    sets = {f"set `{name}`": rules for name, rules in RULE_SETS.items() if name != "none"}
    return single | sets


DEFAULT = Unpromising().probability

BOLD = 0.2
"""A probability for the rule `unpromising` that stops more trainings than its default."""


def with_floors() -> dict[str, tuple[StoppingRule, ...]]:
    """The default set, whose rule `unpromising` needs a model, with its default and with a bold probability."""
    usual = RULE_SETS["default"]
    bold = tuple(Unpromising(BOLD) if isinstance(rule, Unpromising) else rule for rule in usual)
    return {f"p = {DEFAULT:g}": usual, f"p = {BOLD:g}": bold}


def write(data: Path, folder: Path) -> None:
    """Write `rules.md`.

    Args:
        data: Folder of the table.
        folder: Where it is written.
    """
    tables = {task: read_table(str(data), task) for task in TASKS}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.md").write_text(_page(tables), encoding="utf-8")


def _page(tables: Mapping[str, Table]) -> str:
    watched = {
        name: {(task, size): fates(rules, table, size) for task, table in tables.items() for size in SIZES}
        for name, rules in candidates().items()
    }
    overall = [
        [name, *_cells(judge([fate for group in groups.values() for fate in group]))]
        for name, groups in watched.items()
    ]
    by_group = [
        [name, task, f"`{size}`", *_cells(judge(group))]
        for name, groups in watched.items()
        if name.startswith("set")
        for (task, size), group in groups.items()
    ]
    in_sequence = {
        (name, task, size): [fate for order in range(ORDERS) for fate in fates_in_sequence(rules, table, size, order)]
        for name, rules in with_floors().items()
        for task, table in tables.items()
        for size in SIZES
    }
    modelled = [
        [name, task, f"`{size}`", *_cells(judge(group)), _percent(judge(group).best)]
        for (name, task, size), group in in_sequence.items()
    ]
    trainings = sum(len(table.recordings) for table in tables.values())
    usual, extended = (
        judge([fate for group in watched[f"set `{name}`"].values() for fate in group])
        for name in ("default", "extended")
    )
    floored = judge([fate for (name, *_), group in in_sequence.items() if str(DEFAULT) in name for fate in group])
    return f"""# Stopping rules on recorded trainings

Each rule read the step records of {trainings} recorded trainings (`benchmarks/rl_table/data`), which ran without
stopping rules, up to the step at which it would have stopped them. Made by `python -m benchmarks.rl_table rules`.

- precision: of the stopped trainings, the share that ends in the lower half of its task and size;
- recall: of the trainings that end in the lower half, the share that is stopped;
- collapsed: of the trainings that collapsed for good, the share that is stopped;
- false kills: stopped trainings that would have ended in the top quarter of their task and size, and their share among
  these, with an exact 95 % interval;
- saved: share of the compute (CPU seconds of the steps) of all trainings at full length. A collapsed training, which
  was cut short when recorded, counts with the cost of its last steps up to the full length;
- step: median step of the stop; a full training has {max(table.total_steps for table in tables.values())}.

## All tasks and sizes

{markdown_table(["rule", *COLUMNS], overall)}

What was asked of the default set: to save at least 35 % of the compute with false kills of at most 1 % of the top
quarter. **Missed**: reading one training alone it saves {usual.saved:.0%} with {usual.false_kills} of {usual.good},
the extended set {extended.saved:.0%} with {extended.false_kills} of {extended.good}. With the search's model (below) it
saves {floored.saved:.0%} and stopped the best training in {floored.best:.0%} of the orders, but
{floored.false_kills} of {floored.good} of the top quarter, which it does not try to keep. Tried on the first
124 trainings: floors by the probability of reaching the upper half (0.02 to 0.1) saved 20 to 22 % with 0 of 68, of
the upper quarter 27 to 34 % with 4 to 6 of 68. What is in the way: how good trainings rank among themselves shows
late (see [transfer](transfer.md) between lengths), and what is stopped late saves little.

## Sets, by task and size

{markdown_table(["rules", "task", "size", *COLUMNS], by_group)}

## With the search's model

The rule `unpromising` compares evaluations with floors that the model of a search has set. Here a size's trainings,
first seeds, are made one after another in {ORDERS} random orders, all to full length unless a rule of the default set
stops them; from number {WARM_UP + 1} on, the surrogate has seen what was trained of those before, and sets floors below
which a training has a probability of less than p of becoming the best so far. It does not try to keep the top quarter:
a training that will end tenth does not matter to a search. Its own measure is the last column: in what share of the
orders the very best training was stopped. In a search the floors are for proxies only, and what is stopped there can
still be trained on the target.

{markdown_table(["p", "task", "size", *COLUMNS, "best one stopped"], modelled)}
"""


COLUMNS = ("trainings", "stopped", "precision", "recall", "collapsed", "false kills", "saved", "step")


def _cells(verdict: Verdict) -> list[str]:
    low, high = verdict.false_kill_interval
    return [
        str(verdict.trainings),
        str(verdict.stopped),
        _percent(verdict.precision),
        _percent(verdict.recall),
        _percent(verdict.caught),
        f"{verdict.false_kills} of {verdict.good} [{low:.1%}, {high:.1%}]",
        _percent(verdict.saved),
        "" if verdict.step is None else f"{verdict.step:g}",
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
