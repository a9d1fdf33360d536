"""The main job: ask `planning` for the next segment, train it, remember it, until nothing is left to be done."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import Strategy, load_strategy
from jfhpo_core.run.dispatch import Dispatcher, Event, Streamed, Suspended
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.run.planning import (
    HOPELESS_AFTER,
    Phase,
    is_search,
    is_timed,
    patience,
    plan_next,
)
from jfhpo_core.run.scheduler import Load
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.resolved import Study, base_evaluations
from jfhpo_core.study.trial import (
    FailureKind,
    Outcome,
    Segment,
    StepRecord,
    Trial,
    spent_seconds,
)

POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)

PAUSE_SHARE = 0.1
PAUSE_SECONDS = 60.0
"""Running segments have to be saved this share of the wall-clock limit before it, or this long if that is shorter."""

LOST_IN_A_ROW = 3
"""The search gives up when so many trials in a row were lost to infrastructure failures, each after its retries."""


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
    refused: tuple[int, int, int] | None = None

    def submit(self, trial: Trial, segment: Segment) -> None:
        bases = base_evaluations(self.ledger.trials())
        history = self.ledger.step_records(trial.key)
        environment = self.ledger.environment(trial.key)
        job = self.study.job(trial, segment, history, bases.get(trial.model), environment)
        self.in_flight[trial.key] = time.monotonic()
        self.dispatcher.submit(job.model_copy(update={"deadline": self.clock.deadline}))
        self.submitted += 1

    def fits(self, trial: Trial) -> bool:
        """Whether there is time to start a trial and to train a step of it: what is then cut off is saved.

        The first of a call is begun whatever the price is taken to be: a wrong one must not end every call at once.
        """
        trials = self.ledger.trials()
        if math.isinf(self.clock.limit_seconds) or not self.submitted or not is_timed(trials):
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
        on_progress: Called before the first event, with the study as it stood, after every further one, and while a
            trial trains in this very process.
        strategy: None uses the one that the study names.

    Raises:
        LedgerError: The ledger holds another study of this name.
    """
    ledger.open(study.spec)
    clock = _WallClock(study.spec.budget.wall_seconds or math.inf)
    run = _Run(study, ledger, dispatcher, strategy or load_strategy(study), dispatcher.now(), clock)
    run.give_up_after = patience(ledger.trials())

    def show(phase: Phase) -> None:
        if on_progress is not None:
            trials = ledger.trials()
            spent, elapsed = spent_seconds(trials), dispatcher.now() - run.began
            load = dispatcher.load()
            opened = {trial.key for trial in trials if trial.open_segment is not None}
            # What was open when this call began, and has not been submitted yet.
            waiting = {**dict.fromkeys(opened - run.in_flight.keys(), math.inf), **load.waiting}
            load = replace(load, waiting=waiting)
            on_progress(Progress(study, phase, trials, dict(run.live), load, spent, elapsed))

    def hear(event: Streamed) -> None:
        _absorb(run, event)
        show(_phase(ledger.trials()))

    dispatcher.listen(hear)
    for trial in ledger.trials():
        if trial.open_segment is not None:
            run.submit(trial, trial.open_segment)
    try:
        while True:
            phase = _fill(run)
            show(phase)
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
        load = run.dispatcher.load()
        state = (sum(len(trial.segments) for trial in trials), len(load.waiting), load.busy)
        # What was found not to fit is not asked for again before something has ended, a waiting job has started, or
        # devices were given back by a job whose checkpoint is being stored.
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
    if running and not any(is_search(trial.open_segment) for trial in running):
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
        numbers = {trial.key: f"#{trial.number}" for trial in trials}
        name = numbers.get(event.key, event.key)
        logger.warning("trial %s: a result of segment %d came late", name, event.result.segment.index)
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
