from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jfhpo.testing.ledgers import (
    LedgerConformance,
    make_records,
    make_result,
    make_segment,
    make_study,
    make_trial,
)
from jfhpo_core.errors import LedgerError, LedgerUnavailable
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.store.outbox import Outbox, PendingWrite, waiting
from jfhpo_core.study.trial import Segment, SegmentResult, StepRecord, Trial
from tests.studies import simulated_study


class FarLedger(MemoryLedger):
    """A ledger whose store may be away, and whose answer may be lost after it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.away: Callable[[], bool] = lambda: False
        self.mute: Callable[[], bool] = lambda: False
        self.asked: list[str] = []

    def _call(self, method: str, *arguments: Any) -> Any:
        if self.away():
            raise LedgerUnavailable("away")
        answer = getattr(super(), method)(*arguments)
        if self.mute():
            raise LedgerUnavailable("mute")
        return answer

    def begin(self, trial: Trial, segment: Segment) -> None:
        self._call("begin", trial, segment)

    def stream(self, key: str, records: Sequence[StepRecord]) -> None:
        self._call("stream", key, records)

    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        self._call("commit", key, result, records)

    def step_records(self, key: str) -> list[StepRecord]:
        self.asked.append(key)
        answer: list[StepRecord] = self._call("step_records", key)
        return answer

    def summarize(self, facts: Mapping[str, str | float], artifacts: Sequence[Path] = ()) -> None:
        self._call("summarize", facts, artifacts)


class TestOutbox(LedgerConformance):
    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[[], Ledger]:
        store = MemoryLedger()
        return lambda: Outbox(store, tmp_path / "outbox.jsonl")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jfhpo_core.store.outbox.RETRY_SECONDS", 0.0)


def begun(store: FarLedger, path: Path) -> Outbox:
    outbox = Outbox(store, path, patience_seconds=0.0)
    outbox.open(make_study())
    outbox.begin(make_trial(0), make_segment(0, 0, 4))
    return outbox


def test_what_the_rules_need_of_earlier_steps_is_asked_for_while_the_store_is_there(tmp_path: Path) -> None:
    store = FarLedger()
    outbox = begun(store, tmp_path / "outbox.jsonl")
    outbox.commit(make_trial(0).key, make_result(make_segment(0, 0, 4)), make_records(0, 4))
    store.asked.clear()
    Outbox(store, tmp_path / "outbox.jsonl").open(make_study())
    assert store.asked == [make_trial(0).key]


@pytest.mark.usefixtures("no_waiting")
def test_what_waits_survives_the_process(tmp_path: Path) -> None:
    store, path = FarLedger(), tmp_path / "deep" / "outbox.jsonl"
    outbox = begun(store, path)
    assert not path.exists()
    store.away = lambda: True
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    outbox.commit(trial.key, make_result(segment), make_records(0, 4))
    outbox.begin(make_trial(1), make_segment(0, 0, 8))
    assert outbox.environment(make_trial(1).key) == {}
    assert [len(one.segments) for one in store.trials()] == [0]
    assert [len(one.segments) for one in outbox.trials()] == [1, 0]
    with pytest.raises(LedgerUnavailable, match="nothing is lost"):
        outbox.summarize({"best": 1.0})

    store.away = lambda: False
    path.write_text(path.read_text() + '{"trial": {"key"')  # what a crash cuts off was not acknowledged
    after = Outbox(store, path)
    after.open(make_study())
    assert after.trials() == outbox.trials() == store.trials()
    assert after.step_records(trial.key) == make_records(0, 4)
    assert not path.exists()


@pytest.mark.usefixtures("no_waiting")
def test_what_a_crash_has_cut_off_does_not_spoil_what_waits_next(tmp_path: Path) -> None:
    store, path = FarLedger(), tmp_path / "outbox.jsonl"
    path.write_text('{"trial": {"key"')
    outbox = begun(store, path)
    store.away = lambda: True
    outbox.commit(make_trial(0).key, make_result(make_segment(0, 0, 4)), make_records(0, 4))
    store.away = lambda: False
    after = Outbox(store, path)
    after.open(make_study())
    assert after.trials() == outbox.trials()


def test_what_a_crash_has_cut_off_may_end_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "outbox.jsonl"
    whole = (
        PendingWrite(key="0", result=make_result(make_segment(0, 0, 4), message="größer")).model_dump_json().encode()
    )
    path.write_bytes(whole + b"\n" + whole[: whole.index("ö".encode()) + 1])
    assert [entry.model_dump_json().encode() for entry in waiting(path)] == [whole]


@pytest.mark.usefixtures("no_waiting")
def test_what_was_delivered_in_part_is_delivered_again_from_the_beginning(tmp_path: Path) -> None:
    store, path = FarLedger(), tmp_path / "outbox.jsonl"
    outbox = begun(store, path)
    store.away = lambda: True
    first, second = make_segment(0, 0, 4), make_segment(1, 4, 8)
    outbox.commit(make_trial(0).key, make_result(first), make_records(0, 4))
    outbox.begin(outbox.trials()[0], second)
    outbox.commit(make_trial(0).key, make_result(second), make_records(4, 8))
    store.away = lambda: False
    for entry in waiting(path)[:3]:  # and then the driver is killed
        entry.deliver(store)
    after = Outbox(store, path)
    after.open(make_study())
    assert after.trials() == outbox.trials() == store.trials()
    assert not path.exists()


def test_a_stream_does_not_ask_a_store_that_is_away_at_every_record(tmp_path: Path) -> None:
    store = FarLedger()
    asked: list[int] = []
    outbox = begun(store, tmp_path / "outbox.jsonl")

    def away() -> bool:
        asked.append(1)
        return True

    store.away = away
    for step in range(4):
        outbox.stream(make_trial(0).key, make_records(step, step + 1))
    assert len(asked) == 1


@pytest.mark.usefixtures("no_waiting")
def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    store, path = FarLedger(), tmp_path / "outbox.jsonl"
    outbox = begun(store, path)
    store.away = lambda: True
    outbox.commit(make_trial(0).key, make_result(make_segment(0, 0, 4)), [])
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(LedgerError, match="line 1 cannot be read"):
        Outbox(store, path).open(make_study())


def test_a_refusal_is_no_absence(tmp_path: Path) -> None:
    outbox = begun(FarLedger(), tmp_path / "outbox.jsonl")
    with pytest.raises(LedgerError, match="next one is"):
        outbox.begin(make_trial(1), make_segment(1, 4, 8))
    assert not (tmp_path / "outbox.jsonl").exists()


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("seed", range(5))
def test_a_search_through_outages_ends_as_without_them(tmp_path: Path, seed: int) -> None:
    study = simulated_study(tmp_path / "calm")
    calm = MemoryLedger()
    run_search(study, calm, InlineDispatcher(2))
    store, chance = FarLedger(), random.Random(seed)
    ledger = Outbox(store, tmp_path / "outbox.jsonl")
    store.away = lambda: chance.random() < 0.4
    store.mute = lambda: chance.random() < 0.2
    run_search(simulated_study(tmp_path / "rough"), ledger, InlineDispatcher(2))
    store.away = store.mute = lambda: False
    ledger.deliver()

    def seen(one: Ledger) -> list[object]:
        drop = {"segments": {"__all__": {"checkpoint": {"digest"}}}}
        return [trial.model_dump(exclude=drop) for trial in one.trials()]

    assert seen(store) == seen(calm)
    for trial in calm.trials():
        assert store.step_records(trial.key) == calm.step_records(trial.key)
