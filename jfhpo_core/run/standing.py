"""How a study stands: the strategy's ranking of what was tried, and what is recommended by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from jfhpo_core.optimizer.strategy import Recommendation, Strategy
from jfhpo_core.stopping.rules import ZeroReward
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import VALIDATION, Trial, TrialState, configuration_key

REWARDLESS_AFTER = 8
"""So many runs without any reward, one of them on the target, show that there is nothing to learn from. Each of them
has scored hundreds of completions or more."""


def runs_without_reward(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Runs of which no completion had a reward, in training or on the held-out set; none once any other run had one.

    Runs from before a change of data, reward or models that was accepted tell nothing.
    """
    if any(evaluation.score != 0 or evaluation.rewarded for trial in trials for evaluation in trial.evaluations):
        return []
    return [trial for trial in trials if _had_no_reward(trial) and set(study.changed) <= set(trial.changed)]


def is_rewardless(study: Study, without_reward: Sequence[Trial]) -> bool:
    """Whether a search has nothing to learn from: many runs without reward, also on the target."""
    return len(without_reward) >= REWARDLESS_AFTER and any(
        trial.model == study.ladder.target.name for trial in without_reward
    )


def _had_no_reward(trial: Trial) -> bool:
    """Whether a run that has no reward in its evaluations is known to have had none in training either."""
    if trial.decision is not None and trial.decision.rule == ZeroReward.name:
        return True
    trained = [evaluation for evaluation in trial.evaluations if evaluation.step > 0]
    return bool(trained) and all(evaluation.rewarded is False for evaluation in trained)


def first_seed_on_target(history: History) -> dict[str, Trial]:
    """The search's trials on the target with the first training seed, recipes among them, by configuration key."""
    seed = history.study.spec.seeds.training[0]
    return {configuration_key(trial.configuration): trial for trial in history.on_target if trial.seed == seed}


@dataclass(frozen=True)
class Standing:
    """How a study stands: its history and what follows from the strategy's ranking, each worked out once."""

    history: History
    strategy: Strategy

    @cached_property
    def ranked(self) -> list[Recommendation]:
        """See `rank`."""
        history = self.history
        informing = {trial.key for trial in history.search}
        ranked = self.strategy.rank(
            history.study,
            [trial for trial in history.trials if trial.purpose in ("search", "baseline") or trial.key in informing],
        )
        known = {configuration_key(item.configuration) for item in ranked}
        for recipe in history.recipes.values():
            finals = history.final(recipe)
            if finals and configuration_key(recipe) not in known:
                score = fmean(final.score for final in finals)
                error = math.sqrt(sum(final.standard_error**2 for final in finals)) / len(finals)
                place = next((index for index, item in enumerate(ranked) if item.mean < score), len(ranked))
                ranked.insert(place, Recommendation(recipe, score, error))
        # Whatever the strategy knows of constraints: what was measured to break one comes last.
        return sorted(ranked, key=lambda item: history.breaks(item.configuration))

    @cached_property
    def recommended(self) -> Recommendation | None:
        """See `recommend`."""
        finished = {configuration_key(trial.configuration) for trial in self.history.finished}
        return next(
            (
                item
                for item in self.ranked
                if configuration_key(item.configuration) in finished and not self.history.breaks(item.configuration)
            ),
            None,
        )

    @cached_property
    def finalists(self) -> list[tuple[Recommendation, Trial | None]]:
        """The best-ranked configurations, as many as are validated, and what was trained of them on the target.

        Those that a rule stopped, that failed or that broke a constraint on the target are passed over. The list ends
        with the first one that the search itself has completed there: what is ranked below would not be recommended.
        """
        on_target = first_seed_on_target(self.history)
        ranked = ((item, on_target.get(configuration_key(item.configuration))) for item in self.ranked)
        ruined = (TrialState.STOPPED, TrialState.INFEASIBLE)
        left = [
            (item, known)
            for item, known in ranked
            if (known is None or known.state not in ruined) and not self.history.breaks(item.configuration)
        ]
        needed = next((index + 1 for index, (_, known) in enumerate(left) if _is_completed_by_search(known)), len(left))
        return left[: min(self.history.study.spec.budget.top_k, needed)]


def _is_completed_by_search(trial: Trial | None) -> bool:
    """Whether a run reached its full length before the validation, which must not depend on the order of its runs."""
    return trial is not None and trial.final is not None and trial.segments[-1].segment.suggestion.source != VALIDATION


def recommend(study: Study, strategy: Strategy, trials: Sequence[Trial]) -> Recommendation | None:
    """The best-ranked configuration, recipes among them, whose run on the target is complete; None if there is none.

    With constraints: of those that respect them, as measured.
    """
    return Standing(History.of(study, trials), strategy).recommended


def rank(study: Study, strategy: Strategy, trials: Sequence[Trial]) -> list[Recommendation]:
    """The strategy's ranking without what only judges it (see `History`).

    A recipe that the strategy itself does not rank has its place by its measured score.
    """
    return Standing(History.of(study, trials), strategy).ranked
