"""Stopping rules judged on recorded trainings, which ran without any.

A rule reads a training's step records until it wants to stop. That is right if the training ends in the lower half of
its task and size (`POOR_SHARE`), and a false kill if it ends in the top quarter (`GOOD_SHARE`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from benchmarks.markdown import markdown_table
from benchmarks.rl_table.generate import SIZES, TASKS
from jfhpo_core.stopping import RULE_SETS, RULES, Course, Monitor, StoppingRule, Unpromising
from jfhpo_core.trainers.replay_table import Recording, Table, read_table
from jfhpo_core.trial import Evaluation, StepRecord

POOR_SHARE = 0.5
GOOD_SHARE = 0.25

RECENT_STEPS = 8
"""A collapsed training is taken to go on at the cost of its last steps."""


@dataclass(frozen=True)
class Fate:
    """What a rule does to a training, and what the training would have come to.

    Attributes:
        stopped: Step at which the rule stops it; None if it does not.
        poor: Whether it ends in the lower half of its task and size.
        good: Whether it ends in the top quarter.
        collapsed: Whether it was recorded as collapsed.
        seconds: CPU seconds of all its steps up to the full horizon.
        saved_seconds: Of these, the ones after the stop.
    """

    stopped: int | None
    poor: bool
    good: bool
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
    false_kill_interval: tuple[float, float]
    saved: float
    step: float | None


def fates(rules: Sequence[StoppingRule], table: Table, size: str) -> list[Fate]:
    """What rules do to each training of a size, all seeds."""
    recordings = table.of_size(size)
    finals = np.array([recording.evaluations[-1].score for recording in recordings])
    poor, good = np.quantile(finals, [POOR_SHARE, 1 - GOOD_SHARE])
    found = []
    for recording, final in zip(recordings, finals, strict=True):
        stopped = stopping_step(rules, recording, table.total_steps)
        costs = _step_seconds(recording, table.total_steps)
        found.append(
            Fate(
                stopped=stopped,
                poor=bool(final < poor),
                good=bool(final >= good),
                collapsed=not recording.completed,
                seconds=sum(costs),
                saved_seconds=0.0 if stopped is None else sum(costs[stopped:]),
            )
        )
    return found


def stopping_step(rules: Sequence[StoppingRule], recording: Recording, total_steps: int) -> int | None:
    """The step after which one of the rules stops a training; None if none does."""
    monitor = Monitor(rules, Course(total_steps))
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
    trainings = sum(len(table.recordings) for table in tables.values())
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

## Sets, by task and size

{markdown_table(["rules", "task", "size", *COLUMNS], by_group)}
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
