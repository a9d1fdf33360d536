"""What a study's trials say to its models: observations for the surrogate, verdicts for the feasibility classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jfhpo_core.optimizer.score_scale import TARGET, Group, Scale, ScoreScale
from jfhpo_core.optimizer.surrogate import ANY_SEED, FIDELITY_COLUMNS, THIS_STUDY, Observations
from jfhpo_core.stopping.rules import Unpromising
from jfhpo_core.study.history import History, searched_configuration
from jfhpo_core.study.models import progress
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.space import Vector
from jfhpo_core.study.trial import Configuration, Evaluation, Outcome, Trial, TrialState, configuration_key

MAX_OBSERVATIONS = 240
"""Beyond this, evaluations in the middle of curves are thinned out; the last one of each trial stays."""

CURVE_POINTS = 2
"""Evaluations of one curve that are used: the first one, which every run has, so that short and long ones can be
compared; the last one; and others at about equal distances."""

TARGET_CURVE_POINTS = 4
"""The same on the target, where the model has to judge short runs by what long ones became."""

EXACT_REFITS = 12
"""Up to this many commits the parameters are fitted anew at every one."""

REFIT_GROWTH = 0.1
"""Beyond, they are fitted anew whenever the number of commits has grown by this share."""

ASSUMED_SCORE_VARIANCE = 0.25
"""Variance of one completion's score before any is measured: the largest of a score between 0 and 1."""

EARLIER_OPTIMUM = "jfhpo/earlier-optimum"
"""Source of a run of what is best by earlier studies."""

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


def full_length_inputs(points: Vector, size: float = TARGET[1]) -> Tensor:
    """Surrogate inputs of snapped points (m, d) at full length on a model of this size z, shape (m, d + 4)."""
    fidelity = torch.tensor([size, TARGET[2], ANY_SEED, THIS_STUDY], dtype=torch.double)
    return torch.cat([torch.from_numpy(points), fidelity.expand(len(points), -1)], dim=-1)


@dataclass(frozen=True)
class Row:
    """One evaluation that is learned from.

    Attributes:
        inputs: (x, z, t, trial, study).
        score: Held-out score.
        variance: Its squared standard error.
        order: Rank by which it became known.
        last: Whether it is the newest of its run.
    """

    inputs: tuple[float, ...]
    score: float
    variance: float
    order: tuple[int, int, int]
    last: bool

    @property
    def group(self) -> Group:
        """See `score_scale.Group`."""
        size, share, _, study = self.inputs[-FIDELITY_COLUMNS:]
        return study, size, share


def observed_rows(history: History) -> list[Row]:
    """Evaluations of the search and of earlier studies, in the order in which they became known.

    Of a run that went wrong and was stopped by a rule, one thing counts: the score at which it was stopped, as that of
    the full length; without one, the lowest that its model has. With these rules the run would not recover,
    and the shape of a collapse tells nothing about healthy runs. One that was stopped because others are better (rule
    `unpromising`) counts with what was measured.
    """
    study = history.study
    lowest, variance = _lowest_scores(history.in_space), measurement_variance(study, history.in_space)
    rows: list[Row] = []
    for trial in history.in_space:
        size, unscored = study.ladder.size_coordinate(trial.model), (lowest.get(trial.model, 0.0), variance)
        rows += _curve(study, trial, trial.configuration, size, unscored)
    rows += _earlier_rows(study, believed_earlier(history))
    return sorted((row for row in rows if math.isfinite(row.score)), key=lambda row: row.order)


def scale_of(rows: Sequence[Row]) -> ScoreScale:
    """The scale that rows suggest; at least one is needed."""
    return ScoreScale.of(
        [row.group for row in rows], [row.score for row in rows], [math.sqrt(row.variance) for row in rows]
    )


def observe(rows: Sequence[Row], scale: Scale, dimension: int) -> Observations:
    """Rows on a scale, thinned to `MAX_OBSERVATIONS`.

    Args:
        rows: In the order in which they became known.
        scale: Has the groups of all rows.
        dimension: Coordinates of the search space.
    """
    placed = [(row, *scale.value(row.group, row.score)) for row in rows]
    if len(placed) > MAX_OBSERVATIONS:
        placed = [placed[index] for index in _kept([row for row, _, _ in placed], [value for _, value, _ in placed])]
    return Observations(
        torch.tensor([row.inputs for row, _, _ in placed], dtype=torch.double).reshape(
            -1, dimension + FIDELITY_COLUMNS
        ),
        torch.tensor([value for _, value, _ in placed], dtype=torch.double),
        torch.tensor([row.variance * slope**2 for row, _, slope in placed], dtype=torch.double),
    )


def _kept(rows: Sequence[Row], values: Sequence[float]) -> list[int]:
    """Which `MAX_OBSERVATIONS` rows stay, in their order.

    Last evaluations come before those in the middle of curves, this study before earlier ones, larger models before
    smaller ones, and high values before low ones; of what is equally low every part of the space should keep some,
    which the order by value does well enough, as values of bad configurations scatter.
    """

    def importance(index: int) -> tuple[bool, bool, float, float]:
        size, _, _, study = rows[index].inputs[-FIDELITY_COLUMNS:]
        return rows[index].last, study == THIS_STUDY, size, values[index]

    chosen = sorted(range(len(rows)), key=importance, reverse=True)[:MAX_OBSERVATIONS]
    return sorted(chosen)


def believed_earlier(history: History) -> tuple[EarlierStudy, ...]:
    """The earlier studies; none once what is best by them has been trained on the target and lost to a recipe."""
    return () if history.refuted(EARLIER_OPTIMUM) else history.study.earlier


def _earlier_rows(study: Study, known: Sequence[EarlierStudy]) -> list[Row]:
    """What earlier studies observed on this study's space and scales; they stand before everything else.

    Hyperparameters that they held fixed count with that value; trials outside this study's space are left out.
    """
    rows: list[Row] = []
    for index, earlier in enumerate(known, start=1):
        lowest, variance = _lowest_scores(earlier.trials), measurement_variance(study, earlier.trials)
        for trial in earlier.trials:
            configuration = _translated(study, earlier, trial)
            if configuration is None:
                continue
            size = math.log10(earlier.ladder[trial.model].parameters / study.ladder.target.parameters)
            rows += _curve(study, trial, configuration, size, (lowest.get(trial.model, 0.0), variance), index)
    return rows


def earlier_configurations(history: History) -> list[Configuration]:
    """Configurations that earlier studies have trained and that lie in this study's space, without repetitions."""
    found: dict[str, Configuration] = {}
    for earlier in believed_earlier(history):
        for trial in earlier.trials:
            configuration = _translated(history.study, earlier, trial) if trained_evaluations(trial) else None
            if configuration is not None:
                found.setdefault(configuration_key(configuration), configuration)
    return list(found.values())


def _lowest_scores(trials: Sequence[Trial]) -> dict[str, float]:
    """The lowest score on each model, the untrained model's included."""
    lowest: dict[str, float] = {}
    for trial in trials:
        for evaluation in trial.evaluations:
            if math.isfinite(evaluation.score):
                lowest[trial.model] = min(evaluation.score, lowest.get(trial.model, evaluation.score))
    return lowest


def _curve(
    study: Study,
    trial: Trial,
    configuration: Configuration,
    size: float,
    unscored: tuple[float, float],
    belongs_to: int = 0,
) -> list[Row]:
    """What is used of a run's curve; what earlier studies (`belongs_to` > 0) observed stands before this one's.

    Args:
        study: The study, on whose scales the rows are.
        trial: The run.
        configuration: Its configuration in this study's space.
        size: z of its model.
        unscored: Score and variance of a run that went wrong without a score.
        belongs_to: Number of the earlier study; 0: this one.
    """
    curve = trained_evaluations(trial)
    place = tuple(float(value) for value in study.space.encode(configuration))

    def row(share: float, score: float, variance: float, committed: int, step: int, *, last: bool) -> Row:
        inputs = (*place, size, share, float(trial.number), float(belongs_to))
        return Row(inputs, score, variance, (-belongs_to or committed, trial.number, step), last)

    if went_wrong(trial):
        # Some trainers score at rungs only: what a rung before the stop says is not what became of the run.
        scored = bool(curve) and curve[-1].step == trial.step
        score, variance = (curve[-1].score, curve[-1].standard_error ** 2) if scored else unscored
        return [row(1.0, score, variance, trial.segments[-1].committed, trial.step, last=True)]
    return [
        row(
            progress(study.spec, evaluation.prompts),
            evaluation.score,
            evaluation.standard_error**2,
            rank_of(trial, evaluation),
            evaluation.step,
            last=evaluation is curve[-1],
        )
        for evaluation in thinned(curve, TARGET_CURVE_POINTS if size == 0 else CURVE_POINTS)
    ]


def went_wrong(trial: Trial) -> bool:
    """Whether a rule stopped the run for what it did, and not because others are better."""
    if trial.state is not TrialState.STOPPED:
        return False
    return trial.decision is None or trial.decision.rule != Unpromising.name


def _translated(study: Study, earlier: EarlierStudy, trial: Trial) -> Configuration | None:
    """An earlier trial's configuration in this study's space; None if it lies outside."""
    return searched_configuration(study, {**earlier.spec.trainer.fixed, **trial.configuration})


def trained_evaluations(trial: Trial) -> list[Evaluation]:
    """Evaluations of the trained model, the one taken when a rule stopped the run included."""
    return [evaluation for evaluation in trial.evaluations if evaluation.step > 0]


def thinned(evaluations: list[Evaluation], count: int = CURVE_POINTS) -> list[Evaluation]:
    """At most `count` of a curve's evaluations, the first and the last one among them if there may be two."""
    if len(evaluations) <= count:
        return evaluations
    places = np.linspace(len(evaluations) - 1, 0, count)
    return [evaluations[round(place)] for place in reversed(places)]


def rank_of(trial: Trial, evaluation: Evaluation) -> int:
    """Rank of the commit that brought an evaluation."""
    return next(result.committed for result in trial.segments if evaluation in result.evaluations)


def milestone(commits: int) -> int:
    """The number of commits, at most the given one, whose observations the parameters are fitted to.

    Between milestones new observations only condition the model: a pure function of the ledger that saves most fits.
    """
    reached = min(commits, EXACT_REFITS)
    while (following := reached + max(1, round(REFIT_GROWTH * reached))) <= commits:
        reached = following
    return reached


def verdicts(history: History) -> tuple[Tensor, Tensor]:
    """Which runs could be trained at all.

    Returns:
        (x, z) of shape (n, d + 1), and 1 or 0 of shape (n,): 0 if the run failed (out of memory, not finite,
        rejected). Runs that were lost to infrastructure say nothing.
    """
    rows, labels = [], []
    for trial in history.in_space:
        if trial.segments and trial.segments[-1].outcome is not Outcome.LOST:
            rows.append(point(history.study, trial.configuration, trial.model, 0)[: -FIDELITY_COLUMNS + 1])
            labels.append(float(trial.segments[-1].outcome is not Outcome.INFEASIBLE))
    width = history.study.space.dimension + 1
    return torch.tensor(rows, dtype=torch.double).reshape(-1, width), torch.tensor(labels, dtype=torch.double)


def running_points(history: History) -> Tensor | None:
    """Where the running segments will be evaluated at their end; None if nothing runs."""
    rows = [
        point(
            history.study,
            trial.configuration,
            trial.model,
            trial.open_segment.stop_step * trial.prompts_per_step,
            trial.number,
        )
        for trial in history.in_space
        if trial.open_segment is not None
    ]
    return torch.tensor(rows, dtype=torch.double) if rows else None


def measurement_variance(study: Study, trials: Sequence[Trial]) -> float:
    """Variance of an evaluation's score: the mean of those measured so far, or what is assumed before."""
    evaluations = [evaluation for trial in trials for evaluation in trial.evaluations if evaluation.step > 0]
    if not evaluations:
        return ASSUMED_SCORE_VARIANCE / (
            (study.spec.evaluation.prompts or ASSUMED_PROMPTS) * study.spec.evaluation.samples_per_prompt
        )
    return sum(evaluation.standard_error**2 for evaluation in evaluations) / len(evaluations)
