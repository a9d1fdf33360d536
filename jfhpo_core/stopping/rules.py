"""Early stopping on training dynamics: one rule, one class, one formula.

A rule reads the course of a training, its step records and held-out evaluations, and may decide that it is not worth
continuing. The decision names rule, signal, value, threshold and step. The optimizer takes the score at which a
training was stopped for its last one (see `jfhpo_core.optimizer.observations.observe`).

The paper's rules (JF-HPO, section on early stopping) fire on noise when taken literally: growth of the KL from 0.005 to
0.010 is "15 % five times". The default set therefore adds a floor, a window and a warm-up, and lets the KL grow while
the reward rises; the set `paper` keeps the literal rules, for comparison. How often each rule is right, on recorded
trainings, and what it saves is measured in docs/evidence/rules.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from statistics import median
from typing import ClassVar

from jfhpo_core.errors import SpecError
from jfhpo_core.plugins import load_plugin
from jfhpo_core.study.spec import StoppingSpec
from jfhpo_core.study.trial import Decision, Evaluation, StepRecord


@dataclass
class Course:
    """What is known of a training so far, earlier segments included.

    Attributes:
        total_steps: Of the full horizon, whatever the segment's end is.
        base_score: Held-out score of the untrained model; None if it was not measured.
        records: One for each step, in order.
        evaluations: Of the trained model on the held-out set, in order.
        floors: Of the segment, by step.
    """

    total_steps: int
    base_score: float | None = None
    records: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    floors: Mapping[int, float] = field(default_factory=dict)

    def take(self, event: StepRecord | Evaluation) -> None:
        """Add what has just become known; an evaluation before the first step is the base score."""
        if isinstance(event, StepRecord):
            self.records.append(event)
        elif event.step == 0:
            self.base_score = event.score
        else:
            self.evaluations.append(event)

    @property
    def share(self) -> float:
        """Of the full horizon that is trained."""
        return len(self.records) / self.total_steps


@dataclass(frozen=True)
class StoppingRule(ABC):
    """A rule: asked after every step record and every evaluation, it may return a stopping decision."""

    name: ClassVar[str]

    @abstractmethod
    def judge(self, course: Course) -> Decision | None:
        """Judge the training by its course so far."""


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _least(values: Iterable[float]) -> float:
    """The smallest value; NaN if one of them is."""
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else min(numbers)


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the spread of the values; 0 if there is only one."""
    mean, count = _mean(values), len(values)
    return math.dist(values, [mean] * count) / math.sqrt(count * max(1, count - 1))


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
class NonFinite(StoppingRule):
    """Stop as soon as loss signals are not finite: reward, KL, entropy or gradient norm is NaN or infinite."""

    name: ClassVar[str] = "non_finite"

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        if not records:
            return None
        record = records[-1]
        for signal in ("reward", "kl", "entropy", "grad_norm"):
            value = getattr(record, signal)
            if value is not None and not math.isfinite(value):
                return Decision(stop=True, rule=self.name, signal=signal, value=value, threshold=0.0, step=record.step)
        return None


@dataclass(frozen=True)
class KlGrowth(StoppingRule):
    """Stop when the KL to the reference grows by more than `threshold` per step, `patience` times in a row.

    With m_t the mean KL of the last `window` steps, growth is m_t / m_(t-1) - 1. It counts only where m_t is above
    `floor` and after `warmup` steps: near zero a ratio measures noise. And it counts only while the mean reward of the
    last `window` steps is above that of the first ones by at most the share `reward_growth`: a policy that learns fast
    moves away from the reference, too (of recorded trainings, docs/evidence/rules.md, the rule without this stopped
    some of the best). The paper's literal rule has window 1, floor 0, warm-up 0 and any reward (threshold 15 %,
    patience 5).
    """

    name: ClassVar[str] = "kl_growth"
    threshold: float = 0.15
    patience: int = 5
    window: int = 3
    floor: float = 0.3
    warmup: int = 8
    reward_growth: float = 0.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        recent = records[-(self.window + self.patience) :]
        signal = [record.kl for record in recent if record.kl is not None]
        if len(records) <= self.warmup or len(signal) < len(recent):
            return None
        means = _windows(signal, self.window, self.patience + 1)
        if not means or means[-1] < self.floor:
            return None
        first, last = (
            _mean(record.reward for record in part) for part in (records[: self.window], records[-self.window :])
        )
        if last - first > self.reward_growth * abs(first):
            return None
        growth = _least(_growth(before, after) for before, after in pairwise(means))
        return _decision(self, course, "smallest KL growth per step", growth, self.threshold)


@dataclass(frozen=True)
class RewardDrop(StoppingRule):
    """Stop when the smoothed training reward lies far below where it began, `patience` steps in a row.

    With m_t the mean reward of the last `window` steps and m_0 that of the first `window` steps, the drop is
    (m_0 - m_t) / |m_0|. It counts after `warmup` steps. Where rewards can be negative a mean near zero varies by more
    than half of itself by chance: there it counts only if m_0 - m_t is also more than `deviations` standard errors of
    m_0 (from the spread of its steps). The paper's rule compares neighbouring steps instead (10 % down, five times in a
    row, which is a fall by 41 %) and almost never fires; see `PaperRewardDrop`.
    """

    name: ClassVar[str] = "reward_drop"
    threshold: float = 0.5
    patience: int = 2
    window: int = 4
    warmup: int = 8
    deviations: float = 3.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        signal = [record.reward for record in records]
        means = _windows(signal, self.window, self.patience)
        if not means or len(records) <= max(self.warmup, self.window + self.patience):
            return None
        first = signal[: self.window]
        start = _mean(first)
        noise = _standard_error(first) if min(signal) < 0 else 0.0
        if start == 0 or _least(start - mean for mean in means) <= self.deviations * noise:
            return None
        drop = _least((start - mean) / abs(start) for mean in means)
        return _decision(self, course, "drop of the smoothed reward since the start", drop, self.threshold)


@dataclass(frozen=True)
class PaperRewardDrop(StoppingRule):
    """The paper's literal rule: the reward falls by more than `threshold` of itself, `patience` steps in a row."""

    name: ClassVar[str] = "paper_reward_drop"
    threshold: float = 0.10
    patience: int = 5

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        rewards = [record.reward for record in records[-self.patience - 1 :]]
        if len(rewards) <= self.patience:
            return None
        drop = _least(1 - after / before if before > 0 else -math.inf for before, after in pairwise(rewards))
        return _decision(self, course, "smallest reward drop per step", drop, self.threshold)


@dataclass(frozen=True)
class ZeroReward(StoppingRule):
    """Stop when every completion of the last `patience` steps scored exactly zero (paper: k = 5)."""

    name: ClassVar[str] = "zero_reward"
    patience: int = 5

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        last = records[-self.patience :]
        if len(last) < self.patience or any(record.reward != 0 or record.reward_std != 0 for record in last):
            return None
        return Decision(
            stop=True, rule=self.name, signal="steps in a row without any reward", value=float(self.patience),
            threshold=float(self.patience), step=records[-1].step,
        )  # fmt: skip


@dataclass(frozen=True)
class AbsoluteKl(StoppingRule):
    """Stop when the mean KL to the reference over the last `window` steps is above `threshold`.

    Practice warns at 1 and calls 5 to 10 critical (see docs/evidence/rules.md for what it means here).
    """

    name: ClassVar[str] = "absolute_kl"
    threshold: float = 20.0
    window: int = 4

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        signal = f"mean KL of {self.window} steps"
        return _decision(self, course, signal, _recent(course, "kl", self.window), self.threshold)


@dataclass(frozen=True)
class ZeroVariance(StoppingRule):
    """Stop when hardly any group teaches: nearly all of a prompt's completions score alike, and low.

    For each of the last `patience` steps the share of groups without variance is above `threshold` and the mean reward
    below `reward`; groups of which all completions are right have no variance either, and are no failure. Practice
    calls 80 % for 10 steps stalled.
    """

    name: ClassVar[str] = "zero_variance"
    threshold: float = 0.8
    patience: int = 10
    reward: float = 0.1

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        last = course.records[-self.patience :]
        shares = [record.zero_variance_share for record in last if record.zero_variance_share is not None]
        if len(shares) < self.patience or any(record.reward >= self.reward for record in last):
            return None
        return _decision(self, course, "smallest share of groups without variance", _least(shares), self.threshold)


@dataclass(frozen=True)
class GradientNorm(StoppingRule):
    """Stop when the gradient norm is above `threshold` times its running median, `patience` steps in a row.

    The median is that of all steps before these, of which there must be `warmup` at least. Practice takes 10 times.
    """

    name: ClassVar[str] = "gradient_norm"
    threshold: float = 10.0
    patience: int = 3
    warmup: int = 8

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        norms = [record.grad_norm for record in course.records if record.grad_norm is not None]
        before, last = norms[: -self.patience], norms[-self.patience :]
        if len(before) < max(1, self.warmup) or (usual := median(before)) <= 0:
            return None
        return _decision(self, course, "gradient norm over its running median", _least(last) / usual, self.threshold)


@dataclass(frozen=True)
class EntropyCollapse(StoppingRule):
    """Stop when the policy's entropy has fallen to less than `threshold` of its start while the reward has not risen.

    Both are means over `window` steps, compared with the first ones, after `warmup` steps. Practice takes a third.
    Low entropy alone does not predict quality: a training that has learned its task is sure of itself, too, so the
    rule fires only where the reward is below where it began.
    """

    name: ClassVar[str] = "entropy_collapse"
    threshold: float = 1 / 3
    window: int = 4
    warmup: int = 8

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        entropy, reward = _relative(course, "entropy", self.window), _relative(course, "reward", self.window)
        if len(course.records) <= self.warmup or entropy is None or reward is None or reward >= 1:
            return None
        return _decision(self, course, "entropy relative to its start", entropy, self.threshold, below=True)


@dataclass(frozen=True)
class EntropyExplosion(StoppingRule):
    """Stop when the policy's entropy has risen to more than `threshold` times its start.

    Means over `window` steps, after `warmup` steps. Practice sees degradation above 2 nats; relative to the start the
    rule does not depend on the vocabulary.
    """

    name: ClassVar[str] = "entropy_explosion"
    threshold: float = 4.0
    window: int = 4
    warmup: int = 8

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        entropy = _relative(course, "entropy", self.window)
        if len(course.records) <= self.warmup or entropy is None:
            return None
        return _decision(self, course, "entropy relative to its start", entropy, self.threshold)


@dataclass(frozen=True)
class Truncation(StoppingRule):
    """Stop when the mean share of truncated completions over the last `window` steps is above `threshold`.

    Practice calls less than 5 % stable, 10 to 15 % unstable and more than 50 % critical. A model that is cut off at the
    start may learn to be brief: after `warmup` steps.
    """

    name: ClassVar[str] = "truncation"
    threshold: float = 0.5
    window: int = 6
    warmup: int = 12

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        if len(course.records) <= self.warmup:
            return None
        signal = f"mean share of truncated completions in {self.window} steps"
        return _decision(self, course, signal, _recent(course, "truncated_share", self.window), self.threshold)


@dataclass(frozen=True)
class BelowBase(StoppingRule):
    """Stop when the held-out score is below that of the untrained model by more than `threshold` standard errors.

    It counts for each of the last `patience` evaluations; the untrained model's score is taken as exact.
    """

    name: ClassVar[str] = "below_base"
    threshold: float = 3.0
    patience: int = 1

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        base, last = course.base_score, course.evaluations[-self.patience :]
        if base is None or len(last) < self.patience:
            return None
        lost = [
            (base - evaluation.score) / evaluation.standard_error
            for evaluation in last
            if evaluation.standard_error > 0
        ]
        if len(lost) < len(last):
            return None
        return _decision(self, course, "standard errors below the untrained model", _least(lost), self.threshold)


@dataclass(frozen=True)
class RewardHacking(StoppingRule):
    """Stop when the training reward still rises but the held-out score does not.

    The last `patience` evaluations are all below the best one before them by more than one standard error, while the
    mean reward of the last `window` steps is above that of the steps up to the best evaluation by more than
    `threshold`. Practice: two evaluations in a row without a new best.
    """

    name: ClassVar[str] = "reward_hacking"
    threshold: float = 0.02
    patience: int = 2
    window: int = 4

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        before, last = course.evaluations[: -self.patience], course.evaluations[-self.patience :]
        if not before:
            return None
        best = max(before, key=lambda evaluation: evaluation.score)
        if any(evaluation.score >= best.score - evaluation.standard_error for evaluation in last):
            return None
        rewards = [record.reward for record in course.records]
        then = rewards[max(0, best.step - self.window) : best.step]
        if not then or best.step >= len(rewards):
            return None
        rise = _mean(rewards[-self.window :]) - _mean(then)
        return _decision(self, course, "rise of the reward since the best evaluation", rise, self.threshold)


@dataclass(frozen=True)
class NoProgress(StoppingRule):
    """Stop when the training has not begun to learn after a share of the horizon.

    The mean reward of the last `window` steps is above that of the first ones by less than `threshold` of the room
    above it (1 - reward), for rewards in [0, 1], after `warmup` of the horizon. Neither the paper nor practice has it:
    learning rates that are far too low cost full trainings.
    """

    name: ClassVar[str] = "no_progress"
    threshold: float = 0.01
    window: int = 6
    warmup: float = 0.375

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        rewards = [record.reward for record in course.records]
        if len(rewards) < 2 * self.window or course.share < self.warmup:
            return None
        start = _mean(rewards[: self.window])
        if not 0 <= start < 1:
            return None
        gain = (_mean(rewards[-self.window :]) - start) / (1 - start)
        return _decision(self, course, "share of the missing reward that was gained", gain, self.threshold, below=True)


@dataclass(frozen=True)
class Unpromising(StoppingRule):
    """Stop when the training has less than `probability` of ever mattering to the study.

    Its evaluation lies below the floor of that step: the score at which the search's model of all trials leaves its
    configuration with just that probability of being better, on the target at full length, than the best one known.
    The floors are worked out when the segment is chosen (`jfhpo_core.optimizer.floors`), so that workers need no
    model; only segments that the strategy `jfhpo` has chosen on proxies have them. Neither the paper nor practice has
    this rule; the idea is that of Swersky et al. (2014), Freeze-thaw Bayesian optimization, with a probability in
    place of an acquisition.
    """

    name: ClassVar[str] = "unpromising"
    probability: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise SpecError(
                f"stopping.override.{self.name}.probability: {self.probability:g} does not lie between 0 and 1"
            )

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        if not course.evaluations or course.evaluations[-1].step != len(course.records):
            return None
        last = course.evaluations[-1]
        floor = course.floors.get(last.step)
        return None if floor is None else _decision(self, course, "held-out score", last.score, floor, below=True)


def _decision(
    rule: StoppingRule, course: Course, signal: str, value: float, threshold: float, *, below: bool = False
) -> Decision | None:
    """A stopping decision if the value is beyond the threshold; non-finite values are left to their own rule."""
    if not math.isfinite(value) or not (value < threshold if below else value > threshold):
        return None
    step = course.records[-1].step if course.records else 0
    return Decision(stop=True, rule=rule.name, signal=signal, value=value, threshold=threshold, step=step)


def _signal(course: Course, name: str) -> list[float]:
    """A signal's values at all steps; empty if it was not measured at each of them."""
    values = [getattr(record, name) for record in course.records]
    return values if all(value is not None for value in values) else []


def _recent(course: Course, name: str, window: int) -> float:
    """Mean of a signal's last window; NaN if there are too few steps or one of them lacks it."""
    values = _signal(course, name)[-window:]
    return _mean(values) if len(values) == window else math.nan


def _relative(course: Course, name: str, window: int) -> float | None:
    """Mean of a signal's last window over that of its first; None while they overlap, or if it began at zero."""
    values = _signal(course, name)
    if len(values) < 2 * window or (start := _mean(values[:window])) <= 0:
        return None
    return _mean(values[-window:]) / start


ENTRY_POINT_GROUP = "jfhpo.rules"
"""Further rules come by this group; an entry point names a class that derives from `StoppingRule`."""

RULES: dict[str, type[StoppingRule]] = {
    rule.name: rule
    for rule in (
        NonFinite,
        ZeroReward,
        RewardDrop,
        KlGrowth,
        AbsoluteKl,
        ZeroVariance,
        GradientNorm,
        EntropyCollapse,
        EntropyExplosion,
        Truncation,
        BelowBase,
        RewardHacking,
        NoProgress,
        Unpromising,
        PaperRewardDrop,
    )
}

_DEFAULT: tuple[StoppingRule, ...] = (NonFinite(), ZeroReward(), RewardDrop(), KlGrowth(), Unpromising())

RULE_SETS: dict[str, tuple[StoppingRule, ...]] = {
    "default": _DEFAULT,
    "extended": (*_DEFAULT, AbsoluteKl(), ZeroVariance(), GradientNorm(), Truncation(), BelowBase(), NoProgress()),
    "paper": (
        NonFinite(),
        ZeroReward(),
        PaperRewardDrop(),
        KlGrowth(window=1, floor=0.0, warmup=0, reward_growth=math.inf),
    ),
    "none": (NonFinite(),),
}


def load_rule(name: str) -> type[StoppingRule]:
    """The rule of this name.

    Raises:
        SpecError: There is none, or it does not import.
    """
    own = {known: f"{rule.__module__}:{rule.__name__}" for known, rule in RULES.items()}
    kind: type[StoppingRule] = load_plugin(ENTRY_POINT_GROUP, name, "stopping.override", own)
    return kind


def build_rules(spec: StoppingSpec) -> tuple[StoppingRule, ...]:
    """The rules that a study asks for.

    Raises:
        SpecError: An unknown rule or parameter.
    """
    rules = {rule.name: rule for rule in RULE_SETS[spec.rules]}
    for name, change in spec.override.items():
        kind = load_rule(name)
        if change is False:
            rules.pop(name, None)
            continue
        rule = rules.get(name, kind())
        known = {item.name: item for item in fields(rule)}
        unknown = set(change) - set(known)
        if unknown:
            raise SpecError(
                f"stopping.override.{name}: no parameter {', '.join(sorted(unknown))}; there are {', '.join(known)}"
            )
        typed = {key: _typed(f"{name}.{key}", value, getattr(rule, key)) for key, value in change.items()}
        rules[name] = replace(rule, **typed)
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
    """Follows a training's course and asks its rules.

    Args:
        rules: Rules in order of precedence.
        course: Of the training's earlier segments.
    """

    rules: Sequence[StoppingRule]
    course: Course

    def update(self, event: StepRecord | Evaluation) -> Decision | None:
        """Add a record or an evaluation; the first rule that wants to stop decides.

        At the end of the horizon nothing is left to save: only non-finite values still count.
        """
        self.course.take(event)
        complete = self.course.share >= 1
        asked = (rule for rule in self.rules if not complete or isinstance(rule, NonFinite))
        return next((decision for rule in asked if (decision := rule.judge(self.course))), None)
