"""The joint-fidelity strategy: which configuration to train next, on which model, up to which step.

1. The recipes have been trained on the target; so is what is expected to be best, in the middle of its range where
   nothing is. `initial_design`: recipes and Sobol configurations on the smallest proxy. With earlier studies, what they
   say is best comes instead of both. What a run refutes is believed no more.
2. From then on, the knowledge gradient at the target per device-second, over explicit candidates (`candidates`): new
   configurations, known configurations on other models, and continuations of paused trials, which cost only what they
   add. Every so often a full run of the target is due; expected improvement chooses it.
3. Recommendation by the posterior mean at the target (`beliefs`), of what has been trained to full length there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from jfhpo_core.optimizer.acquisition import NetCostUtility, expected_improvement
from jfhpo_core.optimizer.acquisitions import load_acquisition
from jfhpo_core.optimizer.allocation import Allocation, Offer, Priced
from jfhpo_core.optimizer.beliefs import NUMERICAL_ERRORS, Beliefs
from jfhpo_core.optimizer.candidates import (
    Candidate,
    CandidateSet,
    Expectation,
    by_value,
    candidate_inputs,
    expected_configuration,
    is_full_run,
    ranked_configurations,
    with_other_choices,
)
from jfhpo_core.optimizer.constraints import drawn_limit
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.floors import value_floors
from jfhpo_core.optimizer.initial_design import InitialDesign
from jfhpo_core.optimizer.known_optima import FILE, with_known_optima
from jfhpo_core.optimizer.observations import EARLIER_OPTIMUM, believed_earlier, earlier_configurations, point
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
from jfhpo_core.study.metrics import Limit
from jfhpo_core.study.models import progress
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Space
from jfhpo_core.study.trial import Configuration, Suggestion, Trial, configuration_key

logger = logging.getLogger(__name__)

TARGET_PROSPECT = 0.3
"""A full run of the target ends where less than this is left of its chance to be better than the best one known: what
is then saved pays for another. On proxies the rule's own, smaller probability holds, as little is saved there."""

FINISHED_FIRST = 1
"""Full runs of the target, a recipe's among them, that are finished before any is ended for its prospects."""

PAYS_AFTER = 2
"""Full runs of the target that are finished before it is asked whether another would pay."""

KNOWN_OPTIMUM = "jfhpo/known-optimum"
"""Source of a run of what is said to be best."""

DOUBT = 0.1
"""Weight of a candidate that contradicts all that is expected, where one that fulfils it has 1."""


@dataclass(frozen=True)
class _Choice:
    """What is bought.

    Attributes:
        source: What chose it.
        gain: How much it should raise the best expected score at the target.
        worth: The same for each device-second.
    """

    item: Priced
    source: str
    gain: float
    worth: float


@dataclass(frozen=True)
class JointFidelity:
    """The strategy `jfhpo`.

    Attributes:
        initial_trials: See `InitialDesign.trials`.
        choice: See `InitialDesign.choice`.
        anchors: See `InitialDesign.anchors`.
        expectation_trials: Trials after which the user's expectations begin to fade.
        pool: See `CandidateSet`, as for the next five.
        acquisition: Name of what says the worth of a segment: see `jfhpo_core.optimizer.acquisitions`.
        stop_gain: The least gain in score for which another full run of the target would be paid. The search ends when
            no full run is expected to bring its price; see `worth_of_going_on`. 0: it spends its budget.
        target_share: Full runs of the target are due so often that they take this share of the spending: see
            `allocation`.
        prior: What is known of hyperparameters before the search, see `known_optima`: "shipped", "none", or a JSON
            file like the shipped one.
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
    acquisition: str = "knowledge-gradient"
    stop_gain: float = 0.0
    target_share: Share = 0.5
    prior: str = "shipped"

    def check(self, study: Study) -> None:
        """See `Checked.check`."""
        load_acquisition(self.acquisition)
        self.expected(study)

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
        expected = study.space if history.refuted(KNOWN_OPTIMUM) else self.expected(study)
        has_earlier = bool(believed_earlier(history))
        allocation = Allocation.of(history, costs, leads=not has_earlier)
        proposal = None if has_earlier else self._opening(history, costs, expected, remaining_seconds)
        if proposal is not None:
            return proposal if admits(proposal.model, proposal.suggestion.expected_cost_seconds or 0.0) else None
        random = np.random.default_rng(seed)
        drawn = drawn_limit(history, random)
        try:
            beliefs = Beliefs.form(history, further=(drawn,) if drawn is not None else ())
        except NUMERICAL_ERRORS as error:
            return _sobol(history, costs, remaining_seconds, f"the surrogate could not be fitted ({error})")
        if beliefs is None:
            return _sobol(history, costs, remaining_seconds, "no trial has been evaluated yet")
        ranked = ranked_configurations(beliefs)
        candidates = self._candidates.segments(
            beliefs,
            [item.configuration for item in ranked],
            _favourites(beliefs, expected),
            random,
        )
        priced = [
            Priced(item, costs.estimate(item.configuration, item.model, item.start_prompts, item.stop_prompts).seconds)
            for item in candidates
        ]
        affordable = [
            item for item in priced if item.seconds <= remaining_seconds and admits(item.candidate.model, item.seconds)
        ]
        offer = allocation.offer(affordable, remaining_seconds, self._wanted_share(beliefs))
        if not offer.items:
            return None
        if not self.pays(beliefs, affordable, allocation.full_seconds):
            return None
        choice = self._choose(beliefs, ranked, offer, allocation.full_seconds, expected)
        return _chosen(beliefs, ranked, offer, choice, drawn)

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
        return [
            Recommendation(item.configuration, *beliefs.score(item.mean, item.deviation), item.respected)
            for item in ranked_configurations(beliefs)
        ]

    def pays(self, beliefs: Beliefs, items: Sequence[Priced], full_seconds: float) -> bool:
        """Whether some full run of the target is worth more than `stop_gain`: see `worth_of_going_on`.

        Args:
            beliefs: What is known.
            items: What could be bought.
            full_seconds: Price of a full run of usual length.
        """
        return not self.stop_gain or worth_of_going_on(beliefs, items, full_seconds) > self.stop_gain

    def _opening(
        self, history: History, costs: CostModel, expected: Space, remaining_seconds: float
    ) -> Proposal | None:
        """What is trained before the model is asked: the first run of the target, then the initial design."""
        first = _first_run(history, costs, expected, remaining_seconds)
        if first is not None:
            return first
        budget = history.study.spec.budget
        seconds = budget.initial_share * budget.device_seconds
        design = InitialDesign(self.initial_trials, self.choice, self.anchors, seconds, expected)
        designed = design.following(history, costs)
        return None if designed is None else _propose(costs, *designed, source="jfhpo/initial-design")

    def _choose(
        self,
        beliefs: Beliefs,
        ranked: Sequence[Expectation],
        offer: Offer,
        full_seconds: float,
        expected: Space,
    ) -> _Choice:
        """The candidate worth most per second; among full runs that are due, the one worth most.

        There the price does not count: more completions per prompt cost more and are better.
        """
        history, candidates = beliefs.history, [item.candidate for item in offer.items]
        seconds = torch.tensor([item.seconds for item in offer.items], dtype=torch.double)
        inputs = candidate_inputs(history.study, candidates)
        source, gains = f"jfhpo/{self.acquisition}", None
        if not offer.due:
            considered = [item.configuration for item in ranked] + [item.configuration for item in candidates]
            different = {configuration_key(item): item for item in considered}
            gains = self._gains(beliefs, inputs, beliefs.at_target(different.values()))
        if gains is None:
            source, gains = "jfhpo/expected-improvement", _expected_improvement(beliefs, candidates)
        weights = self._weights(history, inputs, expected)
        gains = gains * beliefs.accepted(inputs) * weights
        worth = gains / full_seconds if offer.due else NetCostUtility(lambda _: seconds)(inputs, gains)
        best = int(worth.argmax())
        if offer.due and not any(_sets_a_mark(history, trial) for trial in history.on_target):
            # The first full run is the best guess: where little is known, improvement is expected at the edges. The
            # less sure the model is, the more counts what is expected.
            source = EARLIER_OPTIMUM if believed_earlier(history) else "jfhpo/best-expectation"
            targets = _at_target(beliefs, candidates)
            _, deviations = beliefs.values(targets)
            best = int((beliefs.worth(targets) + deviations * weights.log()).argmax())
        unit = beliefs.scale.unit()
        return _Choice(offer.items[best], source, float(gains[best]) * unit, float(worth[best]) * unit)

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

    def expected(self, study: Study) -> Space:
        """The study's space with what is expected of it before anything is trained."""
        if self.prior == "none":
            return study.space
        return with_known_optima(study, FILE if self.prior == "shipped" else Path(self.prior))

    def _weights(self, history: History, inputs: Tensor, expected: Space) -> Tensor:
        """Weights in (0, 1] of candidates by what is expected, which fades as trials accumulate; shape (n,).

        They never fall below `DOUBT`, so that an expectation which is wrong is overruled.

        References:
            Hvarfner et al. (2022), piBO: Augmenting acquisition functions with user beliefs.
        """
        count = max(1, len(history.search))
        far = expected.log_expectation(inputs[:, : expected.dimension].numpy())
        near = np.exp(far * min(1.0, self.expectation_trials / count))
        return torch.from_numpy(DOUBT + (1 - DOUBT) * near)

    def _wanted_share(self, beliefs: Beliefs) -> float:
        """Share of the spending that the target gets: more than `target_share` if no proxy tells much about it."""
        ladder = beliefs.history.study.ladder
        if not ladder.proxies:
            return 1.0
        if self.target_share <= 0:
            return 0.0
        nearest = ladder.size_coordinate(ladder.proxies[-1].name)
        return max(self.target_share, 1 - beliefs.surrogate.shared_share(nearest))


def _first_run(history: History, costs: CostModel, expected: Space, remaining_seconds: float) -> Proposal | None:
    """A full run of what is expected, in the middle of its range where nothing is: ranges lie around what is meant.

    If it costs too much, with other choices: as few as may be, the nearest to what is expected. None if none can be
    paid, or if this or anything else of the search that counts has been trained on the target.
    """
    study = history.study
    target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
    best = expected_configuration(expected) or study.space.middle()
    on_target = [trial for trial in history.trials if trial.model == target]
    known = {configuration_key(trial.configuration) for trial in on_target}
    if configuration_key(history.canonical(best)) in known or any(_sets_a_mark(history, item) for item in on_target):
        return None
    choices = with_other_choices(study.space, best)
    near = expected.log_expectation(np.array([study.space.encode(item) for item in choices]))
    source = "jfhpo/expected" if expected == study.space else KNOWN_OPTIMUM
    why = (
        "what is expected to be best, before anything is known: values that are expected, else the middle of the range"
    )
    changes = [sum(item[name] != value for name, value in best.items() if name in item) for item in choices]
    for index in np.lexsort((np.array(changes), -near)):
        candidate = Candidate(choices[index], target, 0, horizon, len(history.trials))
        proposal = _propose(costs, candidate, why, source=source)
        if (proposal.suggestion.expected_cost_seconds or 0.0) <= remaining_seconds:
            return proposal
    return None


def worth_of_going_on(beliefs: Beliefs, items: Sequence[Priced], full_seconds: float) -> float:
    """Score that some full run of the target should gain for the price of one of usual length; the most of all of them.

    To stop when this falls below what such a run may cost, in units of the score, is to stop when no Gittins index of
    Pandora's box exceeds the best score found: optimal for independent boxes, and in expectation never worse than to
    stop at once.

    Args:
        beliefs: What is known.
        items: What could be bought.
        full_seconds: Price of a full run of usual length.

    Returns:
        Infinity as long as few have finished, or if none is to be had.

    References:
        Xie et al. (2024), Cost-aware Bayesian optimization via the Pandora's box Gittins index; Xie et al. (2025),
        Cost-aware stopping for Bayesian optimization.
    """
    study = beliefs.history.study
    runs = [item for item in items if is_full_run(study, item.candidate)]
    if not runs or len(beliefs.history.finished) < PAYS_AFTER:
        return math.inf
    candidates = [item.candidate for item in runs]
    gains = _expected_improvement(beliefs, candidates) * beliefs.accepted(candidate_inputs(study, candidates))
    lengths = torch.tensor([item.seconds for item in runs], dtype=torch.double) / full_seconds
    return float((gains / lengths).max()) * beliefs.scale.unit()


def _favourites(beliefs: Beliefs, expected: Space) -> list[Configuration]:
    """What is best by all that is known from elsewhere, with every combination of its choices; none without such."""
    study = beliefs.history.study
    earlier = by_value(beliefs, earlier_configurations(beliefs.history))[:1]
    best = [item.configuration for item in earlier]
    if (known := expected_configuration(expected)) is not None:
        best.append(known)
    return [item for one in best for item in with_other_choices(study.space, one)]


def _sets_a_mark(history: History, trial: Trial) -> bool:
    """Whether a run on the target is one of the search that others can improve on.

    It is not if it breaks a constraint, or was to show what is known and has refuted it.
    """
    if trial.purpose != "search" or history.breaks(trial.configuration):
        return False
    return not history.refutes(trial, KNOWN_OPTIMUM, EARLIER_OPTIMUM)


def _at_target(beliefs: Beliefs, candidates: Sequence[Candidate]) -> Tensor:
    return beliefs.at_target(item.configuration for item in candidates)


def _expected_improvement(beliefs: Beliefs, candidates: Sequence[Candidate]) -> Tensor:
    """Expected improvement at (target, full horizon) of each candidate's configuration, whatever it is run on.

    The incumbent is the best of what has finished there; of the candidates, as long as nothing has.
    """
    inputs = _at_target(beliefs, candidates)
    means, deviations = beliefs.values(inputs)
    finished = beliefs.at_target(trial.configuration for trial in beliefs.history.finished)
    incumbent = float(beliefs.worth(finished if len(finished) else inputs).max())
    return expected_improvement(means, deviations, incumbent)


def _chosen(
    beliefs: Beliefs, ranked: Sequence[Expectation], offer: Offer, choice: _Choice, drawn: Limit | None
) -> Proposal:
    """The proposal of a choice, with the reason for it and its floors."""
    history, chosen, seconds = beliefs.history, choice.item.candidate, choice.item.seconds
    is_known = chosen.trial < len(history.trials)
    verb = "continue" if is_known else "train" if chosen.seed is None else "train another seed"
    return Proposal(
        chosen.configuration,
        chosen.model,
        chosen.stop_prompts,
        seed=chosen.seed,
        suggestion=Suggestion(
            source=choice.source,
            explanation=f"{verb} on {chosen.model} to {progress(history.study.spec, chosen.stop_prompts):.0%}: "
            f"should raise the best expected target score by {choice.gain:.4f} for {seconds:.1f} device-seconds, "
            f"the most per second of {len(offer.items)} candidates{_under(beliefs, chosen, drawn)}"
            f"{' that are full runs of the target, of which one is due' if offer.due else ''}",
            expected_gain=choice.gain,
            expected_cost_seconds=seconds,
        ),
        floors=_floors(beliefs, ranked, chosen),
    )


def _under(beliefs: Beliefs, chosen: Candidate, drawn: Limit | None) -> str:
    """Under which limits a candidate was chosen, and how probably it respects them; empty without any."""
    limits = [*beliefs.history.study.spec.limits, *([drawn] if drawn is not None else [])]
    if not limits:
        return ""
    probability = float(beliefs.respected(_at_target(beliefs, [chosen])))
    note = f" under {', '.join(map(str, limits))}, respected with a probability of {probability:.0%}"
    return f"{note} (the last limit was drawn to find the front)" if drawn is not None else note


def _floors(beliefs: Beliefs, ranked: Sequence[Expectation], chosen: Candidate) -> tuple[tuple[int, float], ...]:
    """Scores at the rungs before the candidate's last one below which it has too little prospect to beat others.

    On the target itself none before a full run has finished: it corrects the model, which sets the floors.
    """
    study = beliefs.history.study
    rule = next((rule for rule in build_rules(study.spec.stopping) if isinstance(rule, Unpromising)), None)
    incumbent = next((item.worth for item in ranked if item.configuration != chosen.configuration), None)
    size = study.ladder.size_coordinate(chosen.model)
    groups = {
        rung: group
        for rung in study.spec.fidelity.levels
        if chosen.start_prompts < rung < chosen.stop_prompts
        and (group := (THIS_STUDY, size, progress(study.spec, rung))) in beliefs.scale.references
    }
    if rule is None or not groups or incumbent is None:
        return ()
    on_target = chosen.model == study.ladder.target.name
    if on_target and len(beliefs.history.finished) < FINISHED_FIRST:
        return ()
    rows = [point(study, chosen.configuration, chosen.model, rung, chosen.trial) for rung in groups]
    values = value_floors(
        beliefs.surrogate,
        beliefs.at_target([chosen.configuration]),
        torch.tensor(rows, dtype=torch.double),
        incumbent,
        max(rule.probability, TARGET_PROSPECT) if on_target else rule.probability,
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
