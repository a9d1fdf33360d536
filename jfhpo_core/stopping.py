"""Early stopping on training dynamics: one rule, one class, one formula.

A rule reads the stream of step records of a trial and may decide that the trial is not worth continuing. The decision
names rule, signal, value, threshold and step. What a rule stops is censored for the optimizer: the evaluation taken
at that step counts, and nothing is invented for the rest.

The paper's rules (JF-HPO, section on early stopping) fire on noise when taken literally: growth of the KL from 0.005 to
0.010 is "15 % five times". The default set therefore adds a floor, a window and a warm-up; the set `paper` keeps the
literal rules, for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import ClassVar, Protocol

from jfhpo_core.errors import SpecError
from jfhpo_core.spec import StoppingSpec
from jfhpo_core.trial import Decision, StepRecord


class StoppingRule(Protocol):
    """A rule: fed with every step record in order, it may return a stopping decision."""

    name: ClassVar[str]

    def update(self, records: Sequence[StepRecord]) -> Decision | None:
        """Judge the trial by all its records so far; the last one is new."""
        ...


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _windows(signal: Sequence[float], window: int, count: int) -> list[float]:
    """Means of the last `count` overlapping windows of the signal, oldest first; empty if it is too short."""
    if len(signal) < window + count - 1:
        return []
    return [_mean(signal[len(signal) - window - back : len(signal) - back]) for back in reversed(range(count))]


def _growth(before: float, after: float) -> float:
    """Relative growth of a signal that is not negative; from nothing to nothing is none."""
    if before > 0:
        return after / before - 1
    return math.inf if after > 0 else 0.0


@dataclass(frozen=True)
class NonFinite:
    """Stop as soon as loss signals are not finite: reward, KL, entropy or gradient norm is NaN or infinite."""

    name: ClassVar[str] = "non_finite"

    def update(self, records: Sequence[StepRecord]) -> Decision | None:
        """See `StoppingRule.update`."""
        record = records[-1]
        for signal in ("reward", "kl", "entropy", "grad_norm"):
            value = getattr(record, signal)
            if value is not None and not math.isfinite(value):
                return Decision(stop=True, rule=self.name, signal=signal, value=value, threshold=0.0, step=record.step)
        return None


@dataclass(frozen=True)
class KlGrowth:
    """Stop when the KL to the reference grows by more than `threshold` per step, `patience` times in a row.

    With m_t the mean KL of the last `window` steps, growth is m_t / m_(t-1) - 1. It counts only where m_t is above
    `floor` and after `warmup` steps: near zero a ratio measures noise. The paper's literal rule has window 1, floor 0
    and warm-up 0 (threshold 15 %, patience 5).
    """

    name: ClassVar[str] = "kl_growth"
    threshold: float = 0.15
    patience: int = 5
    window: int = 3
    floor: float = 0.3
    warmup: int = 8

    def update(self, records: Sequence[StepRecord]) -> Decision | None:
        """See `StoppingRule.update`."""
        recent = records[-(self.window + self.patience) :]
        signal = [record.kl for record in recent if record.kl is not None]
        if len(records) <= self.warmup or len(signal) < len(recent):
            return None
        means = _windows(signal, self.window, self.patience + 1)
        if not means or means[-1] < self.floor:
            return None
        growths = [_growth(before, after) for before, after in pairwise(means)]
        if not all(growth > self.threshold for growth in growths):
            return None
        return Decision(
            stop=True, rule=self.name, signal="smallest KL growth per step", value=min(growths),
            threshold=self.threshold, step=records[-1].step,
        )  # fmt: skip


@dataclass(frozen=True)
class RewardDrop:
    """Stop when the smoothed training reward lies far below where it began, `patience` steps in a row.

    With m_t the mean reward of the last `window` steps and m_0 that of the first `window` steps, the drop is
    (m_0 - m_t) / |m_0|. It counts after `warmup` steps. The paper's rule compares neighbouring steps instead (10 %
    down, five times in a row, which is a fall by 41 %) and almost never fires; see `PaperRewardDrop`.
    """

    name: ClassVar[str] = "reward_drop"
    threshold: float = 0.5
    patience: int = 2
    window: int = 4
    warmup: int = 8

    def update(self, records: Sequence[StepRecord]) -> Decision | None:
        """See `StoppingRule.update`."""
        signal = [record.reward for record in records]
        means = _windows(signal, self.window, self.patience)
        if not means or len(records) <= max(self.warmup, self.window + self.patience):
            return None
        start = _mean(signal[: self.window])
        if start == 0:
            return None
        drops = [(start - mean) / abs(start) for mean in means]
        if not all(drop > self.threshold for drop in drops):
            return None
        return Decision(
            stop=True, rule=self.name, signal="drop of the smoothed reward since the start", value=min(drops),
            threshold=self.threshold, step=records[-1].step,
        )  # fmt: skip


@dataclass(frozen=True)
class PaperRewardDrop:
    """The paper's literal rule: the reward falls by more than `threshold` of itself, `patience` steps in a row."""

    name: ClassVar[str] = "paper_reward_drop"
    threshold: float = 0.10
    patience: int = 5

    def update(self, records: Sequence[StepRecord]) -> Decision | None:
        """See `StoppingRule.update`."""
        rewards = [record.reward for record in records[-self.patience - 1 :]]
        if len(rewards) <= self.patience:
            return None
        drops = [1 - after / before if before > 0 else -math.inf for before, after in pairwise(rewards)]
        if not all(drop > self.threshold for drop in drops):
            return None
        return Decision(
            stop=True, rule=self.name, signal="smallest reward drop per step", value=min(drops),
            threshold=self.threshold, step=records[-1].step,
        )  # fmt: skip


@dataclass(frozen=True)
class ZeroReward:
    """Stop when every completion of the last `patience` steps scored exactly zero (paper: k = 5)."""

    name: ClassVar[str] = "zero_reward"
    patience: int = 5

    def update(self, records: Sequence[StepRecord]) -> Decision | None:
        """See `StoppingRule.update`."""
        last = records[-self.patience :]
        if len(last) < self.patience or any(record.reward != 0 or record.reward_std != 0 for record in last):
            return None
        return Decision(
            stop=True, rule=self.name, signal="steps in a row without any reward", value=float(self.patience),
            threshold=float(self.patience), step=records[-1].step,
        )  # fmt: skip


RULES: dict[str, type[NonFinite | KlGrowth | RewardDrop | PaperRewardDrop | ZeroReward]] = {
    rule.name: rule for rule in (NonFinite, KlGrowth, RewardDrop, PaperRewardDrop, ZeroReward)
}

RULE_SETS: dict[str, tuple[StoppingRule, ...]] = {
    "default": (NonFinite(), ZeroReward(), RewardDrop(), KlGrowth()),
    "paper": (NonFinite(), ZeroReward(), PaperRewardDrop(), KlGrowth(window=1, floor=0.0, warmup=0)),
    "none": (NonFinite(),),
}


def build_rules(spec: StoppingSpec) -> tuple[StoppingRule, ...]:
    """The rules that a study asks for.

    Raises:
        SpecError: An unknown rule or parameter.
    """
    rules = {rule.name: rule for rule in RULE_SETS[spec.rules]}
    for name, change in spec.override.items():
        if name not in RULES:
            raise SpecError(f"stopping.override: no rule {name!r}; there are {', '.join(sorted(RULES))}")
        if change is False:
            rules.pop(name, None)
            continue
        rule = rules.get(name, RULES[name]())
        known = {item.name: item for item in fields(rule)}  # type: ignore[arg-type]
        unknown = set(change) - set(known)
        if unknown:
            raise SpecError(
                f"stopping.override.{name}: no parameter {', '.join(sorted(unknown))}; there are {', '.join(known)}"
            )
        typed = {key: _typed(f"{name}.{key}", value, getattr(rule, key)) for key, value in change.items()}
        rules[name] = replace(rule, **typed)  # type: ignore[type-var]
    return tuple(rules.values())


def _typed(name: str, value: float, default: float) -> float:
    """A rule's parameter: counts (whole, and all but a warm-up at least 1) as int, the others at least 0."""
    least = 1 if isinstance(default, int) and not name.endswith(".warmup") else 0
    if value < least or (isinstance(default, int) and value != int(value)):
        kind = "whole number" if isinstance(default, int) else "number"
        raise SpecError(f"stopping.override.{name}: {value:g} is not a {kind} of at least {least}")
    return type(default)(value)


@dataclass
class Monitor:
    """Feeds a trial's records to its rules.

    Args:
        rules: Rules in order of precedence.
        history: Records of the trial's earlier segments.
    """

    rules: Sequence[StoppingRule]
    history: list[StepRecord] = field(default_factory=list)

    def update(self, record: StepRecord) -> Decision | None:
        """Add a record; the first rule that wants to stop decides."""
        self.history.append(record)
        return next((decision for rule in self.rules if (decision := rule.update(self.history))), None)
