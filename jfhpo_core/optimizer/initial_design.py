"""What is trained before the model is asked: enough for it to have something to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jfhpo_core.optimizer.candidates import Candidate
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.study.history import History
from jfhpo_core.study.space import Space
from jfhpo_core.study.trial import Configuration, Trial, TrialState, committed_seconds, configuration_key

SOURCE = "jfhpo/initial-design"
"""Source of what the initial design suggests."""


@dataclass(frozen=True)
class InitialDesign:
    """Sobol configurations on the smallest proxy, some to an early rung, and anchors that connect it to larger models.

    A recipe that the study has trained on the target is the best anchor: on a proxy it says how the others compare with
    it. Only without one does the best of the Sobol configurations go up the ladder. Where proxies are hardly cheaper
    than the target, the design is made on the target instead, to the first rung.

    Attributes:
        trials: Sobol configurations; None: one more than the space has coordinates.
        choice: Sobol points of which the one nearest to what is expected is taken, if there are any.
        anchors: Configurations that are trained on each larger model if there is no recipe.
        seconds: Device-seconds that it may take.
        expectations: The search space, with what is expected of its hyperparameters.
    """

    trials: int | None
    choice: int
    anchors: int
    seconds: float
    expectations: Space

    def following(self, history: History, costs: CostModel) -> tuple[Candidate, str] | None:
        """The next segment and why; None once the design is complete or its seconds are spent."""
        study = history.study
        levels, smallest = study.spec.fidelity.levels, study.ladder.models[0].name
        target = study.ladder.target.name
        short, long = levels[0], levels[(len(levels) - 1) // 2]
        searched = [trial for trial in history.trials if trial.purpose == "search"]
        left = self.seconds - committed_seconds(searched)

        def seconds(configuration: Configuration, model: str, stop: int) -> float:
            return costs.estimate(configuration, model, 0, stop).seconds

        def offered(configuration: Configuration, model: str, stop: int, why: str) -> tuple[Candidate, str] | None:
            candidate = Candidate(configuration, model, 0, stop, len(history.trials))
            return (candidate, why) if seconds(configuration, model, stop) <= left else None

        # The first rung of the target itself says more than runs of a proxy, unless these are cheaper: which may show
        # when the first one has been timed.
        middle = study.space.middle()
        proxy = (seconds(middle, smallest, short) + seconds(middle, smallest, long)) / 2
        begun = any(trial.model == target and _is_designed(trial) for trial in searched)
        at_once = begun or seconds(middle, target, short) <= proxy
        model = target if at_once else smallest
        designed = [trial for trial in searched if trial.model == model]
        wanted = self.trials if self.trials is not None else study.space.dimension + 1
        if len(designed) < wanted:
            recipes = [] if at_once else list(history.recipes.values())
            configuration = self._next(history, recipes[len(designed) :])
            if configuration is None:
                return None
            # Every other one runs to half the horizon, as the length of the curves has to be learned, too; and each
            # recipe, by which runs of that length are compared with the target.
            is_long = not at_once and (len(designed) % 2 == 1 or len(designed) < len(recipes))
            why = f"configuration {len(designed) + 1} of {wanted} of the initial design"
            return offered(configuration, model, long if is_long else short, why)
        for model in (item.name for item in study.ladder.models[1:] if not history.recipes and not at_once):
            anchored = [trial for trial in history.search if trial.model == model]
            if len(anchored) >= self.anchors:
                continue
            best = self._anchor(designed, {configuration_key(trial.configuration) for trial in anchored})
            if best is None:
                continue
            level = levels[-1 if model == target else len(levels) // 2]
            why = f"anchor: the best of the initial design on {model}, to learn how sizes differ"
            return offered(best, model, level, why)
        return None

    def _next(self, history: History, recipes: Sequence[Configuration]) -> Configuration | None:
        """The recipes first, then Sobol configurations, those before others that are expected to be good."""
        study = history.study
        if recipes and len(study.ladder.models) > 1:
            return recipes[0]
        fresh = fresh_configurations(study, history.search, study.spec.seeds.search, self.choice)
        if not fresh:
            return None
        near = self.expectations.log_expectation(np.array([study.space.encode(item) for item in fresh]))
        return fresh[int(np.argmax(near))]

    @staticmethod
    def _anchor(designed: Sequence[Trial], known: set[str]) -> Configuration | None:
        scored = [
            (trial.evaluations[-1].score, -trial.number, trial.configuration)
            for trial in designed
            if trial.evaluations
            and (trial.is_extendable or trial.state is TrialState.COMPLETED)
            and configuration_key(trial.configuration) not in known
        ]
        return max(scored, key=lambda item: item[:2])[2] if scored else None


def _is_designed(trial: Trial) -> bool:
    """Whether the initial design has suggested a trial."""
    segment = trial.segments[0].segment if trial.segments else trial.open_segment
    return segment is not None and segment.suggestion.source == SOURCE
