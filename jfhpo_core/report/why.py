"""Why a study came out as it did, in sentences: each is computed, and left out where the data do not tell.

What matters comes from the model of strategy `jfhpo`, fitted to the trials of any strategy; where runs collapsed comes
from the trials themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field
from scipy.stats import hypergeom
from threadpoolctl import threadpool_limits

from jfhpo_core.optimizer.beliefs import NUMERICAL_ERRORS, TARGET, Beliefs
from jfhpo_core.optimizer.candidates import ranked_configurations
from jfhpo_core.optimizer.forecast import Quality, forecast_quality, with_more
from jfhpo_core.optimizer.importance import Estimate, Importance, expected_draws, importances
from jfhpo_core.optimizer.observations import went_wrong
from jfhpo_core.optimizer.rank_agreement import FEW_PAIRS, most_telling, size_agreements
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.report.text import duration, number, setting, share, signed
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.standing import rank
from jfhpo_core.study.history import History, searched_configuration
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import ChoiceParameter
from jfhpo_core.study.trial import Configuration, FailureKind, Outcome, Record, Trial, Value, configuration_key

FEWEST_CONFIGURATIONS = 8
"""Evaluated configurations that importance needs, or twice the number of hyperparameters if that is more: with fewer
the prior speaks."""

NOTABLE = 0.05
"""A hyperparameter matters if the interval of its share of the variance lies above this."""

LITTLE = 0.1
"""Little depends on a hyperparameter if that interval begins below `NOTABLE` and ends below this."""

SIGNIFICANCE = 0.01
"""Probability that splits by chance would look as good, over all of them (Bonferroni), that a boundary may have."""

MOST_BOUNDARIES = 3

MOST_DIFFERENCES = 3
"""Hyperparameters in which two configurations differ that a sentence names."""


class Boundary(Record):
    """A value of a hyperparameter beyond which most runs collapsed."""

    name: str
    side: Literal["above", "below"]
    between: tuple[float, float] = Field(description="Neighbouring values that were run, between which it lies.")
    model: str | None = Field(description="The model on which it was seen; null: over all models.")
    collapsed: int = Field(description="Collapsed runs beyond it.")
    runs: int = Field(description="Runs beyond it.")
    other_collapsed: int = Field(description="Collapsed runs on the other side.")
    other_runs: int = Field(description="Runs on the other side.")


class Proxy(Record):
    """What a smaller model could tell about the target."""

    name: str
    shared: float | None = Field(description="Share of its variance that the model believes it has in common, [0, 1].")
    spearman: float | None = Field(description="Measured rank agreement with the target, [-1, 1].")
    interval: tuple[float, float] | None = Field(description="Its 95 % bootstrap interval.")
    pairs: int = Field(description="Configurations measured on both.")
    horizon_share: float | None = Field(description="Share of the horizon at which they were measured.")


class Choice(Record):
    """The recommended configuration against the second best."""

    second: Configuration
    trial: int = Field(description="First trial of the second best.")
    difference: Estimate = Field(description="Expected score of the recommended one minus that of the second.")
    probability: float = Field(description="That the recommended one is better, in [0, 1].")
    differs: dict[str, tuple[Value | None, Value | None]] = Field(
        description="Values of the recommended and the second one where they differ, by importance."
    )


class More(Record):
    """What a budget twice as large should bring."""

    seconds: float = Field(description="Device-seconds added.")
    now: float = Field(description="Expected final score of the best configuration now.")
    score: float = Field(description="Median of the forecast score.")
    low: float = Field(description="Lower end of its 80 % interval.")
    high: float = Field(description="Upper end.")


class Why(Record):
    """Everything that `jfhpo why` says, in figures and sentences."""

    study: str
    configurations: int = Field(description="Configurations that have been evaluated.")
    standard_error: float | None = Field(description="Of one evaluation's score; null without a model.")
    importance: tuple[Importance, ...] = Field(default=(), description="Most important first; empty if unknown.")
    boundaries: tuple[Boundary, ...] = ()
    proxies: tuple[Proxy, ...] = ()
    choice: Choice | None = None
    more: More | None = None
    edges: tuple[str, ...] = Field(default=(), description="Hyperparameters recommended at the edge of their range.")
    sentences: tuple[str, ...] = ()


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]  # on small matrices threads wait for each other
def why(result: SearchResult) -> Why:
    """Explain a study, finished or not, whatever its strategy."""
    study, trials = result.study, result.trials
    history = History.of(study, trials)
    evaluated = {
        configuration_key(trial.configuration)
        for trial in history.evidence
        if any(evaluation.step for evaluation in trial.evaluations)
    }
    needed = max(FEWEST_CONFIGURATIONS, 2 * len(study.space))
    beliefs, lacking = None, f"{len(evaluated)} configurations have been evaluated; {needed} are needed"
    if len(evaluated) >= needed:
        try:
            beliefs = Beliefs.form(history)
            found = _importance(result, beliefs) if beliefs is not None else ()
        except NUMERICAL_ERRORS as error:
            beliefs, lacking = None, f"no model could be fitted to the trials ({error})"
    recommended = result.recommended.configuration if result.recommended is not None else {}
    page = Why(
        study=study.spec.study,
        configurations=len(evaluated),
        standard_error=None if beliefs is None else beliefs.measurement_variance**0.5 * beliefs.scale.unit(),
        importance=() if beliefs is None else found,
        boundaries=tuple(boundaries(study, trials)),
        proxies=tuple(_proxies(study, trials, beliefs)),
        choice=None if beliefs is None else _choice(result, beliefs, found),
        more=_more(result),
        edges=tuple(
            name for name in study.space if name in recommended and study.space[name].at_edge(recommended[name])
        ),
    )
    lead = [] if beliefs is not None else [f"What matters cannot be told: {lacking}."]
    return page.model_copy(update={"sentences": (*lead, *_sentences(study, page))})


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
        for trial in trials
        if trial.segments and trial.segments[-1].outcome is not Outcome.LOST and not _failed_otherwise(trial)
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


def collapsed(trial: Trial) -> bool:
    """Whether a run was stopped for what it did, or ended in values that are not finite."""
    return went_wrong(trial) or trial.segments[-1].failure is FailureKind.NON_FINITE


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
    others = [item.configuration for item in ranked_configurations(beliefs) if item.configuration != first]
    if first is None or not others:
        return None
    second = others[0]
    draws = expected_draws(beliefs, beliefs.at_target([first, second]))
    scores = beliefs.scale.score(TARGET, draws.flatten().tolist()).reshape(-1, 2)
    difference = scores[:, 0] - scores[:, 1]
    return Choice(
        second=second,
        trial=min(trial.number for trial in beliefs.history.evidence if trial.configuration == second),
        difference=Estimate.of(difference),
        probability=float((difference > 0).mean()),
        differs={
            item.name: (first.get(item.name), second.get(item.name))
            for item in importance
            if first.get(item.name) != second.get(item.name)
        },
    )


def _more(result: SearchResult) -> More | None:
    study, trials = result.study, result.trials
    added = study.spec.budget.device_seconds
    ranked = rank(study, load_strategy(study), trials)
    quality: Quality | None = forecast_quality(with_more(study, added), ranked, trials)
    if quality is None:
        return None
    return More(seconds=added, now=quality.now, score=quality.score, low=quality.low, high=quality.high)


def _sentences(study: Study, page: Why) -> list[str]:
    said = []
    matter = [item for item in page.importance if item.total.low >= NOTABLE]
    for index, item in enumerate(matter):
        verb = "matters most" if index == 0 else "matters as well"
        text = (
            f"{item.name} {verb}: it accounts for {_percent(item.total)} of the variance over the search space, "
            f"{_percent(item.first)} alone."
        )
        said.append(f"{text} {_locally(study, page, item)}".rstrip())
    little = [item for item in page.importance if _is_little(item)]
    if little:
        each = "each at" if len(little) > 1 else "at"
        ceiling = share(max(item.total.high for item in little))
        said.append(f"Little depends on {', '.join(item.name for item in little)}: {each} most {ceiling}.")
    for boundary in page.boundaries:
        where = f"on {boundary.model}" if boundary.model is not None else "on models of any size"
        low, high = (setting(value) for value in boundary.between)
        edge = f"From {boundary.name} = {high} upwards" if boundary.side == "above" else f"At {boundary.name} <= {low}"
        said.append(
            f"{edge}, {boundary.collapsed} of {boundary.runs} runs {where} collapsed; "
            f"{'below' if boundary.side == 'above' else 'above'} it, "
            f"{boundary.other_collapsed} of {boundary.other_runs} (the boundary lies between {low} and {high})."
        )
    target = study.ladder.target.name
    for proxy in page.proxies:
        parts = []
        if proxy.spearman is not None and proxy.interval is not None and proxy.pairs >= FEW_PAIRS:
            least, most = proxy.interval
            parts.append(
                f"{proxy.pairs} configurations measured on both at {share(proxy.horizon_share or 0.0)} of the horizon "
                f"rank with a Spearman correlation of {number(proxy.spearman, 2)} ({number(least, 2)} to "
                f"{number(most, 2)})"
            )
        if proxy.shared is not None:
            parts.append(f"the model believes that it shares {share(proxy.shared)} of its variance with {target}")
        if parts:
            said.append(f"Proxy {proxy.name}: {'; '.join(parts)}.")
    if page.choice is not None:
        said.append(_choice_sentence(page.choice))
    if page.more is not None:
        said.append(_more_sentence(page.more, page.standard_error))
    unimportant = {item.name for item in little}
    edges = [name for name in page.edges if name not in unimportant]
    if edges:
        said.append(
            f"Recommended at the edge of the range: {', '.join(edges)}. A better value may lie beyond; widen the "
            "range before spending more."
        )
    return said


def _is_little(item: Importance) -> bool:
    """Whether little depends on a hyperparameter."""
    return item.total.low < NOTABLE and item.total.high < LITTLE


def _percent(estimate: Estimate) -> str:
    return f"{share(estimate.value)} ({100 * estimate.low:.0f} to {share(estimate.high)})"


def _locally(study: Study, page: Why, item: Importance) -> str:
    """How far the hyperparameter alone may move; empty if it is not active in the best configuration."""
    if item.best is None or item.harmless is None or page.standard_error is None:
        return ""
    values, error = [setting(value) for value in item.harmless], number(page.standard_error)
    if not isinstance(study.space[item.name], ChoiceParameter):
        return (
            f"From {values[0]} to {values[1]} (best: {setting(item.best)}), with nothing else changed, the expected "
            f"score stays within one standard error ({error})."
        )
    if len(values) == 1:
        return f"With nothing else changed, any value but {values[0]} costs more than one standard error ({error})."
    return f"With nothing else changed, {' and '.join(values)} differ by less than one standard error ({error})."


def _choice_sentence(choice: Choice) -> str:
    differs = ", ".join(
        f"{name} {'unset' if a is None else setting(a)} instead of {'unset' if b is None else setting(b)}"
        for name, (a, b) in list(choice.differs.items())[:MOST_DIFFERENCES]
    )
    figures = (
        f"{signed(choice.difference.value)} ({signed(choice.difference.low)} to {signed(choice.difference.high)}), "
        f"better with a probability of {share(choice.probability)}"
    )
    if choice.difference.low > 0:
        return f"The recommendation is expected to beat the second best, trial {choice.trial}, by {figures}: {differs}."
    return (
        f"The data do not tell the recommendation clearly from the second best, trial {choice.trial}: an expected "
        f"difference of {figures}; {differs}."
    )


def _more_sentence(more: More, standard_error: float | None) -> str:
    text = (
        f"With {duration(more.seconds)} of device-time more, the final score is forecast at {number(more.score)} (80 % "
        f"interval {number(more.low)} to {number(more.high)}), against {number(more.now)} expected of the best now"
    )
    if standard_error is not None and more.score - more.now < standard_error:
        return (
            f"{text}: less than one standard error of a score ({number(standard_error)}) is to be gained. Further "
            "training seeds of the best configurations would tell more than a longer search."
        )
    return f"{text}."
