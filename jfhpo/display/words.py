"""Figures and ends of segments in the words that people read: durations, bills, scores, configurations."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import FEWEST_CONFIGURATIONS, Quality
from jfhpo_core.study.spec import BudgetSpec
from jfhpo_core.study.trial import Configuration, Evaluation, Outcome, SegmentResult, Trial

TREND_LEVELS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Seconds for people: '4.2 s', '45 s', '3 min 05 s', '2 h 10 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bill(cost: CostEstimate) -> str:
    """A forecast for people: '3 min 05 s (2 min 10 s to 4 min 20 s)'; a cost that is known has no interval."""
    if _is_known(cost):
        return duration(cost.seconds)
    return f"{duration(cost.seconds)} ({duration(cost.low)} to {duration(cost.high)})"


def _is_known(cost: CostEstimate) -> bool:
    return cost.high - cost.low < 0.01 * cost.seconds or cost.high == 0


def paid_bill(cost: CostEstimate, budget: BudgetSpec) -> str:
    """A forecast of device time with its price: '2 h 10 min (1 h 40 min to 3 h 00 min), 6.50 USD (5.00 to 9.00)'."""
    hourly = budget.hourly_cost
    ends = ""
    if hourly is not None and not _is_known(cost):
        ends = f" ({cost.low / 3600 * hourly:,.2f} to {cost.high / 3600 * hourly:,.2f})"
    return f"{bill(cost)}{budget.in_money(cost.seconds)}{ends}"


def show_quality(quality: Quality | None) -> str:
    """A forecast of the final score for people: '0.712 (80 % interval 0.671 to 0.745)'."""
    if quality is None:
        return f"cannot be forecast before {FEWEST_CONFIGURATIONS} full runs of the target"
    return f"{quality.score:.3f} (80 % interval {quality.low:.3f} to {quality.high:.3f})"


def show_value(value: bool | float | str) -> str:
    """A hyperparameter's value, floats without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_configuration(configuration: Configuration) -> str:
    """A configuration on one line."""
    return " ".join(f"{name}={show_value(value)}" for name, value in configuration.items())


def show_score(evaluation: Evaluation) -> str:
    """Score and standard error."""
    return f"{evaluation.score:.3f} ± {evaluation.standard_error:.3f}"


def describe_end(trial: Trial, result: SegmentResult) -> str:
    """One sentence on how a segment ended and why."""
    segment, reason = result.segment, ""
    if result.outcome is Outcome.STOPPED and result.decision is not None:
        text = f"stopped by {result.decision.rule} at step {result.end_step}"
        reason = f" ({result.decision.signal} {result.decision.value:.3g} against {result.decision.threshold:.3g})"
    elif result.outcome is Outcome.INFEASIBLE:
        text = f"infeasible ({result.failure}) at step {result.end_step}: {_first_line(result.message)}"
    elif result.outcome is Outcome.LOST:
        text = f"lost after {result.attempts} attempt(s): {_first_line(result.message)}"
    elif segment.start_step:
        text = f"continued from step {segment.start_step} to {result.end_step} of {trial.total_steps}"
    else:
        text = f"trained to step {result.end_step} of {trial.total_steps}"
    score = f", score {show_score(result.evaluations[-1])}" if result.evaluations else ""
    return f"#{trial.number} {trial.model} ({trial.label or segment.suggestion.source}): {text}{score}{reason}"


def describe_untrained(trial: Trial, result: SegmentResult) -> list[str]:
    """What the untrained model scored, with completions, if the segment has measured it."""
    base = next((one for one in result.evaluations if one.step == 0 and one.examples), None)
    if base is None:
        return []
    return [f"untrained {trial.model}: score {show_score(base)}", *map(str, base.examples)]


def _first_line(message: str | None) -> str:
    return (message or "no message").strip().splitlines()[0]


def trend(values: Iterable[float]) -> str:
    """Values as bars, from their smallest to their largest: '▁▃▅█'."""
    numbers = [value for value in values if math.isfinite(value)]
    if len(numbers) < 2:
        return ""
    low, high = min(numbers), max(numbers)
    top = len(TREND_LEVELS) - 1
    return "".join(TREND_LEVELS[round((value - low) / (high - low) * top) if high > low else 0] for value in numbers)
