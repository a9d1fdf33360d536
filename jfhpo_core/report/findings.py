"""What a study says so far, in numbers: the figures, tables and sentences of the report come from here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from jfhpo_core.report.text import figures, listed, number, signed
from jfhpo_core.run.outcome import Comparison, SearchResult
from jfhpo_core.run.standing import is_rewardless, runs_without_reward
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import Limit
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import (
    Evaluation,
    Purpose,
    SegmentResult,
    StepRecord,
    Trial,
    TrialState,
)

Z_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""

PURPOSES: dict[Purpose, str] = {
    "search": "search",
    "baseline": "baselines",
    "confirmation": "confirmation on further seeds",
    "random-search": "random search, for comparison",
}


def interval(score: float, standard_error: float) -> tuple[float, float]:
    """95 % interval of a score (normal approximation)."""
    return score - Z_95 * standard_error, score + Z_95 * standard_error


NOT_FINISHED = "not finished"
"""Stands for the score of a configuration of which no run reached full length."""


def score_text(row: Comparison) -> str:
    """The score of a row of the final table, for people."""
    return number(row.score) if row.seeds else NOT_FINISHED


def interval_text(row: Comparison) -> str:
    """Its 95 % interval; empty without a score."""
    low, high = interval(row.score, row.standard_error)
    return f"{number(low)} to {number(high)}" if row.seeds else ""


@dataclass(frozen=True)
class Contrast:
    """The recommendation against one row of the final table.

    Attributes:
        difference: Its score minus the row's.
        standard_error: Of the difference, both measurements taken as independent. They share held-out prompts, so
            the true one is smaller, if anything.
    """

    label: str
    difference: float
    standard_error: float

    @property
    def z(self) -> float:
        """Difference in standard errors; NaN if it cannot be told."""
        if self.standard_error > 0:
            return self.difference / self.standard_error
        return math.copysign(math.inf, self.difference) if self.difference else math.nan

    @property
    def verdict(self) -> str:
        """In words; 'clearly' means that the 95 % interval of the difference excludes 0."""
        if not math.isfinite(self.difference):
            return "not comparable with"
        if abs(self.z) >= Z_95:
            return "clearly better than" if self.difference > 0 else "clearly worse than"
        return "not clearly better than" if self.difference > 0 else "not better than"


def contrasts(result: SearchResult) -> list[Contrast]:
    """The recommendation against each other row that has a score; empty if nothing is recommended."""
    if result.recommended is None or not result.rows or not result.rows[0].seeds:
        return []
    mine, *others = result.rows
    return [
        Contrast(row.label, mine.score - row.score, math.hypot(mine.standard_error, row.standard_error))
        for row in others
        if row.seeds
    ]


def verdict(result: SearchResult) -> str:
    """The outcome in a sentence or two."""
    target = result.study.ladder.target.name
    if result.recommended is None or not result.rows:
        return why_nothing(result)
    mine = result.rows[0]
    if not mine.seeds:
        return (
            f"The recommended configuration has not been trained to full length on {target} with a seed of the study."
        )
    low, high = interval(mine.score, mine.standard_error)
    seeds = f"{mine.seeds} seed{'s' if mine.seeds != 1 else ''}"
    text = (
        f"The recommended configuration scores {number(mine.score)} on {target} "
        f"({number(low)} to {number(high)}, {seeds})."
    )
    if result.study.spec.limits:
        text += f" {_respect(mine, result.study.spec.limits)}"
    groups: dict[str, list[str]] = {}
    breaks = {row.label: f", which breaks {broken_text(row.broken, row.measured)}" for row in result.rows if row.broken}
    for contrast in contrasts(result):
        label = f"{contrast.label} ({signed(contrast.difference)}{breaks.get(contrast.label, '')})"
        groups.setdefault(contrast.verdict, []).append(label)
    if groups:
        text += f" It is {'; '.join(f'{words} {listed(labels)}' for words, labels in groups.items())}."
    return text


def broken_text(limits: Sequence[Limit], measured: Mapping[str, float]) -> str:
    """Constraints with what was measured: 'kl <= 0.2 (0.31)'."""
    return listed([f"{limit} ({metric_text(limit.metric, measured)})" for limit in limits])


def metric_text(name: str, measured: Mapping[str, float]) -> str:
    """A metric's value for people."""
    return figures(measured[name]) if name in measured else "not recorded"


def _respect(row: Comparison, limits: Sequence[Limit]) -> str:
    """Whether the recommended configuration keeps to the constraints, over all runs of its row."""
    if row.broken:
        return (
            f"Over all of these runs it breaks {broken_text(row.broken, row.measured)}; in those by which it was "
            "chosen it did not."
        )
    return f"It respects {broken_text(limits, row.measured)}."


def why_nothing(result: SearchResult) -> str:
    """Why nothing can be recommended, and what to do about it."""
    target, budget = result.study.ladder.target.name, result.study.spec.budget.device_seconds
    without_reward = runs_without_reward(result.study, result.trials)
    if is_rewardless(result.study, without_reward):
        return _no_reward(target, len(without_reward))
    if result.tried:
        return _none_respects(result)
    lead = f"Nothing can be recommended: no training run of the search reached full length on {target}."
    if not result.complete:
        return f"{lead} The study is not finished: run the same command to continue."
    ended = [trial for trial in result.trials if trial.purpose == "search" and trial.segments]
    if not ended:
        return (
            f"{lead} The budget of {budget:.3g} device-seconds pays for none: raise it (`jfhpo plan` forecasts what a "
            "run costs) and run the same command again."
        )
    failures = Counter(
        (trial.segments[-1].failure, trial.segments[-1].message)
        for trial in ended
        if trial.state is TrialState.INFEASIBLE
    )
    rules = Counter(trial.decision.rule for trial in ended if trial.decision is not None)
    if failures and failures.total() >= rules.total():
        (kind, message), _ = failures.most_common(1)[0]
        return (
            f"{lead} {failures.total()} of {len(ended)} trials failed, most often like this ({kind}): {message} Remove "
            "the cause and run the same command: it tries one more trial, and goes on if that one succeeds."
        )
    if rules:
        (rule, count), *_ = rules.most_common(1)
        return (
            f"{lead} Stopping rules ended {rules.total()} of {len(ended)} trials, {rule} {count} of them. `jfhpo show` "
            "says why each was stopped. Narrow the space to gentler values, or change the rule in stopping.override; "
            "both make a new study."
        )
    return (
        f"{lead} {result.spent_seconds:.3g} of {budget:.3g} device-seconds are spent: raise the budget and run the "
        "same command again."
    )


def _no_reward(target: str, runs: int) -> str:
    """What to do if no completion ever had a reward."""
    return (
        f"Nothing can be recommended: in {runs} runs, some of them on {target}, no completion had a reward other than "
        "0, in training or on the held-out set. Without any reward there is nothing to learn from, so the search has "
        "ended before its budget. Read completions in the report: if right answers get no reward, mend the reward and "
        "run the same command with --accept-changed-data; if there are none, take easier prompts, allow longer "
        "completions, or first train the models on right answers, which makes a new study."
    )


def _none_respects(result: SearchResult) -> str:
    """What comes nearest to the constraints, if no configuration respects them."""
    study = result.study
    limits = study.spec.limits
    unknown = [limit.metric for limit in limits if all(limit.metric not in item.measured for item in result.tried)]
    count = len(result.tried)
    configurations = f"{count} configuration{'s' if count != 1 else ''} trained to full length on"
    lead = f"Nothing can be recommended: none of {configurations} {study.ladder.target.name} is known to respect "
    if unknown:
        return (
            f"{lead}{listed([str(limit) for limit in limits])}, as no full run has recorded {listed(unknown)}: "
            f"trainer {study.spec.trainer.name!r} does not measure it with these hyperparameters, or the runs are from "
            "an earlier version. Remove the constraint and run the same command again: nothing is trained twice."
        )
    nearest = min(result.tried, key=lambda item: item.excess)
    more = (
        "Loosen the limit (constraints may change at any time), or raise the budget, and run the same command again."
        if result.complete
        else "The study is not finished: run the same command to continue."
    )
    return (
        f"{lead}{listed([str(limit) for limit in limits])}. Trial {nearest.trial} comes nearest: it scores "
        f"{number(nearest.score)} and breaks {broken_text(nearest.broken, nearest.measured)}. {more}"
    )


def caveats(result: SearchResult) -> list[str]:
    """What a careful reader must know about the final table."""
    if not result.rows:
        return []
    notes = []
    fresh = result.confirmed
    if fresh is not None:
        others = "seed" if fresh.seeds == 1 else f"{fresh.seeds} seeds"
        notes.append(
            "The first seed also served to choose the configuration, so its score is too high on average. "
            f"On the other {others} alone it scores {number(fresh.score)}."
        )
    elif result.recommended is not None:
        notes.append("It was chosen and measured on the same seed, which flatters it. More training seeds would tell.")
    finished = [row for row in result.rows if row.seeds]
    single = [row.label for row in finished if row.seeds == 1]
    if single:
        notes.append(
            f"One seed only: {', '.join(single)}. Those intervals hold evaluation noise and not the spread of training."
        )
    elif finished and (fewest := min(row.seeds for row in finished)) < 5:
        notes.append(f"With {fewest} seeds the spread between runs is itself uncertain, and so are the intervals.")
    if any(row.label == "random search" for row in result.rows):
        notes.append("Random search counts with the best of its full runs, which flatters it as well.")
    if result.study.spec.limits and result.recommended is not None:
        notes.append(
            "Constraints are judged by means over the last rung of training; those values are noisy, too, and another "
            "run may lie beyond a limit that these respect narrowly."
        )
    changed = sorted({field for trial in result.trials for field in trial.changed})
    if changed:
        first = min(trial.number for trial in result.trials if trial.changed)
        notes.append(
            f"The contents of {', '.join(changed)} were changed during the study, which was accepted: scores of trials "
            f"that are marked, the first of which is {first}, do not compare with those before."
        )
    notes += [
        f"Not finished, so without a score: {row.label}, {reason}." for row in result.rows for reason in row.unfinished
    ]
    return notes


def untrained(result: SearchResult) -> dict[str, Evaluation]:
    """What the untrained models scored, small to large, as far as a trial has measured it."""
    found = {
        trial.model: evaluation
        for trial in reversed(result.trials)
        for evaluation in trial.evaluations[:1]
        if evaluation.step == 0
    }
    return {model.name: found[model.name] for model in result.study.ladder.models if model.name in found}


def timeouts(result: SearchResult, step_records: Mapping[str, Sequence[StepRecord]]) -> tuple[int, int]:
    """Completions whose scoring took too long: in training and in evaluations."""
    steps = sum(record.reward_timeouts for records in step_records.values() for record in records)
    return steps, sum(evaluation.reward_timeouts for trial in result.trials for evaluation in trial.evaluations)


def history(trials: Sequence[Trial]) -> list[tuple[Trial, SegmentResult]]:
    """All committed segments in order of their commit; those of ledgers that did not note it, by trial number."""
    items = [(trial, segment) for trial in trials for segment in trial.segments]
    return sorted(items, key=lambda item: (item[1].committed, item[0].number, item[1].segment.index))


@dataclass(frozen=True)
class Incumbent:
    """Best score so far against cost: (cumulative device-seconds, score) at each improvement, and where it ends."""

    model: str
    purpose: Purpose
    points: tuple[tuple[float, float], ...]
    end_seconds: float


def incumbents(result: SearchResult) -> list[Incumbent]:
    """For the search: best full-length score on the target, and best score at any length on each proxy.

    For random search: best full-length score on the target. Each purpose has its own purse, counted from zero.
    """
    target = result.study.ladder.target.name
    found: list[Incumbent] = []
    for purpose in ("search", "random-search"):
        spent = 0.0
        points: dict[str, list[tuple[float, float]]] = {model.name: [] for model in result.study.ladder.models}
        for trial, segment in history(result.trials):
            if trial.purpose != purpose:
                continue
            spent += segment.charge_seconds
            for evaluation in segment.evaluations:
                counts = evaluation.step >= trial.total_steps if trial.model == target else evaluation.step > 0
                curve = points[trial.model]
                if counts and math.isfinite(evaluation.score) and (not curve or evaluation.score > curve[-1][1]):
                    curve.append((spent, evaluation.score))
        found += [
            Incumbent(model, "search" if purpose == "search" else "random-search", tuple(curve), spent)
            for model, curve in points.items()
            if curve
        ]
    return found


def cost_by_purpose(result: SearchResult) -> dict[Purpose, dict[str, float]]:
    """Device-seconds by purpose and model, for purposes that have a trial."""
    models = [model.name for model in result.study.ladder.models]
    table: dict[Purpose, dict[str, float]] = {}
    for purpose in PURPOSES:
        mine = [trial for trial in result.trials if trial.purpose == purpose]
        if mine:
            table[purpose] = {m: sum(trial.charge_seconds for trial in mine if trial.model == m) for m in models}
    return table


def search_trial_ratio(result: SearchResult) -> tuple[float, float] | None:
    """Mean cost of a search trial, and of a run at full length on the target, in device-seconds.

    None unless both are known.
    """
    search = [trial.charge_seconds for trial in result.trials if trial.purpose == "search" and trial.segments]
    full = [
        trial.charge_seconds
        for trial in result.trials
        if trial.model == result.study.ladder.target.name and trial.final is not None
    ]
    return (fmean(search), fmean(full)) if search and full and fmean(full) > 0 else None


ACTIVITIES = ("start-up", "generation", "training", "evaluation", "other")


def activities(result: SearchResult, step_records: Mapping[str, Sequence[StepRecord]]) -> dict[str, dict[str, float]]:
    """Worker-seconds by model and activity, over all purposes.

    Generation and training come from the step records; what no record explains is 'other'.
    """
    table = {model.name: dict.fromkeys(ACTIVITIES, 0.0) for model in result.study.ladder.models}
    for trial in result.trials:
        row, records = table[trial.model], step_records.get(trial.key, ())
        parts = {
            "start-up": sum(segment.startup_seconds for segment in trial.segments),
            "generation": sum(record.generation_seconds for record in records),
            "training": sum(record.training_seconds for record in records),
            "evaluation": sum(segment.evaluation_seconds for segment in trial.segments),
        }
        rest = sum(segment.seconds for segment in trial.segments) - sum(parts.values())
        parts["other"] = max(0.0, round(rest, 3))
        for activity, seconds in parts.items():
            row[activity] += seconds
    return table


def states(trials: Sequence[Trial]) -> Counter[str]:
    """Number of trials in each state."""
    return Counter(trial.state.value for trial in trials)


@dataclass(frozen=True)
class Source:
    """One rung of the strategies' ladder: what it asked for."""

    name: str
    segments: int
    trials: int
    seconds: float


def sources(trials: Sequence[Trial]) -> list[Source]:
    """Who asked for the committed segments, busiest first."""
    segments: dict[str, list[tuple[Trial, SegmentResult]]] = {}
    for trial, segment in history(trials):
        segments.setdefault(segment.segment.suggestion.source, []).append((trial, segment))
    found = [
        Source(name, len(items), len({trial.key for trial, _ in items}), sum(s.charge_seconds for _, s in items))
        for name, items in segments.items()
    ]
    return sorted(found, key=lambda source: -source.segments)


def same_configuration(study: Study, row: Comparison, trial: Trial) -> bool:
    """Whether a trial trains the configuration of a row of the final table."""
    history = History.of(study, ())
    return history.canonical(row.configuration) == history.canonical(trial.configuration)


def believed_shares(result: SearchResult) -> dict[str, float]:
    """Share of its variance over the space, in [0, 1], that each proxy has in common with the target, by name.

    What the model of strategy `jfhpo` believes; empty with other strategies and as long as it has no model.
    """
    study = result.study
    if study.spec.strategy.name != "jfhpo" or not study.ladder.proxies:
        return {}
    from jfhpo_core.optimizer.beliefs import NUMERICAL_ERRORS, Beliefs

    try:
        beliefs = Beliefs.form(History.of(study, result.trials))
    except NUMERICAL_ERRORS:
        return {}
    if beliefs is None:
        return {}
    sizes = {model.name: study.ladder.size_coordinate(model.name) for model in study.ladder.proxies}
    return {name: beliefs.surrogate.shared_share(size) for name, size in sizes.items()}
