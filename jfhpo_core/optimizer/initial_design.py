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


@dataclass(frozen=True)
class InitialDesign:
    """Sobol configurations on the smallest proxy, some to an early rung, and anchors that connect it to larger models.

    A recipe that the study has trained on the target is the best anchor: on a proxy it says how the others compare with
    it. Only without one does the best of the Sobol configurations go up the ladder.

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
        spec, models = study.spec, study.ladder.models
        searched = [trial for trial in history.trials if trial.purpose == "search"]
        left = self.seconds - committed_seconds(searched)
        levels, smallest = spec.fidelity.levels, models[0].name

        def affordable(candidate: Candidate) -> bool:
            cost = costs.estimate(candidate.configuration, candidate.model, 0, candidate.stop_prompts)
            return cost.seconds <= left

        wanted = self.trials if self.trials is not None else study.space.dimension + 1
        designed = [trial for trial in searched if trial.model == smallest]
        if len(designed) < wanted:
            configuration = self._next(history, len(designed))
            if configuration is None:
                return None
            # Every other one runs to half the horizon, as the length of the curves has to be learned, too; and each
            # recipe, by which runs of that length are compared with the target.
            is_long = len(designed) % 2 == 1 or len(designed) < len(history.recipes)
            level = levels[(len(levels) - 1) // 2] if is_long else levels[0]
            candidate = Candidate(configuration, smallest, 0, level, len(history.trials))
            why = f"configuration {len(designed) + 1} of {wanted} of the initial design"
            return (candidate, why) if affordable(candidate) else None
        for model in models[1:] if not history.recipes else ():
            anchored = [trial for trial in history.search if trial.model == model.name]
            if len(anchored) >= self.anchors:
                continue
            is_target = model.name == study.ladder.target.name
            level = levels[-1 if is_target else len(levels) // 2]
            best = self._anchor(designed, {configuration_key(trial.configuration) for trial in anchored})
            if best is None:
                continue
            candidate = Candidate(best, model.name, 0, level, len(history.trials))
            why = f"anchor: the best of the initial design on {model.name}, to learn how sizes differ"
            return (candidate, why) if affordable(candidate) else None
        return None

    def _next(self, history: History, count: int) -> Configuration | None:
        """The recipes first, then Sobol configurations, those before others that are expected to be good."""
        study = history.study
        recipes = list(history.recipes.values())
        if count < len(recipes) and len(study.ladder.models) > 1:
            return recipes[count]
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
