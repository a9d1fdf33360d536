from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jfhpo_core.errors import InfrastructureError, LedgerError, SpecError, TrialFailure
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import Proposal, RandomSearch, Recommendation, Strategy, fresh_configurations
from jfhpo_core.report.findings import verdict
from jfhpo_core.run.dispatch import Event, Finished, InlineDispatcher, Streamed
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.run.planning import HOPELESS_AFTER, Phase, call_seed, plan_next
from jfhpo_core.run.search import LOST_IN_A_ROW, Progress, run_search
from jfhpo_core.run.standing import REWARDLESS_AFTER, recommend
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import (
    VALIDATION,
    FailureKind,
    Outcome,
    Trial,
    TrialState,
    committed_seconds,
    configuration_key,
    spent_seconds,
)
from jfhpo_core.trainers import Job
from jfhpo_core.trainers.base import Observer, TrainingResult
from jfhpo_core.trainers.simulated import SimulatedTrainer
from tests.studies import BECAUSE, evaluation, result, simulated_study

TWO_SEEDS = {"search": 0, "training": [0, 1]}


@dataclass(frozen=True)
class Climb:
    """Walks a fixed plan of three configurations over models and rungs, so that outcomes depend on nothing else."""

    name: ClassVar[str] = "climb"
    plan: tuple[tuple[int, str, int], ...] = (
        (0, "small", 160),
        (1, "small", 160),
        (2, "small", 160),
        (0, "small", 480),
        (1, "medium", 320),
        (1, "small", 320),
        (0, "large", 160),
        (0, "large", 320),
    )

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        configurations = fresh_configurations(study, (), 0, 3)
        known = {
            (configuration_key(trial.configuration), trial.model): trial
            for trial in trials
            if trial.purpose == "search"
        }
        for index, model, level in self.plan:
            trial = known.get((configuration_key(configurations[index]), model))
            if trial is not None and trial.state is TrialState.RUNNING:
                continue
            if trial is None or (trial.state is TrialState.PAUSED and trial.step * 16 < level):
                return Proposal(configurations[index], model, level, BECAUSE)
        return None

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        return [Recommendation(item, 0.5, 0.1) for item in fresh_configurations(study, (), 0, 2)]


class Interruption(Exception):  # noqa: N818
    """Stands for Ctrl-C."""


class EventsOnly(InlineDispatcher):
    """Tells nothing of a job while it runs."""

    def listen(self, hear: Callable[[Streamed], None]) -> None:
        pass


def search(study: Study, slots: int = 1, strategy: Strategy | None = None) -> tuple[SearchResult, MemoryLedger]:
    ledger = MemoryLedger()
    return run_search(study, ledger, InlineDispatcher(slots), strategy=strategy), ledger


def interrupted_search(
    study: Study, slots: int, every: int, strategy: Strategy | None = None, at_submit: bool = False
) -> tuple[SearchResult, int]:
    """Run a study to its end while it is interrupted after every so many events (or submissions), and started again.

    Returns the result of the last call and the number of interruptions.
    """
    ledger = MemoryLedger()
    interruptions = 0
    while True:
        counts = {"events": -1, "submissions": 0}

        def count_event(progress: Progress, counts: dict[str, int] = counts) -> None:
            counts["events"] += 1
            if not at_submit and counts["events"] == every:
                raise Interruption

        def count_submission(job: Job, counts: dict[str, int] = counts) -> None:
            trial = next(trial for trial in ledger.trials() if trial.key == job.trial_key)
            assert len(trial.segments) == job.segment.index, "a committed segment is trained again"
            counts["submissions"] += 1
            if at_submit and counts["submissions"] > every:
                raise Interruption

        try:
            dispatcher = EventsOnly(slots, on_submit=count_submission)
            return run_search(study, ledger, dispatcher, on_progress=count_event, strategy=strategy), interruptions
        except Interruption:
            interruptions += 1
            assert interruptions < 500, "the study makes no progress"


def sources(outcome: SearchResult) -> list[str]:
    """Who suggested each finished segment."""
    return [part.segment.suggestion.source for trial in outcome.trials for part in trial.segments]


def substance(trial: Trial) -> dict[str, Any]:
    """What of a trial does not depend on the order in which parallel trials ended.

    That order decides who scores the base model, and what the cost model knew when a segment was planned.
    """
    data = trial.model_dump(exclude={"number", "segments"})
    data["segments"] = [
        done.model_dump(
            exclude={
                "committed": True,
                "seconds": True,
                "evaluation_seconds": True,
                "evaluations": True,
                "segment": {"suggestion"},
            }
        )
        for done in trial.segments
    ]
    data["evaluations"] = [item.model_dump() for item in trial.evaluations if item.step > 0]
    return data


# --- the whole study ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_whole_study_completes(tmp_path: Path, slots: int) -> None:
    study = simulated_study(tmp_path, seeds=TWO_SEEDS)
    outcome, ledger = search(study, slots)
    assert outcome.complete
    assert outcome.trials == tuple(ledger.trials())
    assert all(trial.open_segment is None for trial in outcome.trials)
    assert outcome.recommended is not None
    assert outcome.target_trial is not None
    assert outcome.target_trial.final is not None
    assert outcome.target_trial.model == "large"
    assert outcome.target_trial.configuration == outcome.recommended.configuration
    assert [row.label for row in outcome.rows] == ["recommended", "recipe"]
    assert outcome.rows[0].score > outcome.rows[1].score + 3 * outcome.rows[1].standard_error


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("strategy", [RandomSearch(), Climb()])
def test_the_budget_is_kept_within_one_segment_per_slot(tmp_path: Path, slots: int, strategy: Strategy) -> None:
    study = simulated_study(tmp_path, budget={"trial_seconds": 200, "max_parallel": slots})
    outcome, _ = search(study, slots, strategy)
    longest = max(done.charge_seconds for trial in outcome.trials for done in trial.segments)
    assert outcome.spent_seconds == pytest.approx(spent_seconds(outcome.trials))
    assert outcome.spent_seconds <= 200 + slots * longest


def test_a_larger_budget_continues_a_finished_study(tmp_path: Path) -> None:
    ledger = MemoryLedger()
    small, large = (
        simulated_study(tmp_path, budget={"trial_seconds": seconds, "max_parallel": 1}) for seconds in (100, 300)
    )
    first = run_search(small, ledger, InlineDispatcher())
    second = run_search(large, ledger, InlineDispatcher())
    assert second.spent_seconds > first.spent_seconds + 100
    assert [trial.key for trial in second.trials[: len(first.trials)]] == [trial.key for trial in first.trials]


@pytest.mark.slow
def test_a_larger_budget_is_searched_on_after_validation(tmp_path: Path) -> None:
    ledger = MemoryLedger()
    small, large = (
        simulated_study(tmp_path, strategy="paper", budget={"trial_seconds": seconds, "max_parallel": 1})
        for seconds in (100, 250)
    )
    first = run_search(small, ledger, InlineDispatcher())
    assert VALIDATION in sources(first)
    second = run_search(large, ledger, InlineDispatcher())
    assert second.spent_seconds > first.spent_seconds + 75
    assert sources(second).count("paper/expected-improvement") > sources(first).count("paper/expected-improvement")


class LosingDispatcher(InlineDispatcher):
    """Loses its first jobs, as a cluster does whose nodes die."""

    def __init__(self, losses: int) -> None:
        super().__init__()
        self.losses = losses

    def wait(self, timeout_seconds: float) -> list[Event]:
        return [self._lose(event) if isinstance(event, Finished) else event for event in super().wait(timeout_seconds)]

    def _lose(self, event: Finished) -> Finished:
        if self.losses == 0:
            return event
        self.losses -= 1
        changes = {"outcome": Outcome.LOST, "seconds": 0.0, "checkpoint": None, "evaluations": (), "end_step": 0}
        return Finished(event.key, event.result.model_copy(update={**changes, "message": "node died"}), ())


def test_a_dead_cluster_ends_the_call_and_a_mended_one_goes_on(tmp_path: Path) -> None:
    study, ledger = simulated_study(tmp_path), MemoryLedger()
    with pytest.raises(InfrastructureError, match=r"node died.*run the same command again"):
        run_search(study, ledger, LosingDispatcher(LOST_IN_A_ROW))
    outcome = run_search(study, ledger, InlineDispatcher())
    assert outcome.complete
    assert [row.label for row in outcome.rows] == ["recommended", "recipe"]
    assert all(row.seeds == 2 for row in outcome.rows)


def test_a_single_loss_does_not_end_a_study(tmp_path: Path) -> None:
    outcome = run_search(simulated_study(tmp_path), MemoryLedger(), LosingDispatcher(LOST_IN_A_ROW - 1))
    assert outcome.complete


class DeliversTwice(InlineDispatcher):
    """Delivers each result a second time, as a cluster does that took a worker for dead."""

    def wait(self, timeout_seconds: float) -> list[Event]:
        return [event for event in super().wait(timeout_seconds) for _ in range(1 + isinstance(event, Finished))]


def test_a_result_that_comes_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = run_search(simulated_study(tmp_path), MemoryLedger(), DeliversTwice())
    assert outcome.complete
    assert "trial #0: a result of segment 0 came late" in caplog.messages


class LosesValidations(LosingDispatcher):
    """Loses validations alone."""

    def _lose(self, event: Finished) -> Finished:
        return super()._lose(event) if event.result.segment.suggestion.source == VALIDATION else event


def test_lost_validations_are_made_again(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, budget={"trial_seconds": 300, "max_parallel": 1, "top_k": 2})
    dispatcher = LosesValidations(LOST_IN_A_ROW - 1)
    outcome = run_search(study, MemoryLedger(), dispatcher, strategy=Climb())
    calm = run_search(simulated_study(tmp_path / "calm"), MemoryLedger(), InlineDispatcher(), strategy=Climb())
    assert dispatcher.losses == 0
    assert outcome.recommended == calm.recommended
    assert outcome.target_trial is not None
    assert outcome.target_trial.final is not None


def test_a_finished_study_trains_nothing_more(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    ledger = MemoryLedger()
    first = run_search(study, ledger, InlineDispatcher())
    jobs: list[Job] = []
    second = run_search(study, ledger, InlineDispatcher(on_submit=jobs.append))
    assert jobs == []
    assert second == first


def test_another_study_of_the_same_name_is_refused(tmp_path: Path) -> None:
    ledger = MemoryLedger()
    run_search(simulated_study(tmp_path), ledger, InlineDispatcher())
    before = ledger.trials()
    with pytest.raises(LedgerError, match="give the study a new name"):
        run_search(simulated_study(tmp_path, stopping={"rules": "paper"}), ledger, InlineDispatcher())
    assert ledger.trials() == before


def test_a_small_space_may_run_out_before_the_budget(tmp_path: Path) -> None:
    space = {
        "scheduler": {"type": "choice", "values": ["constant", "cosine"]},
        "n_samples": {"type": "choice", "values": [4, 8]},
    }
    study = simulated_study(tmp_path, space=space, budget={"trial_seconds": 10_000}, random_search=True)
    outcome, _ = search(study)
    assert outcome.complete
    assert len([trial for trial in outcome.trials if trial.purpose == "search"]) == 4


# --- interruption -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [RandomSearch(), Climb()])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_interrupted_after_every_kth_event_a_study_ends_the_same(
    tmp_path: Path, every: int, strategy: Strategy
) -> None:
    changes = {"seeds": TWO_SEEDS, "random_search": True, "budget": {"trial_seconds": 200, "max_parallel": 1}}
    whole, _ = search(simulated_study(tmp_path / "whole", **changes), strategy=strategy)
    pieces, interruptions = interrupted_search(simulated_study(tmp_path / "pieces", **changes), 1, every, strategy)
    assert interruptions >= sum(len(trial.segments) for trial in whole.trials) // every - 1
    assert pieces.trials == whole.trials
    assert pieces.rows == whole.rows
    assert pieces.recommended == whole.recommended
    assert pieces.spent_seconds == whole.spent_seconds


@pytest.mark.parametrize("strategy", [RandomSearch(), Climb()])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_interrupted_between_begin_and_training_a_study_ends_the_same(
    tmp_path: Path, every: int, strategy: Strategy
) -> None:
    changes = {"seeds": TWO_SEEDS, "budget": {"trial_seconds": 200, "max_parallel": 1}}
    whole, _ = search(simulated_study(tmp_path / "whole", **changes), strategy=strategy)
    study = simulated_study(tmp_path / "pieces", **changes)
    pieces, interruptions = interrupted_search(study, 1, every, strategy, at_submit=True)
    assert interruptions > 1
    assert pieces.trials == whole.trials
    assert pieces.rows == whole.rows


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_interrupted_in_parallel_every_segment_is_trained_once_with_the_same_outcome(
    tmp_path: Path, slots: int, every: int
) -> None:
    """In parallel the order of events depends on the clock, so the plan of the strategy must not; segments agree."""
    changes = {"seeds": TWO_SEEDS, "budget": {"trial_seconds": 1000, "max_parallel": slots}}
    whole, _ = search(simulated_study(tmp_path / "whole", **changes), slots, Climb())
    study = simulated_study(tmp_path / "pieces", **changes)
    pieces, interruptions = interrupted_search(study, slots, every, Climb())
    assert interruptions > 1
    assert {trial.key: substance(trial) for trial in pieces.trials} == {
        trial.key: substance(trial) for trial in whole.trials
    }
    assert [(row.label, row.score, row.seeds) for row in pieces.rows] == [
        (row.label, row.score, row.seeds) for row in whole.rows
    ]


def test_a_lost_dispatcher_loses_only_what_was_not_committed(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    ledger = MemoryLedger()

    def interrupt_late(progress: Progress) -> None:
        if progress.spent_seconds > 100:
            raise Interruption

    with pytest.raises(Interruption):
        run_search(study, ledger, InlineDispatcher(2), on_progress=interrupt_late)
    before = {trial.key: trial.segments for trial in ledger.trials() if trial.segments}
    begun = [trial.key for trial in ledger.trials() if trial.open_segment is not None]
    assert before
    assert begun
    jobs: list[Job] = []
    outcome = run_search(study, ledger, InlineDispatcher(2, on_submit=jobs.append))
    after = {trial.key: trial.segments for trial in outcome.trials}
    assert all(after[key][: len(segments)] == segments for key, segments in before.items())
    assert [job.trial_key for job in jobs[: len(begun)]] == begun


def test_what_has_finished_when_ctrl_c_comes_is_kept(tmp_path: Path) -> None:
    study, ledger = simulated_study(tmp_path), MemoryLedger()

    def interrupt(progress: Progress) -> None:
        if progress.trials[-1].open_segment is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(study, ledger, EventsOnly(), on_progress=interrupt)
    assert [len(trial.segments) for trial in ledger.trials()] == [1]


def test_a_wall_clock_limit_ends_the_call_and_not_the_study(tmp_path: Path) -> None:
    budget = {"trial_seconds": 200, "max_parallel": 1}
    whole, _ = search(simulated_study(tmp_path / "whole", budget=budget))
    limited = simulated_study(tmp_path / "limited", budget={**budget, "wall_seconds": 1e-6})
    ledger = MemoryLedger()
    cut = run_search(limited, ledger, InlineDispatcher())
    assert not cut.complete
    assert cut.recommended is None
    assert cut.trials == ()
    assert "nothing was gained, and the same limit may be too short again: raise it" in cut.note
    finished = run_search(simulated_study(tmp_path / "limited", budget=budget), ledger, InlineDispatcher())
    assert finished.complete
    assert finished.trials == whole.trials


def limited_study(folder: Path, wall_seconds: float | None, rungs: int = 3) -> Study:
    """A study whose longest segments take 0.3 s by the clock."""
    return simulated_study(
        folder,
        trainer={
            "name": "simulated",
            "settings": {
                "real_seconds_per_step": 0.01,
                "seconds_per_step": 0.01,
                "startup_seconds": 1e-3,
                "evaluation_seconds": 1e-3,
            },
        },
        fidelity={"horizon_prompts": 480, "rungs": rungs},
        budget={"trial_seconds": 1, "max_parallel": 1, "wall_seconds": wall_seconds},
    )


def measured(outcome: SearchResult) -> list[Any]:
    return [(trial.configuration, trial.model, trial.purpose, trial.evaluations) for trial in outcome.trials]


@pytest.mark.slow
def test_calls_shorter_than_a_segment_make_progress_and_end_with_the_same_result(tmp_path: Path) -> None:
    whole = run_search(limited_study(tmp_path / "whole", None), MemoryLedger(), InlineDispatcher())
    limited, ledger = limited_study(tmp_path / "limited", 0.15), MemoryLedger()
    notes = []
    while not (outcome := run_search(limited, ledger, InlineDispatcher())).complete:
        notes.append(outcome.note)
        assert len(notes) < 200, "no progress"
    assert measured(outcome) == measured(whole)
    assert [row.score for row in outcome.rows] == [row.score for row in whole.rows]
    assert outcome.note == ""
    saved = [re.search(r"#0 at step (\d+) of 30", note) for note in notes[:2]]
    assert all(saved)
    assert int(saved[0][1]) < int(saved[1][1])
    assert all(note.endswith("Run the same command to continue.") for note in notes)


class Unpausing(SimulatedTrainer):
    """Knows when it starts where it will save, as trainers in processes of their own do."""

    pauses = False


@pytest.mark.slow
def test_a_trainer_that_cannot_be_paused_is_cut_at_rungs(tmp_path: Path) -> None:
    whole = run_search(limited_study(tmp_path / "whole", None, 10), MemoryLedger(), InlineDispatcher())
    limited, ledger = limited_study(tmp_path / "limited", 0.2, 10), MemoryLedger()
    calls = 0
    while not (outcome := run_search(limited, ledger, InlineDispatcher(trainer=Unpausing()))).complete:
        calls += 1
        assert calls < 200, "no progress"
    assert calls > 2
    assert measured(outcome) == measured(whole)


class Slow(InlineDispatcher):
    """Never delivers what it runs."""

    cancelled: ClassVar[list[str]] = []

    def wait(self, timeout_seconds: float) -> list[Event]:
        time.sleep(0.01)
        return []

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)


def test_what_a_limit_cuts_off_unsaved_is_said_to_be_lost(tmp_path: Path) -> None:
    outcome = run_search(limited_study(tmp_path, 0.5, 1), MemoryLedger(), Slow(trainer=Unpausing()))
    assert not outcome.complete
    assert Slow.cancelled == [outcome.trials[0].key]
    assert re.search(r"Lost since their last checkpoint: #0 \(\d+ s\); trainer 'simulated' did not reach", outcome.note)
    assert "more fidelity.rungs" in outcome.note


def test_only_the_first_segment_of_a_call_is_begun_although_it_should_not_fit(tmp_path: Path) -> None:
    study = simulated_study(
        tmp_path,
        trainer={"name": "simulated", "settings": {"seconds_per_step": 1000.0}},
        budget={"trial_seconds": 1e6, "max_parallel": 2, "wall_seconds": 100.0},
    )
    ledger = MemoryLedger()
    for call in (1, 2):
        outcome = run_search(study, ledger, InlineDispatcher(2))
        assert not outcome.complete
        assert (
            sum(len(trial.segments) for trial in outcome.trials) == call + 1
        )  # the first call knows no price yet and fills both slots


class Storing(InlineDispatcher):
    """Tells of a job that has finished a while after it has given its devices back: its checkpoint is being stored."""

    stored: tuple[Event, ...] = ()

    def wait(self, timeout_seconds: float) -> list[Event]:
        if self.stored:
            told, self.stored = self.stored, ()
            return list(told)
        self.stored = tuple(super().wait(timeout_seconds))
        return []


class OneByOne(Climb):
    """Wants the large model next, for so short a time that it is not worth waiting for."""

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        proposal = super().suggest(study, trials, remaining_seconds, seed)
        if proposal is None or proposal.model == "small":
            return proposal
        brief = proposal.suggestion.model_copy(update={"expected_cost_seconds": 1e-3})
        return replace(proposal, suggestion=brief)


def test_devices_that_a_finished_job_has_given_back_are_used_while_its_checkpoint_is_stored(tmp_path: Path) -> None:
    family = [
        {"name": name, "path": "simulated", "parameters": parameters, "devices": devices}
        for name, parameters, devices in (("small", 1_000_000, 1), ("large", 8_000_000, 2))
    ]
    study = simulated_study(tmp_path, family=family, baselines=[], budget={"trial_seconds": 1e6})
    ledger = MemoryLedger()
    began: list[tuple[str, int]] = []

    def note(job: Job) -> None:
        began.append((job.model, sum(len(trial.segments) for trial in ledger.trials())))
        if job.model == "large":
            raise Interruption

    dispatcher = Storing(None, on_submit=note, nodes={"here": 2})
    with pytest.raises(Interruption):
        run_search(study, ledger, dispatcher, strategy=OneByOne(((0, "small", 480), (0, "large", 160))))
    assert began == [("small", 0), ("large", 0)], "the large one began only once the small one was committed"


# --- phases -------------------------------------------------------------------------------------------------------


def test_phases_come_in_order_and_the_bill_grows(tmp_path: Path) -> None:
    seen: list[Progress] = []
    study = simulated_study(tmp_path, seeds=TWO_SEEDS, random_search=True)
    run_search(study, MemoryLedger(), InlineDispatcher(), on_progress=seen.append, strategy=Climb())
    phases = [progress.phase for progress in seen]
    assert list(dict.fromkeys(phases)) == list(Phase)
    assert phases == sorted(phases, key=list(Phase).index)
    for earlier, later in pairwise(seen):
        assert later.spent_seconds >= earlier.spent_seconds
        assert later.elapsed_seconds >= earlier.elapsed_seconds
    assert seen[0].spent_seconds == 0


def test_validation_continues_or_begins_the_best_on_the_target(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, budget={"trial_seconds": 1000, "top_k": 2, "max_parallel": 1})
    outcome, _ = search(study, strategy=Climb())
    zero, one = (configuration_key(item) for item in fresh_configurations(study, (), 0, 2))
    target = {
        configuration_key(trial.configuration): trial
        for trial in outcome.trials
        if trial.model == "large" and trial.purpose == "search"
    }
    assert target.keys() == {zero, one}
    validated = target[zero].segments[-1]
    assert validated.segment.suggestion.source == "validation"
    assert (validated.segment.start_step, validated.segment.stop_step) == (20, 30)
    (fresh,) = target[one].segments
    assert (fresh.segment.start_step, fresh.segment.stop_step) == (0, 30)
    assert target[zero].state is TrialState.COMPLETED


@pytest.mark.parametrize(("plan", "validated"), [(((0, "large", 480),), []), (((1, "large", 480),), [0])])
def test_only_what_ranks_above_a_complete_run_is_validated(
    tmp_path: Path, plan: tuple[tuple[int, str, int], ...], validated: list[int]
) -> None:
    """`Climb` ranks configuration 0 above 1, and no other."""
    study = simulated_study(tmp_path, budget={"trial_seconds": 2000, "top_k": 2, "max_parallel": 1})
    outcome, _ = search(study, strategy=Climb((*((index, "small", 160) for index in range(3)), *plan)))
    configurations = fresh_configurations(study, (), 0, 3)
    assert [
        configurations.index(trial.configuration)
        for trial in outcome.trials
        for result in trial.segments
        if result.segment.suggestion.source == VALIDATION
    ] == validated


@dataclass(frozen=True)
class Told(Climb):
    """Remembers what it was told to be left."""

    remaining: list[float] = field(default_factory=list)

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        self.remaining.append(remaining_seconds)
        return super().suggest(study, trials, remaining_seconds, seed)


@pytest.mark.parametrize(("trainings", "paid"), [(1.5, 0), (4.0, 1), (10.0, 2)])
def test_what_is_held_back_is_what_validations_within_their_share_cost(
    tmp_path: Path, trainings: float, paid: int
) -> None:
    plain = simulated_study(tmp_path)
    costs = [
        CostModel.fit(plain, []).estimate(item, "large", 0, 480).high for item in fresh_configurations(plain, (), 0, 2)
    ]
    budget = trainings * max(costs)
    study = simulated_study(tmp_path, baselines=[], budget={"trial_seconds": budget, "top_k": 2})
    told = Told()
    plan_next(study, told, [])
    share = study.spec.budget.validation_share
    held = sum(costs[:paid]) if paid else share * budget
    assert told.remaining == [pytest.approx(budget - held)]


def test_nothing_is_held_back_for_a_validation_that_cannot_be_paid_any_more(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, baselines=[], budget={"trial_seconds": 100.0, "top_k": 1})
    told = Told()
    first, _, other = fresh_configurations(study, (), 0, 3)
    finished_other = study.new_trial(0, other, "large", 0)
    done = result(0, 0, 30, evaluations=(evaluation(30, 0.5),), seconds=95.0)
    plan_next(study, told, [finished_other.model_copy(update={"segments": (done,)})])
    assert CostModel.fit(study, []).estimate(first, "large", 0, 480).seconds > 5.0
    assert told.remaining == [pytest.approx(5.0)]


def test_a_space_may_leave_out_the_trainers_own_batch_size(tmp_path: Path) -> None:
    space = {
        "prompts_per_step": {"type": "choice", "values": [5, 25]},
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
    }
    study = simulated_study(
        tmp_path, space=space, baselines=[], fidelity={"horizon_prompts": 300, "rungs": 3}, seeds={"training": [0]}
    )
    outcome, _ = search(study)
    assert outcome.complete
    assert outcome.recommended is not None


def test_what_a_running_training_still_needs_is_held_back(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, baselines=[], budget={"trial_seconds": 1000.0, "top_k": 2, "max_parallel": 2})
    trials: list[Trial] = []
    for number, configuration in enumerate(fresh_configurations(study, (), 0, 2)):
        trial = study.new_trial(number, configuration, "large", 0)
        paused = trial.model_copy(update={"segments": (result(0, 0, 10, evaluations=(evaluation(10, 0.4),)),)})
        priced = BECAUSE.model_copy(update={"expected_cost_seconds": 0.0})
        trials.append(paused.model_copy(update={"open_segment": study.next_segment(paused, 320, priced)}))
    told = Told()
    plan_next(study, told, trials)
    costs = CostModel.fit(study, trials)
    held = sum(costs.estimate(trial.configuration, "large", 320, 480).high for trial in trials)
    assert told.remaining == [pytest.approx(1000.0 - 20.0 - held)]


@dataclass(frozen=True)
class InOrder(Told):
    """Ranks configurations as they came, whatever became of them on the target."""

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        return [Recommendation(item, 0.5, 0.1) for item in fresh_configurations(study, (), 0, 3)]


def test_what_the_target_has_ruined_is_passed_over(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, baselines=[], budget={"trial_seconds": 200.0, "top_k": 2, "max_parallel": 1})
    first, second, third = fresh_configurations(study, (), 0, 3)
    stopped = result(0, 0, 10, outcome=Outcome.STOPPED, evaluations=(evaluation(10, 0.1),))
    failed = result(0, 0, 10, outcome=Outcome.INFEASIBLE, failure=FailureKind.OUT_OF_MEMORY)
    trials = [
        study.new_trial(number, configuration, "large", 0).model_copy(update={"segments": (done,)})
        for number, (configuration, done) in enumerate([(first, stopped), (second, failed)])
    ]
    strategy = InOrder(plan=())
    assert recommend(study, strategy, trials) is None
    step = plan_next(study, strategy, trials)
    assert step.trial is not None
    assert (step.phase, step.trial.configuration, step.trial.model) == (Phase.VALIDATION, third, "large")


def test_a_running_segment_of_a_strategy_that_knows_no_prices_counts_against_the_budget(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, baselines=[])
    step = plan_next(study, RandomSearch(), [])
    assert step.trial is not None
    assert step.segment is not None
    price = CostModel.fit(study, []).estimate(step.trial.configuration, "large", 0, 480).seconds
    assert step.segment.suggestion.expected_cost_seconds == pytest.approx(price)
    assert committed_seconds([step.trial.model_copy(update={"open_segment": step.segment})]) == pytest.approx(price)


def test_without_a_recipe_at_least_one_configuration_is_validated_however_small_the_budget(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, budget={"trial_seconds": 10, "max_parallel": 1}, baselines=[])
    outcome, _ = search(study, strategy=Climb())
    completed = [trial for trial in outcome.trials if trial.purpose == "search" and trial.final is not None]
    assert [trial.model for trial in completed] == ["large"]
    assert outcome.recommended is not None


def test_a_recipe_competes_with_what_a_strategy_ranks_that_does_not_know_it(tmp_path: Path) -> None:
    small = simulated_study(tmp_path, budget={"trial_seconds": 1, "max_parallel": 1})
    outcome, _ = search(small, strategy=Climb())
    assert outcome.recommended is not None
    assert outcome.recommended.configuration == History.of(small, outcome.trials).canonical({"learning_rate": 1e-4})
    assert not any(trial.purpose == "search" and trial.model == "large" for trial in outcome.trials)


@pytest.mark.parametrize("seeds", [[0], [0, 1], [3, 1, 2]])
def test_recommendation_and_baselines_are_trained_with_every_seed(tmp_path: Path, seeds: list[int]) -> None:
    baselines = [
        {"name": "low", "configuration": {"learning_rate": 1e-5}},
        {"name": "high", "configuration": {"learning_rate": 1e-4}},
    ]
    study = simulated_study(tmp_path, seeds={"search": 0, "training": seeds}, baselines=baselines)
    outcome, _ = search(study, slots=2)
    assert [row.label for row in outcome.rows] == ["recommended", "low", "high"]
    assert [row.seeds for row in outcome.rows] == [len(seeds)] * 3
    for trial in outcome.trials:
        assert trial.seed == seeds[0] or trial.purpose == "confirmation"


def test_random_search_gets_as_much_as_the_search(tmp_path: Path) -> None:
    outcome, _ = search(simulated_study(tmp_path, random_search=True), slots=2, strategy=Climb())
    mine, theirs = spent_seconds(outcome.trials), spent_seconds(outcome.trials, "random-search")
    longest = max(trial.charge_seconds for trial in outcome.trials if trial.purpose == "random-search")
    assert mine <= theirs <= mine + 2 * longest
    assert outcome.rows[-1].label == "random search"
    best = max(
        trial.final.score for trial in outcome.trials if trial.purpose == "random-search" and trial.final is not None
    )
    assert outcome.rows[-1].score == best


def test_baselines_and_confirmation_are_not_charged_to_the_search(tmp_path: Path) -> None:
    outcome, _ = search(simulated_study(tmp_path, seeds=TWO_SEEDS))
    charged = sum(trial.charge_seconds for trial in outcome.trials if trial.purpose == "search")
    assert outcome.spent_seconds == charged
    assert sum(trial.charge_seconds for trial in outcome.trials) > charged


# --- failure ------------------------------------------------------------------------------------------------------


def test_a_study_in_which_everything_fails_ends_without_a_recommendation(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, trainer={"name": "simulated", "settings": {"memory_limit": 0.001}})
    outcome, _ = search(study, slots=2)
    assert outcome.complete
    assert outcome.recommended is None
    assert outcome.target_trial is None
    assert [(row.label, row.seeds) for row in outcome.rows] == [("recipe", 0)]
    assert "do not fit in memory" in outcome.rows[0].unfinished[0]
    tried = [trial for trial in outcome.trials if trial.purpose == "search"]
    assert HOPELESS_AFTER <= len(tried) < HOPELESS_AFTER + 2
    assert {trial.state for trial in outcome.trials} == {TrialState.INFEASIBLE}


class Broken(SimulatedTrainer):
    """Fails in every training until it is mended."""

    def __init__(self, kind: FailureKind) -> None:
        self.kind: FailureKind | None = kind

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        if self.kind is not None:
            raise TrialFailure(self.kind, "reward.py raised KeyError: 'answer'", seconds=1.0)
        return super().run(job, start, stage, observe)


def test_a_study_in_which_everything_failed_tries_once_more_with_every_call_and_goes_on_once_mended(
    tmp_path: Path,
) -> None:
    study, ledger, trainer = simulated_study(tmp_path, baselines=[]), MemoryLedger(), Broken(FailureKind.OUT_OF_MEMORY)
    tried = []
    for _ in range(2):
        outcome = run_search(study, ledger, InlineDispatcher(1, trainer=trainer))
        assert outcome.recommended is None
        tried.append(len(outcome.trials))
    assert tried == [HOPELESS_AFTER, HOPELESS_AFTER + 1]
    trainer.kind = None
    mended = run_search(study, ledger, InlineDispatcher(1, trainer=trainer))
    assert mended.complete
    assert mended.recommended is not None


class Unrewarded(SimulatedTrainer):
    """No completion gets a reward on these models."""

    def __init__(self, *models: str) -> None:
        self.models = models

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        if job.model not in self.models:
            return super().run(job, start, stage, observe)

        def without(event: Any) -> Any:
            nothing = {"score": 0.0} if hasattr(event, "score") else {"reward": 0.0, "reward_std": 0.0}
            return event.model_copy(update=nothing)

        result = super().run(job, start, stage, lambda event: observe(without(event)))
        return result.model_copy(update={"evaluations": tuple(map(without, result.evaluations))})


@pytest.mark.parametrize("rules", ["default", "none"])
@pytest.mark.parametrize("baselines", [[], [{"name": "recipe", "configuration": {}}]])
def test_a_search_without_any_reward_ends_before_its_budget(tmp_path: Path, rules: str, baselines: list[Any]) -> None:
    budget = {"trial_seconds": 600, "max_parallel": 2}
    study = simulated_study(tmp_path, baselines=baselines, budget=budget, stopping={"rules": rules})
    ledger, trainer = MemoryLedger(), Unrewarded("small", "medium", "large")
    outcome = run_search(study, ledger, InlineDispatcher(2, trainer=trainer))
    assert outcome.complete
    assert outcome.recommended is None
    assert REWARDLESS_AFTER <= len(outcome.trials) < REWARDLESS_AFTER + 4
    assert any(trial.model == "large" for trial in outcome.trials)
    assert outcome.spent_seconds < 400
    assert "no completion had a reward other than 0" in verdict(outcome)
    # Nothing more is spent by another call, unless the reward was mended, which has to be accepted.
    assert run_search(study, ledger, InlineDispatcher(2, trainer=trainer)).trials == outcome.trials
    trainer.models = ()
    mended = run_search(replace(study, changed=("task.reward",)), ledger, InlineDispatcher(2, trainer=trainer))
    assert mended.recommended is not None


@pytest.mark.slow
def test_before_a_search_without_any_reward_ends_the_target_is_run(tmp_path: Path) -> None:
    budget = {"trial_seconds": 600, "max_parallel": 1}
    study = simulated_study(tmp_path, strategy="jfhpo", baselines=[], budget=budget)
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=Unrewarded("small", "medium", "large")))
    assert outcome.complete
    assert outcome.recommended is None
    assert {trial.model for trial in outcome.trials} >= {"small", "large"}
    assert outcome.spent_seconds < 200


@pytest.mark.slow
def test_proxies_without_reward_do_not_end_a_search_whose_target_has_some(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, baselines=[], strategy="jfhpo", budget={"trial_seconds": 300, "max_parallel": 1})
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=Unrewarded("small", "medium")))
    assert outcome.recommended is not None
    assert outcome.spent_seconds > 200


def test_a_reward_that_fails_ends_the_search_at_once_and_a_mended_one_goes_on(tmp_path: Path) -> None:
    study, ledger, trainer = simulated_study(tmp_path), MemoryLedger(), Broken(FailureKind.REWARD)
    with pytest.raises(SpecError, match=r"KeyError: 'answer'; nothing is charged .* run the same command again"):
        run_search(study, ledger, InlineDispatcher(1, trainer=trainer))
    assert [(trial.state, trial.charge_seconds) for trial in ledger.trials()] == [(TrialState.RUNNING, 0.0)]
    trainer.kind = None
    mended = run_search(study, ledger, InlineDispatcher(1, trainer=trainer))
    assert mended == run_search(study, MemoryLedger(), InlineDispatcher(1))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["jfhpo", "random", "paper"])
def test_a_price_that_is_guessed_too_high_refuses_no_search(tmp_path: Path, strategy: str) -> None:
    fast = {"seconds_per_step": 1e-3, "startup_seconds": 0.01, "evaluation_seconds": 0.01}
    study = simulated_study(
        tmp_path,
        trainer={"name": "simulated", "settings": fast},
        fidelity={"horizon_prompts": 4800, "rungs": 3},
        budget={"trial_seconds": 2.0, "max_parallel": 2},
        strategy=strategy,
        baselines=[],
    )
    smallest, first = study.ladder.models[0].name, study.spec.fidelity.levels[0]
    assert CostModel.fit(study, []).estimate(study.space.middle(), smallest, 0, first).seconds > 2.0
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(2))
    assert outcome.spent_seconds > 0.8
    assert outcome.recommended is not None


@pytest.mark.parametrize("strategy", ["jfhpo", "random"])
def test_prices_that_are_guessed_too_low_overspend_by_one_segment_at_most(tmp_path: Path, strategy: str) -> None:
    slow = {"seconds_per_step": 30.0, "startup_seconds": 10.0, "evaluation_seconds": 10.0}
    study = simulated_study(
        tmp_path,
        trainer={"name": "simulated", "settings": slow},
        budget={"trial_seconds": 200.0, "max_parallel": 4},
        strategy=strategy,
        baselines=[],
    )
    outcome = run_search(study, MemoryLedger(), InlineDispatcher(4))
    longest = max(part.charge_seconds for trial in outcome.trials for part in trial.segments)
    assert 0 < outcome.spent_seconds <= 200.0 + longest


def test_some_infeasible_configurations_do_not_end_a_study(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, trainer={"name": "simulated", "settings": {"memory_limit": 128}})
    outcome, _ = search(study)
    states = {trial.configuration["n_samples"]: trial.state for trial in outcome.trials if trial.purpose == "search"}
    assert states[16] is TrialState.INFEASIBLE
    assert states[8] is not TrialState.INFEASIBLE
    assert outcome.recommended is not None
    assert outcome.recommended.configuration["n_samples"] in (4, 8)


def test_collapsing_trials_are_stopped_and_cost_less(tmp_path: Path) -> None:
    space = {"learning_rate": {"type": "float", "low": 3e-3, "high": 3e-2, "log": True}}
    outcome, _ = search(simulated_study(tmp_path, space=space))
    stopped = [trial for trial in outcome.trials if trial.state is TrialState.STOPPED]
    assert stopped
    full = next(trial for trial in outcome.trials if trial.purpose == "baseline")
    for trial in stopped:
        assert trial.decision is not None
        assert trial.step < trial.total_steps
        assert trial.evaluations[-1].step == trial.step == trial.decision.step
        assert trial.charge_seconds < full.charge_seconds


# --- pure functions -----------------------------------------------------------------------------------------------


def build(study: Study, make: Callable[[Study], list[Trial]]) -> SearchResult:
    return conclude(study, make(study), RandomSearch(), complete=True)


def finished(study: Study, number: int, seed: int, score: float, rate: float, **changes: Any) -> Trial:
    trial = study.new_trial(number, {"learning_rate": rate}, "large", seed, **changes)
    return trial.model_copy(update={"segments": (result(0, 0, 30, evaluations=(evaluation(30, score),)),)})


def test_the_next_step_is_a_pure_function_of_the_trials(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    outcome, _ = search(study)
    for count in range(len(outcome.trials)):
        known = outcome.trials[:count]
        assert plan_next(study, RandomSearch(), known) == plan_next(study, RandomSearch(), list(known))


def test_each_suggestion_has_a_seed_of_its_own_that_a_restart_repeats(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    outcome, _ = search(study)
    seeds = [call_seed(study, outcome.trials[:count]) for count in range(len(outcome.trials))]
    assert len(set(seeds)) == len(seeds)
    other = simulated_study(tmp_path, seeds={"search": 1})
    assert call_seed(other, outcome.trials) != call_seed(study, outcome.trials)


def test_committed_seconds_count_what_is_running(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    done = finished(study, 0, 0, 0.5, 1e-4)
    fresh = study.new_trial(1, {"learning_rate": 1e-3}, "large", 0)
    expected = BECAUSE.model_copy(update={"expected_cost_seconds": 7.0})
    running = fresh.model_copy(update={"open_segment": study.next_segment(fresh, 480, expected)})
    assert spent_seconds([done, running]) == 10
    assert committed_seconds([done, running]) == 17
    assert committed_seconds([done, running], "baseline") == 0


def test_a_row_is_the_mean_over_seeds_with_the_larger_of_two_errors(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, seeds=TWO_SEEDS, baselines=[])
    apart = build(study, lambda s: [finished(s, 0, 0, 0.5, 1e-3), finished(s, 1, 1, 0.6, 1e-3, purpose="confirmation")])
    (row,) = apart.rows
    assert row.score == pytest.approx(0.55)
    assert row.standard_error == pytest.approx(math.sqrt(2 * 0.05**2 / 2))
    assert (row.seeds, row.seconds) == (2, 20)
    alike = build(study, lambda s: [finished(s, 0, 0, 0.5, 1e-3), finished(s, 1, 1, 0.5, 1e-3, purpose="confirmation")])
    assert alike.rows[0].standard_error == pytest.approx(0.02 / math.sqrt(2))


def test_seeds_by_which_the_search_chose_are_no_part_of_the_comparison(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, seeds=TWO_SEEDS, baselines=[])
    found = build(
        study,
        lambda s: [
            finished(s, 0, 0, 0.5, 1e-3),
            finished(s, 1, 7, 0.9, 1e-3),
            finished(s, 2, 1, 0.6, 1e-3, purpose="confirmation"),
        ],
    )
    assert (found.rows[0].score, found.rows[0].seeds) == (pytest.approx(0.55), 2)


def test_a_baseline_that_did_not_finish_has_a_row_without_a_score(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)

    def make(study: Study) -> list[Trial]:
        trial = study.new_trial(0, {"learning_rate": 1e-4}, "large", 0, "baseline", "recipe")
        done = result(0, 0, 12, outcome=Outcome.STOPPED, evaluations=(evaluation(10, 0.3), evaluation(12, 0.1)))
        return [trial.model_copy(update={"segments": (done,)})]

    (row,) = build(study, make).rows
    assert (row.label, row.seeds, row.seconds) == ("recipe", 0, 10)
    assert math.isnan(row.score)
    assert row.unfinished == ("seed 0 ended at step 12 of 30: stopped",)


def test_a_seed_that_did_not_finish_adds_nothing_to_the_score(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, seeds=TWO_SEEDS, baselines=[])

    def make(study: Study) -> list[Trial]:
        trial = study.new_trial(1, {"learning_rate": 1e-3}, "large", 1, "confirmation", "recommended")
        ended = result(0, 0, 9, outcome=Outcome.STOPPED, evaluations=(evaluation(9, 0.1),))
        return [finished(study, 0, 0, 0.5, 1e-3), trial.model_copy(update={"segments": (ended,)})]

    (row,) = build(study, make).rows
    assert (row.score, row.seeds, len(row.unfinished)) == (0.5, 1, 1)


@dataclass(frozen=True)
class BestSeen:
    """Ranks configurations by the mean of all final scores that it is shown."""

    name: ClassVar[str] = "best-seen"

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        return None

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        scores: dict[str, list[float]] = {}
        for trial in trials:
            assert trial.final is not None
            scores.setdefault(configuration_key(trial.configuration), []).append(trial.final.score)
        known = {configuration_key(trial.configuration): trial.configuration for trial in trials}
        found = [Recommendation(known[key], sum(each) / len(each), 0.1) for key, each in scores.items()]
        return sorted(found, key=lambda item: -item.mean)


def test_what_judges_the_choice_does_not_make_it(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, seeds=TWO_SEEDS)
    trials = [
        finished(study, 0, 0, 0.65, 1e-3),
        finished(study, 1, 0, 0.63, 2e-3),
        finished(study, 2, 1, 0.45, 1e-3, purpose="confirmation"),
    ]
    best = recommend(study, BestSeen(), trials)
    assert best is not None
    assert best.configuration == {"learning_rate": 1e-3}
    compared = [*trials, finished(study, 3, 0, 0.9, 2e-3, purpose="random-search")]
    assert recommend(study, BestSeen(), compared) == best


def test_only_what_was_finished_on_the_target_is_recommended(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trials = [
        finished(study, 0, 0, 0.4, 1e-3),
        finished(study, 1, 0, 0.6, 2e-3),
        finished(study, 2, 0, 0.9, 3e-3, purpose="baseline"),
        finished(study, 3, 0, 0.8, 4e-3, purpose="random-search"),
    ]
    best = recommend(study, RandomSearch(), trials)
    assert best is not None
    assert best.configuration == {"learning_rate": 2e-3}
    assert recommend(study, RandomSearch(), []) is None
