"""The main job: ask for the next segment, train it, remember it; then validate, compare and recommend.

What to do next is a pure function of the study and its trials (`plan_next`), so a search that was interrupted at any
moment goes on as if nothing had happened: open segments are trained again, committed ones are never repeated.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from statistics import fmean

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import Proposal, RandomSearch, Recommendation, Selective, Strategy, load_strategy
from jfhpo_core.run.dispatch import Dispatcher, Event, Streamed, Suspended
from jfhpo_core.run.scheduler import Load, Opening
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.history import History
from jfhpo_core.study.models import steps_at
from jfhpo_core.study.resolved import Study, base_evaluations
from jfhpo_core.study.trial import (
    VALIDATION,
    Configuration,
    FailureKind,
    Outcome,
    Purpose,
    ScoreFloor,
    Segment,
    StepRecord,
    Suggestion,
    Trial,
    TrialState,
    committed_seconds,
    configuration_key,
    spent_seconds,
)

POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)

HOPELESS_AFTER = 20
"""Stop after this many infeasible trials if none has succeeded; the cause is then unlikely to be a hyperparameter
value. Every further call of the search tries one more, in case the cause has been removed."""

PAUSE_SHARE = 0.1
PAUSE_SECONDS = 60.0
"""Running segments have to be saved this share of the wall-clock limit before it, or this long if that is shorter."""

LOST_IN_A_ROW = 3
"""The search gives up when so many trials in a row were lost to infrastructure failures, each after its retries."""

REOPEN_SHARE = 0.1
"""Once the final comparison has begun, the search goes on only if this share of the budget is left: it was raised."""


ENDED_EARLY = (TrialState.STOPPED, TrialState.INFEASIBLE)
"""States of a run that will never reach full length."""


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


@dataclass(frozen=True)
class Progress:
    """A snapshot for displays.

    Attributes:
        live: Latest step record of each running trial.
        load: How busy the devices are, and which trials wait for some.
        spent_seconds: Device-seconds charged to the search budget.
        elapsed_seconds: Wall-clock (or simulated) seconds of this call.
    """

    study: Study
    phase: Phase
    trials: Sequence[Trial]
    live: dict[str, StepRecord]
    load: Load
    spent_seconds: float
    elapsed_seconds: float


@dataclass(frozen=True)
class Comparison:
    """One row of the final table: a configuration on the target at full length, over the training seeds.

    Attributes:
        score: Mean final held-out score of the runs that reached full length; NaN if none did.
        standard_error: Of the mean: evaluation noise and, with two seeds or more, the spread between seeds.
        seeds: Runs that reached full length, one per seed.
        seconds: Device-seconds charged for all runs of the row.
        unfinished: Why further runs ended before full length, one reason each. They have no score.
    """

    label: str
    configuration: Configuration
    score: float
    standard_error: float
    seeds: int
    seconds: float
    unfinished: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a study.

    Attributes:
        recommended: The recommended configuration, with the model's belief about it.
        target_trial: Of its runs on the target at full length the one that scored best, whatever its seed; its weights
            are the ones to use, and its score flatters it. None if no run reached full length.
        confirmed: Its runs on seeds that had no part in choosing it, as a row of the table; None without one.
        rows: Final table: the recommendation first, then the baselines, then random search.
        complete: False if a wall-clock limit or an interruption ended the call before the study was done.
        note: Why the call ended before the study was done, what is lost by it, and what to do; empty if it is complete.
    """

    study: Study
    trials: Sequence[Trial]
    recommended: Recommendation | None
    target_trial: Trial | None
    rows: tuple[Comparison, ...]
    spent_seconds: float
    complete: bool
    note: str = ""
    confirmed: Comparison | None = None


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

    standing = _Standing(history, strategy)
    remaining = spec.budget.device_seconds - _reserve(standing) - history.committed_seconds
    comparing = any(trial.purpose in ("confirmation", "random-search") for trial in trials)
    enough = REOPEN_SHARE * spec.budget.device_seconds if comparing else 0.0
    if remaining > enough and not _hopeless(trials, give_up_after):
        proposal = _suggest(study, strategy, trials, remaining, opening)
        if proposal is None and not running and not _is_timed(trials):
            # The price was a guess, and may be far too high: one segment is trained to know better.
            proposal = _suggest(study, strategy, trials, math.inf, opening)
        if proposal is not None:
            step = _step(study, trials, proposal, Phase.SEARCH)
            if _is_affordable(standing, step, remaining):
                return step if _is_admitted(study, step, opening) else Step(Phase.SEARCH)
    if any(_is_search(trial.open_segment) for trial in trials if trial.purpose == "search"):
        return Step(Phase.SEARCH)

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


def _reserve(standing: _Standing) -> float:
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
    secured = any(_planned_prompts(trial) >= horizon for trial in _first_seed_on_target(history).values())
    return held if held or secured else room


def _planned_prompts(trial: Trial) -> int:
    """Prompts that a trial has consumed, or will have when its running segment ends."""
    running = trial.open_segment
    return trial.kept_prompts if running is None else running.stop_step * trial.prompts_per_step


def _first_seed_on_target(history: History) -> dict[str, Trial]:
    """The search's trials on the target with the first training seed, recipes among them, by configuration key."""
    seed = history.study.spec.seeds.training[0]
    return {configuration_key(trial.configuration): trial for trial in history.on_target if trial.seed == seed}


def _is_search(segment: Segment | None) -> bool:
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


def _is_timed(trials: Sequence[Trial]) -> bool:
    """Whether the cost model rests on a measurement."""
    results = [result for trial in trials for result in trial.segments]
    return any(result.outcome not in (Outcome.INFEASIBLE, Outcome.LOST) for result in results)


def _is_affordable(standing: _Standing, step: Step, remaining: float) -> bool:
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
        return needed <= remaining or not _is_timed(trials) or not standing.finalists
    costs = CostModel.fit(study, trials)

    def excess(trial: Trial, segment: Segment) -> float:
        stop_prompts = segment.stop_step * trial.prompts_per_step
        most = costs.estimate(trial.configuration, trial.model, trial.kept_prompts, stop_prompts).high
        return max(0.0, most - (segment.suggestion.expected_cost_seconds or 0.0))

    return needed + excess(step.trial, step.segment) + sum(excess(*one) for one in running) <= remaining


def _validate(standing: _Standing) -> Step | None:
    """Bring the best-ranked configurations to full length on the target, as far as the budget allows, at least one."""
    history = standing.history
    study, spec, trials = history.study, history.study.spec, history.trials
    target, horizon = study.ladder.target.name, spec.fidelity.horizon_prompts
    tried = _first_seed_on_target(history)
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


@dataclass(frozen=True)
class _Standing:
    """How a study stands: its history and what follows from the strategy's ranking, each worked out once."""

    history: History
    strategy: Strategy

    @cached_property
    def ranked(self) -> list[Recommendation]:
        """See `rank`."""
        history = self.history
        evidence = {trial.key for trial in history.search}
        ranked = self.strategy.rank(
            history.study,
            [trial for trial in history.trials if trial.purpose in ("search", "baseline") or trial.key in evidence],
        )
        known = {configuration_key(item.configuration) for item in ranked}
        for recipe in history.recipes.values():
            finals = history.final(recipe)
            if finals and configuration_key(recipe) not in known:
                score = fmean(final.score for final in finals)
                error = math.sqrt(sum(final.standard_error**2 for final in finals)) / len(finals)
                place = next((index for index, item in enumerate(ranked) if item.mean < score), len(ranked))
                ranked.insert(place, Recommendation(recipe, score, error))
        return ranked

    @cached_property
    def recommended(self) -> Recommendation | None:
        """See `recommend`."""
        finished = {configuration_key(trial.configuration) for trial in self.history.finished}
        return next((item for item in self.ranked if configuration_key(item.configuration) in finished), None)

    @cached_property
    def finalists(self) -> list[tuple[Recommendation, Trial | None]]:
        """The best-ranked configurations, as many as are validated, and what was trained of them on the target.

        Those that a rule stopped or that failed on the target are passed over.
        """
        on_target = _first_seed_on_target(self.history)
        ranked = ((item, on_target.get(configuration_key(item.configuration))) for item in self.ranked)
        ruined = (TrialState.STOPPED, TrialState.INFEASIBLE)
        left = [(item, known) for item, known in ranked if known is None or known.state not in ruined]
        return left[: self.history.study.spec.budget.top_k]


def recommend(study: Study, strategy: Strategy, trials: Sequence[Trial]) -> Recommendation | None:
    """The best-ranked configuration, recipes among them, whose run on the target is complete; None if there is none."""
    return _Standing(History.of(study, trials), strategy).recommended


def rank(study: Study, strategy: Strategy, trials: Sequence[Trial]) -> list[Recommendation]:
    """The strategy's ranking without what only judges it (see `History`).

    A recipe that the strategy itself does not rank has its place by its measured score.
    """
    return _Standing(History.of(study, trials), strategy).ranked


@dataclass
class _WallClock:
    """The time that one call of `run_search` has.

    Args:
        limit_seconds: `budget.wall_seconds`; infinite without a limit.
    """

    limit_seconds: float
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    over: bool = False
    """Whether nothing more is begun: what would come next does not fit."""

    @property
    def usable_seconds(self) -> float:
        """Time from the beginning until running segments have to be saved."""
        if math.isinf(self.limit_seconds):
            return math.inf
        return self.limit_seconds - min(PAUSE_SECONDS, PAUSE_SHARE * self.limit_seconds)

    @property
    def deadline(self) -> float | None:
        """The same as seconds since the epoch, for workers elsewhere; None without a limit."""
        return None if math.isinf(self.limit_seconds) else self.began_at + self.usable_seconds

    @property
    def spent(self) -> bool:
        """Whether the limit is reached."""
        return time.monotonic() - self.began > self.limit_seconds

    def has(self, seconds: float) -> bool:
        """Whether something that takes so long can still be begun; once it cannot, nothing can in this call."""
        self.over = self.over or time.monotonic() - self.began + seconds > self.usable_seconds
        return not self.over


@dataclass
class _Run:
    """State of one call of `run_search`; all of it can be rebuilt from the ledger."""

    study: Study
    ledger: Ledger
    dispatcher: Dispatcher
    strategy: Strategy
    began: float
    clock: _WallClock
    in_flight: dict[str, float] = field(default_factory=dict)
    """When each running trial was submitted, by the monotonic clock."""
    suspended: dict[str, int] = field(default_factory=dict)
    """Step at which each trial was saved whose segment this call did not end."""
    submitted: int = 0
    committed: int = 0
    give_up_after: int = HOPELESS_AFTER
    live: dict[str, StepRecord] = field(default_factory=dict)
    lost_in_a_row: int = 0
    refused: tuple[int, int] | None = None

    def submit(self, trial: Trial, segment: Segment) -> None:
        bases = base_evaluations(self.ledger.trials())
        history = self.ledger.step_records(trial.key)
        environment = self.ledger.environment(trial.key)
        job = self.study.job(trial, segment, history, bases.get(trial.model), environment)
        self.dispatcher.submit(job.model_copy(update={"deadline": self.clock.deadline}))
        self.in_flight[trial.key] = time.monotonic()
        self.submitted += 1

    def fits(self, trial: Trial) -> bool:
        """Whether there is time to start a trial and to train a step of it: what is then cut off is saved.

        The first of a call is begun whatever the price is taken to be: a wrong one must not end every call at once.
        """
        trials = self.ledger.trials()
        if math.isinf(self.clock.limit_seconds) or not self.submitted or not _is_timed(trials):
            return self.clock.has(0.0)
        costs, done = CostModel.fit(self.study, trials), trial.kept_prompts
        least = costs.estimate(trial.configuration, trial.model, done, done + trial.prompts_per_step).seconds
        return self.clock.has(least / self.study.ladder[trial.model].devices)

    def note(self) -> str:
        """Why the wall-clock limit ended the call, what it has cut off, and what to do."""
        trials = {trial.key: trial for trial in self.ledger.trials()}
        saved = [
            f"#{trials[key].number} at step {step} of {trials[key].total_steps}" for key, step in self.suspended.items()
        ]
        lost = [f"#{trials[key].number} ({time.monotonic() - since:.0f} s)" for key, since in self.in_flight.items()]
        text = f"The wall-clock limit of {self.clock.limit_seconds:.6g} s (budget.wall_seconds) ended this call."
        if saved:
            text += f" Saved, to go on from there: {', '.join(saved)}."
        if lost:
            text += (
                f" Lost since their last checkpoint: {', '.join(lost)}; trainer {self.study.spec.trainer.name!r} did "
                "not reach a point where it could save them."
            )
        if not self.committed and not saved:
            text += (
                " So nothing was gained, and the same limit may be too short again: raise it, or have trials saved "
                "more often by more fidelity.rungs."
            )
        return f"{text} Run the same command to continue."


def run_search(
    study: Study,
    ledger: Ledger,
    dispatcher: Dispatcher,
    on_progress: Callable[[Progress], None] | None = None,
    strategy: Strategy | None = None,
) -> SearchResult:
    """Run or continue a study until it is done.

    Args:
        study: A resolved study.
        ledger: Where it is kept; this process must be its only writer.
        dispatcher: Where its trials run. The caller closes it.
        on_progress: Called before the first event, with the study as it stood, and after every further one.
        strategy: None uses the one that the study names.

    Raises:
        LedgerError: The ledger holds another study of this name.
    """
    ledger.open(study.spec)
    clock = _WallClock(study.spec.budget.wall_seconds or math.inf)
    run = _Run(study, ledger, dispatcher, strategy or load_strategy(study), dispatcher.now(), clock)
    run.give_up_after = patience(ledger.trials())
    for trial in ledger.trials():
        if trial.open_segment is not None:
            run.submit(trial, trial.open_segment)
    try:
        while True:
            phase = _fill(run)
            if on_progress is not None:
                trials = ledger.trials()
                spent, elapsed = spent_seconds(trials), dispatcher.now() - run.began
                on_progress(Progress(study, phase, trials, dict(run.live), dispatcher.load(), spent, elapsed))
            if clock.spent:
                for event in dispatcher.wait(0):
                    _absorb(run, event)
                for key in run.in_flight:
                    dispatcher.cancel(key)
            if clock.spent or not run.in_flight:
                complete = phase is Phase.DONE and not run.suspended
                if complete or clock.over or clock.spent:
                    note = "" if complete else run.note()
                    return conclude(study, ledger.trials(), run.strategy, complete, note)
            for event in dispatcher.wait(POLL_SECONDS):
                _absorb(run, event)
    except KeyboardInterrupt:
        # What has finished in the meantime need not be trained again.
        for event in dispatcher.wait(0):
            _absorb(run, event)
        raise


def _fill(run: _Run) -> Phase:
    """Begin segments until all devices are busy or there is nothing to begin."""
    while True:
        trials = run.ledger.trials()
        opening = run.dispatcher.opening()
        state = (sum(len(trial.segments) for trial in trials), len(run.dispatcher.load().waiting))
        # What was found not to fit is not asked for again before something has ended or a waiting job has started.
        if opening is None or (run.in_flight and state == run.refused):
            return _phase(trials)
        paused = next((trial for trial in trials if trial.key in run.suspended), None)
        if paused is not None and paused.open_segment is not None and run.fits(paused):
            del run.suspended[paused.key]
            run.submit(paused, paused.open_segment)
            continue
        if run.clock.over:
            return _phase(trials)
        step = plan_next(run.study, run.strategy, trials, run.give_up_after, opening if run.in_flight else None)
        if step.trial is None or step.segment is None:
            run.refused = state
            return step.phase
        if not run.fits(step.trial):
            return step.phase
        run.ledger.begin(step.trial, step.segment)
        run.submit(step.trial, step.segment)


def _phase(trials: Sequence[Trial]) -> Phase:
    """The phase that the newest running segment belongs to."""
    running = [trial for trial in trials if trial.open_segment is not None]
    if any(trial.purpose in ("confirmation", "random-search") for trial in running):
        return Phase.COMPARISON
    if running and not any(_is_search(trial.open_segment) for trial in running):
        return Phase.VALIDATION
    return Phase.BASELINES if all(trial.purpose == "baseline" for trial in running) else Phase.SEARCH


def _absorb(run: _Run, event: Event) -> None:
    if isinstance(event, Streamed):
        run.ledger.stream(event.key, event.records)
        if event.records:
            run.live[event.key] = event.records[-1]
        return
    if isinstance(event, Suspended):
        if run.in_flight.pop(event.key, None) is not None:
            run.suspended[event.key] = event.step
            run.live.pop(event.key, None)
        return
    trials = run.ledger.trials()
    opened = {trial.key: trial.open_segment.index for trial in trials if trial.open_segment is not None}
    if opened.get(event.key) != event.result.segment.index:
        # Delivered twice, or by a worker that was given up for dead: the segment counts once.
        logger.warning("trial %s: a result of segment %d came late", event.key, event.result.segment.index)
        return
    if event.result.failure is FailureKind.REWARD:
        # No hyperparameter is to blame. The segment stays open, so a mended reward is tried by it first.
        raise SpecError(f"{event.result.message}; nothing is charged for it: correct it and run the same command again")
    committed = 1 + max((result.committed for trial in trials for result in trial.segments), default=0)
    noted = {"committed": committed, "waiting_seconds": event.waiting_seconds}
    run.ledger.commit(event.key, event.result.model_copy(update=noted), event.records)
    run.committed += 1
    run.in_flight.pop(event.key, None)
    run.live.pop(event.key, None)
    run.lost_in_a_row = run.lost_in_a_row + 1 if event.result.outcome is Outcome.LOST else 0
    if run.lost_in_a_row >= LOST_IN_A_ROW:
        raise InfrastructureError(
            f"{LOST_IN_A_ROW} trials in a row were lost to infrastructure failures, the last one by: "
            f"{event.result.message}; nothing that was finished is lost: mend the cause and run the same command again"
        )


def conclude(study: Study, trials: Sequence[Trial], strategy: Strategy, complete: bool, note: str = "") -> SearchResult:
    """Recommendation and final table, from the trials alone; see `SearchResult` for `complete` and `note`."""
    history = History.of(study, trials)
    recommended = _Standing(history, strategy).recommended
    rows: list[Comparison] = []
    target_trial: Trial | None = None
    confirmed: Comparison | None = None
    if recommended is not None:
        mine = _runs(history, recommended.configuration)
        target_trial = max(
            (trial for trial in mine if trial.final is not None),
            key=lambda trial: (trial.final.score if trial.final else 0.0, -trial.number),
            default=None,
        )
        runs = history.of_configuration(recommended.configuration)
        clean = [trial for trial in runs if history.judges(trial) and trial.final is not None]
        confirmed = _compare("confirmed", recommended.configuration, clean) if clean else None
        rows.append(_compare("recommended", recommended.configuration, mine))
    for baseline in study.spec.baselines:
        mine = _runs(history, baseline.configuration)
        if mine:
            rows.append(_compare(baseline.name, baseline.configuration, mine))
    random = [trial for trial in trials if trial.purpose == "random-search" and trial.final is not None]
    if random:
        best = max(random, key=lambda trial: trial.final.score if trial.final else 0.0)
        rows.append(_compare("random search", best.configuration, [best]))
    return SearchResult(
        study=study,
        trials=tuple(trials),
        recommended=recommended,
        target_trial=target_trial,
        confirmed=confirmed,
        rows=tuple(rows),
        spent_seconds=spent_seconds(trials),
        complete=complete,
        note=note,
    )


def _runs(history: History, configuration: Configuration) -> list[Trial]:
    """The runs of a configuration on the target that have ended, one per seed; one that reached full length, if any."""
    by_seed: dict[int, Trial] = {}
    for trial in history.of_configuration(configuration):
        # Further seeds by which the search chose are no part of the comparison: baselines have none of them.
        compared = trial.seed in history.study.spec.seeds.training
        ended = trial.final is not None or (trial.state in ENDED_EARLY and trial.purpose != "search")
        if compared and ended:
            known = by_seed.setdefault(trial.seed, trial)
            by_seed[trial.seed] = trial if known.final is None else known
    return list(by_seed.values())


def _compare(label: str, configuration: Configuration, trials: Sequence[Trial]) -> Comparison:
    """Mean and standard error over the trials that reached full length; what a shorter run scored is not comparable."""
    finals = [trial.final for trial in trials if trial.final is not None]
    count = len(finals)
    score, variance = math.nan, math.nan
    if finals:
        score = sum(evaluation.score for evaluation in finals) / count
        variance = sum(evaluation.standard_error**2 for evaluation in finals) / count**2
    if count > 1:
        between = sum((evaluation.score - score) ** 2 for evaluation in finals) / (count * (count - 1))
        variance = max(variance, between)
    seconds = sum(trial.charge_seconds for trial in trials)
    unfinished = tuple(_ending(trial) for trial in trials if trial.final is None)
    return Comparison(label, configuration, score, variance**0.5, count, seconds, unfinished)


def _ending(trial: Trial) -> str:
    """Why a run ended before full length."""
    last = trial.segments[-1]
    reason = last.decision.explain() if last.decision is not None else last.message or str(trial.state)
    return f"seed {trial.seed} ended at step {trial.step} of {trial.total_steps}: {reason}"
