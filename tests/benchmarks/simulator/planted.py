"""Twenty-two bugs, each planted into the real code in the place of what is there."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.simulator.disk import SimulatedOs
from benchmarks.simulator.world import OUTBOX
from jfhpo_core.run import planning, search, worker
from jfhpo_core.store import checkpoints, ledger, outbox
from jfhpo_core.store.outbox import Outbox, PendingWrite
from jfhpo_core.study.resolved import Study
from mlflow_plugin import ledger as mlflow_ledger
from mlflow_plugin import tags, trial_runs
from mlflow_plugin.failures import explained
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.owner import Owner

Plant = Callable[[pytest.MonkeyPatch], None]


def nothing(*_: object, **__: object) -> None:
    """Does nothing."""


def name_of_the_outbox_is_not_flushed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(outbox, "flush", nothing)
    patch.setattr(outbox, "make_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))


def content_of_the_outbox_is_not_flushed(patch: pytest.MonkeyPatch) -> None:
    real = SimulatedOs.fsync
    patch.setattr(SimulatedOs, "fsync", lambda path: None if path == OUTBOX else real(path))


def what_waits_is_not_written_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingWrite, "model_dump_json", lambda _entry: "")


def what_waits_is_not_delivered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(outbox, "waiting", lambda _path: [])


def the_outbox_is_deleted_before_it_is_delivered(patch: pytest.MonkeyPatch) -> None:
    real = Outbox._empty

    def empty(self: Outbox) -> None:
        self._path.unlink(missing_ok=True)
        real(self)

    patch.setattr(Outbox, "_empty", empty)


def an_entry_leaves_the_outbox_before_it_is_delivered(patch: pytest.MonkeyPatch) -> None:
    def empty(self: Outbox) -> None:
        while self._waiting:
            self._waiting.popleft().deliver(self._ledger)
        self._path.unlink(missing_ok=True)

    patch.setattr(Outbox, "_empty", empty)


def the_outbox_is_delivered_backwards(patch: pytest.MonkeyPatch) -> None:
    real = outbox.waiting
    patch.setattr(outbox, "waiting", lambda path: list(reversed(real(path))))


def a_later_write_overtakes_what_waits(patch: pytest.MonkeyPatch) -> None:
    real = Outbox._put

    def put(self: Outbox, entry: PendingWrite) -> None:
        held, self._waiting = self._waiting, deque()
        try:
            real(self, entry)
        finally:
            self._waiting = deque([*held, *self._waiting])

    patch.setattr(Outbox, "_put", put)


def a_segment_may_be_committed_again(patch: pytest.MonkeyPatch) -> None:
    for module in (ledger, mlflow_ledger):
        patch.setattr(module, "check_commit", lambda _trial, _result: True)


def late_results_count(patch: pytest.MonkeyPatch) -> None:
    def absorb(run: Any, event: Any) -> None:
        trials = run.ledger.trials()
        if hasattr(event, "result"):
            rank = 1 + max((result.committed for trial in trials for result in trial.segments), default=0)
            run.ledger.commit(event.key, event.result.model_copy(update={"committed": rank}), event.records)
            run.in_flight.pop(event.key, None)

    patch.setattr(search, "_absorb", absorb)


def records_follow_the_commit(patch: pytest.MonkeyPatch) -> None:
    real = MlflowLedger.commit

    def commit(self: MlflowLedger, key: str, result: Any, records: Sequence[Any]) -> None:
        client = self.client
        texts: list[Any] = []
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(client, "log_text", lambda *arguments: texts.append(arguments))
            real(self, key, result, records)
        for arguments in texts:
            client.log_text(*arguments)

    patch.setattr(MlflowLedger, "commit", explained(commit))


def the_owner_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MlflowLedger, "_check_owner", nothing)


def a_study_that_was_released_counts_as_ours(patch: pytest.MonkeyPatch) -> None:
    real = Owner.check

    def check(self: Owner) -> None:
        if json.loads(self._client.get_run(self._run_id).data.tags.get("jfhpo.owner") or "null") is not None:
            real(self)

    patch.setattr(Owner, "check", check)


def an_owner_is_not_watched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mlflow_plugin.owner.MISSED_BEATS", 0)


def checkpoints_are_not_flushed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoints, "flush", nothing)


def folders_of_checkpoints_are_not_flushed(patch: pytest.MonkeyPatch) -> None:
    real = checkpoints.flush
    patch.setattr(checkpoints, "flush", lambda path: None if path.is_dir() else real(path))


def damage_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoints, "_fault", nothing)


def the_checkpoint_before_is_deleted_too_early(patch: pytest.MonkeyPatch) -> None:
    real = worker.CheckpointStore.commit

    def commit(self: Any, key: str, stage: Any, step: int, prompts: int) -> Any:
        self.prune(key, [])
        return real(self, key, stage, step, prompts)

    patch.setattr(worker.CheckpointStore, "commit", commit)


def the_suggestion_depends_on_the_clock(patch: pytest.MonkeyPatch) -> None:
    real = planning.call_seed

    def call_seed(study: Study, trials: Sequence[Any]) -> int:
        return real(study, trials) + int(search.time.time() // 86400)

    patch.setattr(planning, "call_seed", call_seed)


def the_suggestion_depends_on_the_process(patch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    patch.setattr(planning, "call_seed", lambda _study, _trials: next(calls))


def long_tags_are_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tags, "TAG_LIMIT", 10**9)


def pages_are_not_turned(patch: pytest.MonkeyPatch) -> None:
    def first_page(client: Any, experiment: str, condition: str, view: int = 1) -> list[Any]:
        return list(client.search_runs([experiment], condition, view, order_by=[], page_token=None))

    patch.setattr(trial_runs, "search_runs", first_page)


PLANTED: tuple[Plant, ...] = (
    name_of_the_outbox_is_not_flushed,
    content_of_the_outbox_is_not_flushed,
    what_waits_is_not_written_down,
    what_waits_is_not_delivered,
    the_outbox_is_deleted_before_it_is_delivered,
    an_entry_leaves_the_outbox_before_it_is_delivered,
    the_outbox_is_delivered_backwards,
    a_later_write_overtakes_what_waits,
    a_segment_may_be_committed_again,
    late_results_count,
    records_follow_the_commit,
    the_owner_is_not_asked,
    a_study_that_was_released_counts_as_ours,
    an_owner_is_not_watched,
    checkpoints_are_not_flushed,
    folders_of_checkpoints_are_not_flushed,
    damage_is_not_noticed,
    the_checkpoint_before_is_deleted_too_early,
    the_suggestion_depends_on_the_clock,
    the_suggestion_depends_on_the_process,
    long_tags_are_cut,
    pages_are_not_turned,
)
