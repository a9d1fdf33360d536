"""What every dispatcher promises, held by each of them with the same tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo_core.run.dispatch import Dispatcher, Event, Finished, InlineDispatcher, Streamed, Suspended
from jfhpo_core.study.trial import FailureKind, Outcome
from tests.run.support import collect, first_job
from tests.studies import BECAUSE, simulated_study

SLOW = {"real_seconds_per_step": 0.001}
RATES = [1e-4, 2e-4, 3e-4, 5e-4, 8e-4]


def test_every_job_finishes_once_with_its_records_in_order(dispatcher: Dispatcher, tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    jobs = [first_job(study, rate) for rate in RATES]
    for job in jobs:
        dispatcher.submit(job)
    streamed, finished = collect(dispatcher, len(jobs))
    assert finished.keys() == {job.trial_key for job in jobs}
    for key, event in finished.items():
        assert event.result.outcome is Outcome.REACHED
        assert event.result.attempts == 1
        assert [record.step for record in event.records] == list(range(1, 31))
        assert tuple(record for part in streamed if part.key == key for record in part.records) == event.records
    assert dispatcher.wait(0) == []


def test_a_job_in_this_process_is_heard_of_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jfhpo_core.run.dispatch.TELL_SECONDS", 0.0)
    dispatcher = InlineDispatcher(nodes={"here": 1})
    job = first_job(simulated_study(tmp_path, trainer={"name": "simulated", "settings": SLOW}), 1e-4)
    heard: list[Streamed] = []
    busy: list[int] = []

    def hear(event: Streamed) -> None:
        heard.append(event)
        busy.append(dispatcher.load().busy)

    dispatcher.listen(hear)
    dispatcher.submit(job)
    assert heard[0] == Streamed(job.trial_key, ())
    assert len(heard) > 20
    assert set(busy) == {1}
    later, finished = collect(dispatcher, 1)
    told = tuple(record for event in (*heard, *later) for record in event.records)
    assert told == finished[job.trial_key].records


def test_results_are_those_of_the_inline_dispatcher(dispatcher: Dispatcher, tmp_path: Path) -> None:
    study, other = (simulated_study(tmp_path / name) for name in ("here", "there"))
    inline = InlineDispatcher(slots=2)
    for rate in RATES[:2]:
        dispatcher.submit(first_job(study, rate))
        inline.submit(first_job(other, rate))
    _, finished = collect(dispatcher, 2)
    _, expected = collect(inline, 2)
    assert finished == expected


def test_a_trial_goes_on_from_its_checkpoint(dispatcher: Dispatcher, tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    whole = first_job(study, 1e-4)
    dispatcher.submit(whole)
    _, finished = collect(dispatcher, 1)
    expected = finished[whole.trial_key]

    trial = study.new_trial(0, {"learning_rate": 3e-4}, "large", seed=0)
    history: tuple = ()
    for prompts in (160, 480):
        job = study.job(trial, study.next_segment(trial, prompts, BECAUSE), history, None)
        dispatcher.submit(job)
        _, finished = collect(dispatcher, 1)
        part = finished[trial.key]
        assert [record.step for record in part.records] == list(range(job.segment.start_step + 1, prompts // 16 + 1))
        trial = trial.model_copy(update={"segments": (*trial.segments, part.result)})
        history += part.records
    assert trial.step == expected.result.end_step
    assert [record.step for record in history] == [record.step for record in expected.records]


def test_a_job_whose_deadline_has_come_is_suspended_and_goes_on_when_submitted_again(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    job = first_job(simulated_study(tmp_path))
    dispatcher.submit(job.model_copy(update={"deadline": 0.0}))
    events: list[Event] = []
    while not any(isinstance(event, Suspended) for event in events):
        events += dispatcher.wait(0.5)
    assert events[-1] == Suspended(job.trial_key, step=1)
    dispatcher.submit(job)
    _, finished = collect(dispatcher, 1)
    assert [record.step for record in finished[job.trial_key].records] == list(range(1, 31))
    assert finished[job.trial_key].result.outcome is Outcome.REACHED


def test_the_configurations_fault_is_a_result_and_no_retry(dispatcher: Dispatcher, tmp_path: Path) -> None:
    study = simulated_study(tmp_path, trainer={"name": "simulated", "settings": {"memory_limit": 1.0}})
    job = first_job(study)
    dispatcher.submit(job)
    _, finished = collect(dispatcher, 1)
    result = finished[job.trial_key].result
    assert (result.outcome, result.failure, result.attempts) == (Outcome.INFEASIBLE, FailureKind.OUT_OF_MEMORY, 1)


def test_a_cancelled_job_never_finishes_and_leaves_no_checkpoint(dispatcher: Dispatcher, tmp_path: Path) -> None:
    slow = {"name": "simulated", "settings": {"real_seconds_per_step": 0.02}}
    study = simulated_study(tmp_path, trainer=slow)
    withdrawn, kept = first_job(study, 1e-4), first_job(study, 2e-4)
    dispatcher.submit(withdrawn)
    dispatcher.cancel(withdrawn.trial_key)
    dispatcher.submit(kept)
    dispatcher.cancel("0000000000000000")
    _, finished = collect(dispatcher, 1)
    assert finished.keys() == {kept.trial_key}
    assert not [event for event in dispatcher.wait(0.5) if isinstance(event, Finished)]
    # The same trial may be submitted again.
    dispatcher.submit(withdrawn)
    _, finished = collect(dispatcher, 1)
    assert finished[withdrawn.trial_key].result.end_step == 30
