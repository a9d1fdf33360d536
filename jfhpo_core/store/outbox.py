"""A ledger whose store may be away for minutes: what is to be written waits in a local file, and is written later.

The search goes on meanwhile. What waits counts as soon as it stands in the file, so a crash loses nothing of it: the
next process delivers the file before anything else. Delivering an entry twice changes nothing: a segment that is
committed is not begun again, and beginning the same segment or committing the same result again changes nothing in any
ledger.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from jfhpo_core.errors import LedgerError, LedgerUnavailable
from jfhpo_core.store.checkpoints import flush, make_folder
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Record, Segment, SegmentResult, StepRecord, Trial

RETRY_SECONDS = 5.0
"""Shortest time between two attempts to reach the store."""

PATIENCE_SECONDS = 900.0
"""How long a call that cannot do without the store waits for it."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class PendingWrite(Record):
    """A write that waits: the beginning of a segment (trial and segment), or its end (key, result, records)."""

    trial: Trial | None = None
    segment: Segment | None = None
    key: str | None = None
    result: SegmentResult | None = None
    records: tuple[StepRecord, ...] = ()

    def deliver(self, ledger: Ledger) -> None:
        """Write it to a ledger."""
        if self.trial is not None and self.segment is not None:
            known = next((trial for trial in ledger.trials() if trial.key == self.trial.key), None)
            if known is None or len(known.segments) <= self.segment.index:
                ledger.begin(self.trial, self.segment)
        elif self.key is not None and self.result is not None:
            ledger.commit(self.key, self.result, self.records)


class Outbox:
    """A ledger in front of another one. See `jfhpo_core.store.ledger.Ledger` for what each method promises.

    Args:
        ledger: Raises `LedgerUnavailable` while its store is away.
        path: The file. It exists only while something waits in it.
        patience_seconds: See `PATIENCE_SECONDS`.
    """

    def __init__(self, ledger: Ledger, path: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._ledger = ledger
        self._path = path
        self._patience_seconds = patience_seconds
        self._mirror = MemoryLedger()
        self._waiting: deque[PendingWrite] = deque()
        self._tried_at = -math.inf

    def open(self, study: StudySpec) -> None:
        """See `Ledger.open`. Delivers what an earlier process has left.

        Raises:
            LedgerUnavailable: The store is away.
            LedgerError: What was left contradicts what the store has.
        """
        self._ledger.open(study)
        self._waiting = deque(waiting(self._path))
        try:
            self.deliver()
        except LedgerUnavailable:
            raise
        except LedgerError as error:
            raise LedgerError(
                f"{error}; {self._path} holds another one, because two machines that did not see each other trained "
                "the study: delete this file to go on with what the ledger has"
            ) from error
        self._path.unlink(missing_ok=True)  # the rest of a line that a crash has cut off must not spoil the next one
        self._mirror = MemoryLedger(self._ledger.trials())
        # The rules need what a continued run did before; from now on nobody has to wait for the store to tell.
        for trial in self._mirror.trials():
            if trial.open_segment is not None or trial.is_extendable:
                with contextlib.suppress(LedgerError):  # a run that is not continued does not miss them
                    self._ledger.step_records(trial.key)

    def trials(self) -> list[Trial]:
        """See `Ledger.trials`."""
        return self._mirror.trials()

    def begin(self, trial: Trial, segment: Segment) -> None:
        """See `Ledger.begin`."""
        self._mirror.begin(trial, segment)
        self._put(PendingWrite(trial=trial, segment=segment))

    def stream(self, key: str, records: Sequence[StepRecord]) -> None:
        """See `Ledger.stream`; nothing is shown while the store is away."""
        self._retry()
        if not self._waiting and self._is_due:
            with self._excused("not shown"):
                self._ledger.stream(key, records)

    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        """See `Ledger.commit`."""
        self._mirror.commit(key, result, records)
        self._put(PendingWrite(key=key, result=result, records=tuple(records)))

    def step_records(self, key: str) -> list[StepRecord]:
        """See `Ledger.step_records`."""
        delivered = [] if self._is_new(key) else self.wait_for(lambda: self._ledger.step_records(key))
        records = {record.step: record for record in (*delivered, *self._mirror.step_records(key))}
        return [records[step] for step in sorted(records)]

    def summarize(self, facts: Mapping[str, str | float], artifacts: Sequence[Path] = ()) -> None:
        """See `Ledger.summarize`; waits for the store."""
        self.deliver()
        self.wait_for(lambda: self._ledger.summarize(facts, artifacts))

    def facts(self) -> dict[str, str | float]:
        """See `Ledger.facts`."""
        return self._ledger.facts()

    def environment(self, key: str) -> dict[str, str]:
        """See `Ledger.environment`; empty for a trial that the store does not know yet."""
        return {} if self._is_new(key) else self._ledger.environment(key)

    def url(self) -> str | None:
        """See `Ledger.url`."""
        return self._ledger.url()

    def deliver(self) -> None:
        """Write everything that waits; waits for the store.

        Raises:
            LedgerUnavailable: It has not come back. What waits stays in the file, for the next process.
        """
        if self._waiting:
            self.wait_for(self._empty)

    def _is_new(self, key: str) -> bool:
        """Whether the beginning of a trial itself still waits."""
        return any(
            entry.trial is not None and entry.trial.key == key and not entry.trial.segments for entry in self._waiting
        )

    def _put(self, entry: PendingWrite) -> None:
        self._retry()
        if not self._waiting:
            try:
                entry.deliver(self._ledger)
            except LedgerUnavailable as error:
                logger.warning("%s; the search goes on, and what it would write waits in %s", error, self._path)
                self._tried_at = time.monotonic()
            else:
                return
        self._waiting.append(entry)
        make_folder(self._path.parent)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{entry.model_dump_json()}\n")
            file.flush()
            os.fsync(file.fileno())
        flush(self._path.parent)

    def _retry(self) -> None:
        """Try again to write what waits, if the last attempt is a while ago."""
        if self._waiting and self._is_due:
            with self._excused("still away"):
                self._empty()

    @contextlib.contextmanager
    def _excused(self, what: str) -> Iterator[None]:
        """Do without the store while it is away, and note when it was found so."""
        try:
            yield
        except LedgerUnavailable as error:
            self._tried_at = time.monotonic()
            logger.debug("%s: %s", what, error)

    @property
    def _is_due(self) -> bool:
        """Whether the store was last found away long enough ago; an attempt itself may take many seconds."""
        return time.monotonic() - self._tried_at >= RETRY_SECONDS

    def _empty(self) -> None:
        while self._waiting:
            self._waiting[0].deliver(self._ledger)
            self._waiting.popleft()
        self._path.unlink(missing_ok=True)
        logger.warning("what waited in %s is written", self._path)

    def wait_for(self, call: Callable[[], Answer]) -> Answer:
        """Call what cannot do without the store, again and again while the store is away.

        Raises:
            LedgerUnavailable: It has not come back.
        """
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                return call()
            except LedgerUnavailable as error:
                if time.monotonic() > deadline:
                    raise LedgerUnavailable(
                        f"{error}; nothing is lost: start the store again and run the same command"
                    ) from error
                time.sleep(min(RETRY_SECONDS, self._patience_seconds))


def waiting(path: Path) -> list[PendingWrite]:
    """What waits in a file. A last line that a crash has cut off was never acknowledged.

    Raises:
        LedgerError: Another line cannot be read.
    """
    if not path.exists():
        return []
    entries = []
    lines = path.read_bytes().split(b"\n")  # not decoded as a whole: what is cut off may end within a character
    for number, line in enumerate(lines, 1):
        try:
            entries += [PendingWrite.model_validate_json(line)] if line else []
        except ValidationError as error:
            if number < len(lines):
                raise LedgerError(f"{path}, line {number} cannot be read ({error}); was the file edited?") from None
    return entries
