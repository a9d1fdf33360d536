"""The strategy `paper`: JF-HPO as published, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from jfhpo_core.optimizer.acquisition import expected_improvement
from jfhpo_core.optimizer.candidates import Expectation
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.observations import Row, milestone, observe, point, scale_of, thinned, trained_evaluations
from jfhpo_core.optimizer.score_scale import ScoreScale
from jfhpo_core.optimizer.strategy import Positive, Proposal, Recommendation, check_model, fresh_configurations
from jfhpo_core.optimizer.surrogate import THIS_STUDY, JointStructure, JointSurrogate, fitted_surrogate
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Outcome, Suggestion, Trial


@dataclass(frozen=True)
class PaperStrategy:
    """The strategy `paper`: JF-HPO as published (arXiv 2606.03073).

    Every trial runs on one proxy. A Gaussian process over (hyperparameters, steps), without model size, and expected
    improvement per expected cost choose the next configuration and its steps; the best one goes to the target.
    Where the paper is silent: our surrogate without its size terms and without an ensemble; the incumbent is the best
    posterior mean of a tried configuration at the full horizon; configurations continue from their checkpoints, but
    the cost in the acquisition is that of a fresh training, as in the paper's formula.

    Attributes:
        proxy: Name of the proxy; None: the smallest model.
        initial_trials: Sobol configurations before the model is asked.
        fresh: New configurations among the candidates of each suggestion.
    """

    name: ClassVar[str] = "paper"
    proxy: str | None = None
    initial_trials: Positive = 8
    fresh: Positive = 64

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        costs = CostModel.fit(study, trials)
        proxy, levels = self.proxy or study.ladder.models[0].name, study.spec.fidelity.levels
        mine = [trial for trial in trials if trial.purpose == "search" and trial.model == proxy]
        if len(mine) < self.initial_trials or not any(trial.evaluations for trial in mine):
            first = fresh_configurations(study, trials, study.spec.seeds.search, 1)
            level = levels[len(mine) % len(levels)]
            cost = costs.estimate(first[0], proxy, 0, level).seconds if first else 0.0
            suggestion = Suggestion(
                source="paper/initial-design", explanation="Sobol configuration", expected_cost_seconds=cost
            )
            return Proposal(first[0], proxy, level, suggestion) if first and cost <= remaining_seconds else None
        model, scale = self._fit(study, mine)
        incumbent = max(item.mean for item in self._at_horizon(study, mine, model))
        candidates = [
            (trial.configuration, trial.kept_prompts, level)
            for trial in mine
            if trial.is_extendable
            for level in levels
            if level > trial.kept_prompts
        ]
        candidates += [
            (configuration, 0, level)
            for configuration in fresh_configurations(study, trials, seed, self.fresh)
            for level in levels
        ]
        net = [costs.estimate(item, proxy, start, stop).seconds for item, start, stop in candidates]
        affordable = [index for index, seconds in enumerate(net) if seconds <= remaining_seconds]
        if not affordable:
            return None
        inputs = torch.tensor(
            [point(study, candidates[i][0], proxy, candidates[i][2]) for i in affordable], dtype=torch.double
        )
        means, deviations = model.mean_and_deviation(inputs)
        fresh_cost = [costs.estimate(candidates[i][0], proxy, 0, candidates[i][2]).seconds for i in affordable]
        gains = expected_improvement(means, deviations, incumbent)
        best = int((gains / torch.tensor(fresh_cost, dtype=torch.double)).argmax())
        (configuration, _, level), cost = candidates[affordable[best]], net[affordable[best]]
        gain = float(gains[best]) * scale.unit((THIS_STUDY, study.ladder.size_coordinate(proxy), 1.0))
        return Proposal(
            configuration,
            proxy,
            level,
            Suggestion(
                source="paper/expected-improvement",
                explanation=f"expected improvement {gain:.4f} on {proxy} per {fresh_cost[best]:.1f} device-seconds",
                expected_gain=gain,
                expected_cost_seconds=cost,
            ),
        )

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`: by the proxy's posterior mean at the full horizon, taken for the target's."""
        proxy = self.proxy or study.ladder.models[0].name
        mine = [trial for trial in trials if trial.purpose == "search" and trial.model == proxy and trial.evaluations]
        if not mine:
            return []
        model, scale = self._fit(study, mine)
        group = (THIS_STUDY, study.ladder.size_coordinate(proxy), 1.0)
        ranked = sorted(self._at_horizon(study, mine, model), key=lambda item: -item.mean)
        return [
            Recommendation(item.configuration, *scale.median_and_deviation(group, item.mean, item.deviation))
            for item in ranked
        ]

    def check(self, study: Study) -> None:
        """See `Checked.check`."""
        check_model("proxy", self.proxy, study)

    @staticmethod
    def _fit(study: Study, trials: Sequence[Trial]) -> tuple[JointSurrogate, ScoreScale]:
        """A Gaussian process over hyperparameters and progress, of the scores of one model.

        The joint surrogate does for it: with a single size its size terms vanish, and without draws it is one GP.
        """
        commits = max(result.committed for trial in trials for result in trial.segments)
        rows = _rows(study, trials)
        basis = [row for row in rows if row.order[0] <= milestone(commits)] or rows
        d = study.space.dimension
        scale = scale_of(rows)
        known, fitted = observe(rows, scale, d), observe(basis, scale_of(basis), d)
        return fitted_surrogate(known, fitted, JointStructure(d, ()), draws=1), scale

    def _at_horizon(self, study: Study, trials: Sequence[Trial], model: JointSurrogate) -> list[Expectation]:
        healthy = [
            trial
            for trial in trials
            if trial.evaluations and not any(r.outcome in (Outcome.STOPPED, Outcome.INFEASIBLE) for r in trial.segments)
        ]
        pool = healthy or [trial for trial in trials if trial.evaluations]
        horizon = study.spec.fidelity.horizon_prompts
        inputs = torch.tensor(
            [point(study, trial.configuration, trial.model, horizon) for trial in pool], dtype=torch.double
        )
        means, deviations = (values.tolist() for values in model.mean_and_deviation(inputs))
        return [
            Expectation(trial.configuration, mean, sd, mean, None)
            for trial, mean, sd in zip(pool, means, deviations, strict=True)
        ]


def _rows(study: Study, trials: Sequence[Trial]) -> list[Row]:
    """The scores themselves, of stopped runs too; long curves are thinned."""
    rows = []
    for trial in trials:
        curve = thinned(trained_evaluations(trial))
        for evaluation in curve:
            committed = next(result.committed for result in trial.segments if evaluation in result.evaluations)
            rows.append(
                Row(
                    tuple(point(study, trial.configuration, trial.model, evaluation.prompts, trial.number)),
                    evaluation.score,
                    evaluation.standard_error**2,
                    (committed, trial.number, evaluation.step),
                    last=evaluation is curve[-1],
                )
            )
    return sorted(rows, key=lambda row: row.order)
