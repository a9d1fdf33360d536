"""Random walks of ledgers, outbox and checkpoint store beside models of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jfhpo.testing.machines import LedgerMachine
from jfhpo_core.errors import CheckpointError
from jfhpo_core.store import outbox as outbox_module
from jfhpo_core.store.checkpoints import SHARED_BYTES, CheckpointStore
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.store.outbox import Outbox, waiting
from jfhpo_core.study.trial import Checkpoint
from tests.store.test_outbox import FarLedger


class MemoryMachine(LedgerMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryLedger()

    def connect(self) -> Ledger:
        return self.store


class OutboxMachine(LedgerMachine):
    """The store goes away, comes back, and loses answers after it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "outbox.jsonl")
        self.store = FarLedger()

    def connect(self) -> Ledger:
        self.comes_back()  # to open a study needs the store
        return Outbox(self.store, self.path, patience_seconds=0.0)

    @rule()
    def goes_away(self) -> None:
        self.store.away = lambda: True

    @rule()
    def answers_get_lost(self) -> None:
        self.store.mute = lambda: True

    @rule()
    def comes_back(self) -> None:
        self.store.away = self.store.mute = lambda: False

    @property
    def in_reach(self) -> bool:
        return not (self.store.away() or self.store.mute())

    @precondition(lambda self: self.in_reach)
    @rule(name=st.sampled_from(["best", "note"]), value=st.integers(0, 9).map(float))
    def a_fact_is_noted(self, name: str, value: float) -> None:
        self.ledger.summarize({name: value})
        self.facts[name] = value

    @invariant()
    def it_holds_what_was_acknowledged(self) -> None:
        assert self.ledger.trials() == list(self.model.values())
        if self.in_reach:
            super().it_holds_what_was_acknowledged()

    @precondition(lambda self: self.in_reach)
    @rule()
    def everything_is_delivered(self) -> None:
        assert isinstance(self.ledger, Outbox)
        self.ledger.deliver()
        assert waiting(self.path) == []
        assert self.store.trials() == list(self.model.values())

    @rule()
    def a_crash_cuts_off_a_line(self) -> None:
        if self.path.exists():
            with self.path.open("a", encoding="utf-8") as file:
                file.write('{"trial": {"key"')
            self.the_process_ends_and_another_one_goes_on()

    def teardown(self) -> None:
        self.folder.cleanup()


KEYS = ("0" * 16, "1" * 16)
FILES = {"small": 10, "large": SHARED_BYTES}


class CheckpointMachine(RuleBasedStateMachine):
    """Checkpoints are written, replaced, damaged, verified and deleted; writers die in between."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = CheckpointStore(Path(self.folder.name))
        self.whole: dict[tuple[str, int], tuple[Checkpoint, dict[str, bytes]]] = {}
        self.damaged: dict[tuple[str, int], Checkpoint] = {}
        self.quarantined = 0

    def write(self, key: str, contents: dict[str, bytes]) -> Path:
        stage = self.store.stage(key)
        for name, content in contents.items():
            (stage / name).write_bytes(content)
        return stage

    @rule(key=st.sampled_from(KEYS), step=st.integers(1, 3), letter=st.sampled_from("ab"))
    def a_checkpoint_is_committed(self, key: str, step: int, letter: str) -> None:
        contents = {name: letter.encode() * size for name, size in FILES.items()}
        checkpoint = self.store.commit(key, self.write(key, contents), step, 16 * step)
        self.whole[key, step] = checkpoint, contents
        self.damaged.pop((key, step), None)

    @rule(key=st.sampled_from(KEYS))
    def a_writer_dies(self, key: str) -> None:
        self.write(key, {"small": b"half"})

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), name=st.sampled_from([*FILES, "jfhpo-manifest.json"]))
    def a_file_is_damaged(self, data: st.DataObject, name: str) -> None:
        place = data.draw(st.sampled_from(sorted(self.whole)))
        checkpoint, _ = self.whole.pop(place)
        file = self.store.root / checkpoint.path / name
        content = file.read_bytes()
        file.unlink()  # a new file: the other checkpoints keep the shared one
        file.write_bytes(content[:-1])
        self.damaged[place] = checkpoint

    @precondition(lambda self: self.damaged)
    @rule(data=st.data())
    def a_damaged_one_is_found(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.damaged)))
        with pytest.raises(CheckpointError, match="moved to"):
            self.store.verify(self.damaged.pop(place))
        self.quarantined += 1

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def one_is_deleted(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.whole)))
        checkpoint, _ = self.whole.pop(place)
        self.store.delete(self.store.root / checkpoint.path)
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            self.store.verify(checkpoint)

    @invariant()
    def what_was_committed_is_there_byte_by_byte(self) -> None:
        for checkpoint, contents in self.whole.values():
            folder = self.store.verify(checkpoint)
            assert {name: (folder / name).read_bytes() for name in contents} == contents
        assert len(self.store.folders()) == len(self.whole) + len(self.damaged)
        assert len(self.store.quarantined()) == self.quarantined

    def teardown(self) -> None:
        self.folder.cleanup()


SETTINGS = settings(max_examples=20, stateful_step_count=30, deadline=None)

TestMemoryLedger = MemoryMachine.TestCase
TestMemoryLedger.settings = SETTINGS
TestCheckpointStore = CheckpointMachine.TestCase
TestCheckpointStore.settings = SETTINGS


class TestOutbox(OutboxMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = SETTINGS

    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outbox_module, "RETRY_SECONDS", 0.0)
