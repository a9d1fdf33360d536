"""What a study has come to: the recommendation and the final table, from the trials alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jfhpo_core.optimizer.strategy import Recommendation, Strategy
from jfhpo_core.run.standing import Standing, is_rewardless, runs_without_reward
from jfhpo_core.run.tried import Tried, tried
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import Limit, broken, mean_of
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import (
    Configuration,
    Trial,
    TrialState,
    spent_seconds,
)

ENDED_EARLY = (TrialState.STOPPED, TrialState.INFEASIBLE)
"""States of a run that will never reach full length."""


@dataclass(frozen=True)
class Comparison:
    """One row of the final table: a configuration on the target at full length, over the training seeds.

    Attributes:
        score: Mean final held-out score of the runs that reached full length; NaN if none did.
        standard_error: Of the mean: evaluation noise and, with two seeds or more, the spread between seeds.
        seeds: Runs that reached full length, one per seed.
        seconds: Device-seconds charged for all runs of the row.
        unfinished: Why further runs ended before full length, one reason each. They have no score.
        measured: What the runs that reached full length come to, by metric; see `jfhpo_core.study.metrics`.
        broken: Constraints that these values do not respect.
    """

    label: str
    configuration: Configuration
    score: float
    standard_error: float
    seeds: int
    seconds: float
    unfinished: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    broken: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a study.

    Attributes:
        recommended: The recommended configuration, with the model's belief about it.
        target_trial: Of its runs on the target at full length the one that scored best, whatever its seed, among those
            that respect all constraints, if any does; its weights are the ones to use, and its score flatters it. None
            if no run reached full length.
        tried: What there was to choose from, best score first.
        confirmed: Its runs on seeds that had no part in choosing it, as a row of the table; None without one.
        rows: Final table: the recommendation first, then the baselines, then random search.
        complete: False if a wall-clock limit or an interruption ended the call before the study was done.
        note: Why the call ended before the study was done, what is lost by it, and what to do; empty if it is complete.
    """

    study: Study
    trials: Sequence[Trial]
    recommended: Recommendation | None
    target_trial: Trial | None
    rows: tuple[Comparison, ...]
    spent_seconds: float
    complete: bool
    note: str = ""
    confirmed: Comparison | None = None
    tried: tuple[Tried, ...] = ()


def conclude(study: Study, trials: Sequence[Trial], strategy: Strategy, complete: bool, note: str = "") -> SearchResult:
    """Recommendation and final table, from the trials alone; see `SearchResult` for `complete` and `note`."""
    history = History.of(study, trials)
    rewardless = is_rewardless(study, runs_without_reward(study, trials))
    recommended = None if rewardless else Standing(history, strategy).recommended
    rows: list[Comparison] = []
    target_trial: Trial | None = None
    limits = study.spec.limits
    confirmed: Comparison | None = None
    if recommended is not None:
        mine = _runs(history, recommended.configuration)
        target_trial = _best(mine, limits)
        runs = history.of_configuration(recommended.configuration)
        clean = [trial for trial in runs if history.judges(trial) and trial.final is not None]
        confirmed = _compare("confirmed", recommended.configuration, clean, limits) if clean else None
        rows.append(_compare("recommended", recommended.configuration, mine, limits))
    for baseline in study.spec.baselines:
        mine = _runs(history, baseline.configuration)
        if mine:
            rows.append(_compare(baseline.name, baseline.configuration, mine, limits))
    best = _best([trial for trial in trials if trial.purpose == "random-search"], limits)
    if best is not None:
        rows.append(_compare("random search", best.configuration, [best], limits))
    return SearchResult(
        study=study,
        trials=tuple(trials),
        recommended=recommended,
        target_trial=target_trial,
        confirmed=confirmed,
        rows=tuple(rows),
        spent_seconds=spent_seconds(trials),
        complete=complete,
        note=note,
        tried=tried(history),
    )


def _runs(history: History, configuration: Configuration) -> list[Trial]:
    """The runs of a configuration on the target that have ended, one per seed; one that reached full length, if any."""
    by_seed: dict[int, Trial] = {}
    for trial in history.of_configuration(configuration):
        # Further seeds by which the search chose are no part of the comparison: baselines have none of them.
        compared = trial.seed in history.study.spec.seeds.training
        ended = trial.final is not None or (trial.state in ENDED_EARLY and trial.purpose != "search")
        if compared and ended:
            known = by_seed.setdefault(trial.seed, trial)
            by_seed[trial.seed] = trial if known.final is None else known
    return list(by_seed.values())


def _best(trials: Sequence[Trial], limits: Sequence[Limit]) -> Trial | None:
    """The run that scored best at full length, of those that respect all constraints, if any does."""
    finals = [(trial, trial.final) for trial in trials if trial.final is not None]
    return max(
        finals,
        key=lambda item: (not broken(limits, item[1].training), item[1].score, -item[0].number),
        default=(None,),
    )[0]


def _compare(label: str, configuration: Configuration, trials: Sequence[Trial], limits: Sequence[Limit]) -> Comparison:
    """Mean and standard error over the trials that reached full length; what a shorter run scored is not comparable."""
    finals = [trial.final for trial in trials if trial.final is not None]
    count = len(finals)
    score, variance = math.nan, math.nan
    if finals:
        score = sum(evaluation.score for evaluation in finals) / count
        variance = sum(evaluation.standard_error**2 for evaluation in finals) / count**2
    if count > 1:
        between = sum((evaluation.score - score) ** 2 for evaluation in finals) / (count * (count - 1))
        variance = max(variance, between)
    seconds = sum(trial.charge_seconds for trial in trials)
    unfinished = tuple(_ending(trial) for trial in trials if trial.final is None)
    measured = mean_of([evaluation.training for evaluation in finals])
    return Comparison(
        label,
        configuration,
        score,
        variance**0.5,
        count,
        seconds,
        unfinished,
        measured,
        broken(limits, measured) if finals else (),
    )


def _ending(trial: Trial) -> str:
    """Why a run ended before full length."""
    last = trial.segments[-1]
    reason = last.decision.explain() if last.decision is not None else last.message or str(trial.state)
    return f"seed {trial.seed} ended at step {trial.step} of {trial.total_steps}: {reason}"
