"""The joint-fidelity strategy: which configuration to train next, on which model, up to which step.

1. Initial design: Sobol configurations on the smallest proxy up to an early rung, then a few of the best on each larger
   model, so that the difference between sizes can be learned. Capped as a share of the budget.
2. From then on, the knowledge gradient at the target per device-second, over explicit candidates: new configurations,
   known configurations on other models, and continuations of paused trials, which cost only what they add.
3. Recommendation by the posterior mean at the target among all configurations tried.

The paper's own strategy is here too, as `PaperStrategy`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from jfhpo_core.acquisition import TargetKnowledgeGradient, expected_improvement
from jfhpo_core.cost import CostModel
from jfhpo_core.fidelity import progress
from jfhpo_core.strategies import Proposal, Recommendation, fresh_configurations
from jfhpo_core.study import Study, base_scores
from jfhpo_core.surrogate import JointSurrogate, Observations
from jfhpo_core.trial import (
    Configuration,
    Evaluation,
    Outcome,
    Suggestion,
    Trial,
    TrialState,
    committed_seconds,
    configuration_key,
)

MAX_OBSERVATIONS = 400
"""Beyond this, evaluations in the middle of curves are thinned out; the last one of each trial stays."""

EXTENDABLE = (TrialState.PAUSED,)


@dataclass(frozen=True)
class Candidate:
    """A segment that could be trained.

    Attributes:
        start_prompts: What the checkpoint to continue from has consumed; 0 for a new trial.
    """

    configuration: Configuration
    model: str
    start_prompts: int
    stop_prompts: int


def point(study: Study, configuration: Configuration, model: str, prompts: int) -> list[float]:
    """Surrogate input (x, z, t) of a searched configuration."""
    return [
        *(float(value) for value in study.space.encode(configuration)),
        study.ladder.size_coordinate(model),
        progress(study.spec, prompts),
    ]


def searched_configuration(study: Study, trial: Trial) -> Configuration | None:
    """The trial's configuration within the search space; None if it lies outside (a baseline may)."""
    configuration = study.space.restrict(study.complete(trial.configuration))
    try:
        study.space.encode(configuration)
    except ValueError:
        return None
    return configuration


def observe(study: Study, trials: Sequence[Trial]) -> Observations:
    """All evaluations as observations of the gain over the untrained model.

    Stopped trials contribute what was measured up to the stop, nothing beyond: they are censored, not scored. Trials of
    the random-search comparison are left out.
    """
    bases = base_scores(trials)
    rows: list[tuple[list[float], float, float, bool]] = []
    for trial in trials:
        configuration = None if trial.purpose == "random-search" else searched_configuration(study, trial)
        if configuration is None:
            continue
        base = bases.get(trial.model, min(bases.values(), default=0.0))
        trained = [evaluation for evaluation in trial.evaluations if evaluation.step > 0]
        for evaluation in trained:
            inputs = point(study, configuration, trial.model, evaluation.prompts)
            rows.append((inputs, evaluation.score - base, evaluation.standard_error**2, evaluation is trained[-1]))
    if len(rows) > MAX_OBSERVATIONS:
        middle = [row for row in rows if not row[3]]
        kept = max(0, MAX_OBSERVATIONS - (len(rows) - len(middle)))
        chosen = {int(i) for i in np.linspace(0, len(middle) - 1, kept)} if kept else set()
        allowed = {id(row) for index, row in enumerate(middle) if index in chosen}
        rows = [row for row in rows if row[3] or id(row) in allowed]
    width = study.space.dimension + 2
    return Observations(
        torch.tensor([row[0] for row in rows], dtype=torch.double).reshape(-1, width),
        torch.tensor([row[1] for row in rows], dtype=torch.double),
        torch.tensor([row[2] for row in rows], dtype=torch.double),
    )


Fitted = TypeVar("Fitted")

_fitted: dict[str, Any] = {}
"""The model last fitted in this process, by the content it was fitted to: saves repeated fits, changes nothing."""


def _remembered(fit: Callable[[], Fitted], *content: object) -> Fitted:
    """The fitted model for this content, from memory if the last fit was for the same."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    key = digest.hexdigest()
    if key not in _fitted:
        _fitted.clear()
        _fitted[key] = fit()
    model: Fitted = _fitted[key]
    return model


def fit_surrogate(study: Study, observations: Observations) -> JointSurrogate:
    """The surrogate fitted to observations: a pure function of them, remembered for the next call."""
    shifting = study.space.shifting_coordinates
    return _remembered(
        lambda: JointSurrogate(observations, shifting).fit(),
        "joint",
        observations.inputs,
        observations.gains,
        observations.variances,
        shifting,
    )


@dataclass(frozen=True)
class Feasibility:
    """Probability that a configuration can be trained on a model at all.

    A kernel-smoothed Beta-Bernoulli estimate: every trial votes with weight exp(-|difference|^2 / 2) over the unit
    cube and log size, the lengths below, against a Beta(9, 1) prior. Without infeasible trials it is close to 1.

    Attributes:
        inputs: (x, z) of finished trials, shape (n, d + 1).
        feasible: 1 or 0, shape (n,).
    """

    inputs: Tensor
    feasible: Tensor
    cube_length: ClassVar[float] = 0.2
    size_length: ClassVar[float] = 0.5
    prior_feasible: ClassVar[float] = 0.9
    prior_weight: ClassVar[float] = 0.5

    @classmethod
    def fit(cls, study: Study, trials: Sequence[Trial]) -> Feasibility:
        """From the trials that have a verdict."""
        rows, labels = [], []
        for trial in trials:
            configuration = searched_configuration(study, trial)
            if configuration is not None and trial.segments and trial.state is not TrialState.LOST:
                rows.append(point(study, configuration, trial.model, 0)[:-1])
                labels.append(float(trial.state is not TrialState.INFEASIBLE))
        width = study.space.dimension + 1
        return cls(torch.tensor(rows, dtype=torch.double).reshape(-1, width), torch.tensor(labels, dtype=torch.double))

    def probability(self, inputs: Tensor) -> Tensor:
        """For inputs (x, z, t) of shape (m, d + 2), shape (m,)."""
        if not len(self.feasible) or bool((self.feasible == 1).all()):
            return torch.ones(len(inputs), dtype=torch.double)
        lengths = torch.full((inputs.shape[-1] - 1,), self.cube_length, dtype=torch.double)
        lengths[-1] = self.size_length
        squared = torch.cdist(inputs[:, :-1] / lengths, self.inputs / lengths).square()
        weights = torch.exp(-squared / 2)
        prior = self.prior_weight * self.prior_feasible
        return (prior + weights @ self.feasible) / (self.prior_weight + weights.sum(-1))


@dataclass(frozen=True)
class JointFidelity:
    """The strategy `jfhpo`.

    Attributes:
        initial_trials: Sobol configurations in the initial design; None: one more than the space has coordinates.
        anchors: Configurations of the initial design that are also trained on each larger model.
        fresh: New Sobol configurations among the candidates of each suggestion.
        local: New configurations near the best known ones among the candidates.
        known: Best known configurations that are candidates for models they have not seen.
        target_share: Of what the search has spent, at least this share goes to the target once the initial design is
            complete: a guard against a cheap proxy that the model trusts too much.
    """

    name: ClassVar[str] = "jfhpo"
    initial_trials: int | None = None
    anchors: int = 1
    fresh: int = 32
    local: int = 32
    known: int = 8
    target_share: float = 0.3

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        costs = CostModel.fit(study, trials)
        initial = self._initial(study, trials, costs)
        if initial is not None:
            return initial
        observations = observe(study, trials)
        if not len(observations.gains):
            return self._first(study, trials, costs, "no trial has been evaluated yet")
        surrogate = fit_surrogate(study, observations)
        random = np.random.default_rng(seed)
        ranked = self._ranked(study, trials, surrogate)
        candidates = self._candidates(study, trials, ranked, random)
        priced = [(item, self._cost(costs, item)) for item in candidates]
        priced = [(item, cost) for item, cost in priced if cost <= remaining_seconds]
        if not priced:
            return None
        due = self._target_is_due(study, trials)
        on_target = [(item, cost) for item, cost in priced if item.model == study.ladder.target.name]
        if due and on_target:
            priced = on_target
        candidates = [item for item, _ in priced]
        inputs = torch.tensor(
            [point(study, item.configuration, item.model, item.stop_prompts) for item in candidates],
            dtype=torch.double,
        )
        targets = self._targets(study, candidates, ranked)
        acquisition = TargetKnowledgeGradient(
            surrogate, targets, measurement_variance(study, trials), running_points(study, trials)
        )
        feasible = Feasibility.fit(study, trials).probability(inputs)
        gains = acquisition(inputs.unsqueeze(-2)) * feasible
        seconds = torch.tensor([cost for _, cost in priced], dtype=torch.double)
        best = int((gains / seconds).argmax())
        chosen = candidates[best]
        verb = "continue" if chosen.start_prompts else "train"
        gain, cost = float(gains[best]), float(seconds[best])
        return Proposal(
            chosen.configuration,
            chosen.model,
            chosen.stop_prompts,
            Suggestion(
                source="jfhpo/knowledge-gradient",
                explanation=f"{verb} on {chosen.model} to {progress(study.spec, chosen.stop_prompts):.0%}: "
                f"should raise the best expected target score by {gain:.4f} for {cost:.1f} device-seconds, "
                f"the most per second of {len(candidates)} candidates"
                f"{' on the target, which was due' if due and on_target else ''}",
                expected_gain=gain,
                expected_cost_seconds=cost,
            ),
        )

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`: by posterior mean at the target among the configurations tried by the search."""
        observations = observe(study, trials)
        if not len(observations.gains):
            return []
        surrogate = fit_surrogate(study, observations)
        base = target_base(study, trials)
        return [
            Recommendation(configuration, base + mean, deviation)
            for configuration, mean, deviation in self._ranked(study, trials, surrogate)
        ]

    def _initial(self, study: Study, trials: Sequence[Trial], costs: CostModel) -> Proposal | None:
        """The next segment of the initial design; None when it is complete or its share of the budget is spent."""
        mine = [trial for trial in trials if trial.purpose == "search"]
        cap = study.spec.budget.initial_share * study.spec.budget.device_seconds
        spent = sum(trial.charge_seconds for trial in mine)
        if mine and spent > cap:
            return None
        wanted = self.initial_trials if self.initial_trials is not None else study.space.dimension + 1
        smallest, *larger = study.ladder.models
        designed = [trial for trial in mine if trial.model == smallest.name]
        if len(designed) < wanted:
            first = self._first(study, trials, costs, f"initial design, {len(designed) + 1} of {wanted}")
            if first is not None:
                return first
        for model in larger:
            anchored = [trial for trial in mine if trial.model == model.name]
            if len(anchored) >= self.anchors:
                continue
            level = study.spec.fidelity.levels[len(study.spec.fidelity.levels) // 2]
            known = {configuration_key(trial.configuration) for trial in anchored}
            scored = [
                (trial.evaluations[-1].score, -trial.number, trial.configuration)
                for trial in designed
                if trial.evaluations
                and trial.state in EXTENDABLE
                and configuration_key(trial.configuration) not in known
            ]
            if not scored:
                continue
            configuration = max(scored, key=lambda item: item[:2])[2]
            return self._propose(
                costs,
                Candidate(configuration, model.name, 0, level),
                "jfhpo/initial-design",
                f"anchor: the best of the initial design on {model.name}, to learn how sizes differ",
            )
        return None

    def _target_is_due(self, study: Study, trials: Sequence[Trial]) -> bool:
        """Whether the target has had less than its share of what the search has spent, running segments included."""
        mine = [trial for trial in trials if trial.purpose == "search"]
        on_target = [trial for trial in mine if trial.model == study.ladder.target.name]
        return committed_seconds(on_target) < self.target_share * committed_seconds(mine)

    def _first(self, study: Study, trials: Sequence[Trial], costs: CostModel, why: str) -> Proposal | None:
        """The next Sobol configuration on the smallest model up to the first rung; None if the space has run out."""
        fresh = fresh_configurations(study, trials, study.spec.seeds.search, 1)
        if not fresh:
            return None
        candidate = Candidate(fresh[0], study.ladder.models[0].name, 0, study.spec.fidelity.levels[0])
        return self._propose(costs, candidate, "jfhpo/initial-design", why)

    def _propose(self, costs: CostModel, candidate: Candidate, source: str, why: str) -> Proposal:
        suggestion = Suggestion(source=source, explanation=why, expected_cost_seconds=self._cost(costs, candidate))
        return Proposal(candidate.configuration, candidate.model, candidate.stop_prompts, suggestion)

    @staticmethod
    def _cost(costs: CostModel, item: Candidate) -> float:
        return costs.estimate(item.configuration, item.model, item.start_prompts, item.stop_prompts).seconds

    @staticmethod
    def _ranked(
        study: Study, trials: Sequence[Trial], surrogate: JointSurrogate
    ) -> list[tuple[Configuration, float, float]]:
        """Configurations tried by the search with posterior mean gain and deviation at the target, best first.

        Configurations that a rule stopped or that failed on the target itself are left out.
        """
        target = study.ladder.target.name
        ruined = (TrialState.STOPPED, TrialState.INFEASIBLE)
        tried = {
            configuration_key(trial.configuration): trial.configuration
            for trial in trials
            if trial.purpose == "search" and trial.evaluations
        }
        for trial in trials:
            if trial.model == target and trial.state in ruined:
                tried.pop(configuration_key(trial.configuration), None)
        if not tried:
            return []
        configurations = list(tried.values())
        horizon = study.spec.fidelity.horizon_prompts
        inputs = torch.tensor([point(study, item, target, horizon) for item in configurations], dtype=torch.double)
        means, deviations = surrogate.gain_moments(inputs)
        order = torch.argsort(means, descending=True, stable=True).tolist()
        return [(configurations[i], float(means[i]), float(deviations[i])) for i in order]

    def _candidates(
        self,
        study: Study,
        trials: Sequence[Trial],
        ranked: Sequence[tuple[Configuration, float, float]],
        random: np.random.Generator,
    ) -> list[Candidate]:
        """Continuations of paused trials, known configurations on further models, and new configurations."""
        levels, models = study.spec.fidelity.levels, [model.name for model in study.ladder.models]
        mine = [trial for trial in trials if trial.purpose == "search"]
        candidates: list[Candidate] = []
        for trial in mine:
            if trial.state in EXTENDABLE:
                done = trial.step * trial.prompts_per_step
                candidates += [
                    Candidate(trial.configuration, trial.model, done, level) for level in levels if level > done
                ]
        seen = {(configuration_key(trial.configuration), trial.model) for trial in mine}
        best = [configuration for configuration, _, _ in ranked[: self.known]]
        fresh = fresh_configurations(study, trials, int(random.integers(2**31)), self.fresh)
        fresh += self._neighbours(study, trials, best, random)
        for configuration in (*best, *fresh):
            key = configuration_key(configuration)
            candidates += [
                Candidate(configuration, model, 0, level)
                for model in models
                if (key, model) not in seen
                for level in levels
            ]
        return candidates

    def _neighbours(
        self, study: Study, trials: Sequence[Trial], best: Sequence[Configuration], random: np.random.Generator
    ) -> list[Configuration]:
        """New configurations at random small distances from the best ones, a few coordinates changed at a time."""
        if not best:
            return []
        known = {configuration_key(trial.configuration) for trial in trials}
        found: list[Configuration] = []
        for index in range(4 * self.local):
            centre = study.space.encode(best[index % len(best)])
            scale = 10 ** random.uniform(-2, -0.5)
            changed = random.random(len(centre)) < max(0.3, 1.5 / len(centre))
            moved = np.clip(centre + changed * random.normal(0, scale, len(centre)), 0, 1)
            configuration = study.space.decode(moved)
            key = configuration_key(configuration)
            if key not in known:
                known.add(key)
                found.append(configuration)
            if len(found) == self.local:
                break
        return found

    @staticmethod
    def _targets(
        study: Study, candidates: Iterable[Candidate], ranked: Sequence[tuple[Configuration, float, float]]
    ) -> Tensor:
        """Every configuration in play at (target, full horizon)."""
        configurations = {configuration_key(item): item for item, _, _ in ranked}
        configurations |= {configuration_key(item.configuration): item.configuration for item in candidates}
        target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        rows = [point(study, configuration, target, horizon) for configuration in configurations.values()]
        return torch.tensor(rows, dtype=torch.double)


def target_base(study: Study, trials: Sequence[Trial]) -> float:
    """Score of the untrained target; before it is measured, that of the largest model measured."""
    bases = base_scores(trials)
    names = [model.name for model in study.ladder.models if model.name in bases]
    return bases[names[-1]] if names else 0.0


def measurement_variance(study: Study, trials: Sequence[Trial]) -> float:
    """Variance of an evaluation's score: the mean of those measured so far; a coin's before there is one."""
    evaluations: list[Evaluation] = [
        evaluation for trial in trials for evaluation in trial.evaluations if evaluation.step > 0
    ]
    if not evaluations:
        count = (study.spec.evaluation.prompts or 1000) * study.spec.evaluation.samples_per_prompt
        return 0.25 / count
    return sum(evaluation.standard_error**2 for evaluation in evaluations) / len(evaluations)


def running_points(study: Study, trials: Sequence[Trial]) -> Tensor | None:
    """Where the running segments will be evaluated at their end; None if nothing runs."""
    rows = []
    for trial in trials:
        configuration = searched_configuration(study, trial)
        if trial.open_segment is not None and configuration is not None and trial.purpose != "random-search":
            prompts = trial.open_segment.stop_step * trial.prompts_per_step
            rows.append(point(study, configuration, trial.model, prompts))
    return torch.tensor(rows, dtype=torch.double) if rows else None


@dataclass(frozen=True)
class PaperStrategy:
    """The strategy `paper`: JF-HPO as published (arXiv 2606.03073).

    Every trial runs on one proxy. A Gaussian process over (hyperparameters, steps), without model size, and expected
    improvement per expected cost choose the next configuration and its steps; the best one goes to the target.
    Where the paper is silent: Matern-5/2 with BoTorch's default priors; the incumbent is the best posterior mean of a
    tried configuration at the full horizon; configurations continue from their checkpoints, but the cost in the
    acquisition is that of a fresh training, as in the paper's formula.

    Attributes:
        proxy: Name of the proxy; None: the smallest model.
        initial_trials: Sobol configurations before the model is asked.
        fresh: New configurations among the candidates of each suggestion.
    """

    name: ClassVar[str] = "paper"
    proxy: str | None = None
    initial_trials: int = 8
    fresh: int = 64

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
        model = self._fit(study, mine)
        incumbent = max(mean for _, mean, _ in self._at_horizon(study, mine, model))
        candidates = [
            Candidate(trial.configuration, proxy, trial.step * trial.prompts_per_step, level)
            for trial in mine
            if trial.state in EXTENDABLE
            for level in levels
            if level > trial.step * trial.prompts_per_step
        ]
        candidates += [
            Candidate(configuration, proxy, 0, level)
            for configuration in fresh_configurations(study, trials, seed, self.fresh)
            for level in levels
        ]
        net = [costs.estimate(c.configuration, proxy, c.start_prompts, c.stop_prompts).seconds for c in candidates]
        affordable = [index for index, seconds in enumerate(net) if seconds <= remaining_seconds]
        if not affordable:
            return None
        inputs = torch.tensor(
            [self._input(study, candidates[i].configuration, candidates[i].stop_prompts) for i in affordable],
            dtype=torch.double,
        )
        with torch.no_grad():
            posterior = model.posterior(inputs)
        means, deviations = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1).sqrt()
        fresh_cost = [
            costs.estimate(candidates[i].configuration, proxy, 0, candidates[i].stop_prompts).seconds
            for i in affordable
        ]
        gains = expected_improvement(means, deviations, incumbent)
        best = int((gains / torch.tensor(fresh_cost, dtype=torch.double)).argmax())
        chosen, gain, cost = candidates[affordable[best]], float(gains[best]), net[affordable[best]]
        return Proposal(
            chosen.configuration,
            proxy,
            chosen.stop_prompts,
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
        ranked = sorted(self._at_horizon(study, mine, self._fit(study, mine)), key=lambda item: -item[1])
        return [Recommendation(*item) for item in ranked]

    @staticmethod
    def _input(study: Study, configuration: Configuration, prompts: int) -> list[float]:
        return [*(float(value) for value in study.space.encode(configuration)), progress(study.spec, prompts)]

    def _fit(self, study: Study, trials: Sequence[Trial]) -> SingleTaskGP:
        rows = [
            (self._input(study, trial.configuration, evaluation.prompts), evaluation)
            for trial in trials
            for evaluation in trial.evaluations
            if evaluation.step > 0
        ]
        inputs = torch.tensor([inputs for inputs, _ in rows], dtype=torch.double)
        scores = torch.tensor([[evaluation.score] for _, evaluation in rows], dtype=torch.double)

        def fit() -> SingleTaskGP:
            model = SingleTaskGP(inputs, scores)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            return model

        return _remembered(fit, "paper", inputs, scores)

    def _at_horizon(
        self, study: Study, trials: Sequence[Trial], model: SingleTaskGP
    ) -> list[tuple[Configuration, float, float]]:
        healthy = [
            trial
            for trial in trials
            if trial.evaluations and not any(r.outcome in (Outcome.STOPPED, Outcome.INFEASIBLE) for r in trial.segments)
        ]
        pool = healthy or [trial for trial in trials if trial.evaluations]
        horizon = study.spec.fidelity.horizon_prompts
        inputs = torch.tensor([self._input(study, trial.configuration, horizon) for trial in pool], dtype=torch.double)
        with torch.no_grad():
            posterior = model.posterior(inputs)
        means, deviations = posterior.mean.squeeze(-1).tolist(), posterior.variance.squeeze(-1).sqrt().tolist()
        return [(trial.configuration, mean, sd) for trial, mean, sd in zip(pool, means, deviations, strict=True)]
