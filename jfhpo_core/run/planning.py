"""What to do next: a pure function of a study and its trials.

A search that was interrupted at any moment goes on as if nothing had happened: open segments are trained again,
committed ones are never repeated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import Proposal, RandomSearch, Selective, Strategy
from jfhpo_core.run.scheduler import Opening
from jfhpo_core.run.standing import (
    REWARDLESS_AFTER,
    Standing,
    first_seed_on_target,
    is_rewardless,
    runs_without_reward,
)
from jfhpo_core.study.history import History
from jfhpo_core.study.models import steps_at
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import (
    VALIDATION,
    Configuration,
    Outcome,
    Purpose,
    ScoreFloor,
    Segment,
    Suggestion,
    Trial,
    TrialState,
    committed_seconds,
    spent_seconds,
)

HOPELESS_AFTER = 20
"""Stop after this many infeasible trials if none has succeeded; the cause is then unlikely to be a hyperparameter
value. Every further call of the search tries one more, in case the cause has been removed."""

REOPEN_SHARE = 0.1
"""Once the final comparison has begun, the search goes on only if this share of the budget is left: it was raised."""


class Phase(StrEnum):
    """What the study is busy with."""

    BASELINES = "baselines"
    SEARCH = "search"
    VALIDATION = "validation"
    COMPARISON = "comparison"
    DONE = "done"


@dataclass(frozen=True)
class Step:
    """What to do next: train `segment` of `trial`; or, with neither, wait for running segments (or, if DONE, stop)."""

    phase: Phase
    trial: Trial | None = None
    segment: Segment | None = None


def call_seed(study: Study, trials: Sequence[Trial]) -> int:
    """Seed of the next suggestion: depends on the study's seed and on how many segments were begun."""
    begun = sum(len(trial.segments) + (trial.open_segment is not None) for trial in trials)
    digest = hashlib.sha256(f"{study.spec.seeds.search}:{begun}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def plan_next(
    study: Study,
    strategy: Strategy,
    trials: Sequence[Trial],
    give_up_after: int = HOPELESS_AFTER,
    opening: Opening | None = None,
) -> Step:
    """The next thing to do, from the study's trials and from what may start.

    Args:
        study: The study.
        strategy: Chooses the trials of the search.
        trials: The study's, running ones included.
        give_up_after: See `patience`.
        opening: What one more job may be; None: anything.
    """
    spec, history = study.spec, History.of(study, trials)
    running = any(trial.open_segment is not None for trial in trials)
    first, *further = spec.seeds.training
    for baseline in spec.baselines:
        step = _full_length(
            history, baseline.configuration, first, "baseline", Phase.BASELINES,
            f"baseline {baseline.name}", baseline.name,
        )  # fmt: skip
        if step is not None and _is_due(study, step, opening):
            return step

    standing = Standing(history, strategy)
    remaining = spec.budget.device_seconds - _reserve(standing) - history.committed_seconds
    comparing = any(trial.purpose in ("confirmation", "random-search") for trial in trials)
    enough = REOPEN_SHARE * spec.budget.device_seconds if comparing else 0.0
    # The largest model may do what the smaller ones cannot: one run of it is made, by the validation, before the end.
    without_reward = runs_without_reward(study, trials)
    if remaining > enough and len(without_reward) < REWARDLESS_AFTER and not _hopeless(trials, give_up_after):
        proposal = _suggest(study, strategy, trials, remaining, opening)
        if proposal is None and not running and not is_timed(trials):
            # The price was a guess, and may be far too high: one segment is trained to know better.
            proposal = _suggest(study, strategy, trials, math.inf, opening)
        if proposal is not None:
            step = _step(study, trials, proposal, Phase.SEARCH)
            if _is_affordable(standing, step, remaining):
                return step if _is_admitted(study, step, opening) else Step(Phase.SEARCH)
    if any(is_search(trial.open_segment) for trial in trials if trial.purpose == "search"):
        return Step(Phase.SEARCH)
    if is_rewardless(study, without_reward):
        return Step(Phase.VALIDATION) if running else Step(Phase.DONE)

    step = _validate(standing)
    if step is not None:
        return step if _is_due(study, step, opening) else Step(step.phase)
    recommended = standing.recommended
    candidates = [(baseline.name, baseline.configuration) for baseline in spec.baselines]
    if recommended is not None:
        candidates.insert(0, ("recommended", recommended.configuration))
    for seed in further:
        for label, configuration in candidates:
            step = _full_length(
                history, configuration, seed, "confirmation", Phase.COMPARISON, f"{label}, seed {seed}", label
            )
            if step is not None:
                return step if _is_due(study, step, opening) else Step(step.phase)
    if recommended is not None and further:
        # After an extension every seed of the study may have had its part in the choice: one more judges it.
        runs = history.of_configuration(recommended.configuration)
        if not any(history.judges(trial) for trial in runs):
            seed = max(spec.seeds.training[-1], *(trial.seed for trial in runs)) + 1
            step = _full_length(
                history, recommended.configuration, seed, "confirmation", Phase.COMPARISON,
                f"recommended, seed {seed}", "recommended",
            )  # fmt: skip
            if step is not None:
                return step if _is_due(study, step, opening) else Step(step.phase)
    if spec.random_search and committed_seconds(trials, "random-search") < spent_seconds(trials):
        proposal = RandomSearch().suggest(study, trials, 1.0, spec.seeds.search)
        if proposal is not None:
            step = _step(study, trials, proposal, Phase.COMPARISON, "random-search")
            return step if _is_due(study, step, opening) else Step(step.phase)
    return Step(Phase.COMPARISON) if running else Step(Phase.DONE)


def _suggest(
    study: Study, strategy: Strategy, trials: Sequence[Trial], remaining: float, opening: Opening | None
) -> Proposal | None:
    """What the strategy wants next: of what may start now, if it can choose and wants any of that."""
    seed = call_seed(study, trials)

    def admits(model: str, cost_seconds: float) -> bool:
        devices = study.ladder[model].devices
        return opening is None or opening.admits(devices, cost_seconds / devices)

    if opening is not None and isinstance(strategy, Selective):
        proposal = strategy.suggest_among(study, trials, remaining, seed, admits)
        if proposal is not None:
            return proposal
    return strategy.suggest(study, trials, remaining, seed)


def _is_admitted(study: Study, step: Step, opening: Opening | None) -> bool:
    """Whether a segment that the strategy chose may begin now, or soon enough to wait for it."""
    return opening is None or opening.admits(*_size(study, step))


def _is_due(study: Study, step: Step, opening: Opening | None) -> bool:
    """Whether a segment that must be trained anyway may begin now, or be the next one that waits for its devices."""
    if opening is None or step.segment is None:
        return True
    return bool(opening.waits) or opening.fits(*_size(study, step))


def _size(study: Study, step: Step) -> tuple[int, float]:
    """Devices and expected seconds of a step's segment."""
    assert step.trial is not None
    assert step.segment is not None
    devices, cost = study.ladder[step.trial.model].devices, step.segment.suggestion.expected_cost_seconds
    return devices, math.inf if cost is None else cost / devices


def _reserve(standing: Standing) -> float:
    """Device-seconds held back for validation, within the budget's share and what is left.

    They are what the top k may still need on the target (the upper end of the estimate), of those as many as can be
    paid for; as long as nothing has finished there, the whole room if not even one can.
    """
    history = standing.history
    study, spec = history.study, history.study.spec
    target, horizon = study.ladder.target.name, spec.fidelity.horizon_prompts
    best = [(item.configuration, known) for item, known in standing.finalists]
    best = best or [(study.space.middle(), None)]
    best += best[-1:] * (spec.budget.top_k - len(best))
    costs = CostModel.fit(study, history.trials)
    budget = spec.budget.device_seconds
    room = min(spec.budget.validation_share * budget, max(0.0, budget - history.committed_seconds))
    held = 0.0
    for configuration, known in best:
        done = 0 if known is None else _planned_prompts(known)
        if done < horizon:
            needed = costs.estimate(configuration, target, done, horizon).high
            if held + needed <= room:
                held += needed
    secured = any(_planned_prompts(trial) >= horizon for trial in first_seed_on_target(history).values())
    return held if held or secured else room


def _planned_prompts(trial: Trial) -> int:
    """Prompts that a trial has consumed, or will have when its running segment ends."""
    running = trial.open_segment
    return trial.kept_prompts if running is None else running.stop_step * trial.prompts_per_step


def is_search(segment: Segment | None) -> bool:
    """Whether an open segment was chosen by the strategy, and is not a validation."""
    return segment is not None and segment.suggestion.source != VALIDATION


def patience(trials: Sequence[Trial]) -> int:
    """Infeasible trials after which one call of the search gives up, if it finds the study in this state."""
    ended = sum(trial.purpose == "search" and bool(trial.segments) for trial in trials)
    return max(HOPELESS_AFTER, ended + 1)


def _hopeless(trials: Sequence[Trial], give_up_after: int) -> bool:
    """Whether every search trial so far was infeasible, and there were many."""
    states = [trial.state for trial in trials if trial.purpose == "search" and trial.segments]
    return len(states) >= give_up_after and all(state is TrialState.INFEASIBLE for state in states)


def is_timed(trials: Sequence[Trial]) -> bool:
    """Whether the cost model rests on a measurement."""
    results = [result for trial in trials for result in trial.segments]
    return any(result.outcome not in (Outcome.INFEASIBLE, Outcome.LOST) for result in results)


def _is_affordable(standing: Standing, step: Step, remaining: float) -> bool:
    """Whether a step of the search may begin, so that the budget is overspent by one segment at most.

    Alone it must fit what is left, unless its price is a guess or there is nothing yet that could be validated instead.
    Beside running segments it must fit even if each of them costs as much as it may.
    """
    assert step.trial is not None
    assert step.segment is not None
    study, trials = standing.history.study, standing.history.trials
    running = [(trial, trial.open_segment) for trial in trials if trial.purpose == "search" and trial.open_segment]
    needed = step.segment.suggestion.expected_cost_seconds or 0.0
    if not running:
        return needed <= remaining or not is_timed(trials) or not standing.finalists
    costs = CostModel.fit(study, trials)

    def excess(trial: Trial, segment: Segment) -> float:
        stop_prompts = segment.stop_step * trial.prompts_per_step
        most = costs.estimate(trial.configuration, trial.model, trial.kept_prompts, stop_prompts).high
        return max(0.0, most - (segment.suggestion.expected_cost_seconds or 0.0))

    return needed + excess(step.trial, step.segment) + sum(excess(*one) for one in running) <= remaining


def _validate(standing: Standing) -> Step | None:
    """Bring the best-ranked configurations to full length on the target, as far as the budget allows, at least one."""
    history = standing.history
    study, spec, trials = history.study, history.study.spec, history.trials
    target, horizon = study.ladder.target.name, spec.fidelity.horizon_prompts
    tried = first_seed_on_target(history)
    running = any(trial.open_segment is not None for trial in tried.values())
    finished = any(trial.final is not None for trial in tried.values())
    tries = _validations(trials)
    if finished and tries >= spec.budget.top_k:
        return Step(Phase.VALIDATION) if running else None
    secured = running or finished or tries >= spec.budget.top_k
    remaining = spec.budget.device_seconds - history.committed_seconds
    costs = CostModel.fit(study, trials)
    for item, known in standing.finalists:
        if known is not None and known.state not in (TrialState.PAUSED, TrialState.LOST):
            continue
        done = 0 if known is None else known.kept_prompts
        cost = costs.estimate(item.configuration, target, done, horizon).seconds
        if cost > remaining and (secured or remaining <= 0):
            continue
        suggestion = Suggestion(
            source=VALIDATION,
            explanation=f"among the {spec.budget.top_k} best by posterior mean at the target ({item.mean:.3f}); "
            "trained to full length to be sure",
            expected_cost_seconds=cost,
        )
        return _step(study, trials, Proposal(item.configuration, target, horizon, suggestion), Phase.VALIDATION)
    return Step(Phase.VALIDATION) if running else None


def _validations(trials: Sequence[Trial]) -> int:
    """Runs of the present validation: those committed since the strategy's last one, but for the lost ones."""
    results = [result for trial in trials if trial.purpose == "search" for result in trial.segments]
    chosen = [result.committed for result in results if result.segment.suggestion.source != VALIDATION]
    return sum(result.committed > max(chosen, default=0) and result.outcome is not Outcome.LOST for result in results)


def _full_length(
    history: History,
    configuration: Configuration,
    seed: int,
    purpose: Purpose,
    phase: Phase,
    why: str,
    label: str,
) -> Step | None:
    """Train a configuration on the target over the full horizon, unless a baseline or confirmation has done so.

    A run that infrastructure failures ended is tried again.
    """
    study, trials = history.study, history.trials
    target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
    same = [
        trial
        for trial in history.of_configuration(configuration)
        if trial.seed == seed and trial.purpose in (purpose, "baseline", "confirmation")
    ]
    if any(trial.state is not TrialState.LOST for trial in same):
        return None
    cost = CostModel.fit(study, trials).estimate(configuration, target, 0, horizon).seconds
    suggestion = Suggestion(source=str(phase), explanation=why, expected_cost_seconds=cost)
    trial = same[0] if same else study.new_trial(_next_number(trials), configuration, target, seed, purpose, label)
    return Step(phase, trial, study.next_segment(trial, horizon, suggestion))


def _next_number(trials: Sequence[Trial]) -> int:
    """The number of the next trial; a ledger that has lost trials has gaps."""
    return max((trial.number + 1 for trial in trials), default=0)


def _step(study: Study, trials: Sequence[Trial], proposal: Proposal, phase: Phase, purpose: Purpose = "search") -> Step:
    seed = study.spec.seeds.training[0] if proposal.seed is None else proposal.seed
    new = study.new_trial(_next_number(trials), proposal.configuration, proposal.model, seed, purpose)
    trial = next((trial for trial in trials if trial.key == new.key), new)
    suggestion = proposal.suggestion
    if suggestion.expected_cost_seconds is None:
        # Not every strategy knows prices; without one, a running segment would not count against the budget.
        cost = CostModel.fit(study, trials).estimate(
            proposal.configuration, proposal.model, trial.kept_prompts, proposal.stop_prompts
        )
        suggestion = suggestion.model_copy(update={"expected_cost_seconds": cost.seconds})
    segment = study.next_segment(trial, proposal.stop_prompts, suggestion)
    floors = tuple(
        ScoreFloor(step=steps_at(prompts, trial.prompts_per_step), score=score) for prompts, score in proposal.floors
    )
    return Step(phase, trial, segment.model_copy(update={"floors": floors}))
