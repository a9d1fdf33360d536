"""How the spending is divided: when a full run of the target is due, and what may be bought besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jfhpo_core.optimizer.candidates import Candidate, is_full_run
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.study.history import History
from jfhpo_core.study.trial import Trial, committed_seconds

LEAD_RUNS = 0.7
"""Full runs of the target that may be spent on cheaper segments before the first one is due."""


@dataclass(frozen=True)
class Priced:
    """A candidate and the device-seconds that it should cost."""

    candidate: Candidate
    seconds: float


@dataclass(frozen=True)
class Offer:
    """What may be bought next.

    Attributes:
        items: Full runs of the target alone if one is due.
        due: Whether one is.
    """

    items: tuple[Priced, ...]
    due: bool


@dataclass(frozen=True)
class Allocation:
    """Full runs of the target come so often that they take a share of the spending.

    The first one is due after a short lead: a search can be cut short at any time, and what it has to show then are
    full runs of the target.

    Attributes:
        history: What was trained.
        full_seconds: Price of a full run of the target.
        lead: Device-seconds for cheaper segments before the first full run is due.
    """

    history: History
    full_seconds: float
    lead: float

    @classmethod
    def of(cls, history: History, costs: CostModel, *, leads: bool) -> Allocation:
        """At the prices of today.

        Args:
            history: What was trained.
            costs: The prices.
            leads: Whether anything may come before the first full run; not with earlier studies, which say what it is.
        """
        study, budget = history.study, history.study.spec.budget
        target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        full = costs.estimate(study.space.middle(), target, 0, horizon).seconds
        lead = min(LEAD_RUNS * full, budget.initial_share * budget.device_seconds) if leads else 0.0
        return cls(history, full, lead)

    def is_due(self, share: float) -> bool:
        """Whether the next segment should be a full run of the target.

        Args:
            share: Of the spending beyond the lead that full runs take.
        """
        own = [trial for trial in self.history.trials if trial.purpose == "search"]
        ahead = committed_seconds(own) - self.lead
        target = self.history.study.ladder.target.name
        complete = sum(trial.model == target and _planned_step(trial) >= trial.total_steps for trial in own)
        return ahead >= 0 and complete < 1 + share * ahead / self.full_seconds

    def offer(self, items: Sequence[Priced], remaining_seconds: float, share: float) -> Offer:
        """What of some candidates may be bought.

        What is learned from a cheaper segment is worth nothing without the means to train what it recommends.

        Args:
            items: Candidates that can be paid.
            remaining_seconds: What is left to spend.
            share: See `is_due`.
        """
        is_full = [is_full_run(self.history.study, item.candidate) for item in items]
        if any(is_full) and self.is_due(share):
            return Offer(tuple(item for item, full in zip(items, is_full, strict=True) if full), due=True)
        enough = tuple(
            item
            for item, full in zip(items, is_full, strict=True)
            if full or item.seconds + self.full_seconds <= remaining_seconds
        )
        return Offer(enough, due=False)


def _planned_step(trial: Trial) -> int:
    """The step that a trial has reached, or will have when its running segment ends."""
    return trial.step if trial.open_segment is None else trial.open_segment.stop_step
