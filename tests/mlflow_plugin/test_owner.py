from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from jfhpo.testing.ledgers import make_record, make_result, make_segment, make_study, make_trial
from jfhpo_core.errors import LedgerError
from mlflow_plugin import owner
from mlflow_plugin.ledger import MlflowLedger

Foreign = Callable[[int], None]


@pytest.fixture
def opened(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> MlflowLedger:
    """A ledger that renews its claim no more: a renewal might overwrite a claim that a test makes."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 3600.0)
    ledger = MlflowLedger(MlflowClient(tracking_uri=tracking_uri))
    ledger.open(make_study())
    return ledger


@pytest.fixture
def foreign(opened: MlflowLedger) -> Foreign:
    """Writes the claim of a driver on another machine."""

    def claim(beat: int) -> None:
        text = json.dumps({"host": "elsewhere", "process": 7, "beat": beat})
        opened.client.set_tag(opened.study_run_id, owner.TAG, text)

    return claim


def test_a_study_that_another_machine_runs_is_refused(
    opened: MlflowLedger, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(1)
    # The other driver renews its claim while this one watches it.
    monkeypatch.setattr(owner.time, "sleep", lambda _: foreign(2))
    with pytest.raises(LedgerError, match="is being run by process 7 on 'elsewhere'"):
        MlflowLedger(opened.client).open(make_study())


def test_a_study_whose_owner_has_died_is_taken_over_and_the_dead_one_stays_dead(
    opened: MlflowLedger, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.2)
    trial = make_trial(0)
    opened.begin(trial, make_segment(0, 0, 4))
    foreign(3)
    with pytest.raises(LedgerError, match=r"'elsewhere'.*this process writes nothing more"):
        opened.commit(trial.key, make_result(make_segment(0, 0, 4)), [make_record(1)])
    second = MlflowLedger(opened.client)
    second.open(make_study())
    assert [known.open_segment for known in second.trials()] == [make_segment(0, 0, 4)]
    second.commit(trial.key, make_result(make_segment(0, 0, 4)), [make_record(1)])


def test_an_owner_that_is_gone_in_good_order_is_not_waited_for(
    opened: MlflowLedger, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_plugin.presentation import StudyState

    opened.end(StudyState.INTERRUPTED)
    assert opened.client.get_run(opened.study_run_id).data.tags[owner.TAG] == ""
    monkeypatch.setattr(owner.time, "sleep", lambda _: pytest.fail("it waits"))
    MlflowLedger(opened.client).open(make_study())


def test_a_process_of_this_machine_is_known_to_be_dead(opened: MlflowLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"host": socket.gethostname(), "process": 2**22 + 1, "beat": 1})
    opened.client.set_tag(opened.study_run_id, owner.TAG, text)
    monkeypatch.setattr(owner.time, "sleep", lambda _: pytest.fail("it waits"))
    MlflowLedger(opened.client).open(make_study())


def test_an_owner_shows_signs_of_life(opened: MlflowLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.2)
    again = MlflowLedger(opened.client)
    again.open(make_study())

    def beat() -> int:
        return int(json.loads(opened.client.get_run(opened.study_run_id).data.tags[owner.TAG])["beat"])

    first, waited = beat(), threading.Event()
    for _ in range(200):
        if beat() > first:
            return
        waited.wait(0.1)
    pytest.fail("no sign of life")
