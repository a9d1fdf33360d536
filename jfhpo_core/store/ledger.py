"""The ledger: the study's only memory. The protocol, and the ledger that lives in this process's memory.

A ledger holds trials and their committed segments. `commit` is the one moment at which work counts: before it, a
segment is open and will be trained again after a crash; after it, the segment is charged, once. One process writes.
`jfhpo.testing.LedgerConformance` is the contract that every ledger must pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from jfhpo_core.errors import LedgerError
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Record, Segment, SegmentResult, StepRecord, Trial


class Ledger(Protocol):
    """Where a study is kept."""

    def open(self, study: StudySpec) -> None:
        """Create the study, or continue it.

        Raises:
            LedgerError: A study of this name exists and its `identity()` differs. Nothing is changed then.
        """
        ...

    def trials(self) -> list[Trial]:
        """All trials in order of creation, with committed segments and the open one."""
        ...

    def begin(self, trial: Trial, segment: Segment) -> None:
        """Note that a segment is about to be trained; creates the trial if the ledger lacks it.

        Beginning the same segment again changes nothing.

        Raises:
            LedgerError: The segment is not the trial's next one.
        """
        ...

    def stream(self, key: str, records: Sequence[StepRecord]) -> None:
        """Show records of a running segment. They count only once their segment is committed."""
        ...

    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        """Close the open segment with its result and all its step records. Committing an equal result again is a no-op.

        Raises:
            LedgerError: The trial is unknown, or the result contradicts a committed one.
        """
        ...

    def step_records(self, key: str) -> list[StepRecord]:
        """Step records of the committed segments, by step. Empty for an unknown trial."""
        ...

    def summarize(self, facts: Mapping[str, str | float], artifacts: Sequence[Path] = ()) -> None:
        """Attach facts (text or numbers) and files to the study; a fact given again replaces the old one."""
        ...

    def facts(self) -> dict[str, str | float]:
        """The facts attached by `summarize`."""
        ...

    def environment(self, key: str) -> dict[str, str]:
        """Environment variables that tell a trainer's own tracking which trial it works for."""
        ...

    def url(self) -> str | None:
        """Where a person can look at the study, if anywhere."""
        ...


def check_begin(trial: Trial, segment: Segment) -> None:
    """The rule for `begin`, shared by all ledgers.

    Raises:
        LedgerError: The segment is not the next one, or another one is open.
    """
    if trial.open_segment is not None and not _same(trial.open_segment, segment):
        raise LedgerError(
            f"trial #{trial.number}: segment {trial.open_segment.index} is open; commit it before beginning another"
        )
    if segment.index != len(trial.segments):
        raise LedgerError(
            f"trial #{trial.number}: segment {segment.index} begun, but the next one is {len(trial.segments)}"
        )


def check_commit(trial: Trial, result: SegmentResult) -> bool:
    """The rule for `commit`, shared by all ledgers. Returns False if the result is already committed.

    Raises:
        LedgerError: The result contradicts a committed one, or its segment was never begun.
    """
    index = result.segment.index
    if index < len(trial.segments):
        if _same(trial.segments[index], result):
            return False
        raise LedgerError(f"trial #{trial.number}: segment {index} is already committed with another result")
    if trial.open_segment is None or not _same(trial.open_segment, result.segment):
        raise LedgerError(f"trial #{trial.number}: segment {index} was not begun")
    return True


def _same(one: Record, other: Record) -> bool:
    """Equality for which NaN equals NaN: a ledger that was read again holds other NaN objects."""
    return one.model_dump_json() == other.model_dump_json()


class MemoryLedger:
    """A ledger for simulations and tests; it ends with the process.

    Args:
        trials: What it holds to begin with.
    """

    def __init__(self, trials: Sequence[Trial] = ()) -> None:
        self._study: StudySpec | None = None
        self._trials = {trial.key: trial for trial in trials}
        self._records: dict[str, dict[int, StepRecord]] = {}
        self._facts: dict[str, str | float] = {}

    def open(self, study: StudySpec) -> None:
        """See `Ledger.open`."""
        if self._study is not None and self._study.identity() != study.identity():
            raise LedgerError(mismatch_message(study.study, self._study.changes(study)))
        self._study = study

    def trials(self) -> list[Trial]:
        """See `Ledger.trials`."""
        return list(self._trials.values())

    def begin(self, trial: Trial, segment: Segment) -> None:
        """See `Ledger.begin`."""
        known = self._trials.get(trial.key, trial.model_copy(update={"segments": (), "open_segment": None}))
        check_begin(known, segment)
        self._trials[trial.key] = known.model_copy(update={"open_segment": segment})

    def stream(self, key: str, records: Sequence[StepRecord]) -> None:
        """See `Ledger.stream`; no-op: in-memory ledgers have no viewer."""

    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        """See `Ledger.commit`."""
        if key not in self._trials:
            raise LedgerError(f"trial {key} is unknown; begin a segment first")
        trial = self._trials[key]
        if check_commit(trial, result):
            self._records.setdefault(key, {}).update({record.step: record for record in records})
            self._trials[key] = trial.model_copy(update={"segments": (*trial.segments, result), "open_segment": None})

    def step_records(self, key: str) -> list[StepRecord]:
        """See `Ledger.step_records`."""
        records = self._records.get(key, {})
        return [records[step] for step in sorted(records)]

    def summarize(self, facts: Mapping[str, str | float], artifacts: Sequence[Path] = ()) -> None:
        """See `Ledger.summarize`; files are not copied."""
        self._facts.update(facts)

    def facts(self) -> dict[str, str | float]:
        """See `Ledger.facts`."""
        return dict(self._facts)

    def environment(self, key: str) -> dict[str, str]:
        """See `Ledger.environment`."""
        return {}

    def url(self) -> str | None:
        """See `Ledger.url`."""
        return None


def mismatch_message(name: str, changes: Sequence[str] = ()) -> str:
    """What to say when a study of the same name means something else.

    Args:
        name: Of the study.
        changes: Fields that differ, if it is known.
    """
    what = f"other values of {', '.join(changes)}" if changes else "other settings"
    return (
        f"study {name!r} exists in the ledger with {what}, so its trials cannot be continued by this file; give the "
        "study a new name, or restore the file. Budget, baselines, seeds, strategy, cluster and tracking may change, "
        "and so may all fields that `jfhpo schema` marks as operational"
    )


def changes_message(name: str, changes: Sequence[str]) -> str:
    """What to say when files that a study reads have changed since it began."""
    return (
        f"study {name!r} was begun with other contents of {', '.join(changes)}, so new scores would not compare with "
        "those that it has; give the study a new name, restore the files, or run `jfhpo search --accept-changed-data`, "
        "which marks every later trial"
    )
