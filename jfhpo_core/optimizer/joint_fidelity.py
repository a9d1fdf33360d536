"""The joint-fidelity strategy: which configuration to train next, on which model, up to which step.

1. The recipes have been trained on the target. `initial_design`: they and Sobol configurations on the smallest proxy;
   none with earlier studies, which say more.
2. From then on, the knowledge gradient at the target per device-second, over explicit candidates (`candidates`): new
   configurations, known configurations on other models, and continuations of paused trials, which cost only what they
   add. Every so often a full run of the target is due; expected improvement chooses it.
3. Recommendation by the posterior mean at the target (`beliefs`). Untried configurations of which the model expects
   more than of all tried ones may lead the ranking; nothing is recommended before validation has trained it to full
   length.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from jfhpo_core.optimizer.acquisition import NetCostUtility, expected_improvement
from jfhpo_core.optimizer.acquisitions import load_acquisition
from jfhpo_core.optimizer.beliefs import NUMERICAL_ERRORS, Beliefs
from jfhpo_core.optimizer.candidates import (
    Candidate,
    CandidateSet,
    Expectation,
    by_value,
    candidate_inputs,
    ranked_configurations,
)
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.floors import value_floors
from jfhpo_core.optimizer.initial_design import InitialDesign
from jfhpo_core.optimizer.observations import point
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
from jfhpo_core.optimizer.surrogate import THIS_STUDY
from jfhpo_core.stopping.rules import Unpromising, build_rules
from jfhpo_core.study.history import History
from jfhpo_core.study.models import progress
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Suggestion, Trial, committed_seconds, configuration_key

logger = logging.getLogger(__name__)

LEAD_RUNS = 0.7
"""Full runs of the target that may be spent on cheaper segments before the first one is due."""


@dataclass(frozen=True)
class JointFidelity:
    """The strategy `jfhpo`.

    Attributes:
        initial_trials: See `InitialDesign.trials`.
        choice: See `InitialDesign.choice`.
        anchors: See `InitialDesign.anchors`.
        expectation_trials: Trials after which the user's expectations begin to fade.
        pool: See `CandidateSet`, as for the next five.
        untried: At most so many configurations that no trial has are ranked above the tried ones, where the model
            expects more of them; validation trains them.
        acquisition: Name of what says the worth of a segment: see `jfhpo_core.optimizer.acquisitions`.
        stop_gain: The search ends early when the best candidate, scaled to the cost of a full run on the target, is
            expected to raise the final score by less than this. 0: it spends its budget. The knowledge gradient sees
            one step ahead and is an underestimate: at 0.0005 half of the searches of a benchmark ended too early.
        target_share: Full runs of the target are due so often that they take this share of the spending: see
            `_target_is_due`.
    """

    name: ClassVar[str] = "jfhpo"
    initial_trials: Positive | None = None
    choice: Positive = 8
    anchors: Count = 1
    expectation_trials: Positive = 10
    pool: Positive = 512
    fresh: Positive = 24
    local: Count = 24
    known: Count = 8
    continued: Count = 24
    replicated: Count = 4
    untried: Count = 3
    acquisition: str = "knowledge-gradient"
    stop_gain: float = 0.0
    target_share: Share = 0.5

    def check(self, study: Study) -> None:
        """See `Checked.check`."""
        load_acquisition(self.acquisition)

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        proposal: Proposal | None = self.suggest_among(study, trials, remaining_seconds, seed, lambda *_: True)
        return proposal

    @threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]  # on small matrices threads wait for each other
    def suggest_among(
        self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int, admits: Admits
    ) -> Proposal | None:
        """See `Selective.suggest_among`."""
        history, costs = History.of(study, trials), CostModel.fit(study, trials)
        target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        full_seconds = costs.estimate(study.space.middle(), target, 0, horizon).seconds
        lead = _lead(history, full_seconds)
        budget = study.spec.budget
        design = InitialDesign(
            self.initial_trials, self.choice, self.anchors, budget.initial_share * budget.device_seconds
        ).following(history, costs)
        if design is not None:
            proposal = _propose(costs, *design, source="jfhpo/initial-design")
            return proposal if admits(proposal.model, proposal.suggestion.expected_cost_seconds or 0.0) else None
        try:
            beliefs = Beliefs.form(history)
        except NUMERICAL_ERRORS as error:
            return _sobol(history, costs, remaining_seconds, f"the surrogate could not be fitted ({error})")
        if beliefs is None:
            return _sobol(history, costs, remaining_seconds, "no trial has been evaluated yet")
        ranked = ranked_configurations(beliefs)
        candidates = self._candidates.segments(
            beliefs, [item.configuration for item in ranked], np.random.default_rng(seed)
        )
        # What might not fit is not begun: it would be paid with what is held back to finish the best.
        estimates = [
            (item, costs.estimate(item.configuration, item.model, item.start_prompts, item.stop_prompts))
            for item in candidates
        ]
        priced = [(item, estimate.seconds) for item, estimate in estimates if estimate.high <= remaining_seconds]
        priced = [(item, cost) for item, cost in priced if admits(item.model, cost)]
        if not priced:
            return None
        share = self._wanted_share(beliefs)
        full_runs = [(item, cost) for item, cost in priced if (item.model, item.stop_prompts) == (target, horizon)]
        due = bool(full_runs) and _target_is_due(history, lead, full_seconds, share)
        # What is learned from a cheaper segment is worth nothing without the means to train what it recommends.
        priced = (
            full_runs
            if due
            else [
                (item, cost)
                for item, cost in priced
                if (item, cost) in full_runs or cost + full_seconds <= remaining_seconds
            ]
        )
        if not priced:
            return None
        candidates = [item for item, _ in priced]
        seconds = torch.tensor([cost for _, cost in priced], dtype=torch.double)
        inputs = candidate_inputs(study, candidates)
        configurations = {configuration_key(item.configuration): item.configuration for item in ranked}
        configurations |= {configuration_key(item.configuration): item.configuration for item in candidates}
        targets = beliefs.at_target(configurations.values())
        source, gains = self.acquisition, None if due else self._gains(beliefs, inputs, targets)
        if gains is None:
            source, gains = "expected-improvement", _expected_improvement(beliefs, candidates, targets)
        gains = gains * beliefs.probability(inputs) * self._expectation(history, inputs)
        # Among full runs that are due the price does not count: more completions per prompt cost more and are better.
        worth = gains / full_seconds if due else NetCostUtility(lambda _: seconds)(inputs, gains)
        best = int(worth.argmax())
        if due and not any(trial.purpose == "search" for trial in history.on_target):
            # The first full run is the best guess: where little is known, improvement is expected at the edges.
            source, best = "best-expectation", int(beliefs.expected(_at_target(beliefs, candidates))[0].argmax())
        chosen = candidates[best]
        gain, cost = float(gains[best]) * beliefs.scale.unit(), float(seconds[best])
        if float(worth[best]) * beliefs.scale.unit() * full_seconds < self.stop_gain:
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
                f"{' that are full runs of the target, of which one is due' if due else ''}",
                expected_gain=gain,
                expected_cost_seconds=cost,
            ),
            floors=_floors(beliefs, ranked, chosen),
        )

    @threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`: by the expected value at the target; by measured scores if no model can be fitted."""
        history = History.of(study, trials)
        try:
            beliefs = Beliefs.form(history)
        except NUMERICAL_ERRORS:
            logger.warning("ranking by measured scores: the surrogate could not be fitted", exc_info=True)
            return RandomSearch().rank(study, trials)
        if beliefs is None:
            return []
        ranked = ranked_configurations(beliefs)
        if self.untried and ranked:
            ranked = self._better_untried(beliefs, ranked) + ranked
        return [Recommendation(item.configuration, *beliefs.score(item.mean, item.deviation)) for item in ranked]

    def _gains(self, beliefs: Beliefs, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Worth of each candidate in values; None if it cannot be computed."""
        try:
            gains = load_acquisition(self.acquisition)(beliefs, inputs, targets)
        except NUMERICAL_ERRORS as error:
            logger.warning("%s failed, expected improvement takes over: %s", self.acquisition, error)
            return None
        return gains if bool(gains.isfinite().all()) else None

    @property
    def _candidates(self) -> CandidateSet:
        return CandidateSet(self.pool, self.fresh, self.local, self.known, self.continued, self.replicated)

    def _better_untried(self, beliefs: Beliefs, ranked: Sequence[Expectation]) -> list[Expectation]:
        """Untried configurations that are expected to be better than all that were tried."""
        seed = [beliefs.history.study.spec.seeds.search, len(beliefs.surrogate.observations)]
        best = [item.configuration for item in ranked[: self.known]]
        new = self._candidates.new_configurations(beliefs, best, np.random.default_rng(seed))
        return [item for item in by_value(beliefs, new)[: self.untried] if item.mean > ranked[0].mean]

    def _expectation(self, history: History, inputs: Tensor) -> Tensor:
        """Weights in (0, 1] of candidates by the user's expectations, which fade as trials accumulate; shape (n,).

        References:
            Hvarfner et al. (2022), piBO: Augmenting acquisition functions with user beliefs.
        """
        count = max(1, len(history.search))
        space = history.study.space
        far = space.log_expectation(inputs[:, : space.dimension].numpy())
        return torch.from_numpy(np.exp(far * min(1.0, self.expectation_trials / count)))

    def _wanted_share(self, beliefs: Beliefs) -> float:
        """Share of the spending that the target gets: more than `target_share` if no proxy tells much about it."""
        ladder = beliefs.history.study.ladder
        if not ladder.proxies:
            return 1.0
        if self.target_share <= 0:
            return 0.0
        nearest = ladder.size_coordinate(ladder.proxies[-1].name)
        return max(self.target_share, 1 - beliefs.surrogate.shared_share(nearest))


def _at_target(beliefs: Beliefs, candidates: Sequence[Candidate]) -> Tensor:
    return beliefs.at_target(item.configuration for item in candidates)


def _expected_improvement(beliefs: Beliefs, candidates: Sequence[Candidate], targets: Tensor) -> Tensor:
    """Expected improvement at (target, full horizon) of each candidate's configuration, whatever it is run on.

    The incumbent is the best of what has finished there; of all that is considered, as long as nothing has.
    """
    means, deviations = beliefs.values(_at_target(beliefs, candidates))
    target = beliefs.history.study.ladder.target.name
    finished = beliefs.at_target(
        trial.configuration for trial in beliefs.history.evidence if trial.model == target and trial.final is not None
    )
    incumbent = float(beliefs.expected(finished if len(finished) else targets)[0].max())
    return expected_improvement(means, deviations, incumbent)


def _lead(history: History, full_seconds: float) -> float:
    """Device-seconds for cheaper segments before the first full run of the target is due; none with earlier studies."""
    budget = history.study.spec.budget
    if history.study.earlier:
        return 0.0
    return min(LEAD_RUNS * full_seconds, budget.initial_share * budget.device_seconds)


def _target_is_due(history: History, lead: float, full_seconds: float, share: float) -> bool:
    """Whether the next segment should be a full run of the target.

    The first one is due after a short lead, and further ones so often that they take a share of the spending: a search
    can be cut short at any time, and what it has to show then are full runs of the target.

    Args:
        history: What was trained.
        lead: See `_lead`.
        full_seconds: Price of a full run of the target.
        share: See `JointFidelity.target_share`.
    """
    own = [trial for trial in history.trials if trial.purpose == "search"]
    ahead = committed_seconds(own) - lead
    target = history.study.ladder.target.name
    complete = sum(trial.model == target and _planned_step(trial) >= trial.total_steps for trial in own)
    return ahead >= 0 and complete < 1 + share * ahead / full_seconds


def _planned_step(trial: Trial) -> int:
    """The step that a trial has reached, or will have when its running segment ends."""
    return trial.step if trial.open_segment is None else trial.open_segment.stop_step


def _floors(beliefs: Beliefs, ranked: Sequence[Expectation], chosen: Candidate) -> tuple[tuple[int, float], ...]:
    """Scores at the rungs before the candidate's last one below which it has too little prospect to beat others.

    None for the target itself: what is measured there at full length is what the model, which sets the floors, is
    corrected by.
    """
    study = beliefs.history.study
    rule = next((rule for rule in build_rules(study.spec.stopping) if isinstance(rule, Unpromising)), None)
    incumbent = next((item.mean for item in ranked if item.configuration != chosen.configuration), None)
    size = study.ladder.size_coordinate(chosen.model)
    groups = {
        rung: group
        for rung in study.spec.fidelity.levels
        if chosen.start_prompts < rung < chosen.stop_prompts
        and (group := (THIS_STUDY, size, progress(study.spec, rung))) in beliefs.scale.references
    }
    if rule is None or chosen.model == study.ladder.target.name or not groups or incumbent is None:
        return ()
    rows = [point(study, chosen.configuration, chosen.model, rung, chosen.trial) for rung in groups]
    values = value_floors(
        beliefs.surrogate,
        beliefs.at_target([chosen.configuration]),
        torch.tensor(rows, dtype=torch.double),
        incumbent,
        rule.probability,
        beliefs.measurement_variance,
        beliefs.inflation,
    )
    return tuple(
        (rung, float(beliefs.scale.score(group, [value])[0]))
        for (rung, group), value in zip(groups.items(), values, strict=True)
        if value is not None
    )


def _sobol(history: History, costs: CostModel, remaining_seconds: float, why: str) -> Proposal | None:
    """The next Sobol configuration on the smallest model up to the first rung; None if there is none to afford."""
    study = history.study
    fresh = fresh_configurations(study, history.search, study.spec.seeds.search, 1)
    if not fresh:
        return None
    candidate = Candidate(fresh[0], study.ladder.models[0].name, 0, study.spec.fidelity.levels[0], len(history.trials))
    proposal = _propose(costs, candidate, why, source="jfhpo/sobol")
    cost = proposal.suggestion.expected_cost_seconds
    return proposal if cost is not None and cost <= remaining_seconds else None


def _propose(costs: CostModel, candidate: Candidate, why: str, *, source: str) -> Proposal:
    cost = costs.estimate(candidate.configuration, candidate.model, candidate.start_prompts, candidate.stop_prompts)
    suggestion = Suggestion(source=source, explanation=why, expected_cost_seconds=cost.seconds)
    return Proposal(candidate.configuration, candidate.model, candidate.stop_prompts, suggestion)
