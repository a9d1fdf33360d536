"""The page on stopping rules: what each rule and each set of them did to the recorded trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.markdown import markdown_table
from benchmarks.rl_table.generate import SIZES
from benchmarks.rl_table.rules import ORDERS, WARM_UP, Fate, Verdict, fates, fates_in_sequence, judge, would_have_led
from benchmarks.rl_table.thresholds import (
    GRIDS,
    LEAST_GAIN,
    MAX_FALSE_KILLS,
    Watched,
    best_set,
    best_variant,
    described,
    hindsight,
    variants,
    watch,
)
from jfhpo_core.stopping.rules import RULE_SETS, RULES, KlGrowth, StoppingRule, Unpromising
from jfhpo_core.trainers.replay_table import Table, read_table, recorded_tasks

DEFAULT = Unpromising().probability

BOLD = 0.2
"""A probability for the rule `unpromising` that stops more trainings than its default."""

ASKED_SAVING = 0.35
"""Share of the compute that the default set should save, with at most `MAX_FALSE_KILLS`."""

Group = tuple[str, str]
"""Task and size."""


def candidates() -> dict[str, tuple[StoppingRule, ...]]:
    """Each rule with its defaults, alone, and the sets of rules that a study can ask for."""
    # A recorded training has no search around it that would set floors.
    single = {f"`{name}`": (rule(),) for name, rule in RULES.items() if name != Unpromising.name}
    heedless = {f"`{KlGrowth.name}`, whatever the reward does": (KlGrowth(reward_growth=math.inf),)}
    sets = {f"set `{name}`": rules for name, rules in RULE_SETS.items() if name != "none"}
    return single | heedless | sets


def with_floors() -> dict[float, tuple[StoppingRule, ...]]:
    """The default set, whose rule `unpromising` needs a model, with its default and with a bold probability."""
    usual = RULE_SETS["default"]
    bold = tuple(Unpromising(BOLD) if isinstance(rule, Unpromising) else rule for rule in usual)
    return {DEFAULT: usual, BOLD: bold}


def write(data: Path, folder: Path) -> None:
    """Write `rules.md`.

    Args:
        data: Folder of the table.
        folder: Where it is written.
    """
    tables = {task: read_table(str(data), task) for task in recorded_tasks(str(data))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.md").write_text(_page(tables), encoding="utf-8")


def _page(tables: Mapping[str, Table]) -> str:
    watched = {
        name: {(task, size): fates(rules, table, size) for task, table in tables.items() for size in SIZES}
        for name, rules in candidates().items()
    }
    in_sequence = {
        probability: {
            (task, size): [fates_in_sequence(rules, table, size, order) for order in range(ORDERS)]
            for task, table in tables.items()
            for size in SIZES
        }
        for probability, rules in with_floors().items()
    }
    watched_variants = {
        task: watch((variant for rule in GRIDS for variant in variants(rule)), table, SIZES)
        for task, table in tables.items()
    }
    overall = [[name, *_cells(found := _together(groups)), _kills(found)] for name, groups in watched.items()]
    by_group = [
        [name, task, f"`{size}`", *_cells(judge(group)), _kills(judge(group))]
        for name, groups in watched.items()
        if name.startswith("set")
        for (task, size), group in groups.items()
    ]
    modelled = [
        [f"{probability:g}", task, f"`{size}`", *_in_sequence(orders)]
        for probability, groups in in_sequence.items()
        for (task, size), orders in groups.items()
    ]
    trainings = sum(len(table.recordings) for table in tables.values())
    return f"""# Stopping rules on recorded trainings

Each rule read the step records of {trainings} recorded trainings (`benchmarks/rl_table/data`), which ran without
stopping rules, up to the step at which it would have stopped them. Made by `python -m benchmarks.rl_table rules`.

- precision: of the stopped trainings, the share that ends in the lower half of its task and size;
- recall: of the trainings that end in the lower half, the share that is stopped;
- collapsed: of the trainings that collapsed for good, the share that is stopped;
- false kills: stopped trainings that would have ended in the top quarter of their task and size, and an exact 95 %
  interval of their share among these, as if trainings were independent (the same configurations are trained on every
  size, some with two seeds);
- saved: share of the compute (CPU seconds of the steps) of all trainings at full length. A collapsed training, which
  was cut short when recorded, counts with the cost of its last steps up to the full length;
- step: median step of the stop; a full training has {max(table.total_steps for table in tables.values())}.

## All tasks and sizes

{markdown_table(["rule", *COLUMNS, FALSE_KILLS], overall)}

{_verdict(watched, in_sequence[DEFAULT])}

## Sets, by task and size

{markdown_table(["rules", "task", "size", *COLUMNS, FALSE_KILLS], by_group)}

## With the search's model

The rule `unpromising` compares evaluations with floors that the model of a search has set. Here a size's trainings,
first seeds, are made one after another in {ORDERS} random orders, all to full length unless a rule of the default set
stops them; from number {WARM_UP + 1} on, the surrogate has seen what was trained of those before, and sets floors below
which a training has a probability of less than p of becoming the best so far. It does not try to keep the top quarter:
a training that will end tenth does not matter to a search. Its own measure is how many of those that it stopped would
have ended better than every earlier one that was not stopped: if the model is right, at most a share of p. In a long
sequence that is enough to lose the very best one, which the last column counts, of the orders in which it came after
number {WARM_UP}. In a search the floors are for proxies only, and what is stopped there can still be trained on the
target. A training counts once in each order.

{markdown_table(["p", "task", "size", *COLUMNS, *SEQUENCE_COLUMNS], modelled)}

## Thresholds chosen on one task and judged on the other

The rules' defaults come from practice and from the paper, but for two that were changed after a look at this table:
`{KlGrowth.name}` counts only while the reward has not risen, and `{Unpromising.name}` has p = {DEFAULT:g}. Here the
thresholds of each rule are, of a grid around its defaults, those that save the most on one task while they stop at most
{MAX_FALSE_KILLS:.0%} of the top quarter there, all sizes together. The last two columns are what they do to the other
task, which had no part in the choice. The sets are built the same way: the variant that saves the most, then the one
that adds the most to it, and so on while that is {LEAST_GAIN:.1%} or more.

{markdown_table(CHOICE_COLUMNS, _chosen(watched_variants))}

What comparing scores at the same step could save at most without a false kill, were the outcome of every training
known (a floor for each size and step, just below the lowest score of the top quarter there):
{", ".join(f"{hindsight(table, SIZES):.0%} on {task}" for task, table in tables.items())}.
"""


def _together(groups: Mapping[Group, Sequence[Fate]]) -> Verdict:
    return judge([fate for group in groups.values() for fate in group])


def _verdict(
    watched: Mapping[str, Mapping[Group, Sequence[Fate]]], floored: Mapping[Group, Sequence[Sequence[Fate]]]
) -> str:
    """Whether the default set does what was asked of it."""
    usual, extended = (_together(watched[f"set `{name}`"]) for name in ("default", "extended"))
    modelled = judge([fate for orders in floored.values() for order in orders for fate in order])
    led, stopped = np.sum([_led(orders) for orders in floored.values()], axis=0)
    lost, counted = np.sum([_best_stopped(orders) for orders in floored.values()], axis=0)
    saves, keeps = usual.saved >= ASKED_SAVING, usual.false_kills <= MAX_FALSE_KILLS * usual.good
    return f"""What was asked of the default set: to save at least {ASKED_SAVING:.0%} of the compute
(**{"met" if saves else "missed"}**) with false kills of at most {MAX_FALSE_KILLS:.0%} of the top quarter
(**{"met" if keeps else "missed"}**). Reading one training alone it saves {usual.saved:.1%} with {usual.false_kills} of
{usual.good}, the extended set {extended.saved:.1%} with {extended.false_kills} of {extended.good}. With the search's
model (below) it saves {modelled.saved:.1%}: {led} of {stopped} that were stopped for want of prospects would have been
the best so far ({led / stopped:.1%}; p = {DEFAULT:.0%} was allowed), the very best one of all was stopped in {lost} of
{counted} orders, and {modelled.false_kills} of {modelled.good} of the top quarter, which this rule does not try to
keep, were stopped. What else was tried is in
[note 15](../decisions/0015-floors-from-the-model.md). What is in the way: how good trainings rank among themselves
shows late (see [transfer](transfer.md) between lengths), and what is stopped late saves little."""


def _in_sequence(orders: Sequence[Sequence[Fate]]) -> list[str]:
    found = judge([fate for order in orders for fate in order])
    counts = ((found.false_kills, found.good), _led(orders), _best_stopped(orders))
    return [*_cells(found), *(f"{part} of {whole}" for part, whole in counts)]


def _led(orders: Sequence[Sequence[Fate]]) -> tuple[int, int]:
    """See `would_have_led`, over orders."""
    counts = [would_have_led(order) for order in orders]
    return sum(led for led, _ in counts), sum(stopped for _, stopped in counts)


def _best_stopped(orders: Sequence[Sequence[Fate]]) -> tuple[int, int]:
    """In how many orders the best training was stopped, and in how many it could have been for want of prospects."""
    found = [fate.stopped is not None for order in orders for fate in order[WARM_UP:] if fate.best]
    return sum(found), len(found)


def _chosen(watched: Mapping[str, Watched]) -> list[list[str]]:
    rows = []
    for rule in GRIDS:
        for task, here in watched.items():
            best = best_variant(here, rule)
            if best is not None:
                rows.append([described(here.rules[best]), *_judged(watched, task, [best])])
    for task, here in watched.items():
        chosen = best_set(here)
        rows.append([" + ".join(described(here.rules[i]) for i in chosen), *_judged(watched, task, chosen)])
    return rows


def _judged(watched: Mapping[str, Watched], task: str, chosen: list[int]) -> list[str]:
    other = next(there for name, there in watched.items() if name != task)
    return [
        task,
        _percent(watched[task].saved(chosen)),
        _percent(other.saved(chosen)),
        f"{other.false_kills(chosen)} of {other.good.sum()}",
    ]


COLUMNS = ("trainings", "stopped", "precision", "recall", "collapsed", "saved", "step")

FALSE_KILLS = "false kills"

SEQUENCE_COLUMNS = (FALSE_KILLS, "would have been the best so far", "best one stopped")

CHOICE_COLUMNS = ("chosen", "on", "saved there", "saved on the other task", "false kills on the other task")


def _cells(verdict: Verdict) -> list[str]:
    return [
        str(verdict.trainings),
        str(verdict.stopped),
        _percent(verdict.precision),
        _percent(verdict.recall),
        _percent(verdict.caught),
        _percent(verdict.saved),
        "" if verdict.step is None else f"{verdict.step:g}",
    ]


def _kills(verdict: Verdict) -> str:
    low, high = verdict.false_kill_interval
    return f"{verdict.false_kills} of {verdict.good} [{low:.1%}, {high:.1%}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
