"""Why a study came out as it did, in sentences: each is computed, and left out where the data do not tell.

What matters comes from the model of strategy `jfhpo`, fitted to the trials of any strategy; where runs collapsed comes
from the trials themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import hypergeom, norm
from threadpoolctl import threadpool_limits

from jfhpo_core.optimizer.beliefs import NUMERICAL_ERRORS, Beliefs
from jfhpo_core.optimizer.candidates import ranked_configurations
from jfhpo_core.optimizer.forecast import Quality, forecast_quality, with_more
from jfhpo_core.optimizer.importance import Estimate, Importance, expected_draws, importances, interactions
from jfhpo_core.optimizer.observations import went_wrong
from jfhpo_core.optimizer.predicted_front import Predicted, predicted_front
from jfhpo_core.optimizer.rank_agreement import most_telling, size_agreements
from jfhpo_core.optimizer.score_scale import TARGET
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.report.findings import Z_95, contrasts
from jfhpo_core.report.text import duration
from jfhpo_core.report.why_records import Boundary, Change, Choice, Constraint, Front, More, Promise, Proxy, Why
from jfhpo_core.report.why_sentences import NOTABLE, SIGNIFICANCE, sections
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.standing import rank
from jfhpo_core.study.history import History, searched_configuration
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, FailureKind, Outcome, Trial, Value, configuration_key

__all__ = ["Boundary", "Why", "boundaries", "collapsed", "why"]

FEWEST_CONFIGURATIONS = 8
"""Evaluated configurations that importance needs, or twice the number of hyperparameters if that is more: with fewer
the prior speaks."""

MOST_BOUNDARIES = 3

FEWEST_ON_FRONT = 2
"""Configurations without which a front has no two ends."""

FALL = 0.5
"""A run has collapsed if it lost more than this share of the best score that it had, as in the rule `reward_drop`."""

CLEAR = 3.0
"""Standard errors that such a fall must have: the best of several scores is flattered by noise."""

MOST_PAIRED = 3
"""How many of the most important hyperparameters are looked at in pairs."""


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]  # on small matrices threads wait for each other
def why(result: SearchResult) -> Why:
    """Explain a study, finished or not, whatever its strategy."""
    study, trials = result.study, result.trials
    history = History.of(study, trials)
    evaluated = {
        configuration_key(trial.configuration)
        for trial in history.in_space
        if any(evaluation.step for evaluation in trial.evaluations)
    }
    needed = max(FEWEST_CONFIGURATIONS, 2 * len(study.space))
    beliefs, lacking = None, f"{len(evaluated)} configurations have been evaluated; {needed} are needed."
    if len(evaluated) >= needed:
        try:
            beliefs = Beliefs.form(history)
            found = _importance(result, beliefs) if beliefs is not None else ()
            paired = [item.name for item in found if item.total.value >= NOTABLE][:MOST_PAIRED]
            together = tuple(interactions(beliefs, paired)) if beliefs is not None else ()
            predicted = predicted_front(beliefs) if beliefs is not None else ()
        except NUMERICAL_ERRORS as error:
            beliefs, lacking = None, f"no model could be fitted to the trials ({error})."
    recommended = result.recommended.configuration if result.recommended is not None else {}
    page = Why(
        study=study.spec.study,
        configurations=len(evaluated),
        constraints=tuple(_constraints(result)),
        front=_front(result),
        predicted_front=() if beliefs is None else predicted,
        promise=None if beliefs is None else _promise(result, predicted),
        standard_error=None if beliefs is None else beliefs.measurement_variance**0.5 * beliefs.scale.unit(),
        importance=() if beliefs is None else found,
        interactions=() if beliefs is None else together,
        boundaries=tuple(boundaries(study, trials)),
        proxies=tuple(_proxies(study, trials, beliefs)),
        choice=None if beliefs is None else _choice(result, beliefs, found),
        more=_more(result),
        edges=tuple(
            name for name in study.space if name in recommended and study.space[name].at_edge(recommended[name])
        ),
    )
    topics = {topic: tuple(said) for topic, said in sections(study, page).items()}
    if beliefs is None:
        topics["matters"] = (f"What matters cannot be told: {lacking}", *topics["matters"])
    if len(evaluated) < needed:
        topics["next"] = (_more_configurations(result, len(evaluated), needed), *topics["next"])
    topics["next"] += tuple(_undecided(result))
    topics["collapse"] = topics["collapse"] or _without_boundary(_telling(trials))
    sentences = tuple(sentence for said in topics.values() for sentence in said)
    return page.model_copy(update={"topics": topics, "sentences": sentences})


def _more_configurations(result: SearchResult, evaluated: int, needed: int) -> str:
    """How to get the configurations that importance needs."""
    text = f"To learn what matters takes {needed - evaluated} more configurations"
    if not result.complete:
        return f"{text}. The study is not finished: run the same command to continue, then ask again."
    if not evaluated or not result.spent_seconds:
        return f"{text}: raise the budget (`jfhpo plan` forecasts what runs cost) and run the search again."
    more = result.spent_seconds / evaluated * (needed - evaluated)
    return (
        f"{text}. At what they have cost so far, {duration(more)} of device-time more should buy them: raise the "
        f"budget by as much (`jfhpo plan --more {math.ceil(more)}s` says what to expect) and run the search again."
    )


def _undecided(result: SearchResult) -> list[str]:
    """What would tell the recommendation from recipes that it does not clearly beat."""
    unclear = [item.label for item in contrasts(result) if math.isfinite(item.z) and abs(item.z) < Z_95]
    if not unclear:
        return []
    said = f"The comparison with {', '.join(unclear)} is not decided: further training seeds (`seeds.training`, which"
    return [f"{said} may be extended at any time) narrow its interval."]


def _constraints(result: SearchResult) -> list[Constraint]:
    """What every constraint costs; none before a full run on the target."""
    best = max((item.score for item in result.tried if not item.broken), default=None)
    found = []
    for limit in result.study.spec.limits if result.tried else ():
        alone = [item for item in result.tried if item.broken == (limit,) and (best is None or item.score > best)]
        leading = max(alone, key=lambda item: item.score, default=None)
        found.append(
            Constraint(
                limit=str(limit),
                configurations=len(result.tried),
                broken_by=sum(limit in item.broken for item in result.tried),
                best=best,
                without=None if leading is None else leading.score,
                without_trial=None if leading is None else leading.trial,
                without_value=None if leading is None else leading.measured.get(limit.metric),
            )
        )
    return found


def _front(result: SearchResult) -> Front | None:
    second, found = result.study.spec.second_objective, [item for item in result.tried if item.on_front]
    if second is None or len(found) < FEWEST_ON_FRONT:
        return None
    first, last = found[0], found[-1]
    return Front(
        metric=second.metric,
        direction=second.direction,
        configurations=len(found),
        best_score=(first.score, first.measured[second.metric]),
        best_metric=(last.score, last.measured[second.metric]),
    )


def _promise(result: SearchResult, predicted: Sequence[Predicted]) -> Promise | None:
    """The point of the predicted front without a full run that is expected to gain most on what was measured."""
    second = result.study.spec.second_objective
    if second is None:
        return None
    # What is not known of the metric counts against a configuration that was not run: its rivals may have as much.
    sign = 1.0 if second.direction == "minimize" else -1.0
    found = []
    for item in predicted:
        bound = item.metric_high if second.direction == "minimize" else item.metric_low
        rivals = [
            tried.score
            for tried in result.tried
            if not tried.broken and sign * tried.measured.get(second.metric, sign * math.inf) <= sign * bound
        ]
        if item.trial is None and rivals:
            found.append(Promise(predicted=item, measured=max(rivals)))
    return max(found, key=lambda item: item.predicted.score - item.measured, default=None)


def _importance(result: SearchResult, beliefs: Beliefs) -> tuple[Importance, ...]:
    """Of every hyperparameter, locally around the recommendation; around the best-ranked one if it has none."""
    chosen = _recommended(result)
    if chosen is None:
        ranked = ranked_configurations(beliefs)
        chosen = ranked[0].configuration if ranked else result.study.space.middle()
    return tuple(importances(beliefs, chosen))


def _recommended(result: SearchResult) -> Configuration | None:
    """The recommended configuration within the search space."""
    if result.recommended is None:
        return None
    return searched_configuration(result.study, result.recommended.configuration)


def boundaries(study: Study, trials: Sequence[Trial]) -> list[Boundary]:
    """Where most runs collapsed: on the target if its runs separate, else over all models.

    One hyperparameter after another, each over the runs that the earlier ones leave: what was tried together with a
    high learning rate is not blamed for it.
    """
    target = study.ladder.target.name
    runs = [
        (study.space.restrict(study.complete(trial.configuration)), collapsed(trial), trial.model)
        for trial in _telling(trials)
    ]
    for model in (target, None):
        left = [(values, ruined) for values, ruined, where in runs if model in (where, None)]
        found: list[Boundary] = []
        while len(found) < MOST_BOUNDARIES and (boundary := _best_split(study, left, model)) is not None:
            found.append(boundary)
            left = [(values, ruined) for values, ruined in left if not _beyond(boundary, values)]
        if found:
            return found
    return []


def _telling(trials: Sequence[Trial]) -> list[Trial]:
    """The runs that say whether their configuration collapses."""
    return [
        trial
        for trial in trials
        if trial.segments and trial.segments[-1].outcome is not Outcome.LOST and not _failed_otherwise(trial)
    ]


def _without_boundary(runs: Sequence[Trial]) -> tuple[str, ...]:
    """What is said of collapse where no hyperparameter separates the runs."""
    ruined = [trial.number for trial in runs if collapsed(trial)]
    if not runs:
        return ()
    if not ruined:
        return (f"None of {len(runs)} runs collapsed.",)
    which = f"trial{'s' if len(ruined) > 1 else ''} {', '.join(map(str, ruined))}"
    return (
        f"{len(ruined)} of {len(runs)} runs collapsed ({which}); no single hyperparameter tells where runs collapse.",
    )


def collapsed(trial: Trial) -> bool:
    """Whether a run was stopped for what it did, ended in values that are not finite, or lost most of its score."""
    return went_wrong(trial) or trial.segments[-1].failure is FailureKind.NON_FINITE or _has_fallen(trial)


def _has_fallen(trial: Trial) -> bool:
    """Whether the last score lies clearly and far below the best one before, whatever ended the run."""
    if len(trial.evaluations) < 2:
        return False
    *before, last = trial.evaluations
    best = max(before, key=lambda evaluation: evaluation.score)
    fall, noise = best.score - last.score, math.hypot(best.standard_error, last.standard_error)
    return fall > max(FALL * abs(best.score), CLEAR * noise)


def _failed_otherwise(trial: Trial) -> bool:
    """Whether a run failed for another reason, such as memory: it says nothing about collapse."""
    return trial.segments[-1].failure not in (None, FailureKind.NON_FINITE)


def _beyond(boundary: Boundary, values: Mapping[str, Value]) -> bool:
    low, high = boundary.between
    value = values.get(boundary.name)
    return value is not None and (float(value) >= high if boundary.side == "above" else float(value) <= low)


def _best_split(study: Study, runs: Sequence[tuple[Configuration, bool]], model: str | None) -> Boundary | None:
    """The boundary that separates collapsed runs best (Fisher's exact test); None if chance would do as well."""
    best: tuple[float, Boundary] | None = None
    tried = 0
    for name in study.space:
        known = [(values[name], ruined) for values, ruined in runs if name in values]
        if any(isinstance(value, bool | str) for value, _ in known):
            continue
        places = np.array([float(value) for value, _ in known])
        ruined = np.array([bool(bad) for _, bad in known], dtype=bool)
        distinct = np.unique(places)
        for low, high in pairwise(distinct.tolist()):
            for side in ("above", "below"):
                tried += 1
                inside = places >= high if side == "above" else places <= low
                count, bad = int(inside.sum()), int((inside & ruined).sum())
                chance = float(hypergeom.sf(bad - 1, len(places), int(ruined.sum()), count))
                if 2 * bad >= count and (best is None or chance < best[0]):
                    boundary = Boundary(
                        name=name,
                        side="above" if side == "above" else "below",
                        between=(low, high),
                        model=model,
                        collapsed=bad,
                        runs=count,
                        other_collapsed=int(ruined.sum()) - bad,
                        other_runs=len(places) - count,
                    )
                    best = chance, boundary
    return best[1] if best is not None and best[0] * tried < SIGNIFICANCE else None


def _proxies(study: Study, trials: Sequence[Trial], beliefs: Beliefs | None) -> list[Proxy]:
    """Of every proxy that was evaluated, small to large."""
    found = []
    seen = {trial.model for trial in trials if any(evaluation.step for evaluation in trial.evaluations)}
    for model in study.ladder.proxies:
        if model.name not in seen:
            continue
        telling = most_telling(size_agreements(study, trials, model.name))
        size = study.ladder.size_coordinate(model.name)
        found.append(
            Proxy(
                name=model.name,
                shared=None if beliefs is None else beliefs.surrogate.shared_share(size),
                spearman=None if telling is None else telling.agreement.spearman,
                interval=None if telling is None else telling.agreement.spearman_interval,
                pairs=0 if telling is None else telling.agreement.pairs,
                horizon_share=None if telling is None else telling.first[1] / study.spec.fidelity.horizon_prompts,
            )
        )
    return found


def _choice(result: SearchResult, beliefs: Beliefs, importance: Sequence[Importance]) -> Choice | None:
    """The recommendation against the best of the other configurations that were tried; None without either."""
    first = _recommended(result)
    ranked = [item.configuration for item in ranked_configurations(beliefs)]
    others = [other for other in ranked if other != first and not beliefs.history.breaks(other)]
    if first is None or not others:
        return None
    second = others[0]
    draws = expected_draws(beliefs, beliefs.at_target([first, second]))
    scores = beliefs.scale.score(TARGET, draws.flatten().tolist()).reshape(-1, 2)
    difference = scores[:, 0] - scores[:, 1]
    return Choice(
        second=second,
        trial=min(trial.number for trial in beliefs.history.in_space if trial.configuration == second),
        difference=Estimate.of(difference),
        probability=float((difference > 0).mean()),
        differs={
            item.name: (first.get(item.name), second.get(item.name))
            for item in importance
            if first.get(item.name) != second.get(item.name)
        },
        change=_change(beliefs, first, second),
    )


def _change(beliefs: Beliefs, first: Configuration, second: Configuration) -> Change | None:
    """What one more full run of either would have to score; None if failures decide between the two."""
    moments, inputs = beliefs.surrogate.moments(), beliefs.at_target([first, second])
    predicted = moments.at(inputs)
    between = torch.cov(predicted.mean.T, correction=0)
    covariance = beliefs.inflation**2 * (moments.covariance(predicted, predicted).mean(0) + between).numpy()
    means = predicted.mean.mean(0).tolist()
    if means[0] <= means[1]:
        return None
    surrogate = beliefs.surrogate
    seeds = float(surrogate.structure.value(surrogate.parameter_draws, "seed").exp().mean())
    needed: list[tuple[float, float] | None] = []
    for index, other in ((1, 0), (0, 1)):
        variance = covariance[index, index] + seeds + beliefs.measurement_variance
        # A surprise moves this configuration's mean by more than the other's.
        apart = (covariance[index, index] - covariance[other, index]) / variance
        if apart <= 0:
            needed.append(None)
            continue
        surprise = (means[0] - means[1]) / apart
        value = means[index] + (surprise if index == 1 else -surprise)
        needed.append((float(beliefs.scale.score(TARGET, [value])[0]), float(norm.sf(surprise / variance**0.5))))
    better, worse = needed
    return Change(
        second_at_least=None if better is None else better[0],
        second_probability=0.0 if better is None else better[1],
        first_at_most=None if worse is None else worse[0],
        first_probability=0.0 if worse is None else worse[1],
    )


def _more(result: SearchResult) -> More | None:
    study, trials = result.study, result.trials
    added = study.spec.budget.device_seconds
    ranked = rank(study, load_strategy(study), trials)
    quality: Quality | None = forecast_quality(with_more(study, added), ranked, trials)
    if quality is None:
        return None
    return More(seconds=added, now=quality.now, score=quality.score, low=quality.low, high=quality.high)
