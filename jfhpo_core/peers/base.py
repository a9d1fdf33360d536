"""What the peers share: a study as a library sees it that knows one model, a few rungs, and nothing of checkpoints."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import Proposal, Recommendation, check_model, fresh_configurations
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Suggestion, Trial, TrialState, configuration_key

DRAWS = 32
"""How often a library is asked again when it proposes a configuration that has been tried: a small space runs out."""


@dataclass(frozen=True)
class Choice:
    """What a peer wants to train next: a configuration, from its checkpoint if there is one, up to a rung.

    Attributes:
        after_commit: See `Suggestion.after_commit`.
    """

    configuration: Configuration
    stop_prompts: int
    explanation: str
    after_commit: int | None = None


@dataclass(frozen=True)
class Peer:
    """A strategy that searches on one model of the family.

    Attributes:
        model: The model that trials run on; None: the target. The best of a proxy are validated on the target by the
            search, as for any strategy.
    """

    name: ClassVar[str]
    model: str | None = None

    @abstractmethod
    def choose(self, study: Study, mine: Sequence[Trial], seed: int) -> Choice | None:
        """The next segment; None if there is nothing left to try.

        Args:
            study: The study.
            mine: The search's trials on the peer's model, in order of creation.
            seed: Differs from call to call.
        """

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`; None as soon as the next proposal does not fit into the remaining budget."""
        mine = self.trials(study, trials)
        choice = self.choose(study, mine, seed)
        if choice is None:
            return None
        key = configuration_key(choice.configuration)
        known = next((trial for trial in mine if configuration_key(trial.configuration) == key), None)
        start = known.step * known.prompts_per_step if known is not None else 0
        costs = CostModel.fit(study, trials)
        model = self.trained_model(study)
        cost = costs.estimate(choice.configuration, model, start, choice.stop_prompts).seconds
        if cost > remaining_seconds:
            return None
        suggestion = Suggestion(
            source=self.name,
            explanation=choice.explanation,
            expected_cost_seconds=cost,
            after_commit=choice.after_commit,
        )
        return Proposal(choice.configuration, model, choice.stop_prompts, suggestion)

    def check(self, study: Study) -> None:
        """See `Checked.check`."""
        check_model("model", self.model, study)

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`: by the score at the highest rung reached, highest rungs first.

        Trials on the target stand before those on a proxy; trials that were stopped, failed or lost do not stand.
        """
        target = study.ladder.target.name
        best: dict[str, tuple[tuple[bool, int, float], Recommendation]] = {}
        for trial in trials:
            usable = trial.state in (TrialState.COMPLETED, TrialState.PAUSED, TrialState.RUNNING)
            trained = [evaluation for evaluation in trial.evaluations if evaluation.step > 0]
            if trial.purpose != "search" or not usable or not trained:
                continue
            last = trained[-1]
            order = (trial.model == target, last.prompts, last.score)
            key = configuration_key(trial.configuration)
            if key not in best or order > best[key][0]:
                best[key] = (order, Recommendation(trial.configuration, last.score, last.standard_error))
        return [item for _, item in sorted(best.values(), key=lambda entry: entry[0], reverse=True)]

    def trained_model(self, study: Study) -> str:
        """Name of the model that the peer trains."""
        return self.model or study.ladder.target.name

    def trials(self, study: Study, trials: Sequence[Trial]) -> list[Trial]:
        """The search's trials on the peer's model with the search's training seed, in order of creation."""
        model, seed = self.trained_model(study), study.spec.seeds.training[0]
        mine = [trial for trial in trials if (trial.purpose, trial.model, trial.seed) == ("search", model, seed)]
        return sorted(mine, key=lambda trial: trial.number)


def new_configuration(
    study: Study, mine: Sequence[Trial], draw: Callable[[], Configuration], seed: int
) -> tuple[Configuration, str] | None:
    """A configuration that no trial has, and how it came about; None when the space has run out.

    Args:
        study: The study.
        mine: The peer's trials.
        draw: Asks the library for a configuration.
        seed: For the Sobol sequence that is searched when the library comes up with known ones only.
    """
    known = {configuration_key(trial.configuration) for trial in mine}
    for _ in range(DRAWS):
        configuration = draw()
        if configuration_key(configuration) not in known:
            return configuration, "new configuration"
    fresh = fresh_configurations(study, mine, seed, 1)
    return (fresh[0], f"Sobol configuration: the library's {DRAWS} proposals were all known") if fresh else None


def ladder(levels: Sequence[int], eta: float) -> tuple[int, ...]:
    """The rungs that fit a halving by `eta`: of the study's levels those nearest to horizon / eta^k, ascending.

    Neighbouring rungs lie at least a factor of sqrt(eta) apart.

    >>> ladder((64, 128, 192, 256, 320, 384, 448, 512, 576), 3)
    (64, 192, 576)
    """
    chosen = [levels[-1]]
    while below := [level for level in levels if level * math.sqrt(eta) <= chosen[-1]]:
        wanted = levels[-1] / eta ** len(chosen)
        chosen.append(min(below, key=lambda level: abs(math.log(level / wanted))))
    return tuple(reversed(chosen))


def top_budget(rungs: int, eta: int) -> float:
    """Budget of the last rung for libraries that space rungs by exact powers of `eta`, the first being 1.

    A little more than the power, because they count rungs by the floor of a quotient of logarithms.
    """
    return float(eta ** (rungs - 1)) * (1 + 1e-9)


def rung_of(budget: float, eta: int) -> int:
    """Position of the rung that a budget means: see `top_budget`.

    >>> [rung_of(top_budget(4, 3) / 3**k, 3) for k in (3, 2, 1, 0)]
    [0, 1, 2, 3]
    """
    return round(math.log(budget, eta))


def score_at(trial: Trial, prompts: int) -> float | None:
    """Held-out score at a rung, if the trial was evaluated there."""
    return next((evaluation.score for evaluation in trial.evaluations if evaluation.prompts == prompts), None)


def last_score(trial: Trial) -> float | None:
    """The newest held-out score after training."""
    trained = [evaluation.score for evaluation in trial.evaluations if evaluation.step > 0]
    return trained[-1] if trained else None
