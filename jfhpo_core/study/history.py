"""A study's trials, seen from the questions that a search asks about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jfhpo_core.errors import SpecError
from jfhpo_core.study.metrics import broken, mean_of
from jfhpo_core.study.resolved import Study, base_scores
from jfhpo_core.study.trial import (
    VALIDATION,
    Configuration,
    Evaluation,
    Trial,
    TrialState,
    Value,
    committed_seconds,
    configuration_key,
)


@dataclass(frozen=True)
class History:
    """The trials of a study at one moment.

    A baseline whose configuration lies in the search space belongs to the search, which learns from it and may choose
    it for all that a configuration can be chosen for. Runs of the final comparison (confirmations, random search) do
    not: they judge the choice. The search learns from confirmations once it goes on after them, with a larger budget:
    what was measured by several seeds must not be forgotten, and other seeds judge the next choice.

    Attributes:
        study: The study.
        trials: All of its trials, in order of creation.
    """

    study: Study
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, study: Study, trials: Sequence[Trial]) -> History:
        """The history of a study's trials."""
        return cls(study, tuple(trials))

    @cached_property
    def recipes(self) -> dict[str, Configuration]:
        """Baselines within the search space, by the key of the configuration as the study file has it."""
        found = {}
        for baseline in self.study.spec.baselines:
            configuration = recipe_in_space(self.study, baseline.configuration)
            if configuration is not None:
                found[configuration_key(baseline.configuration)] = configuration
        return found

    def canonical(self, configuration: Configuration) -> Configuration:
        """A configuration as the search writes it: of a recipe, all searched hyperparameters and no others."""
        return self.recipes.get(configuration_key(configuration), configuration)

    @cached_property
    def search(self) -> tuple[Trial, ...]:
        """Trials that the search may learn and choose from, each with its canonical configuration."""
        found = []
        for trial in self.trials:
            if trial.purpose == "search":
                found.append(trial)
            elif trial.purpose == "baseline" or (trial.purpose == "confirmation" and self._has_informed(trial)):
                configuration = self.canonical(trial.configuration)
                if trial.purpose == "confirmation" or configuration_key(trial.configuration) in self.recipes:
                    found.append(trial.model_copy(update={"configuration": configuration}))
        return tuple(found)

    @cached_property
    def in_space(self) -> tuple[Trial, ...]:
        """The search's trials within the search space, each with all searched hyperparameters.

        A strategy may also train what lies outside; a model over the space cannot learn from that.
        """
        found = []
        for trial in self.search:
            try:
                self.study.space.encode(trial.configuration)
            except ValueError:
                configuration = searched_configuration(self.study, trial.configuration)
                if configuration is not None:
                    found.append(trial.model_copy(update={"configuration": configuration}))
            else:
                found.append(trial)
        return tuple(found)

    def _has_informed(self, confirmation: Trial) -> bool:
        """Whether the search has gone on since a confirmation ended, and so has learned from it."""
        ended = max((result.committed for result in confirmation.segments), default=math.inf)
        return (
            ended < self._newest_choice and searched_configuration(self.study, confirmation.configuration) is not None
        )

    @cached_property
    def _newest_choice(self) -> int:
        """Rank of the newest commit of a segment that the strategy chose; validations are not its choice."""
        return max(
            (
                result.committed
                for trial in self.trials
                if trial.purpose == "search"
                for result in trial.segments
                if result.segment.suggestion.source != VALIDATION
            ),
            default=0,
        )

    def of_configuration(self, configuration: Configuration) -> tuple[Trial, ...]:
        """The runs of a configuration on the target for search, baselines and comparison, not of random search."""
        wanted, target = self.canonical(configuration), self.study.ladder.target.name
        return tuple(
            trial
            for trial in self.trials
            if trial.model == target
            and trial.purpose != "random-search"
            and self.canonical(trial.configuration) == wanted
        )

    def refuted(self, source: str) -> bool:
        """Whether a run on the target that a source suggested is worse than a recipe there: its knowledge is wrong."""
        return any(self.refutes(trial, source) for trial in self.on_target)

    def refutes(self, trial: Trial, *sources: str) -> bool:
        """Whether a run on the target that one of the sources suggested failed, or is clearly worse than a recipe."""
        if not trial.segments or trial.segments[0].segment.suggestion.source not in sources:
            return False
        if trial.state in (TrialState.STOPPED, TrialState.INFEASIBLE):
            return True
        recipes = [other.final for other in self.on_target if other.purpose == "baseline" and other.final is not None]
        return trial.final is not None and any(_is_worse(trial.final, recipe) for recipe in recipes)

    def judges(self, trial: Trial) -> bool:
        """Whether a run had no part in the choice of a configuration, so that its score is an unbiased judgement."""
        return all(trial.key != other.key for other in self.search)

    def on(self, model: str) -> tuple[Trial, ...]:
        """The search's trials on a model."""
        return tuple(trial for trial in self.search if trial.model == model)

    @cached_property
    def on_target(self) -> tuple[Trial, ...]:
        """The search's trials on the target."""
        return self.on(self.study.ladder.target.name)

    @cached_property
    def known(self) -> frozenset[str]:
        """Keys of the configurations that the search has begun on any model."""
        return frozenset(configuration_key(trial.configuration) for trial in self.search)

    def final(self, configuration: Configuration) -> tuple[Evaluation, ...]:
        """Evaluations at full length on the target that the search has of a configuration, one for each seed."""
        return self._finals.get(frozenset(configuration.items()), ())

    @cached_property
    def _finals(self) -> dict[frozenset[tuple[str, Value]], tuple[Evaluation, ...]]:
        """All of them by configuration: asked for each of 1,000 trials, a look at every trial would take a minute."""
        found: dict[frozenset[tuple[str, Value]], tuple[Evaluation, ...]] = {}
        for trial in self.on_target:
            if trial.final is not None:
                key = frozenset(trial.configuration.items())
                found[key] = (*found.get(key, ()), trial.final)
        return found

    def measured(self, configuration: Configuration) -> dict[str, float]:
        """What the search's full runs of a configuration on the target come to, by metric: see `metrics`."""
        return mean_of([final.training for final in self.final(configuration)])

    def breaks(self, configuration: Configuration) -> bool:
        """Whether a configuration was measured to break a constraint; not as long as it has no full run.

        A run that did not record a metric breaks every limit on it.
        """
        limits = self.study.spec.limits
        return bool(limits and self.final(configuration) and broken(limits, self.measured(configuration)))

    @cached_property
    def finished(self) -> tuple[Trial, ...]:
        """The search's trials that reached the full horizon on the target."""
        return tuple(trial for trial in self.on_target if trial.final is not None)

    @cached_property
    def bases(self) -> dict[str, float]:
        """Held-out scores of the untrained models."""
        return base_scores(self.trials)

    @property
    def committed_seconds(self) -> float:
        """Device-seconds charged to the search, and what running segments should add."""
        return committed_seconds(self.trials)


def _is_worse(one: Evaluation, other: Evaluation) -> bool:
    """Whether a score lies below another one by more than twice what measuring both of them leaves open."""
    return one.score < other.score - 2 * math.hypot(one.standard_error, other.standard_error)


def searched_configuration(study: Study, configuration: Configuration) -> Configuration | None:
    """A configuration within the search space; None if it lies outside (a baseline may)."""
    try:
        searched = study.space.restrict(study.complete(configuration))
        study.space.encode(searched)
    except (SpecError, ValueError):
        return None
    return searched


def recipe_in_space(study: Study, configuration: Configuration) -> Configuration | None:
    """A baseline's searched configuration; None if it lies outside, or sets what the study holds at another value."""
    searched = searched_configuration(study, configuration)
    same = searched is not None and study.complete(searched) == study.complete(configuration)
    return searched if same else None
