"""Who chooses the next trial: the interface that all strategies share, and those that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from scipy.stats import qmc

from jfhpo_core.errors import SpecError
from jfhpo_core.plugins import load_plugin
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Suggestion, Trial, TrialState, configuration_key

Count = Annotated[int, Field(ge=0)]
"""Setting of a strategy: a whole number."""

Positive = Annotated[int, Field(ge=1)]
"""Setting of a strategy: a whole number of at least 1."""

Share = Annotated[float, Field(ge=0, le=1)]
"""Setting of a strategy: a share."""

Reduction = Annotated[int, Field(ge=2)]
"""Reduction factor of a strategy: one trial in this many is promoted to the next rung."""


@dataclass(frozen=True)
class Proposal:
    """Train this configuration on this model up to this rung; a known trial is continued.

    Attributes:
        seed: Training seed; None: the first of the study's.
        floors: Prompts consumed, and the held-out score there below which the run is not worth continuing.
    """

    configuration: Configuration
    model: str
    stop_prompts: int
    suggestion: Suggestion
    seed: int | None = None
    floors: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """A configuration with the score it should reach on the target at the full horizon.

    Attributes:
        mean: Expected final held-out score (its median, where the distribution is skewed).
        standard_deviation: Its uncertainty, evaluation noise excluded.
        respected: Probability that it respects all constraints; None without any, or if the strategy does not tell.
    """

    configuration: Configuration
    mean: float
    standard_deviation: float
    respected: float | None = None


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


@runtime_checkable
class Checked(Protocol):
    """A strategy that may refuse a study."""

    def check(self, study: Study) -> None:
        """Called when the strategy is loaded, before anything is trained.

        Raises:
            SpecError: The strategy cannot work on this study.
        """
        ...


Admits = Callable[[str, float], bool]
"""Whether a segment may be trained now: name of its model, expected device-seconds."""


@runtime_checkable
class Selective(Protocol):
    """A strategy that can choose among what fits on the free devices; others are asked again until theirs fits."""

    def suggest_among(
        self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int, admits: Admits
    ) -> Proposal | None:
        """As `Strategy.suggest`, among the segments that `admits` lets pass; None if it wants none of them."""
        ...


ENTRY_POINT_GROUP = "jfhpo.strategies"
"""Further strategies come by this group; an entry point names a class whose settings are keyword arguments."""

STRATEGIES = {
    "jfhpo": "jfhpo_core.optimizer.joint_fidelity:JointFidelity",
    "paper": "jfhpo_core.optimizer.paper:PaperStrategy",
    "random": "jfhpo_core.optimizer.strategy:RandomSearch",
    "given": "jfhpo_core.optimizer.strategy:Given",
    "gp": "jfhpo_core.peers.gp:Gp",
    "tpe": "jfhpo_core.peers.optuna:Tpe",
    "asha": "jfhpo_core.peers.optuna:Asha",
    "bohb": "jfhpo_core.peers.optuna:Bohb",
    "successive-halving": "jfhpo_core.peers.smac:SuccessiveHalving",
    "hyperband": "jfhpo_core.peers.smac:Hyperband",
    "smac3": "jfhpo_core.peers.smac:Smac3",
    "dehb": "jfhpo_core.peers.dehb:Dehb",
    "fastbo": "jfhpo_core.peers.fastbo:FastBo",
}
"""Where the strategies of this package are, by name; imported when a study names them."""


def load_strategy(study: Study) -> Strategy:
    """The strategy that the study names.

    Raises:
        SpecError: There is none of that name, what it needs is not installed, or it refuses its settings.
    """
    name, settings = study.spec.strategy.name, study.spec.strategy.settings
    kind = load_plugin(ENTRY_POINT_GROUP, name, "strategy.name", STRATEGIES)
    try:
        strategy: Strategy = kind(**settings)
        if is_dataclass(kind):
            strategy = TypeAdapter(kind).validate_python(dict(settings))
    except TypeError as error:
        raise SpecError(f"strategy.settings: {error}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("strategy.settings", *fault["loc"]))
        raise SpecError(f"{place}: {fault['msg']}, got {fault['input']!r}") from None
    if isinstance(strategy, Checked):
        strategy.check(study)
    return strategy


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


@dataclass(frozen=True)
class Given:
    """No search: one configuration, trained on the target over the full horizon.

    Attributes:
        configuration: Hyperparameters; those not named keep the study's fixed values and the trainer's defaults.
    """

    name: ClassVar[str] = "given"

    configuration: Configuration

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """The configuration, until a run of it has come to an end other than by an infrastructure failure."""
        mine = [trial for trial in trials if trial.purpose == "search"]
        if any(trial.state not in (TrialState.LOST, TrialState.PAUSED) for trial in mine):
            return None
        explanation = "the configuration that was given, at full length on the target"
        return Proposal(
            self.configuration,
            study.ladder.target.name,
            study.spec.fidelity.horizon_prompts,
            Suggestion(source="given", explanation=explanation),
        )

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """The configuration, once it is trained."""
        return RandomSearch().rank(study, trials)


def check_model(setting: str, name: str | None, study: Study) -> None:
    """Check the model that a strategy's setting names, if it names one.

    Raises:
        SpecError: The study has no such model.
    """
    names = [model.name for model in study.ladder.models]
    if name is not None and name not in names:
        raise SpecError(
            f"strategy.settings.{setting}: {name!r} is not among the models of the study ({', '.join(names)})"
        )


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
