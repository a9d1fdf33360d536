"""Stopping rules judged on recorded trainings, which ran without any.

A rule reads a training's step records until it wants to stop. That is right if the training ends in the lower half of
its task and size (`POOR_SHARE`), and a false kill if it ends in the top quarter (`GOOD_SHARE`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from jfhpo_core.optimizer.floors import value_floors
from jfhpo_core.optimizer.observations import Row, milestone, observe, scale_of, thinned
from jfhpo_core.optimizer.surrogate import ANY_SEED, FIDELITY_COLUMNS, THIS_STUDY, JointStructure, fitted_surrogate
from jfhpo_core.stopping.rules import Course, Monitor, StoppingRule, Unpromising
from jfhpo_core.study.trial import Decision, Evaluation, StepRecord
from jfhpo_core.trainers.replay_table import SPACE, Recording, Table

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
        rule: The rule's name; None if it does not.
        final: Score at full length, or of the last evaluation before it collapsed.
        poor: Whether it ends in the lower half of its task and size.
        good: Whether it ends in the top quarter.
        best: Whether none ends better.
        collapsed: Whether it was recorded as collapsed.
        seconds: CPU seconds of all its steps up to the full horizon.
        saved_seconds: Of these, the ones after the stop.
    """

    stopped: int | None
    rule: str | None
    final: float
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
    decisions = [first_decision(rules, recording, table.total_steps) for recording in recordings]
    return _fates(recordings, decisions, table.total_steps)


def _fates(recordings: Sequence[Recording], decisions: Sequence[Decision | None], total_steps: int) -> list[Fate]:
    finals = np.array([recording.evaluations[-1].score for recording in recordings])
    poor, good = np.quantile(finals, [POOR_SHARE, 1 - GOOD_SHARE])
    found = []
    for recording, final, decision in zip(recordings, finals, decisions, strict=True):
        costs = step_seconds(recording, total_steps)
        found.append(
            Fate(
                stopped=None if decision is None else decision.step,
                rule=None if decision is None else decision.rule,
                final=float(final),
                poor=bool(final < poor),
                good=bool(final >= good),
                best=bool(final == finals.max()),
                collapsed=not recording.completed,
                seconds=sum(costs),
                saved_seconds=0.0 if decision is None else sum(costs[decision.step :]),
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
    model_rule = next((rule for rule in rules if isinstance(rule, Unpromising)), None)
    rows: list[Row] = []
    fitted = 0
    decisions: list[Decision | None] = []
    for number, recording in enumerate(recordings):
        floors: dict[int, float] = {}
        if model_rule is not None and number >= warm_up:
            if milestone(number) > fitted:
                fitted, basis = milestone(number), len(rows)
            floors = _floors(model_rule, rows, rows[:basis], recording, number, table)
        decision = first_decision(rules, recording, table.total_steps, floors)
        decisions.append(decision)
        learned = _learned(recording, decision, table.total_steps)
        rows += [
            Row(
                _input(recording, progress, number),
                evaluation.score,
                evaluation.standard_error**2,
                (number, number, evaluation.step),
                last=evaluation is learned[-1][1],
            )
            for progress, evaluation in learned
        ]
    return _fates(recordings, decisions, table.total_steps)


def would_have_led(order: Sequence[Fate]) -> tuple[int, int]:
    """Of trainings made one after another, those that `unpromising` stopped, and that would have been the best so far.

    Returns:
        How many would have ended better than every one before them that was not stopped, and how many were stopped.
    """
    best, led, stopped = -math.inf, 0, 0
    for fate in order:
        if fate.rule == Unpromising.name:
            stopped += 1
            led += fate.final > best
        elif fate.stopped is None:
            best = max(best, fate.final)
    return led, stopped


def _learned(recording: Recording, decision: Decision | None, total_steps: int) -> list[tuple[float, Evaluation]]:
    """Progress and score of what a search would learn from a run (see `jfhpo_core.optimizer.observations.observe`)."""
    if decision is not None and decision.rule != Unpromising.name:
        return [(1.0, recording.evaluation(decision.step))]
    end = total_steps if decision is None else decision.step
    seen = [evaluation for evaluation in recording.evaluations if 0 < evaluation.step <= end]
    return [(evaluation.step / total_steps, evaluation) for evaluation in thinned(seen)]


def _floors(
    rule: Unpromising, known: Sequence[Row], basis: Sequence[Row], recording: Recording, number: int, table: Table
) -> dict[int, float]:
    """Scores at the rungs before the last one below which a run is not expected to become the best so far."""
    scale = scale_of(known)
    surrogate = fitted_surrogate(
        observe(known, scale, SPACE.dimension),
        observe(basis, scale_of(basis), SPACE.dimension),
        JointStructure(SPACE.dimension, []),
    )
    target = torch.tensor([_input(recording, 1.0, ANY_SEED)], dtype=torch.double)
    tried = surrogate.observations.inputs.clone()
    tried[:, -FIDELITY_COLUMNS + 1], tried[:, -FIDELITY_COLUMNS + 2] = 1.0, ANY_SEED
    incumbent = float(surrogate.mean_and_deviation(tried)[0].max())
    rungs = {
        evaluation.step: group
        for evaluation in recording.evaluations
        if 0 < evaluation.step < table.total_steps
        and (group := (THIS_STUDY, 0.0, evaluation.step / table.total_steps)) in scale.references
    }
    inputs = torch.tensor([_input(recording, share, number) for _, _, share in rungs.values()], dtype=torch.double)
    variance = float(surrogate.observations.variances.mean())
    inflation = surrogate.moments().inflation()
    values = value_floors(surrogate, target, inputs, incumbent, rule.probability, variance, inflation)
    return {
        step: float(scale.score(group, [value])[0])
        for (step, group), value in zip(rungs.items(), values, strict=True)
        if value is not None
    }


def _input(recording: Recording, progress: float, trial: float) -> tuple[float, ...]:
    return (*(float(value) for value in recording.point), 0.0, progress, float(trial), THIS_STUDY)


def stopping_step(
    rules: Sequence[StoppingRule], recording: Recording, total_steps: int, floors: Mapping[int, float] | None = None
) -> int | None:
    """The step after which one of the rules stops a training; None if none does."""
    decision = first_decision(rules, recording, total_steps, floors)
    return None if decision is None else decision.step


def first_decision(
    rules: Sequence[StoppingRule], recording: Recording, total_steps: int, floors: Mapping[int, float] | None = None
) -> Decision | None:
    """The decision with which one of the rules stops a training; None if none does."""
    groups = recording.steps[0].prompts
    completions = groups * int(recording.configuration["n_samples"])
    course = Course(total_steps, floors=dict(floors or {}), groups=groups, completions=completions)
    monitor = Monitor(rules, course)
    evaluations = {evaluation.step: evaluation for evaluation in recording.evaluations}
    events: list[StepRecord | Evaluation] = [evaluations[0]]
    for record in recording.steps:
        events += [record, *([evaluations[record.step]] if record.step in evaluations else [])]
    decisions = (monitor.update(event) for event in events)
    return next((decision for decision in decisions if decision is not None), None)


def step_seconds(recording: Recording, total_steps: int) -> list[float]:
    """CPU seconds of each step up to the full horizon."""
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
