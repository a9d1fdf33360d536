"""What a study's trials say to its models: observations for the surrogate, verdicts for the feasibility classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.surrogate import ANY_SEED, FIDELITY_COLUMNS, THIS_STUDY, Observations
from jfhpo_core.stopping.rules import Unpromising
from jfhpo_core.study.models import progress
from jfhpo_core.study.resolved import EarlierStudy, Study, base_scores
from jfhpo_core.study.trial import Configuration, Evaluation, Outcome, Trial, TrialState

MAX_OBSERVATIONS = 240
"""Beyond this, evaluations in the middle of curves are thinned out; the last one of each trial stays."""

CURVE_POINTS = 2
"""Evaluations of one curve that are used: the last one and others at about equal distances."""

EXACT_REFITS = 12
"""Up to this many commits the parameters are fitted anew at every one."""

REFIT_GROWTH = 0.1
"""Beyond, they are fitted anew whenever the number of commits has grown by this share."""

COIN_VARIANCE = 0.25
"""Of a score of 0 or 1, before anything is measured."""

ASSUMED_PROMPTS = 1000
"""Held-out prompts where a study uses all of its own and none has been scored yet."""


def point(study: Study, configuration: Configuration, model: str, prompts: int, trial: float = ANY_SEED) -> list[float]:
    """Surrogate input (x, z, t, trial, study) of a searched configuration, in this study."""
    return [
        *(float(value) for value in study.space.encode(configuration)),
        study.ladder.size_coordinate(model),
        progress(study.spec, prompts),
        float(trial),
        THIS_STUDY,
    ]


def searched_configuration(study: Study, trial: Trial) -> Configuration | None:
    """The trial's configuration within the search space; None if it lies outside (a baseline may)."""
    configuration = study.space.restrict(study.complete(trial.configuration))
    try:
        study.space.encode(configuration)
    except ValueError:
        return None
    return configuration


def _used(study: Study, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Configuration]]:
    """Trials that are learned from: all but the random-search comparison and those outside the space."""
    for trial in trials:
        if trial.purpose != "random-search":
            configuration = searched_configuration(study, trial)
            if configuration is not None:
                yield trial, configuration


@dataclass(frozen=True)
class _Row:
    inputs: list[float]
    gain: float
    variance: float
    order: tuple[int, int, int]
    last: bool


def observe(study: Study, trials: Sequence[Trial]) -> Observations:
    """Evaluations as observations of the gain over the untrained model, in the order in which they were committed.

    Of a training that went wrong and was stopped by a rule, one thing counts: the score at which it was stopped (the
    untrained model's if it has none), as that of the full length. Under these rules it comes to nothing else, and a
    collapse has no curve that others resemble. One that was stopped because others are better (rule `unpromising`)
    counts with what was measured.
    """
    bases = base_scores(trials)
    rows: list[_Row] = []
    for trial, configuration in _used(study, trials):
        base = bases.get(trial.model, min(bases.values(), default=0.0))
        rows += _curve(study, trial, configuration, study.ladder.size_coordinate(trial.model), base)
    rows += _earlier_rows(study)
    rows.sort(key=lambda row: row.order)
    if len(rows) > MAX_OBSERVATIONS:
        middle = [index for index, row in enumerate(rows) if not row.last]
        room = max(0, MAX_OBSERVATIONS - (len(rows) - len(middle)))
        chosen = {middle[int(i)] for i in np.linspace(0, len(middle) - 1, room)} if room else set()
        rows = [row for index, row in enumerate(rows) if row.last or index in chosen]
    width = study.space.dimension + FIDELITY_COLUMNS
    return Observations(
        torch.tensor([row.inputs for row in rows], dtype=torch.double).reshape(-1, width),
        torch.tensor([row.gain for row in rows], dtype=torch.double),
        torch.tensor([row.variance for row in rows], dtype=torch.double),
    )


def _earlier_rows(study: Study) -> list[_Row]:
    """What earlier studies observed on this study's space and scales; they stand before everything else.

    Hyperparameters that they held fixed count with that value; trials outside this study's space are left out.
    """
    rows: list[_Row] = []
    for index, earlier in enumerate(study.earlier, start=1):
        bases = base_scores(earlier.trials)
        for trial in earlier.trials:
            configuration = _translated(study, earlier, trial)
            if configuration is None or trial.model not in bases:
                continue
            size = math.log10(earlier.ladder[trial.model].parameters / study.ladder.target.parameters)
            rows += _curve(study, trial, configuration, size, bases[trial.model], index)
    return rows


def _curve(
    study: Study, trial: Trial, configuration: Configuration, size: float, base: float, belongs_to: int = 0
) -> list[_Row]:
    """What is used of a training's curve; what earlier studies (`belongs_to` > 0) observed stands before this one's."""
    curve = trained_evaluations(trial)
    place = [float(value) for value in study.space.encode(configuration)]

    def row(share: float, gain: float, variance: float, committed: int, step: int, *, last: bool) -> _Row:
        inputs = [*place, size, share, float(trial.number), float(belongs_to)]
        return _Row(inputs, gain, variance, (-belongs_to or committed, trial.number, step), last)

    if _went_wrong(trial):
        # Some trainers score at rungs only: what a rung before the stop says is not what became of the training.
        scored = bool(curve) and curve[-1].step == trial.step
        gain = curve[-1].score - base if scored else 0.0
        variance = curve[-1].standard_error ** 2 if scored else measurement_variance(study, ())
        return [row(1.0, gain, variance, trial.segments[-1].committed, trial.step, last=True)]
    return [
        row(
            progress(study.spec, evaluation.prompts),
            evaluation.score - base,
            evaluation.standard_error**2,
            _rank(trial, evaluation),
            evaluation.step,
            last=evaluation is curve[-1],
        )
        for evaluation in thinned(curve)
    ]


def _went_wrong(trial: Trial) -> bool:
    """Whether a rule stopped the training for what it did, and not because others are better."""
    if trial.state is not TrialState.STOPPED:
        return False
    return trial.decision is None or trial.decision.rule != Unpromising.name


def _translated(study: Study, earlier: EarlierStudy, trial: Trial) -> Configuration | None:
    """An earlier trial's configuration in this study's space; None if it lies outside."""
    fixed = earlier.spec.trainer.fixed
    try:
        configuration = study.space.restrict(study.complete({**fixed, **trial.configuration}))
        study.space.encode(configuration)
    except (SpecError, ValueError):
        return None
    return configuration


def trained_evaluations(trial: Trial) -> list[Evaluation]:
    """Evaluations of the trained model, the one taken when a rule stopped the training included."""
    return [evaluation for evaluation in trial.evaluations if evaluation.step > 0]


def thinned(evaluations: list[Evaluation]) -> list[Evaluation]:
    """At most `CURVE_POINTS` of a curve's evaluations, the last one among them."""
    if len(evaluations) <= CURVE_POINTS:
        return evaluations
    places = np.linspace(len(evaluations) - 1, 0, CURVE_POINTS, endpoint=False)
    return [evaluations[round(place)] for place in reversed(places)]


def _rank(trial: Trial, evaluation: Evaluation) -> int:
    """Rank of the commit that brought an evaluation."""
    return next(result.committed for result in trial.segments if evaluation in result.evaluations)


def as_of(trials: Sequence[Trial], commits: int) -> list[Trial]:
    """The trials as they stood after the first so many commits of the study."""
    known = []
    for trial in trials:
        segments = tuple(result for result in trial.segments if result.committed <= commits)
        if segments:
            known.append(trial.model_copy(update={"segments": segments, "open_segment": None}))
    return known


def milestone(commits: int) -> int:
    """The number of commits, at most the given one, whose observations the parameters are fitted to.

    Between milestones new observations only condition the model: a pure function of the ledger that saves most fits.
    """
    reached = min(commits, EXACT_REFITS)
    while (following := reached + max(1, round(REFIT_GROWTH * reached))) <= commits:
        reached = following
    return reached


def verdicts(study: Study, trials: Sequence[Trial]) -> tuple[Tensor, Tensor]:
    """Which trainings could be trained at all.

    Returns:
        (x, z) of shape (n, d + 1), and 1 or 0 of shape (n,): 0 if the training failed (out of memory, not finite,
        rejected). Trainings that were lost to infrastructure say nothing.
    """
    rows, labels = [], []
    for trial, configuration in _used(study, trials):
        if trial.segments and trial.segments[-1].outcome is not Outcome.LOST:
            rows.append(point(study, configuration, trial.model, 0)[: -FIDELITY_COLUMNS + 1])
            labels.append(float(trial.segments[-1].outcome is not Outcome.INFEASIBLE))
    width = study.space.dimension + 1
    return torch.tensor(rows, dtype=torch.double).reshape(-1, width), torch.tensor(labels, dtype=torch.double)


def running_points(study: Study, trials: Sequence[Trial]) -> Tensor | None:
    """Where the running segments will be evaluated at their end; None if nothing runs."""
    rows = [
        point(study, configuration, trial.model, trial.open_segment.stop_step * trial.prompts_per_step, trial.number)
        for trial, configuration in _used(study, trials)
        if trial.open_segment is not None
    ]
    return torch.tensor(rows, dtype=torch.double) if rows else None


def target_base(study: Study, trials: Sequence[Trial]) -> float:
    """Score of the untrained target; before it is measured, that of the largest model measured."""
    bases = base_scores(trials)
    names = [model.name for model in study.ladder.models if model.name in bases]
    return bases[names[-1]] if names else 0.0


def measurement_variance(study: Study, trials: Sequence[Trial]) -> float:
    """Variance of an evaluation's score: the mean of those measured so far; a coin's before there is one."""
    evaluations = [evaluation for trial in trials for evaluation in trial.evaluations if evaluation.step > 0]
    if not evaluations:
        return COIN_VARIANCE / (
            (study.spec.evaluation.prompts or ASSUMED_PROMPTS) * study.spec.evaluation.samples_per_prompt
        )
    return sum(evaluation.standard_error**2 for evaluation in evaluations) / len(evaluations)
