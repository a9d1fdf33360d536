"""The vocabulary of a search: what is trained (trial), in which pieces (segment), and what came of it.

All values here are frozen pydantic models: they travel between driver, workers and ledger as JSON, and a trial's state
is never stored but always derived from its committed segments, so that it cannot contradict them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from statistics import fmean, stdev
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Value = bool | int | float | str
Configuration = dict[str, Value]
"""Hyperparameter name to value, active hyperparameters only."""


EXAMPLES = 3
EXAMPLE_LENGTH = 300
"""Characters of a prompt or completion that is kept to be looked at."""


class Record(BaseModel):
    """Base of everything that is written to a ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class StepRecord(Record):
    """One optimizer-visible training step (one rollout batch and the updates made on it).

    A signal that a trainer cannot measure is None; a signal that became non-finite is reported as such (NaN or inf),
    because the stopping rules look for it.
    """

    step: int = Field(ge=1, description="Steps completed, this one included.")
    prompts: int = Field(ge=0, description="Prompts consumed since step 0.")
    tokens: int = Field(ge=0, description="Completion tokens generated since step 0.")
    reward: float = Field(description="Mean training reward of the step's completions.")
    reward_std: float = Field(description="Standard deviation of the reward over the step's completions.")
    zero_variance_share: float = Field(ge=0, le=1, description="Share of groups whose completions all scored alike.")
    kl: float | None = Field(description="KL divergence to the reference model, nats per token (k3 estimator).")
    entropy: float | None = Field(description="Mean entropy of the sampling policy, nats per token.")
    clip_fraction: float | None = Field(description="Share of tokens whose probability ratio was clipped.")
    grad_norm: float | None = Field(description="Gradient norm before clipping, mean over the step's updates.")
    completion_tokens: float = Field(ge=0, description="Mean completion length in tokens.")
    truncated_share: float = Field(ge=0, le=1, description="Share of completions cut off at the length limit.")
    learning_rate: float | None = Field(default=None, description="Learning rate used by the step's last update.")
    reward_timeouts: int = Field(default=0, ge=0, description="Completions whose scoring took too long.")
    reward_parts: dict[str, float] = Field(
        default_factory=dict, description="Mean of every reward function, by its name, if there are several."
    )
    generation_seconds: float = Field(ge=0)
    training_seconds: float = Field(ge=0)


class PassAtN(Record):
    """The held-out set with n completions of each prompt, the best of which counts.

    If the reward is 0 or 1, the score is pass@n: the share of prompts that at least one of n completions solves.
    """

    n: int = Field(ge=2, description="Completions of each prompt.")
    score: float = Field(description="Mean over held-out prompts of the reward of the best completion.")
    standard_error: float = Field(ge=0, description="Standard error of the score over the held-out prompts.")

    @classmethod
    def of(cls, rewards: Iterable[Sequence[float]]) -> Self | None:
        """From the rewards of each prompt's completions, for two prompts or more.

        None if the prompts have one completion each, or not all the same number of them.
        """
        groups = list(rewards)
        n = len(groups[0])
        if n == 1 or any(len(group) != n for group in groups):
            return None
        best = [max(group) for group in groups]
        # All prompts scoring alike does not prove a noiseless score; half a prompt's weight is the least to claim.
        error = max(stdev(best) / math.sqrt(len(best)), 0.5 / len(best))
        return cls(n=n, score=fmean(best), standard_error=error)


class Example(Record):
    """A completion with its reward, to look at."""

    prompt: str
    completion: str
    reward: float

    def __str__(self) -> str:
        return f"{self.prompt!r} -> {self.completion!r}, reward {self.reward:g}"

    @classmethod
    def first(cls, prompts: Sequence[str], completions: Sequence[str], rewards: Sequence[float]) -> tuple[Self, ...]:
        """The first `EXAMPLES`, cut off at `EXAMPLE_LENGTH`."""
        found = list(zip(prompts, completions, rewards, strict=True))[:EXAMPLES]
        return tuple(
            cls(prompt=prompt[:EXAMPLE_LENGTH], completion=completion[:EXAMPLE_LENGTH], reward=reward)
            for prompt, completion, reward in found
        )


class Evaluation(Record):
    """A measurement on the held-out set."""

    step: int = Field(ge=0)
    prompts: int = Field(ge=0, description="Training prompts consumed when it was taken.")
    score: float = Field(description="Mean held-out reward of sampled completions (accuracy if the reward is 0 or 1).")
    standard_error: float = Field(ge=0, description="Standard error of the score over the held-out prompts.")
    samples: int = Field(ge=1, description="Completions scored.")
    seconds: float = Field(ge=0)
    pass_at_n: PassAtN | None = Field(
        default=None, description="None with one completion per prompt, or where the trainer does not tell."
    )
    reward_timeouts: int = Field(default=0, ge=0, description="Completions whose scoring took too long.")
    examples: tuple[Example, ...] = Field(
        default=(), description="The first completions, to be read; empty if the study keeps none."
    )
    by_prompt: tuple[float, ...] = Field(
        default=(),
        description="At full length: mean reward of each held-out prompt, for paired comparisons; empty where the "
        "trainer does not tell.",
    )
    training: dict[str, float] = Field(
        default_factory=dict,
        description="Means over the training steps since the rung before, by metric (`jfhpo_core.study.metrics`).",
    )
    rewarded: bool | None = Field(
        default=None,
        description="Whether any completion of these steps had another reward than 0; None: no steps, or not known.",
    )


class Decision(Record):
    """What a stopping rule says about a trial, and on which evidence."""

    stop: bool
    rule: str
    signal: str
    value: float
    threshold: float
    step: int

    def explain(self) -> str:
        """One sentence for people."""
        return f"{self.rule}: {self.signal} = {self.value:.4g} against {self.threshold:.4g} at step {self.step}"


class Pause(Record):
    """An answer to a trainer's step: write the checkpoint now and return. The segment goes on from it later."""

    stop: Literal[False] = False


class Checkpoint(Record):
    """A committed checkpoint in the checkpoint store."""

    step: int = Field(ge=0)
    prompts: int = Field(ge=0)
    path: str = Field(description="Folder relative to the store's root.")
    digest: str = Field(description="SHA-256 of the manifest, which holds the SHA-256 of every file.")
    size_bytes: int = Field(ge=0)


VALIDATION = "validation"
"""Source of the suggestions by which the best configurations are trained to full length on the target."""


class FailureKind(StrEnum):
    """Why a trial is infeasible."""

    OUT_OF_MEMORY = "out-of-memory"
    NON_FINITE = "non-finite"
    HUNG = "hung"
    REJECTED = "rejected"
    REWARD = "reward"


class Outcome(StrEnum):
    """How a segment ended."""

    REACHED = "reached"
    STOPPED = "stopped"
    INFEASIBLE = "infeasible"
    LOST = "lost"


class Suggestion(Record):
    """Why a segment is trained: which strategy chose it, by which rung of its ladder, and for what expected gain."""

    source: str = Field(description="Strategy and rung, e.g. 'jfhpo/knowledge-gradient' or 'baseline'.")
    explanation: str
    expected_gain: float | None = Field(default=None, description="Expected gain in final target score.")
    expected_cost_seconds: float | None = Field(default=None, description="Device-seconds the segment should add.")
    after_commit: int | None = Field(
        default=None, description="Rank of the newest commit known then, from strategies that are rebuilt by replay."
    )


class ScoreFloor(Record):
    """A held-out score at a step, below which the stopping rule `unpromising` ends the run."""

    step: int = Field(ge=1)
    score: float


class Segment(Record):
    """A unit of work: train a trial from its last committed checkpoint up to a step."""

    index: int = Field(ge=0, description="Position among the trial's segments.")
    start_step: int = Field(ge=0)
    stop_step: int = Field(ge=1)
    suggestion: Suggestion
    floors: tuple[ScoreFloor, ...] = Field(
        default=(),
        description="What was known when it was chosen, as the worker needs it; see `jfhpo_core.optimizer.floors`.",
    )
    changed: tuple[str, ...] = Field(
        default=(),
        description="Fields of the study whose files had been changed, and the change accepted, since it began.",
    )


class SegmentResult(Record):
    """What came of a segment. Committing it to the ledger is what makes it count (and what charges it)."""

    segment: Segment
    outcome: Outcome
    end_step: int = Field(ge=0, description="Last completed step.")
    end_prompts: int = Field(ge=0)
    evaluations: tuple[Evaluation, ...] = ()
    checkpoint: Checkpoint | None = None
    seconds: float = Field(ge=0, description="Seconds that the segment held its devices, evaluation included.")
    waiting_seconds: float = Field(default=0.0, ge=0, description="From its submission until it had its devices.")
    startup_seconds: float = Field(default=0.0, ge=0, description="Of these, loading and set-up before the first step.")
    evaluation_seconds: float = Field(default=0.0, ge=0, description="Of these, evaluation.")
    devices: int = Field(default=1, ge=1, description="Devices held; the charge is seconds times devices.")
    decision: Decision | None = None
    failure: FailureKind | None = None
    message: str | None = None
    attempts: int = Field(default=1, ge=1, description="Tries needed, infrastructure failures included.")
    committed: int = Field(default=0, ge=0, description="Rank of its commit in the study, from 1; 0 if not known.")
    moved_to: int | None = Field(
        default=None,
        ge=0,
        description="Step at which it really began, if the checkpoint that it begins at was damaged.",
    )

    @property
    def began_step(self) -> int:
        """Step at which the run began."""
        return self.segment.start_step if self.moved_to is None else self.moved_to

    @property
    def charge_seconds(self) -> float:
        """Device-seconds charged to the budget."""
        return self.seconds * self.devices


class TrialState(StrEnum):
    """The trial state machine of the design; derived, never stored."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    STOPPED = "stopped"
    INFEASIBLE = "infeasible"
    LOST = "lost"


Purpose = Literal["search", "baseline", "confirmation", "random-search"]
"""What a trial is for. The budget counts 'search'; the other purposes belong to the final comparison."""


class Trial(Record):
    """One configuration on one model of the family with one seed."""

    key: str
    number: int = Field(ge=0, description="Order of creation in the study.")
    configuration: Configuration
    model: str
    seed: int
    purpose: Purpose = "search"
    label: str | None = Field(default=None, description="A baseline's name.")
    total_steps: int = Field(ge=1, description="Steps at the full horizon.")
    prompts_per_step: int = Field(ge=1)
    segments: tuple[SegmentResult, ...] = ()
    open_segment: Segment | None = None

    @property
    def state(self) -> TrialState:
        """Where the trial stands, from its segments alone."""
        if self.open_segment is not None:
            return TrialState.RUNNING
        if not self.segments:
            return TrialState.PENDING
        last = self.segments[-1]
        if last.outcome is Outcome.REACHED:
            return TrialState.COMPLETED if last.end_step >= self.total_steps else TrialState.PAUSED
        return TrialState(last.outcome.value)

    @property
    def changed(self) -> tuple[str, ...]:
        """Data, rewards or models that had been changed when a segment began; its scores are not like earlier ones."""
        parts = [*(result.segment for result in self.segments), *([self.open_segment] if self.open_segment else [])]
        return tuple(sorted({field for part in parts for field in part.changed}))

    @property
    def step(self) -> int:
        """Last completed step of the committed segments."""
        return max((result.end_step for result in self.segments), default=0)

    @property
    def is_extendable(self) -> bool:
        """Whether it can go on from its checkpoint: it is paused, or its last segment was lost to infrastructure.

        What was lost twice in a row is given up.
        """
        if self.state is TrialState.LOST:
            return not any(result.outcome is Outcome.LOST for result in self.segments[-2:-1])
        return self.state is TrialState.PAUSED

    @property
    def kept_prompts(self) -> int:
        """Prompts that the newest segment that was not lost has brought it to; 0 if there is none."""
        return max((result.end_prompts for result in self.segments if result.outcome is not Outcome.LOST), default=0)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        return next((result.checkpoint for result in reversed(self.segments) if result.checkpoint), None)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All evaluations, by step; a step evaluated twice counts with its newest value."""
        by_step = {evaluation.step: evaluation for result in self.segments for evaluation in result.evaluations}
        return tuple(by_step[step] for step in sorted(by_step))

    @property
    def final(self) -> Evaluation | None:
        """The evaluation at the full horizon, if the trial got there."""
        evaluations = self.evaluations
        return evaluations[-1] if evaluations and evaluations[-1].step >= self.total_steps else None

    @property
    def charge_seconds(self) -> float:
        """Device-seconds charged so far."""
        return sum(result.charge_seconds for result in self.segments)

    @property
    def decision(self) -> Decision | None:
        """The stopping decision that ended the trial, if one did."""
        return self.segments[-1].decision if self.segments else None


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def configuration_key(configuration: Mapping[str, Value]) -> str:
    """Short stable identity of a configuration (12 hex digits)."""
    return hashlib.sha256(canonical_json(dict(configuration)).encode()).hexdigest()[:12]


def trial_key(study: str, configuration: Mapping[str, Value], model: str, seed: int, purpose: str = "search") -> str:
    """Identity of a trial: hash(study, configuration, model, seed, purpose), 16 hex digits.

    The purpose is part of it so that a random-search comparison never borrows a trial of the search.
    """
    identity = canonical_json([study, dict(configuration), model, seed, purpose])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def spent_seconds(trials: Sequence[Trial], purpose: Purpose = "search") -> float:
    """Device-seconds charged to trials of a purpose."""
    return sum(trial.charge_seconds for trial in trials if trial.purpose == purpose)


def committed_seconds(trials: Sequence[Trial], purpose: Purpose = "search") -> float:
    """Charged device-seconds plus what the running segments should add."""
    expected = sum(
        trial.open_segment.suggestion.expected_cost_seconds or 0.0
        for trial in trials
        if trial.open_segment is not None and trial.purpose == purpose
    )
    return spent_seconds(trials, purpose) + expected
