"""The joint-fidelity strategy: which configuration to train next, on which model, up to which step.

1. Initial design: Sobol configurations on the smallest proxy up to an early rung, then a few of the best on each larger
   model, so that the difference between sizes can be learned. Capped as a share of the budget.
2. From then on, the knowledge gradient at the target per device-second, over explicit candidates: new configurations,
   known configurations on other models, and continuations of paused trials, which cost only what they add.
3. Recommendation by the posterior mean at the target. Untried configurations of which the model expects more than of
   all tried ones may lead the ranking; nothing is recommended before validation has trained it to full length.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from linear_operator.utils.errors import NanError, NotPSDError
from scipy.stats import qmc
from threadpoolctl import threadpool_limits
from torch import Tensor

from jfhpo_core.optimizer.acquisition import NetCostUtility, TargetKnowledgeGradient, expected_improvement
from jfhpo_core.optimizer.cost import CostEstimate, CostModel
from jfhpo_core.optimizer.feasibility import Feasibility
from jfhpo_core.optimizer.floors import gain_floors
from jfhpo_core.optimizer.observations import (
    as_of,
    measurement_variance,
    milestone,
    observe,
    point,
    running_points,
    target_base,
    verdicts,
)
from jfhpo_core.optimizer.strategy import (
    Admits,
    Count,
    Positive,
    Proposal,
    RandomSearch,
    Recommendation,
    Share,
    fresh_configurations,
)
from jfhpo_core.optimizer.surrogate import FIDELITY_COLUMNS, THIS_STUDY, JointSurrogate, fitted_surrogate
from jfhpo_core.stopping.rules import Unpromising, build_rules
from jfhpo_core.study.models import progress
from jfhpo_core.study.resolved import Study, base_scores
from jfhpo_core.study.space import Vector
from jfhpo_core.study.trial import Configuration, Suggestion, Trial, TrialState, committed_seconds, configuration_key

logger = logging.getLogger(__name__)

CANDIDATE_LEVELS = 4
"""Rungs at which each candidate is considered: its next ones thinned to this many, the full horizon among them."""

NUMERICAL_ERRORS = (NanError, NotPSDError, RuntimeError)


@dataclass(frozen=True)
class Candidate:
    """A segment that could be trained.

    Attributes:
        start_prompts: What the checkpoint to continue from has consumed; 0 for a new trial.
        trial: Number of the trial that it continues or would be.
        seed: Training seed; None: the first of the study's.
    """

    configuration: Configuration
    model: str
    start_prompts: int
    stop_prompts: int
    trial: int
    seed: int | None = None


@dataclass(frozen=True)
class Beliefs:
    """Everything that the trials so far say: the surrogate, the feasibility, and what follows for the target.

    Attributes:
        surrogate: Of the gain.
        feasibility: None as long as nothing has failed.
    """

    study: Study
    surrogate: JointSurrogate
    feasibility: Feasibility | None

    @classmethod
    def form(cls, study: Study, trials: Sequence[Trial]) -> Beliefs | None:
        """From the trials alone; None if nothing has been evaluated. The last ones formed are remembered."""
        # What is running says nothing yet, and beginning a segment must not cost a new model.
        known = [
            trial if trial.open_segment is None else trial.model_copy(update={"open_segment": None})
            for trial in trials
            if trial.segments
        ]
        if not _formed or _formed[0][0] is not study or _formed[0][1] != known:
            _formed[:] = [(study, known, cls._form(study, known))]
        return _formed[0][2]

    @classmethod
    def _form(cls, study: Study, trials: Sequence[Trial]) -> Beliefs | None:
        observations = observe(study, trials)
        if not len(observations):
            return None
        commits = max((result.committed for trial in trials for result in trial.segments), default=0)
        basis = observe(study, as_of(trials, milestone(commits)))
        surrogate = fitted_surrogate(
            observations, basis if len(basis) else observations, study.space.dimension, study.space.shifting_coordinates
        )
        inputs, feasible = verdicts(study, trials)
        ruined = bool((feasible == 0).any())
        return cls(study, surrogate, Feasibility.fit(inputs, feasible) if ruined else None)

    def probability(self, inputs: Tensor) -> Tensor:
        """P(feasible) at inputs (m, d + 4), shape (m,)."""
        if self.feasibility is None:
            return torch.ones(len(inputs), dtype=inputs.dtype)
        return self.feasibility.probability(inputs[:, : -FIDELITY_COLUMNS + 1])

    def at_target(self, configurations: Iterable[Configuration]) -> Tensor:
        """Inputs of configurations at (target, full horizon), shape (m, d + 4)."""
        name, horizon = self.study.ladder.target.name, self.study.spec.fidelity.horizon_prompts
        rows = [point(self.study, configuration, name, horizon) for configuration in configurations]
        return torch.tensor(rows, dtype=torch.double).reshape(-1, self.study.space.dimension + FIDELITY_COLUMNS)

    @cached_property
    def inflation(self) -> float:
        """Factor on posterior deviations at the target; see `calibration.inflation`."""
        return self.surrogate.moments().inflation()

    def gains(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and calibrated deviation of the gain at the target, if feasible; each of shape (m,)."""
        means, deviations = self.surrogate.gain_moments(inputs)
        return means, deviations * self.inflation

    def expected(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Expected gain (a failed training gains nothing) and the gain's deviation if feasible; each of shape (m,)."""
        means, deviations = self.gains(inputs)
        return self.probability(inputs) * means, deviations


_formed: list[tuple[Study, list[Trial], Beliefs | None]] = []
"""What was last believed in this process, and from which trials: the search asks twice. Saves time, changes nothing."""


@dataclass(frozen=True)
class JointFidelity:
    """The strategy `jfhpo`.

    Attributes:
        initial_trials: Sobol configurations in the initial design; None: one more than the space has coordinates.
        choice: Sobol points of which the initial design takes the one nearest to the user's expectations, if there are
            any.
        expectation_trials: Trials after which the user's expectations begin to fade.
        anchors: Configurations of the initial design that are also trained on each larger model.
        pool: New Sobol configurations from which candidates are picked by what the model expects of them.
        fresh: Candidates picked from the pool.
        local: Candidates picked from the neighbourhood of the best ones.
        known: Best known configurations that are candidates for models they have not seen.
        continued: Best known configurations whose paused trainings are candidates for continuation.
        replicated: Of the best configurations, so many may get a further training seed on the target.
        untried: At most so many configurations that no trial has are ranked above the tried ones, where the model
            expects more of them; validation trains them.
        stop_gain: The search ends early when the best candidate, scaled to the cost of a full training on the target,
            is expected to raise the final score by less than this. 0: it spends its budget. The knowledge gradient sees
            one step ahead and is an underestimate: at 0.0005 half of the searches of a benchmark ended too early.
        target_share: Of what the search has spent, at least this share goes to the target once the initial design is
            complete: a guard against a cheap proxy that the model trusts too much. With a half, the search costs at
            most twice what its trainings on the target cost. The share grows to that of the target's variance which
            the largest proxy does not explain.
        patience_seconds: Wall-clock cap of a suggestion. Once it is exceeded the next cheaper way of choosing is
            taken; which one chose is in the suggestion's source.
    """

    name: ClassVar[str] = "jfhpo"
    initial_trials: Positive | None = None
    choice: Positive = 8
    expectation_trials: Positive = 10
    anchors: Count = 1
    pool: Positive = 512
    fresh: Positive = 24
    local: Count = 24
    known: Count = 8
    continued: Count = 24
    replicated: Count = 4
    untried: Count = 3
    stop_gain: float = 0.0
    target_share: Share = 0.5
    patience_seconds: float = 60.0

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        proposal: Proposal | None = self.suggest_among(study, trials, remaining_seconds, seed, lambda *_: True)
        return proposal

    @threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]  # on small matrices threads wait for each other
    def suggest_among(
        self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int, admits: Admits
    ) -> Proposal | None:
        """See `Selective.suggest_among`."""
        began = time.monotonic()
        costs = CostModel.fit(study, trials)
        initial = self._initial(study, trials, costs)
        if initial is not None:
            return initial if admits(initial.model, initial.suggestion.expected_cost_seconds or 0.0) else None
        try:
            beliefs = Beliefs.form(study, trials)
        except NUMERICAL_ERRORS as error:
            return self._sobol(study, trials, costs, remaining_seconds, f"the surrogate could not be fitted ({error})")
        if beliefs is None:
            return self._sobol(study, trials, costs, remaining_seconds, "no trial has been evaluated yet")
        random = np.random.default_rng(seed)
        ranked = self._ranked(trials, beliefs)
        candidates = self._candidates(study, trials, beliefs, ranked, random)
        # What might not fit is not begun: it would be paid with what is held back to finish the best.
        estimates = [(item, self._estimate(costs, item)) for item in candidates]
        priced = [(item, estimate.seconds) for item, estimate in estimates if estimate.high <= remaining_seconds]
        priced = [(item, cost) for item, cost in priced if admits(item.model, cost)]
        if not priced:
            return None
        share = self._wanted_share(beliefs)
        on_target = [(item, cost) for item, cost in priced if item.model == study.ladder.target.name]
        due = bool(on_target) and self._target_is_due(study, trials, share)
        if due:
            priced = on_target
        candidates = [item for item, _ in priced]
        seconds = torch.tensor([cost for _, cost in priced], dtype=torch.double)
        inputs = _inputs(study, candidates)
        configurations = {configuration_key(item): item for item, _, _ in ranked}
        configurations |= {configuration_key(item.configuration): item.configuration for item in candidates}
        targets = beliefs.at_target(configurations.values())
        source, gains = "knowledge-gradient", None
        if time.monotonic() - began < self.patience_seconds:
            gains = self._knowledge_gradient(study, trials, beliefs, inputs, targets)
        if gains is None:
            source, gains = "expected-improvement", self._expected_improvement(beliefs, candidates, targets)
        gains = gains * beliefs.probability(inputs) * self._expectation(study, trials, inputs)
        worth = NetCostUtility(lambda _: seconds)(inputs, gains)
        best = int(worth.argmax())
        chosen = candidates[best]
        gain, cost = float(gains[best]), float(seconds[best])
        if self._is_converged(study, costs, chosen.configuration, float(worth[best])):
            return None
        verb = "continue" if chosen.trial < len(trials) else "train" if chosen.seed is None else "train another seed"
        return Proposal(
            chosen.configuration,
            chosen.model,
            chosen.stop_prompts,
            seed=chosen.seed,
            suggestion=Suggestion(
                source=f"jfhpo/{source}",
                explanation=f"{verb} on {chosen.model} to {progress(study.spec, chosen.stop_prompts):.0%}: "
                f"should raise the best expected target score by {gain:.4f} for {cost:.1f} device-seconds, "
                f"the most per second of {len(candidates)} candidates"
                f"{f' on the target, which had less than {share:.0%} of what was spent' if due else ''}",
                expected_gain=gain,
                expected_cost_seconds=cost,
            ),
            floors=self._floors(study, trials, beliefs, ranked, chosen),
        )

    @threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`: by the expected score at the target; by measured ones if no surrogate can be fitted."""
        try:
            beliefs = Beliefs.form(study, trials)
        except NUMERICAL_ERRORS:
            logger.warning("ranking by measured scores: the surrogate could not be fitted", exc_info=True)
            return RandomSearch().rank(study, trials)
        if beliefs is None:
            return []
        ranked = self._ranked(trials, beliefs)
        if self.untried and ranked:
            ranked = self._with_untried(study, trials, beliefs, ranked)
        base = target_base(study, trials)
        return [Recommendation(configuration, base + gain, deviation) for configuration, gain, deviation in ranked]

    def _with_untried(
        self,
        study: Study,
        trials: Sequence[Trial],
        beliefs: Beliefs,
        ranked: list[tuple[Configuration, float, float]],
    ) -> list[tuple[Configuration, float, float]]:
        """The ranking with those untried configurations that are expected to be better than all that were tried."""
        random = np.random.default_rng([study.spec.seeds.search, len(beliefs.surrogate.observations)])
        best = [configuration for configuration, _, _ in ranked[: self.known]]
        new = self._new(study, trials, beliefs, best, random)
        if not new:
            return ranked
        means, deviations = beliefs.expected(beliefs.at_target(new))
        order = torch.argsort(means, descending=True, stable=True)[: self.untried].tolist()
        better = [(new[i], float(means[i]), float(deviations[i])) for i in order if float(means[i]) > ranked[0][1]]
        return better + ranked

    def _expectation(self, study: Study, trials: Sequence[Trial], inputs: Tensor) -> Tensor:
        """Weights in (0, 1] of candidates by the user's expectations, which fade as trials accumulate; shape (n,).

        References:
            Hvarfner et al. (2022), piBO: Augmenting acquisition functions with user beliefs.
        """
        count = max(1, sum(trial.purpose == "search" for trial in trials))
        far = study.space.log_expectation(inputs[:, : study.space.dimension].numpy())
        return torch.from_numpy(np.exp(far * min(1.0, self.expectation_trials / count)))

    @staticmethod
    def _expected_first(study: Study, configurations: Sequence[Configuration]) -> list[Configuration]:
        """The configurations by how near they are to the user's expectations, nearest first (a stable order)."""
        if not configurations:
            return []
        near = study.space.log_expectation(np.array([study.space.encode(item) for item in configurations]))
        return [configurations[index] for index in np.argsort(-near, kind="stable")]

    def _is_converged(self, study: Study, costs: CostModel, configuration: Configuration, worth: float) -> bool:
        """Whether what a full training on the target costs is no longer expected to gain `stop_gain`.

        Args:
            study: The study.
            costs: Fitted to its trials.
            configuration: Whose full training is the yardstick.
            worth: Expected gain per device-second of the best candidate.
        """
        target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        return worth * costs.estimate(configuration, target, 0, horizon).seconds < self.stop_gain

    @staticmethod
    def _floors(
        study: Study,
        trials: Sequence[Trial],
        beliefs: Beliefs,
        ranked: Sequence[tuple[Configuration, float, float]],
        chosen: Candidate,
    ) -> tuple[tuple[int, float], ...]:
        """Scores at the rungs before the candidate's last one below which it has too little prospect to beat others.

        None for the target itself: what is measured there at full length is what the model, which sets the floors, is
        corrected by.
        """
        rule = next((rule for rule in build_rules(study.spec.stopping) if isinstance(rule, Unpromising)), None)
        rungs = [rung for rung in study.spec.fidelity.levels if chosen.start_prompts < rung < chosen.stop_prompts]
        base = base_scores(trials).get(chosen.model)
        incumbent = next((gain for configuration, gain, _ in ranked if configuration != chosen.configuration), None)
        if rule is None or chosen.model == study.ladder.target.name or not rungs or base is None or incumbent is None:
            return ()
        rows = [point(study, chosen.configuration, chosen.model, rung, chosen.trial) for rung in rungs]
        gains = gain_floors(
            beliefs.surrogate,
            beliefs.at_target([chosen.configuration]),
            torch.tensor(rows, dtype=torch.double),
            incumbent,
            rule.probability,
            measurement_variance(study, trials),
            beliefs.inflation,
        )
        return tuple((rung, base + gain) for rung, gain in zip(rungs, gains, strict=True) if gain is not None)

    @staticmethod
    def _finished(study: Study, trials: Sequence[Trial]) -> list[Trial]:
        """Trials of the search that reached the full horizon on the target."""
        return [
            trial
            for trial in trials
            if trial.purpose == "search" and trial.model == study.ladder.target.name and trial.final is not None
        ]

    @staticmethod
    def _knowledge_gradient(
        study: Study, trials: Sequence[Trial], beliefs: Beliefs, inputs: Tensor, targets: Tensor
    ) -> Tensor | None:
        """Value of each candidate in score units; None if it cannot be computed."""
        try:
            acquisition = TargetKnowledgeGradient(
                beliefs.surrogate,
                targets,
                measurement_variance(study, trials),
                beliefs.probability(targets),
                running_points(study, trials),
            )
            gains: Tensor = acquisition(inputs.unsqueeze(-2))
        except NUMERICAL_ERRORS as error:
            logger.warning("the knowledge gradient failed, expected improvement takes over: %s", error)
            return None
        return gains if bool(gains.isfinite().all()) else None

    @staticmethod
    def _expected_improvement(beliefs: Beliefs, candidates: Sequence[Candidate], targets: Tensor) -> Tensor:
        """Expected improvement at (target, full horizon) of each candidate's configuration, whatever it is run on."""
        means, deviations = beliefs.gains(beliefs.at_target(item.configuration for item in candidates))
        incumbent = float(beliefs.expected(targets)[0].max())
        return expected_improvement(means, deviations, incumbent)

    def _initial(self, study: Study, trials: Sequence[Trial], costs: CostModel) -> Proposal | None:
        """The next training of the initial design; None once it is complete or its share of the budget is spent."""
        spec = study.spec
        mine = [trial for trial in trials if trial.purpose == "search"]
        left = spec.budget.initial_share * spec.budget.device_seconds - committed_seconds(mine)
        wanted = self.initial_trials if self.initial_trials is not None else study.space.dimension + 1
        smallest = study.ladder.models[0].name
        designed = [trial for trial in mine if trial.model == smallest]
        if len(designed) < wanted:
            first = self._expected_first(study, fresh_configurations(study, trials, spec.seeds.search, self.choice))
            if not first:
                return None
            # Every other one runs to half the horizon: the length of the curves has to be learned, too.
            levels = spec.fidelity.levels
            level = levels[(len(levels) - 1) // 2] if len(designed) % 2 else levels[0]
            candidate = Candidate(first[0], smallest, 0, level, len(trials))
            if self._cost(costs, candidate) <= left:
                return self._propose(
                    costs, candidate, "jfhpo/initial-design",
                    f"configuration {len(designed) + 1} of {wanted} of the initial design",
                )  # fmt: skip
            return None
        for model in study.ladder.models[1:]:
            anchored = [trial for trial in mine if trial.model == model.name]
            if len(anchored) >= self.anchors:
                continue
            is_target = model.name == study.ladder.target.name
            level = spec.fidelity.levels[-1 if is_target else len(spec.fidelity.levels) // 2]
            known = {configuration_key(trial.configuration) for trial in anchored}
            scored = [
                (trial.evaluations[-1].score, -trial.number, trial.configuration)
                for trial in designed
                if trial.evaluations
                and (trial.is_extendable or trial.state is TrialState.COMPLETED)
                and configuration_key(trial.configuration) not in known
            ]
            if not scored:
                continue
            configuration = max(scored, key=lambda item: item[:2])[2]
            candidate = Candidate(configuration, model.name, 0, level, len(trials))
            if self._cost(costs, candidate) > left:
                return None
            return self._propose(
                costs, candidate, "jfhpo/initial-design",
                f"anchor: the best of the initial design on {model.name}, to learn how sizes differ",
            )  # fmt: skip
        return None

    def _wanted_share(self, beliefs: Beliefs) -> float:
        """Share of the spending that the target gets: more than `target_share` if no proxy tells much about it."""
        proxies = beliefs.study.ladder.proxies
        if not proxies:
            return 1.0
        nearest = beliefs.study.ladder.size_coordinate(proxies[-1].name)
        return max(self.target_share, 1 - beliefs.surrogate.shared_share(nearest))

    @staticmethod
    def _target_is_due(study: Study, trials: Sequence[Trial], share: float) -> bool:
        """Whether the target has had less than a share of what the search has spent, running segments included."""
        mine = [trial for trial in trials if trial.purpose == "search"]
        on_target = [trial for trial in mine if trial.model == study.ladder.target.name]
        return committed_seconds(on_target) < share * committed_seconds(mine)

    def _sobol(
        self, study: Study, trials: Sequence[Trial], costs: CostModel, remaining_seconds: float, why: str
    ) -> Proposal | None:
        """The next Sobol configuration on the smallest model up to the first rung; None if there is none to afford."""
        fresh = fresh_configurations(study, trials, study.spec.seeds.search, 1)
        if not fresh:
            return None
        candidate = Candidate(fresh[0], study.ladder.models[0].name, 0, study.spec.fidelity.levels[0], len(trials))
        if self._cost(costs, candidate) > remaining_seconds:
            return None
        return self._propose(costs, candidate, "jfhpo/sobol", why)

    def _propose(self, costs: CostModel, candidate: Candidate, source: str, why: str) -> Proposal:
        suggestion = Suggestion(source=source, explanation=why, expected_cost_seconds=self._cost(costs, candidate))
        return Proposal(candidate.configuration, candidate.model, candidate.stop_prompts, suggestion)

    @staticmethod
    def _estimate(costs: CostModel, item: Candidate) -> CostEstimate:
        return costs.estimate(item.configuration, item.model, item.start_prompts, item.stop_prompts)

    def _cost(self, costs: CostModel, item: Candidate) -> float:
        return self._estimate(costs, item).seconds

    @staticmethod
    def _ranked(trials: Sequence[Trial], beliefs: Beliefs) -> list[tuple[Configuration, float, float]]:
        """Configurations tried by the search with expected gain and deviation at the target, best first.

        Configurations that a rule stopped or that failed on the target itself are left out.
        """
        target = beliefs.study.ladder.target.name
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
        means, deviations = beliefs.expected(beliefs.at_target(configurations))
        order = torch.argsort(means, descending=True, stable=True).tolist()
        return [(configurations[i], float(means[i]), float(deviations[i])) for i in order]

    def _candidates(
        self,
        study: Study,
        trials: Sequence[Trial],
        beliefs: Beliefs,
        ranked: Sequence[tuple[Configuration, float, float]],
        random: np.random.Generator,
    ) -> list[Candidate]:
        """Continuations of paused trials, known configurations on further models, and new configurations."""
        levels, models = study.spec.fidelity.levels, [model.name for model in study.ladder.models]
        mine = [trial for trial in trials if trial.purpose == "search"]
        promising = {configuration_key(item) for item, _, _ in ranked[: self.continued]}
        candidates: list[Candidate] = []
        for trial in mine:
            if trial.is_extendable and configuration_key(trial.configuration) in promising:
                done = trial.kept_prompts
                candidates += [
                    Candidate(trial.configuration, trial.model, done, level, trial.number, trial.seed)
                    for level in _spread([level for level in levels if level > done])
                ]
        seen = {(configuration_key(trial.configuration), trial.model) for trial in mine}
        best = [configuration for configuration, _, _ in ranked[: self.known]]
        for configuration in (*best, *self._new(study, trials, beliefs, best, random)):
            key = configuration_key(configuration)
            candidates += [
                Candidate(configuration, model, 0, level, len(trials))
                for model in models
                if (key, model) not in seen
                for level in _spread(levels)
            ]
        return candidates + self._replicates(study, trials, ranked)

    def _replicates(
        self, study: Study, trials: Sequence[Trial], ranked: Sequence[tuple[Configuration, float, float]]
    ) -> list[Candidate]:
        """Another seed, on the target at full length, of the best configurations that have finished there.

        Their seeds begin above those of the final comparison, which must not be looked at before.
        """
        finished = {configuration_key(trial.configuration) for trial in self._finished(study, trials)}
        target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        candidates = []
        for configuration, _, _ in ranked[: self.replicated]:
            if configuration_key(configuration) in finished:
                # One that is still running has its seed, too.
                taken = [
                    trial.seed
                    for trial in trials
                    if trial.purpose == "search" and trial.model == target and trial.configuration == configuration
                ]
                seed = max(*study.spec.seeds.training, *taken) + 1
                candidates.append(Candidate(configuration, target, 0, horizon, len(trials), seed))
        return candidates

    def _new(
        self,
        study: Study,
        trials: Sequence[Trial],
        beliefs: Beliefs,
        best: Sequence[Configuration],
        random: np.random.Generator,
    ) -> list[Configuration]:
        """Untried configurations worth a closer look.

        A Sobol pool is searched at the target by expectation and by optimistic and random draws of the belief; then
        the neighbourhood of what was found and of the best known configurations is searched in the same way, twice.
        """
        sobol = qmc.Sobol(study.space.dimension, rng=random).random(self.pool)
        found = self._promising(beliefs, study.space.snap(sobol), self.fresh, random)
        centres = np.array([study.space.encode(configuration) for configuration in best]).reshape(
            -1, study.space.dimension
        )
        near = centres
        for scales in ((-1.5, -0.5), (-2.0, -1.0)):
            around = np.concatenate([centres, near, found[: self.known]])
            moved = study.space.snap(_neighbours(around, self.pool // 2, scales, random))
            near = self._promising(beliefs, moved, self.local, random)
        known = {configuration_key(trial.configuration) for trial in trials}
        new: dict[str, Configuration] = {}
        for row in np.concatenate([found, near]):
            configuration = study.space.decode(row)
            key = configuration_key(configuration)
            if key not in known:
                new.setdefault(key, configuration)
        return list(new.values())

    @staticmethod
    def _promising(beliefs: Beliefs, points: Vector, count: int, random: np.random.Generator) -> Vector:
        """At most `count` of the points: a third each by the expected gain, an optimistic one, and one drawn.

        Args:
            beliefs: They tell the gains.
            points: Snapped, shape (n, dimension).
            count: How many are wanted.
            random: Draws gains.
        """
        fidelity = np.tile([0.0, 1.0, -1.0, 0.0], (len(points), 1))
        inputs = torch.from_numpy(np.concatenate([points, fidelity], axis=1))
        means, deviations = (values.numpy() for values in beliefs.gains(inputs))
        feasible = beliefs.probability(inputs).numpy()
        chosen: list[int] = []
        for weight in (np.zeros(len(points)), np.ones(len(points)), random.normal(size=len(points))):
            order = np.argsort(-feasible * (means + weight * deviations), kind="stable")
            fresh = [int(index) for index in order[:count] if index not in chosen]
            chosen += fresh[: count // 3]
        return points[chosen]


def _inputs(study: Study, candidates: Sequence[Candidate]) -> Tensor:
    """Surrogate inputs of candidates, shape (n, d + 4)."""
    encoded: dict[int, list[float]] = {}
    rows = []
    for item in candidates:
        x = encoded.get(id(item.configuration))
        if x is None:
            x = encoded[id(item.configuration)] = study.space.encode(item.configuration).tolist()
        size, share = study.ladder.size_coordinate(item.model), progress(study.spec, item.stop_prompts)
        rows.append([*x, size, share, float(item.trial), THIS_STUDY])
    return torch.tensor(rows, dtype=torch.double)


def _spread(levels: Sequence[int], count: int = CANDIDATE_LEVELS) -> list[int]:
    """At most `count` of the levels at about equal distances, the last one among them."""
    if len(levels) <= count:
        return list(levels)
    return [levels[round(place)] for place in np.linspace(len(levels) - 1, 0, count, endpoint=False)][::-1]


def _neighbours(centres: Vector, count: int, scales: tuple[float, float], random: np.random.Generator) -> Vector:
    """Points at random distances from the centres, a few coordinates changed at a time, shape (count, dimension).

    Args:
        centres: Shape (n, dimension).
        count: How many are wanted.
        random: Draws them.
        scales: Range of the decimal logarithm of the steps' standard deviation.
    """
    around = centres[np.arange(count) % len(centres)]
    size = 10 ** random.uniform(*scales, size=(count, 1))
    changed = random.random(around.shape) < max(0.3, 1.5 / around.shape[1])
    moved: Vector = np.clip(around + changed * random.normal(size=around.shape) * size, 0, 1)
    return moved
