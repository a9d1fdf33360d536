"""The sentences of `jfhpo why`: each from figures of the page, left out where these do not tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jfhpo_core.optimizer.importance import LEADING, Estimate, Importance, Interaction
from jfhpo_core.optimizer.rank_agreement import FEW_PAIRS
from jfhpo_core.report.text import duration, figures, listed, number, setting, share, signed
from jfhpo_core.report.why_records import Choice, Constraint, Front, More, Promise, Proxy, Topic, Why
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import ChoiceParameter

NOTABLE = 0.05
"""A hyperparameter matters if the interval of its share of the variance lies above this."""

LITTLE = 0.1
"""Little depends on a hyperparameter if that interval begins below `NOTABLE` and ends below this."""

CERTAIN = 0.95
"""Probability with which it is said which hyperparameters are among the most important ones, and which are not."""

POOR_RANKING = 0.3
"""A proxy with a rank correlation below this, the upper end of its interval included, tells little."""

SIGNIFICANCE = 0.01
"""Probability that splits by chance would look as good, over all of them (Bonferroni), that a boundary may have."""

MOST_DIFFERENCES = 3
"""Hyperparameters in which two configurations differ that a sentence names."""


def sections(study: Study, page: Why) -> dict[Topic, list[str]]:
    """The sentences by topic, in the order of a reader's questions."""
    tradeoffs = [_constraint_sentence(item, study.ladder.target.name) for item in page.constraints]
    if page.front is not None:
        tradeoffs.append(_front_sentence(page.front))
    if page.promise is not None and page.standard_error is not None:
        tradeoffs.append(_promise_sentence(page.promise, page.standard_error, study))
    matters: list[str] = []
    collapse: list[str] = []
    proxies: list[str] = []
    choice: list[str] = []
    following: list[str] = []
    matter = [item for item in page.importance if item.total.low >= NOTABLE]
    for index, item in enumerate(matter):
        verb = ("matters most" if stands_out(page.importance) else "matters") if index == 0 else "matters as well"
        text = (
            f"{item.name} {verb}: it accounts for {_percent(item.total)} of the variance over the search space, "
            f"{_percent(item.first)} alone."
        )
        matters.append(f"{text} {_locally(study, page, item)}".rstrip())
    if len(matter) >= LEADING:
        matters.append(_leading_sentence(page.importance))
    little = [item for item in page.importance if _is_little(item)]
    if little:
        each = "each at" if len(little) > 1 else "at"
        ceiling = share(max(item.total.high for item in little))
        matters.append(f"Little depends on {', '.join(item.name for item in little)}: {each} most {ceiling}.")
    unclear = [item.name for item in page.importance if item not in matter and item not in little]
    if unclear:
        matters.append(_unclear_sentence(unclear))
    matters += [_pair_sentence(pair) for pair in page.interactions if pair.share.low >= NOTABLE]
    for boundary in page.boundaries:
        where = f"on {boundary.model}" if boundary.model is not None else "on models of any size"
        low, high = (setting(value) for value in boundary.between)
        edge = f"From {boundary.name} = {high} upwards" if boundary.side == "above" else f"At {boundary.name} <= {low}"
        collapse.append(
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
            parts.append(
                f"the model believes that it shares {share(proxy.shared)} of its variance with {target} (at 100 % it "
                f"would rank configurations as {target} does, but for best values that shift with size)"
            )
        if parts:
            proxies.append(f"Proxy {proxy.name}: {'; '.join(parts)}.")
    if page.choice is not None:
        choice.append(_choice_sentence(page.choice))
        if page.choice.change is not None and (text := _change_sentence(page.choice)):
            choice.append(text)
    if page.more is not None:
        following.append(_more_sentence(page.more, page.standard_error))
    poor = [item for item in page.proxies if _ranks_poorly(item)]
    if poor and len(poor) == len(page.proxies):
        following.append(
            f"No proxy ranks configurations as {target} does: name models nearer to it (fidelity.proxies), or let the "
            "target have more of the budget (strategy.settings.target_share)."
        )
    unimportant = {item.name for item in little}
    edges = [name for name in page.edges if name not in unimportant]
    if edges:
        following.append(
            f"Recommended at the edge of the range: {', '.join(edges)}. A better value may lie beyond; before spending "
            f"more, widen the range in a study of another name, with `warm_start: [{page.study}]`."
        )
    return {
        "tradeoffs": tradeoffs,
        "matters": matters,
        "collapse": collapse,
        "proxies": proxies,
        "choice": choice,
        "next": following,
    }


def _constraint_sentence(item: Constraint, target: str) -> str:
    """How many configurations break a constraint, and what would lead without it."""
    count = f"{item.broken_by} of {item.configurations} configurations with a full run on {target}"
    text = f"{count} {'breaks' if item.broken_by == 1 else 'break'} {item.limit}."
    if item.without is None:
        return text
    metric = item.limit.split()[0]
    value = "not recorded" if item.without_value is None else figures(item.without_value)
    text += f" Without this constraint trial {item.without_trial} would lead: {number(item.without)} ({metric} {value})"
    return f"{text}." if item.best is None else f"{text}, against {number(item.best)} of the best that respects it."


def _front_sentence(front: Front) -> str:
    (score, at), (least, end) = front.best_score, front.best_metric
    return (
        f"The Pareto front of score and {front.metric} ({front.direction}) has {front.configurations} configurations: "
        f"from a score of {number(score)} with {front.metric} {figures(at)} to {number(least)} with "
        f"{figures(end)}."
    )


def leaders(importance: Sequence[Importance]) -> tuple[list[str], list[str]]:
    """Names of those that are among the most important hyperparameters, and of the others that may be.

    That the former are, and that no further one is, hold with a probability of `CERTAIN` each (Bonferroni).
    """
    ranked = sorted(importance, key=lambda item: -item.leading)
    doubt = np.cumsum([1 - item.leading for item in ranked])
    chance = np.cumsum([item.leading for item in reversed(ranked)])[::-1]
    certain = [item.name for item, most in zip(ranked, doubt, strict=True) if most <= 1 - CERTAIN]
    possible = [item.name for item, most in zip(ranked, chance, strict=True) if most > 1 - CERTAIN]
    return certain, possible[len(certain) :]


def _leading_sentence(importance: Sequence[Importance]) -> str:
    """Which three hyperparameters matter most, as far as the draws agree."""
    certain, possible = leaders(importance)
    if len(certain) == LEADING or not possible:
        return f"The hyperparameters that matter most are {listed(certain)}."
    if not certain:
        return f"Which three matter most cannot be told: they are among {listed(possible)}."
    verb = "are" if len(certain) > 1 else "is"
    one = len(certain) == LEADING - 1
    rest = f"the third is {listed(possible, 'or')}" if one else f"the other two are among {listed(possible)}"
    return f"{listed(certain)} {verb} among the three that matter most; {rest}."


def _promise_sentence(promise: Promise, standard_error: float, study: Study) -> str:
    """Where the model expects something better than the measured front, or that it does not."""
    item, second = promise.predicted, study.spec.second_objective
    assert second is not None
    if item.score - promise.measured < standard_error:
        return (
            "No configuration without a full run is expected to lie above the measured front by more than one standard "
            f"error of a score ({number(standard_error)})."
        )
    metric, low, high = (figures(value) for value in (item.metric, item.metric_low, item.metric_high))
    values = ", ".join(f"{name} {setting(value)}" for name, value in item.configuration.items())
    side, end = ("at most", high) if second.direction == "minimize" else ("at least", low)
    return (
        f"Without a full run so far, but expected above the front: a score of {number(item.score)} (80 % interval "
        f"{number(item.score_low)} to {number(item.score_high)}) with {second.metric} {metric} ({low} to {high}), "
        f"where the best that was measured with {side} {end} scores {number(promise.measured)}: {values}."
    )


def _unclear_sentence(names: Sequence[str]) -> str:
    """Which hyperparameters may or may not matter."""
    if len(names) == 1:
        return f"Whether {names[0]} matters is not told: its interval begins below {share(NOTABLE)}."
    return f"Whether {listed(names)} matter is not told: their intervals begin below {share(NOTABLE)}."


def stands_out(importance: Sequence[Importance]) -> bool:
    """Whether the first hyperparameter is clearly the most important."""
    return len(importance) < 2 or importance[0].total.low >= importance[1].total.value


def _pair_sentence(pair: Interaction) -> str:
    return (
        f"{pair.names[0]} and {pair.names[1]} act together: {_percent(pair.share)} of the variance comes from their "
        "interaction, so what one of them does depends on the other."
    )


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


def _change_sentence(choice: Choice) -> str:
    """What would change the mind; empty if no single run would."""
    change, parts = choice.change, []
    if change is not None and change.second_at_least is not None and change.second_probability >= SIGNIFICANCE:
        parts.append(
            f"one of trial {choice.trial}'s configuration that scores {number(change.second_at_least)} or more "
            f"(probability {share(change.second_probability)})"
        )
    if change is not None and change.first_at_most is not None and change.first_probability >= SIGNIFICANCE:
        parts.append(
            f"one of the recommended configuration that scores {number(change.first_at_most)} or less (probability "
            f"{share(change.first_probability)})"
        )
    return f"One more full run could change this choice: {', or '.join(parts)}." if parts else ""


def _ranks_poorly(proxy: Proxy) -> bool:
    """Whether a proxy was seen to rank configurations otherwise than the target."""
    return proxy.pairs >= FEW_PAIRS and proxy.interval is not None and proxy.interval[1] < POOR_RANKING


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
    return f"{text}. To spend it, raise the budget in the study file by as much and run the search again."
