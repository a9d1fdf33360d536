"""Who chooses the next trial: the interface that all strategies share, and those that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from scipy.stats import qmc

from jfhpo_core.errors import SpecError
from jfhpo_core.study import Study
from jfhpo_core.trial import Configuration, Suggestion, Trial, configuration_key


@dataclass(frozen=True)
class Proposal:
    """Train this configuration on this model up to this rung; a known trial is continued."""

    configuration: Configuration
    model: str
    stop_prompts: int
    suggestion: Suggestion


@dataclass(frozen=True)
class Recommendation:
    """A configuration with the score it should reach on the target at the full horizon.

    Attributes:
        mean: Expected final held-out score.
        standard_deviation: Its uncertainty, evaluation noise excluded.
    """

    configuration: Configuration
    mean: float
    standard_deviation: float


class Strategy(Protocol):
    """A pure function of the study and its trials: the same trials and seed give the same proposal."""

    name: ClassVar[str]

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """The next segment to train, or None if nothing is worth the remaining budget.

        Args:
            study: The study.
            trials: Its trials, running ones included.
            remaining_seconds: Device-seconds left for the search, running segments deducted.
            seed: Differs from call to call.
        """
        ...

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """All configurations worth recommending, best first; empty if there is no evidence yet."""
        ...


def load_strategy(study: Study) -> Strategy:
    """The strategy that the study names.

    Raises:
        SpecError: There is none of that name.
    """
    name, settings = study.spec.strategy.name, study.spec.strategy.settings
    try:
        if name == "random":
            return RandomSearch(**settings)
        if name in ("jfhpo", "paper"):
            from jfhpo_core.optimizer import JointFidelity, PaperStrategy

            return JointFidelity(**settings) if name == "jfhpo" else PaperStrategy(**settings)
    except TypeError as error:
        raise SpecError(f"strategy.settings: {error}") from None
    raise SpecError(f"strategy.name: no strategy {name!r}; there are jfhpo, paper, random")


@dataclass(frozen=True)
class RandomSearch:
    """Scrambled-Sobol configurations, each trained on the target over the full horizon."""

    name: ClassVar[str] = "random"

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        if remaining_seconds <= 0:
            return None
        mine = [trial for trial in trials if trial.purpose in ("search", "random-search")]
        fresh = fresh_configurations(study, mine, study.spec.seeds.search, 1)
        if not fresh:
            return None
        return Proposal(
            fresh[0],
            study.ladder.target.name,
            study.spec.fidelity.horizon_prompts,
            Suggestion(source="random", explanation="next point of a Sobol sequence, at full length on the target"),
        )

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """By the observed final score on the target."""
        finals = [
            Recommendation(trial.configuration, trial.final.score, trial.final.standard_error)
            for trial in trials
            if trial.model == study.ladder.target.name and trial.final is not None and trial.purpose == "search"
        ]
        return sorted(finals, key=lambda item: -item.mean)


def fresh_configurations(study: Study, trials: Sequence[Trial], seed: int, count: int) -> list[Configuration]:
    """The next `count` configurations of the study's Sobol sequence that no trial has; fewer if a space runs out."""
    known = {configuration_key(trial.configuration) for trial in trials}
    sampler = qmc.Sobol(study.space.dimension, rng=np.random.default_rng(seed))
    fresh: list[Configuration] = []
    for _ in range(64):
        for point in sampler.random(64):
            configuration = study.space.decode(point)
            key = configuration_key(configuration)
            if key not in known:
                known.add(key)
                fresh.append(configuration)
                if len(fresh) == count:
                    return fresh
    return fresh
