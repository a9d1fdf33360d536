"""Early stopping on training dynamics: one rule, one class, one formula.

A rule reads the course of a run, its step records and held-out evaluations, and may decide that it is not worth
continuing. The decision names rule, signal, value, threshold and step. The optimizer takes the score at which a
training was stopped for its last one (see `jfhpo_core.optimizer.observations.observe`).

The paper's rules (JF-HPO, section on early stopping) fire on noise when taken literally: growth of the KL from 0.005 to
0.010 is "15 % five times". The default set therefore adds a floor, a window and a warm-up, and lets the KL grow while
the reward rises; the set `paper` keeps the literal rules, for comparison. How often each rule is right, on recorded
runs, and what it saves is measured in docs/evidence/rules.md.

Rules on a mean or a share decide only on differences of at least `deviations` standard errors. The literal rules of the
paper are the exception: `paper_reward_drop`, and `kl_growth` with `reward_growth` infinite.

Most rules guess, which a search can afford. A run whose final score is to be reported (baseline, validation,
confirmation, random search for comparison) is ended only by rules that do not: see `StoppingRule.as_verdict`.
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

HOPELESS_SHARE = 0.5
"""Share of the horizon without any reward after which a run is taken not to recover."""


@dataclass
class Course:
    """What is known of a run so far, earlier segments included.

    Attributes:
        total_steps: Of the full horizon, whatever the segment's end is.
        base: Evaluation of the untrained model; None if it was not measured.
        records: One for each step, in order.
        evaluations: Of the trained model on the held-out set, in order.
        floors: Of the segment, by step.
        groups: Prompts per step; None if not known, and the spread between steps alone tells the noise then.
        completions: Completions per step, of all prompts together; None as above.
    """

    total_steps: int
    base: Evaluation | None = None
    records: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    floors: Mapping[int, float] = field(default_factory=dict)
    groups: int | None = None
    completions: int | None = None

    def take(self, event: StepRecord | Evaluation) -> None:
        """Add what has just become known; an evaluation before the first step is the base score."""
        if isinstance(event, StepRecord):
            self.records.append(event)
        elif event.step == 0:
            self.base = event
        else:
            self.evaluations.append(event)

    @property
    def share(self) -> float:
        """Share of the full horizon that is trained."""
        return len(self.records) / self.total_steps


@dataclass(frozen=True)
class StoppingRule(ABC):
    """A rule: asked after every step record and every evaluation, it may return a stopping decision."""

    name: ClassVar[str]

    @abstractmethod
    def judge(self, course: Course) -> Decision | None:
        """Judge the run by its course so far."""

    def as_verdict(self) -> StoppingRule | None:
        """The form in which the rule may end a run whose final score is to be reported.

        None, as for all rules that do not say otherwise, if it guesses: the run might have recovered.
        """
        return None


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _least(values: Iterable[float]) -> float:
    """The smallest value; NaN if one of them is."""
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else min(numbers)


def _standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, from the spread of the values; 0 if there is only one."""
    mean, count = _mean(values), len(values)
    return math.dist(values, [mean] * count) / math.sqrt(count * max(1, count - 1))


def _share_error(shares: Sequence[float], each: int | None) -> float:
    """Standard error of the mean of shares, one per step, each a count out of `each`.

    The larger of the binomial one and that from the spread of the steps.
    """
    mean = _mean(shares)
    binomial = math.sqrt(max(0.0, mean * (1 - mean)) / (each * len(shares))) if each else 0.0
    return max(binomial, _standard_error(shares))


def _reward_rise(course: Course, first: Sequence[StepRecord], last: Sequence[StepRecord]) -> tuple[float, float]:
    """How much higher the mean reward of the last steps is than that of the first, and its standard error.

    The variance of a step's mean reward is the larger of two estimates. One is from the differences of all successive
    steps (von Neumann, 1941), which a trend hardly enters. The other is from the spread of the completions, pooled over
    both windows, as if one completion more had differed by 1: a window in which nothing succeeded has no spread of its
    own, and ten successes in 512 completions against none are three standard errors apart, not many.
    """
    # Products, for ** of a huge reward raises an error.
    between = _mean((b.reward - a.reward) * (b.reward - a.reward) for a, b in pairwise(course.records)) / 2
    within = 0.0
    if course.completions:
        spread = _mean(record.reward_std * record.reward_std for record in (*first, *last))
        within = (spread + 1 / (course.completions * (len(first) + len(last)))) / course.completions
    error = math.sqrt(max(between, within) * (1 / len(first) + 1 / len(last)))
    return _mean(record.reward for record in last) - _mean(record.reward for record in first), error


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

    def as_verdict(self) -> StoppingRule:
        """See `StoppingRule.as_verdict`: parameters that are not finite never become finite again."""
        return self


@dataclass(frozen=True)
class KlGrowth(StoppingRule):
    """Stop when the KL to the reference grows by more than `threshold` per step, `patience` times in a row.

    With m_t the mean KL of the last `window` steps, growth is m_t / m_(t-1) - 1. It counts only where m_t is above
    `floor` and after `warmup` steps: near zero a ratio measures noise. And it counts only if the mean reward of the
    last `window` steps, plus `deviations` standard errors, is above that of the first ones by at most the share
    `reward_growth`: a policy that learns fast moves away from the reference, too (of recorded runs,
    docs/evidence/rules.md, the rule without this stopped some of the best). The paper's literal rule has window 1,
    floor 0, warm-up 0 and any reward (threshold 15 %, patience 5).
    """

    name: ClassVar[str] = "kl_growth"
    threshold: float = 0.15
    patience: int = 5
    window: int = 3
    floor: float = 0.3
    warmup: int = 8
    reward_growth: float = 0.0
    deviations: float = 3.0

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
        first = records[: self.window]
        rise, error = _reward_rise(course, first, records[-self.window :])
        if rise + self.deviations * error > self.reward_growth * abs(_mean(record.reward for record in first)):
            return None
        growth = _least(_growth(before, after) for before, after in pairwise(means))
        return _decision(self, course, "smallest KL growth per step", growth, self.threshold)


@dataclass(frozen=True)
class RewardDrop(StoppingRule):
    """Stop when the smoothed training reward lies far below where it began, `patience` steps in a row.

    With m_t the mean reward of the last `window` steps and m_0 that of the first `window` steps, the drop is
    (m_0 - m_t) / |m_0|. It counts after `warmup` steps, and only if m_0 - m_t is more than `deviations` standard
    errors: three, because it is asked at every step. The paper's rule compares neighbouring steps instead (10 % down,
    five times in a row, which is a fall by 41 %) and almost never fires; see `PaperRewardDrop`.
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
        count = len(records)
        if count <= max(self.warmup, self.window + self.patience):
            return None
        first = records[: self.window]
        start = _mean(record.reward for record in first)
        ends = [records[count - self.window - back : count - back] for back in range(self.patience)]
        rises = [_reward_rise(course, first, end) for end in ends]
        if start == 0 or _least(-rise - self.deviations * error for rise, error in rises) <= 0:
            return None
        drop = _least(-rise / abs(start) for rise, _ in rises)
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
    """Stop when every completion of the last `patience` steps scored exactly zero (paper: k = 5).

    These steps must be at least the share `horizon` of all, and enough to tell: at the score of the untrained model,
    if it is known and between 0 and 1, so many completions without a reward have a probability below `probability`. A
    run without any reward for half of its horizon is taken not to recover.
    """

    name: ClassVar[str] = "zero_reward"
    patience: int = 5
    horizon: float = 0.0
    probability: float = 0.001

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        steps = max(self.patience, math.ceil(self.horizon * course.total_steps))
        last = records[-steps:]
        if len(last) < steps or any(record.reward != 0 or record.reward_std != 0 for record in last):
            return None
        rate = course.base.score if course.base is not None else 0.0
        if course.completions and 0 < rate < 1 and (1 - rate) ** (course.completions * steps) > self.probability:
            return None
        return Decision(
            stop=True, rule=self.name, signal="steps in a row without any reward", value=float(steps),
            threshold=float(steps), step=records[-1].step,
        )  # fmt: skip

    def as_verdict(self) -> StoppingRule:
        """See `StoppingRule.as_verdict`."""
        return replace(self, horizon=max(self.horizon, HOPELESS_SHARE))


@dataclass(frozen=True)
class AbsoluteKl(StoppingRule):
    """Stop when the mean KL to the reference over the last `window` steps is clearly above `threshold`.

    Clearly: by `deviations` standard errors, from the spread of the steps. Practice warns at 1 and calls 5 to 10
    critical (see docs/evidence/rules.md for what it means here).
    """

    name: ClassVar[str] = "absolute_kl"
    threshold: float = 20.0
    window: int = 4
    deviations: float = 2.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        recent = _signal(course, "kl")[-self.window :]
        if len(recent) < self.window or _mean(recent) - self.deviations * _standard_error(recent) <= self.threshold:
            return None
        return _decision(self, course, f"mean KL of {self.window} steps", _mean(recent), self.threshold)


@dataclass(frozen=True)
class ZeroVariance(StoppingRule):
    """Stop when hardly any group teaches: nearly all of a prompt's completions score alike, and low.

    Over the last `patience` steps the share of groups without variance is above `threshold`, and above that of the
    first `window` steps, and the mean reward is below `reward`, each by `deviations` standard errors. Groups of which
    all completions are right have no variance either, and are no failure; where one completion in fifty succeeds, most
    groups have none from the start. Practice calls 80 % for 10 steps stalled.
    """

    name: ClassVar[str] = "zero_variance"
    threshold: float = 0.8
    patience: int = 10
    window: int = 3
    reward: float = 0.1
    deviations: float = 2.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        first, last = course.records[: self.window], course.records[-self.patience :]
        if len(course.records) < self.window + self.patience:
            return None
        _, noise = _reward_rise(course, first, last)
        if not _mean(record.reward for record in last) + self.deviations * noise < self.reward:
            return None
        before, shares = ([record.zero_variance_share for record in part] for part in (first, last))
        share, error = _mean(shares), _share_error(shares, course.groups)
        risen = share - _mean(before) > self.deviations * math.hypot(error, _share_error(before, course.groups))
        if not risen or share - self.deviations * error <= self.threshold:
            return None
        return _decision(self, course, "mean share of groups without variance", share, self.threshold)


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
    """Stop when the policy's entropy has fallen to less than `threshold` of its start while the reward has fallen.

    Both are means over `window` steps, compared with the first ones, after `warmup` steps, and both differences are
    more than `deviations` standard errors. Practice takes a third. Low entropy alone does not predict quality: a
    training that has learned its task is sure of itself, too.
    """

    name: ClassVar[str] = "entropy_collapse"
    threshold: float = 1 / 3
    window: int = 4
    warmup: int = 8
    deviations: float = 2.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records, found = course.records, _relative(course, "entropy", self.window)
        if len(records) <= self.warmup or found is None:
            return None
        entropy, error = found
        rise, noise = _reward_rise(course, records[: self.window], records[-self.window :])
        if rise + self.deviations * noise >= 0 or entropy + self.deviations * error >= self.threshold:
            return None
        return _decision(self, course, "entropy relative to its start", entropy, self.threshold, below=True)


@dataclass(frozen=True)
class EntropyExplosion(StoppingRule):
    """Stop when the policy's entropy has risen to more than `threshold` times its start.

    Means over `window` steps, after `warmup` steps, by more than `deviations` standard errors. Practice sees
    degradation above 2 nats; relative to the start the rule does not depend on the vocabulary.
    """

    name: ClassVar[str] = "entropy_explosion"
    threshold: float = 4.0
    window: int = 4
    warmup: int = 8
    deviations: float = 2.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        found = _relative(course, "entropy", self.window)
        if len(course.records) <= self.warmup or found is None:
            return None
        entropy, error = found
        if entropy - self.deviations * error <= self.threshold:
            return None
        return _decision(self, course, "entropy relative to its start", entropy, self.threshold)


@dataclass(frozen=True)
class Truncation(StoppingRule):
    """Stop when the mean share of truncated completions over the last `window` steps is clearly above `threshold`.

    Clearly: by `deviations` standard errors. Practice calls less than 5 % stable, 10 to 15 % unstable and more than
    50 % critical. A model that is cut off at the start may learn to be brief: after `warmup` steps.
    """

    name: ClassVar[str] = "truncation"
    threshold: float = 0.5
    window: int = 6
    warmup: int = 12
    deviations: float = 2.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        shares = [record.truncated_share for record in course.records[-self.window :]]
        if len(course.records) <= self.warmup or len(shares) < self.window:
            return None
        share, error = _mean(shares), _share_error(shares, course.completions)
        if share - self.deviations * error <= self.threshold:
            return None
        signal = f"mean share of truncated completions in {self.window} steps"
        return _decision(self, course, signal, share, self.threshold)


@dataclass(frozen=True)
class BelowBase(StoppingRule):
    """Stop when the held-out score is below that of the untrained model by more than `threshold` standard errors.

    It counts for each of the last `patience` evaluations. The standard error is that of the difference: the untrained
    model's score was measured, too.
    """

    name: ClassVar[str] = "below_base"
    threshold: float = 3.0
    patience: int = 1

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        base, last = course.base, course.evaluations[-self.patience :]
        if base is None or len(last) < self.patience:
            return None
        errors = [math.hypot(base.standard_error, evaluation.standard_error) for evaluation in last]
        if not all(errors):
            return None
        lost = [(base.score - evaluation.score) / error for evaluation, error in zip(last, errors, strict=True)]
        return _decision(self, course, "standard errors below the untrained model", _least(lost), self.threshold)


@dataclass(frozen=True)
class RewardHacking(StoppingRule):
    """Stop when the training reward still rises but the held-out score does not.

    The last `patience` evaluations are all below the best one before them, while the mean reward of the last `window`
    steps is above that of the steps up to the best evaluation by more than `threshold`; each by more than `deviations`
    standard errors of the difference. Practice: two evaluations in a row without a new best.
    """

    name: ClassVar[str] = "reward_hacking"
    threshold: float = 0.02
    patience: int = 2
    window: int = 4
    deviations: float = 1.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records, before, last = (
            course.records, course.evaluations[: -self.patience], course.evaluations[-self.patience :]
        )  # fmt: skip
        if not before:
            return None
        best = max(before, key=lambda evaluation: evaluation.score)
        for evaluation in last:
            noise = self.deviations * math.hypot(best.standard_error, evaluation.standard_error)
            if evaluation.score >= best.score - noise:
                return None
        then = records[max(0, best.step - self.window) : best.step]
        if not then or best.step >= len(records):
            return None
        rise, error = _reward_rise(course, then, records[-self.window :])
        if rise - self.deviations * error <= self.threshold:
            return None
        return _decision(self, course, "rise of the reward since the best evaluation", rise, self.threshold)


@dataclass(frozen=True)
class NoProgress(StoppingRule):
    """Stop when the run has not begun to learn after a share of the horizon.

    The mean reward of the last `window` steps, plus `deviations` standard errors, is above that of the first ones, m_0,
    by less than `threshold` of the smaller of m_0 and 1 - m_0, for rewards in [0, 1], after `warmup` of the horizon.
    Neither the paper nor practice has it: learning rates that are far too low cost full runs.
    """

    name: ClassVar[str] = "no_progress"
    threshold: float = 0.05
    window: int = 6
    warmup: float = 0.375
    deviations: float = 2.0

    def judge(self, course: Course) -> Decision | None:
        """See `StoppingRule.judge`."""
        records = course.records
        if len(records) < 2 * self.window or course.share < self.warmup:
            return None
        first = records[: self.window]
        start = _mean(record.reward for record in first)
        if not 0 < start < 1:
            return None
        rise, error = _reward_rise(course, first, records[-self.window :])
        room = min(start, 1 - start)
        if (rise + self.deviations * error) / room >= self.threshold:
            return None
        signal = "rise of the reward, relative to its start or the room above"
        return _decision(self, course, signal, rise / room, self.threshold, below=True)


@dataclass(frozen=True)
class Unpromising(StoppingRule):
    """Stop when the run has less than `probability` of ever mattering to the study.

    Its evaluation lies below the floor of that step: the score at which the search's model of all trials leaves its
    configuration with just that probability of being better, on the target at full length, than the best one known.
    The floors are worked out when the segment is chosen (`jfhpo_core.optimizer.floors`), so that workers need no
    model; only segments that the strategy `jfhpo` has chosen have them, on the target once two full runs have finished
    (and at a probability of at least 0.1). Neither the paper nor practice has this rule; the idea is that of Swersky et
    al. (2014), Freeze-thaw Bayesian optimization, with a probability in place of an acquisition.
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


def _relative(course: Course, name: str, window: int) -> tuple[float, float] | None:
    """Mean of a signal's last window over that of its first, and its standard error; None while they overlap.

    None, too, if it began at zero. The standard error comes from the spread of the steps.
    """
    values = _signal(course, name)
    if len(values) < 2 * window or (start := _mean(values[:window])) <= 0:
        return None
    ratio = _mean(values[-window:]) / start
    error = math.hypot(_standard_error(values[-window:]), ratio * _standard_error(values[:window])) / start
    return ratio, error


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


def build_rules(spec: StoppingSpec, *, measured: bool = False) -> tuple[StoppingRule, ...]:
    """The rules that a study asks for.

    Args:
        spec: What the study file says.
        measured: Only those that may end a run whose final score is to be reported; see `StoppingRule.as_verdict`.

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
    if measured:
        return tuple(verdict for rule in rules.values() if (verdict := rule.as_verdict()) is not None)
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
    """Follows a run's course and asks its rules.

    Args:
        rules: Rules in order of precedence.
        course: Of the run's earlier segments.
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
