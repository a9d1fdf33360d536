"""The ledger in MLflow: the study is a run, its trials are nested runs, and one tag per segment makes it count.

What is read back lives in tags with JSON that MLflow's pages do not show (`mlflow.jfhpo.trial`, `mlflow.jfhpo.open`,
`mlflow.jfhpo.segment.0003`) and in one artifact per segment with its step records. Metrics, parameters, names and
descriptions are for people and are never read back.

Order of writes. A trial and its first segment come into being by the one call that creates the run. A segment is
committed by the one call that sets its tag `...segment.NNNN`, which comes last in that call; its records are stored
before. Status and name of the run are written after. A crash at any point leaves a ledger that `open` can read, and
`open` puts right what people would see wrong: statuses, names, parameters and the index of checkpoints. An open segment
is the one in `mlflow.jfhpo.open`, unless it is committed already.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ValidationError

from jfhpo_core.errors import LedgerError, LedgerUnavailable, SpecError
from jfhpo_core.report.text import without_credentials
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.store.ledger import changes_message, check_begin, check_commit, mismatch_message
from jfhpo_core.study.contents import changed, contents
from jfhpo_core.study.models import Ladder, build_ladder
from jfhpo_core.study.resolved import checkpoint_store
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import Configuration, Segment, SegmentResult, StepRecord, Trial, canonical_json
from jfhpo_core.trainers import load_trainer
from mlflow_plugin import checkpoints
from mlflow_plugin.owner import Owner
from mlflow_plugin.presentation import (
    NOTE,
    STATE,
    STATUS,
    STUDY_STATUS,
    StudyState,
    completions_table,
    experiment_note,
    outcome_labels,
    outcome_metrics,
    result_metrics,
    run_name,
    step_metrics,
    study_metrics,
    study_note,
    study_parameters,
    trial_labels,
    trial_parameters,
    view_page,
)
from mlflow_plugin.provenance import TaskData, environment, source_tags, task_data
from mlflow_plugin.views import saved_views
from mlflow_plugin.worker import trial_environment

DEFAULT_URI = "sqlite:///mlflow.db"

STUDY = "jfhpo.study"
IDENTITY = "jfhpo.identity"
INTERNAL = "mlflow.jfhpo."
"""Begins tags that only the ledger reads: MLflow's pages hide what begins with `mlflow.`."""
CONTENTS = f"{INTERNAL}contents"
CHANGED = f"{INTERNAL}changed"
DESCRIBED = "jfhpo.study_sha256"
HEADER = f"{INTERNAL}trial"
OPEN = f"{INTERNAL}open"
SEGMENT = INTERNAL + "segment.{:04d}"
FACTS = f"{INTERNAL}facts"
PARENT = "mlflow.parentRunId"
FORGOTTEN = f"{INTERNAL}forgotten"
"""Tag of the study's run with what a user goes on without: ids of deleted runs and ranks of their commits."""

TAG_LIMIT = 5000
"""Characters of a tag. MLflow takes 8000 since version 2.15 and 5000 before; what is longer it cuts off silently."""
METRICS_PER_CALL = 800
"""MLflow takes 1000 entities in one call, tags and parameters included."""
PARAMETERS_PER_CALL = 100
STREAM_SECONDS = 2.0
"""Shortest time between two writes of a running trial's metrics: a write costs about 20 ms of CPU."""
CONNECT_SECONDS = 10
TRIAL_KEY = "jfhpo.trial_key"
COMPLETIONS = "completions.json"
"""Artifact of a trial that has ended: MLflow shows it as a table, and compares those of several runs."""
AWAY = "TEMPORARILY_UNAVAILABLE"
"""MLflow's code for a database that is locked by another process, full or away."""
TRANSIENT = {AWAY, "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "ABORTED"}
"""MLflow's codes for a server that is away, overloaded or about to restart."""
REMOTE_NAMES = {"databricks", "databricks-uc", "uc"}
"""Tracking URIs without a scheme that are no folders."""
DELETED = "must be in the 'active' state"
"""What MLflow says of a run, or an experiment, that was deleted and can be restored."""
GONE = "RESOURCE_DOES_NOT_EXIST"
REFUSALS = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""The outbox tries again by itself: the driver shall not stand still for the minutes that MLflow's defaults take."""

logger = logging.getLogger(__name__)

AnyModel = TypeVar("AnyModel", bound=BaseModel)
Call = TypeVar("Call", bound=Callable[..., Any])


def _explained(method: Call) -> Call:
    """Translate MLflow and HTTP errors into LedgerError or LedgerUnavailable."""

    @functools.wraps(method)
    def wrapped(self: MlflowLedger, *arguments: Any, **keywords: Any) -> Any:
        from requests import RequestException

        try:
            with contextlib.nullcontext() if self._opened is None or self.remote else _signals_wait():
                return method(self, *arguments, **keywords)
        except (MlflowException, RequestException) as error:
            told = self.explain(error)
            if told is None:
                raise
            raise told from error

    return wrapped  # type: ignore[return-value]


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the call returns; raising inside a database call would leave it locked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _short(error: Exception) -> str:
    text = without_credentials(str(error))
    return text if len(text) <= 200 else f"{text[:200]} ..."


@dataclass
class _Child:
    """A trial and its run.

    Attributes:
        described: Whether the run has its parameters.
        status: The run's status, as MLflow has it.
        name: The run's name, as MLflow has it.
        checkpoint: Where the trial's checkpoint is indexed, as MLflow has it.
        records: Step records of the committed segments by step; None until they are read.
        shown: Step records that this process has logged as metrics.
        waiting: Streamed records that are not logged yet.
        streamed_at: When metrics were last streamed, by the monotonic clock.
    """

    run_id: str
    trial: Trial
    described: bool
    status: str
    name: str
    checkpoint: checkpoints.Entry | None = None
    records: dict[int, StepRecord] | None = None
    shown: dict[int, StepRecord] = field(default_factory=dict)
    waiting: list[StepRecord] = field(default_factory=list)
    streamed_at: float = -math.inf


class MlflowLedger:
    """A ledger in an MLflow tracking store; see `jfhpo_core.store.ledger.Ledger` for what each method promises.

    Trials are read from MLflow once, by `open`; from then on this process is the only writer and answers from memory.

    Args:
        client: Talks to the tracking store; None connects `open` to the one that the study names.
        accept_changes: Let `open` go on with data, rewards or models that have changed; see `changed`.
        forget: Let `open` go on without the runs of the study that were deleted in MLflow.
    """

    def __init__(
        self, client: MlflowClient | None = None, *, accept_changes: bool = False, forget: bool = False
    ) -> None:
        self._given = client
        self._accept_changes = accept_changes
        self._forget = forget
        self._opened: MlflowClient | None = None
        self._study: StudySpec
        self._experiment_id: str
        self._parent: Run
        self._state: StudyState
        self._ladder: Ladder
        self._data: TaskData
        self._source: dict[str, str]
        self._defaults: Configuration
        self._children: dict[str, _Child] = {}
        self._uncertain: set[str] = set()
        self._facts: dict[str, str | float] = {}
        self._owner: Owner | None = None

    @_explained
    def open(self, study: StudySpec) -> None:
        """See `Ledger.open`.

        Raises:
            LedgerError: Also if the tracking store cannot be reached or holds something that cannot be read, or if runs
                of the study were deleted there.
        """
        client = self._given or connect(study)
        experiment = _experiment(client, study)
        parent = _study_run(client, experiment.experiment_id, study)
        if parent is None and not self._forget:
            _refuse_deleted_study(client, experiment.experiment_id, study)
        if parent is not None:
            _refuse_other_meaning(client, parent, study)
        known = contents(study)
        changes = _changed_contents(parent, known) if parent is not None else []
        if changes and not self._accept_changes:
            raise LedgerError(changes_message(study.study, changes))
        self._ladder, self._data, self._source = build_ladder(study), task_data(study.task), source_tags()
        self._defaults = _defaults(study)
        self._opened, self._study, self._experiment_id = client, study, experiment.experiment_id
        self._parent = parent if parent is not None else self._create_study()
        self._note_contents(known, changes)
        self._facts = read_facts(self._parent)
        shown = self._parent.data.tags.get(STATE)
        self._state = next((state for state in StudyState if state.value == shown), StudyState.RUNNING)
        self._children = self._read_children()
        self._account_for_deleted()
        self._owner = Owner.claim(client, self.study_run_id, study.study)
        self._describe_study()
        for child in self._children.values():
            if changes and child.trial.open_segment is not None:
                self._mark_open(child, child.trial.open_segment)
            self._settle(child)
            self._index(child, child.trial)
        if any(trial.open_segment is not None for trial in self.trials()):
            self._show(StudyState.RUNNING)

    @_explained
    def look(self, study: StudySpec) -> bool:
        """Open for reading only, also while another process runs the study. Nothing is created or changed.

        Returns:
            False if the tracking store holds no such study; the ledger is not open then.

        Raises:
            LedgerError: As `open`.
        """
        if self._given is None and not _exists(study):
            return False
        client = self._given or connect(study)
        experiment = client.get_experiment_by_name(_experiment_name(study))
        parent = _study_run(client, experiment.experiment_id, study) if experiment is not None else None
        if parent is None:
            return False
        _refuse_other_meaning(client, parent, study)
        self._opened, self._study, self._experiment_id = client, study, experiment.experiment_id
        self._parent, self._facts = parent, read_facts(parent)
        self._children = self._read_children()
        return True

    def refuse_changes(self) -> None:
        """Refuse data, rewards and models that have changed since the study began.

        Raises:
            LedgerError: With what has changed, and the ways on.
        """
        changes = _changed_contents(self._parent, contents(self._study))
        if changes:
            raise LedgerError(changes_message(self._study.study, changes))

    @property
    def changed(self) -> tuple[str, ...]:
        """Fields of the study whose files were changed, and the change accepted, since it began."""
        self._client  # noqa: B018  refuses a ledger that is not open
        return _accepted(self._parent)

    @_explained
    def recall(self, study: StudySpec, name: str) -> StudySpec:
        """Open an earlier study in the store of `study` for reading only, and return its study file.

        Raises:
            LedgerError: The store holds no study of this name, or its study file is lost.
        """
        client = self._given or (connect(study) if _exists(study) else None)
        found = _study_anywhere(client, study, name) if client is not None else None
        if found is None:
            raise LedgerError(
                f"warm_start: the ledger holds no study {name!r} in experiment "
                f"{_experiment_name(study)!r} or any jfhpo/...; correct the name, or remove it"
            )
        self._opened = client
        experiment, run = found
        spec = parse_study(self._read_text(run.info.run_id, "study.yaml"), f"study {name!r} in the ledger")
        spec = spec.model_copy(update={"tracking": study.tracking.model_copy(update={"experiment": experiment.name})})
        self.look(spec)
        return spec

    def trials(self) -> list[Trial]:
        """See `Ledger.trials`."""
        return [child.trial for child in self._children.values()]

    @_explained
    def begin(self, trial: Trial, segment: Segment) -> None:
        """See `Ledger.begin`."""
        self._client  # noqa: B018  refuses a ledger that is not open
        child = self._children.get(trial.key)
        known = child.trial if child else trial.model_copy(update={"segments": (), "open_segment": None})
        check_begin(known, segment)
        if known.open_segment is not None:
            if child is not None:
                self._settle(child)
            return
        self._check_owner()
        self._show(StudyState.RUNNING)
        begun = known.model_copy(update={"open_segment": segment})
        tags = {**_pack(OPEN, segment.model_dump_json()), **trial_labels(begun)}
        if child is None:
            run = self._found_run(trial.key) or self._create_run(begun, tags)
            child = _Child(run.info.run_id, begun, False, run.info.status, run.info.run_name, records={})
            self._children[trial.key] = child
        else:
            self._log(child.run_id, tags=tags)
            child.trial = begun
        self._settle(child)

    @_explained
    def stream(self, key: str, records: Sequence[StepRecord]) -> None:
        """See `Ledger.stream`; written at most every `STREAM_SECONDS`."""
        child = self._child(key)
        child.waiting.extend(records)
        if time.monotonic() - child.streamed_at >= STREAM_SECONDS:
            self._log(child.run_id, step_metrics(_unseen(child, child.waiting), _now()))
            child.shown.update({record.step: record for record in child.waiting})
            child.waiting = []
            child.streamed_at = time.monotonic()

    @_explained
    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        """See `Ledger.commit`."""
        child = self._child(key)
        if not check_commit(child.trial, result):
            self._settle(child)
            return
        self._check_owner()
        trial = child.trial.model_copy(update={"segments": (*child.trial.segments, result), "open_segment": None})
        known = self._records(child)
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        self._client.log_text(child.run_id, lines, _records_file(result.segment.index))
        self._index(child, trial)
        model_id = child.checkpoint.model_id if child.checkpoint is not None else None
        steps = step_metrics(_unseen(child, records), _now())
        self._log(
            child.run_id,
            [
                *steps,
                *result_metrics(trial, result, _now(), model_id, self._data),
            ],
            tags={**_pack(SEGMENT.format(result.segment.index), result.model_dump_json()), **trial_labels(trial)},
        )
        child.trial, child.waiting, child.shown = trial, [], {}
        if (table := completions_table(trial)) is not None:
            self._client.log_table(child.run_id, table, COMPLETIONS)
        known.update({record.step: record for record in records})
        self._settle(child)
        trials = self.trials()
        self._log(
            self.study_run_id, study_metrics(self._study, trials, _now()), tags={NOTE: study_note(self._study, trials)}
        )

    @_explained
    def step_records(self, key: str) -> list[StepRecord]:
        """See `Ledger.step_records`."""
        if key not in self._children:
            return []
        records = self._records(self._children[key])
        return [records[step] for step in sorted(records)]

    @_explained
    def summarize(self, facts: Mapping[str, str | float], artifacts: Sequence[Path] = ()) -> None:
        """See `Ledger.summarize`."""
        for path in artifacts:
            self._client.log_artifact(self.study_run_id, str(path))
        known = {**self._facts, **facts}
        self._log(self.study_run_id, tags=_pack(FACTS, json.dumps(known, ensure_ascii=False)))
        self._facts = known

    @_explained
    def present(
        self, result: SearchResult, plots: Sequence[Path] = (), figures: Mapping[str, float] | None = None
    ) -> None:
        """Show an outcome on the study's run: as its description, as metrics, and as plots among its artifacts.

        Args:
            result: The outcome.
            plots: Pictures.
            figures: Further metrics, by name.
        """
        for path in plots:
            self._client.log_artifact(self.study_run_id, str(path), "plots")
        note = study_note(self._study, result.trials, result)
        now = _now()
        further = [Metric(name, value, now, 0) for name, value in (figures or {}).items()]
        metrics = [*outcome_metrics(result, now), *further]
        self._log(self.study_run_id, metrics, tags={**outcome_labels(result), NOTE: note})

    def forget_checkpoint(self, key: str) -> None:
        """Note that the newest checkpoint of a trial was deleted, so that the index offers it no longer."""
        entry = self._child(key).checkpoint
        if entry is not None:
            checkpoints.mark_deleted(self._client, entry)

    def end(self, state: StudyState) -> None:
        """Show that this process works on the study no longer; segments that are open wait for the next one.

        Nothing depends on it, so a store that does not take it is no error.
        """
        try:
            if self._owner is not None:
                self._owner.release()
            for child in self._children.values():
                if child.trial.open_segment is not None and child.status != "KILLED":
                    self._log(child.run_id, tags={STATE: StudyState.INTERRUPTED.value})
                    self._client.set_terminated(child.run_id, "KILLED")
                    child.status = "KILLED"
            self._show(state)
        except MlflowException as error:
            logger.warning("MLflow still shows study %r as running: %s", self._study.study, error.message)

    def explain(self, error: Exception) -> LedgerError | None:
        """What an error of MLflow means in our words; None if it has no meaning but a fault of the program."""
        code = error.error_code if isinstance(error, MlflowException) else None
        if code in REFUSALS:
            return LedgerError(
                f"the MLflow server refuses access ({_short(error)}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to an account that may edit the experiment"
            )
        remote = self._opened is not None and self.remote
        if code in (TRANSIENT if remote else {AWAY}) or (code is None and self._opened is not None):
            where = f" {self.tracking_uri}" if self._opened is not None else ""
            store = "server" if remote else "database"
            return LedgerUnavailable(f"the MLflow {store}{where} does not answer: {_short(error)}")
        if DELETED in str(error) or code == GONE:
            return LedgerError(
                f"a run of the study, or its experiment, was deleted in MLflow ({_short(error)}); restore it there, or "
                "run the same command again, which says what is missing and how to go on without it"
            )
        return None

    def facts(self) -> dict[str, str | float]:
        """See `Ledger.facts`."""
        return dict(self._facts)

    def environment(self, key: str) -> dict[str, str]:
        """See `Ledger.environment`: runs that are started for the trial become children of its run."""
        child = self._child(key)
        uri = _absolute(self._client.tracking_uri)
        return trial_environment(uri, self._experiment_id, self._study.study, child.trial, child.run_id)

    def url(self) -> str | None:
        """The study's run in the UI of the tracking server; None without a server (see `tracking_uri`)."""
        if not _is_server(self.tracking_uri):
            return None
        parts = urlsplit(self._client.tracking_uri)
        server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        return f"{server}/#/experiments/{self._experiment_id}/runs/{self.study_run_id}?workflowType=machine_learning"

    def page(self) -> str:
        """The trials in MLflow's UI, as what follows the address of its server: '#/experiments/...'."""
        self._client  # noqa: B018  refuses a ledger that is not open
        return view_page(self._experiment_id)

    @property
    def tracking_uri(self) -> str:
        """Where the study is kept, as `mlflow ui --backend-store-uri` takes it; a password in it is masked."""
        return without_credentials(self._client.tracking_uri)

    @property
    def remote(self) -> bool:
        """Whether the tracking store is a server, which may be away for a while."""
        return _is_server(self._client.tracking_uri)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the study's experiment."""
        self._client  # noqa: B018  refuses a ledger that is not open
        return self._experiment_id

    @property
    def study_run_id(self) -> str:
        """MLflow's id of the study's run."""
        self._client  # noqa: B018  refuses a ledger that is not open
        return str(self._parent.info.run_id)

    @property
    def client(self) -> MlflowClient:
        """The client that the ledger writes with."""
        return self._client

    def run_id(self, key: str) -> str:
        """MLflow's id of a trial's run.

        Raises:
            LedgerError: The trial is unknown.
        """
        return self._child(key).run_id

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            raise LedgerError("the ledger is not open; call open(study) first")
        return self._opened

    def _child(self, key: str) -> _Child:
        self._client  # noqa: B018  refuses a ledger that is not open
        if key not in self._children:
            raise LedgerError(f"trial {key} is unknown; begin a segment first")
        return self._children[key]

    def _create_study(self) -> Run:
        tags = {STUDY: self._study.study, IDENTITY: self._study.identity(), STATE: StudyState.RUNNING.value}
        return self._client.create_run(self._experiment_id, tags={**self._source, **tags}, run_name=self._study.study)

    def _note_contents(self, known: Mapping[str, str], changes: Sequence[str]) -> None:
        """Keep the digests of what the study reads, and which of them changed; those of old studies begin today."""
        tags = self._parent.data.tags
        noted = json.loads(_unpack(tags, CONTENTS) or "{}")
        accepted = sorted({*_accepted(self._parent), *changes})
        fresh = {
            IDENTITY: self._study.identity(),
            **_pack(CONTENTS, canonical_json({**noted, **known})),
            **(_pack(CHANGED, json.dumps(accepted)) if accepted else {}),
        }
        if any(tags.get(name) != value for name, value in fresh.items()):
            self._log(self.study_run_id, tags=fresh)
            self._parent = self._client.get_run(self.study_run_id)

    def _mark_open(self, child: _Child, segment: Segment) -> None:
        """Note that an interrupted segment will be trained with what has changed."""
        marked = segment.model_copy(update={"changed": self.changed})
        child.trial = child.trial.model_copy(update={"open_segment": marked})
        self._log(child.run_id, tags={**_pack(OPEN, marked.model_dump_json()), **trial_labels(child.trial)})

    def _create_run(self, trial: Trial, tags: Mapping[str, str]) -> Run:
        header = trial.model_copy(update={"segments": (), "open_segment": None}).model_dump_json()
        self._uncertain.add(trial.key)
        run = self._client.create_run(
            self._experiment_id,
            tags={
                **self._source, PARENT: self.study_run_id, TRIAL_KEY: trial.key, **_pack(HEADER, header), **tags,
            },
            run_name=run_name(trial),
        )  # fmt: skip
        self._uncertain.discard(trial.key)
        return run

    def _found_run(self, key: str) -> Run | None:
        """The run of a trial that was created, but whose creation was not answered, if there is one."""
        if key not in self._uncertain:
            return None
        condition = f"tags.`{PARENT}` = '{self.study_run_id}' and tags.`{TRIAL_KEY}` = '{key}'"
        return next(iter(_search(self._client, self._experiment_id, condition)), None)

    def _show(self, state: StudyState) -> None:
        """Bring state and status of the study's run up to date."""
        if state is self._state:
            return
        self._client.set_tag(self.study_run_id, STATE, state.value)
        if state is StudyState.RUNNING:
            self._client.update_run(self.study_run_id, STUDY_STATUS[state])
        else:
            self._client.set_terminated(self.study_run_id, STUDY_STATUS[state])
        self._state = state

    def _describe_study(self) -> None:
        """Log study file, versions and source with what can be derived from them, unless they are logged already."""
        tracking = self._study.tracking
        if tracking.uri is not None:
            tracking = tracking.model_copy(update={"uri": without_credentials(tracking.uri)})
        text = self._study.model_copy(update={"tracking": tracking}).to_yaml()
        versions = environment()
        digest = hashlib.sha256(canonical_json([text, versions, self._source]).encode()).hexdigest()
        if self._parent.data.tags.get(DESCRIBED) == digest:
            return
        self._client.log_text(self.study_run_id, text, "study.yaml")
        self._client.log_text(self.study_run_id, json.dumps(versions, indent=1), "environment.json")
        self._client.log_inputs(self.study_run_id, self._data.inputs())
        for name, view in saved_views(self._study, self._ladder, _now()).items():
            self._client.set_experiment_tag(self._experiment_id, name, view)
        tags = {
            **self._source,
            "jfhpo.version": version("jfhpo"),
            "jfhpo.strategy": self._study.strategy.name,
            NOTE: study_note(self._study, self.trials()),
            DESCRIBED: digest,
        }
        # What a study may change (folders, expectations) is in the file; MLflow's parameters stay as they began.
        known = self._parent.data.params
        params = {name: value for name, value in study_parameters(self._study).items() if name not in known}
        self._log(self.study_run_id, params=params, tags=tags)

    def _read_children(self) -> dict[str, _Child]:
        entries = checkpoints.read_index(self._client, self._experiment_id)
        runs = _search(self._client, self._experiment_id, f"tags.`{PARENT}` = '{self.study_run_id}'")
        children = [child for run in runs if (child := _read_child(run, entries)) is not None]
        # A create_run sent twice (its answer was lost) leaves two runs of one trial: the one that got further counts.
        children.sort(key=lambda child: (child.trial.number, -len(child.trial.segments)))
        by_key: dict[str, _Child] = {}
        for child in children:
            by_key.setdefault(child.trial.key, child)
        return by_key

    def _check_owner(self) -> None:
        """Refuse to write to a study that another process has taken over."""
        if self._owner is not None:
            self._owner.check()

    def _account_for_deleted(self) -> None:
        """Notice what was deleted of the study: refuse to go on, or, if told to, note that it is forgotten.

        Raises:
            LedgerError: Runs of trials are deleted, or finished segments are missing with the runs that held them.
        """
        forgotten = set(json.loads(_unpack(self._parent.data.tags, FORGOTTEN) or "[]"))
        condition = f"tags.`{PARENT}` = '{self.study_run_id}'"
        runs = _search(self._client, self._experiment_id, condition, ViewType.DELETED_ONLY)
        read = (_read_child(run, {}) for run in runs if run.info.run_id not in forgotten)
        deleted = [child for child in read if child is not None and child.trial.key not in self._children]
        held = {result.committed for child in deleted for result in child.trial.segments}
        ranks = {result.committed for trial in self.trials() for result in trial.segments}
        gone = set(range(1, max(ranks, default=0))) - ranks - held - forgotten
        if not deleted and not gone:
            return
        if not self._forget:
            lines = [
                f"trial {child.name!r}, back by `mlflow runs restore --run-id {child.run_id}`" for child in deleted
            ]
            lines += [f"{len(gone)} finished segment(s) whose runs are gone for good"] if gone else []
            raise LedgerError(
                f"a part of study {self._study.study!r} was deleted in MLflow ({', '.join(lines)}); restore it, or go "
                "on without it by `jfhpo search --forget`, which may train and pay for the same again"
            )
        noted = forgotten | {child.run_id for child in deleted} | held | gone
        self._client.set_tag(self.study_run_id, FORGOTTEN, json.dumps(sorted(noted, key=str)))

    def _settle(self, child: _Child) -> None:
        """Bring inputs, parameters, status and name of a trial's run up to date."""
        trial = child.trial
        if not child.described:
            self._client.log_inputs(child.run_id, self._data.inputs())
            size = self._ladder[trial.model].parameters
            params = trial_parameters(trial, size, self._study.space, self._defaults)
            self._log(child.run_id, params=params)
            child.described = True
        status, name = STATUS[trial.state], run_name(trial)
        if status != child.status:
            if status == "RUNNING":
                self._log(child.run_id, tags={STATE: trial.state.value})
                self._client.update_run(child.run_id, status)
            else:
                self._client.set_terminated(child.run_id, status)
            child.status = status
        if name != child.name:
            self._client.set_tag(child.run_id, "mlflow.runName", name)
            child.name = name

    def _index(self, child: _Child, trial: Trial) -> None:
        """Bring the index up to the newest checkpoint of `trial`."""
        child.checkpoint = checkpoints.write_index(
            self._client,
            self._experiment_id,
            child.run_id,
            trial,
            child.checkpoint,
            checkpoint_store(self._study),
        )

    def _records(self, child: _Child) -> dict[int, StepRecord]:
        if child.records is None:
            records = {}
            for result in child.trial.segments:
                text = self._read_text(child.run_id, _records_file(result.segment.index))
                for line in text.splitlines():
                    record = _parse(StepRecord, line, child.run_id)
                    records[record.step] = record
            child.records = records
        return child.records

    def _holds(self, run_id: str, path: str) -> bool:
        """Whether a run has an artifact, by the store's own list."""
        folder = str(PurePosixPath(path).parent)
        listed = self._client.list_artifacts(run_id, None if folder == "." else folder)
        return path in {file.path for file in listed}

    def _read_text(self, run_id: str, path: str) -> str:
        with tempfile.TemporaryDirectory(prefix="jfhpo-") as folder:
            try:
                return Path(self._client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
            except (MlflowException, OSError) as error:
                # MLflow says the same of a server that does not answer and of a file that is not there.
                if self.remote and self._holds(run_id, path):
                    raise LedgerUnavailable(f"artifact {path} of MLflow run {run_id} does not come: {error}") from error
                raise LedgerError(
                    f"MLflow run {run_id} has lost its artifact {path} ({error}); was the artifact folder moved or "
                    "deleted? Restore it, or delete the run to train its trial again"
                ) from error

    def _log(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log in as few calls as MLflow allows; the tags are written last and together."""
        metrics, entries = list(metrics), [Param(name, value) for name, value in (params or {}).items()]
        while len(metrics) > METRICS_PER_CALL or len(entries) > PARAMETERS_PER_CALL:
            self._client.log_batch(run_id, metrics[:METRICS_PER_CALL], entries[:PARAMETERS_PER_CALL])
            del metrics[:METRICS_PER_CALL], entries[:PARAMETERS_PER_CALL]
        if metrics or entries or tags:
            self._client.log_batch(run_id, metrics, entries, [RunTag(k, v) for k, v in (tags or {}).items()])


def connect(study: StudySpec) -> MlflowClient:
    """A client for the study's tracking store: the study file's, else `MLFLOW_TRACKING_URI`, else `DEFAULT_URI`.

    Raises:
        LedgerError: A tracking server does not answer. MLflow itself would try again for minutes.
    """
    uri = _uri(study)
    # MLflow prints a link for every run that ends and a bar for every file; the search has its own display.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if _is_server(uri):
        import requests

        for name, value in HTTP_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS)
        except requests.exceptions.SSLError:
            pass  # MLflow's own settings for certificates decide
        except (requests.ConnectionError, requests.Timeout) as error:
            raise LedgerError(
                f"the MLflow server {without_credentials(uri)} does not answer ({type(error).__name__}); start it, or "
                "correct tracking.uri in the study file or MLFLOW_TRACKING_URI"
            ) from None
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return MlflowClient(tracking_uri=uri)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise LedgerError(
            f"MLflow cannot use the tracking URI {without_credentials(uri)!r}: {_short(error)}; start the database (or "
            "install its driver), or correct tracking.uri in the study file or MLFLOW_TRACKING_URI"
        ) from None


def _uri(study: StudySpec) -> str:
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def local_store(study: StudySpec) -> Path | None:
    """The file or folder that is the study's tracking store, which MLflow makes if it is missing; None for others."""
    uri = _uri(study)
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return Path(parts.path.removeprefix("/"))
    return Path(parts.path) if parts.scheme in ("", "file") and uri not in REMOTE_NAMES else None


def _exists(study: StudySpec) -> bool:
    store = local_store(study)
    return store is None or store.exists()


def _absolute(uri: str) -> str:
    """The same store for a process that was started in another folder."""
    prefix, parts = "sqlite:///", urlsplit(uri)
    if uri.startswith(prefix) and parts.path.strip("/"):
        return prefix + str(Path(uri.removeprefix(prefix)).absolute())
    return str(Path(uri).absolute()) if parts.scheme == "" and uri not in REMOTE_NAMES else uri


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _experiment_name(study: StudySpec) -> str:
    return study.tracking.experiment or f"jfhpo/{study.study}"


def _experiment(client: MlflowClient, study: StudySpec) -> Experiment:
    name = _experiment_name(study)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        folder = _artifact_folder(client.tracking_uri, name)
        experiment_id = client.create_experiment(name, folder)
        client.set_experiment_tag(experiment_id, NOTE, experiment_note(experiment_id))
        return client.get_experiment(experiment_id)
    if experiment.lifecycle_stage != "active":
        raise LedgerError(
            f"MLflow experiment {name!r} was deleted; restore it (mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}), or name another one in tracking.experiment"
        )
    return experiment


def _artifact_folder(uri: str, experiment: str) -> str | None:
    """Folder `mlruns` beside an SQLite file, wherever this process was started; None leaves it to MLflow."""
    parts = urlsplit(uri)
    if parts.scheme != "sqlite" or not parts.path.strip("/"):
        return None
    folder = re.sub(r"[^A-Za-z0-9._-]", "-", experiment)
    return (Path(parts.path.removeprefix("/")).absolute().parent / "mlruns" / folder).as_uri()


def _study_run(client: MlflowClient, experiment_id: str, study: StudySpec) -> Run | None:
    runs = _search(client, experiment_id, f"tags.`{STUDY}` = '{study.study}'")
    return runs[0] if runs else None


def _refuse_other_meaning(client: MlflowClient, run: Run, study: StudySpec) -> None:
    """Refuse a study file with another meaning than the one that the run was begun with.

    Identities of other versions of jfhpo were made in other ways; what counts then is the study file in the run.

    Raises:
        LedgerError: With the fields that differ.
    """
    if run.data.tags.get(IDENTITY) == study.identity():
        return
    with tempfile.TemporaryDirectory(prefix="jfhpo-") as folder:
        try:
            path = Path(client.download_artifacts(run.info.run_id, "study.yaml", folder))
            recorded = parse_study(path.read_text(encoding="utf-8"), f"study {study.study!r} in the ledger")
        except (MlflowException, OSError, SpecError):
            raise LedgerError(mismatch_message(study.study)) from None
    if recorded.identity() != study.identity():
        raise LedgerError(mismatch_message(study.study, recorded.changes(study)))


def _changed_contents(run: Run, known: Mapping[str, str]) -> list[str]:
    """Fields whose files have changed since the run noted them."""
    return changed(json.loads(_unpack(run.data.tags, CONTENTS) or "{}"), known)


def _accepted(run: Run) -> tuple[str, ...]:
    """Fields whose changes have been accepted."""
    return tuple(json.loads(_unpack(run.data.tags, CHANGED) or "[]"))


def _study_anywhere(client: MlflowClient, study: StudySpec, name: str) -> tuple[Experiment, Run] | None:
    """The run of a study by its name, in the experiment of `study`, in its own, or else in any other jfhpo/...."""
    likely = [client.get_experiment_by_name(one) for one in (_experiment_name(study), f"jfhpo/{name}")]
    wanted = study.model_copy(update={"study": name})
    for experiment in (*filter(None, likely), *client.search_experiments(filter_string="name LIKE 'jfhpo/%'")):
        run = _study_run(client, experiment.experiment_id, wanted)
        if run is not None:
            return experiment, run
    return None


def recorded_before(study: StudySpec) -> list[str]:
    """Names of the studies in the store of `study` that began before it, newest first; of all, if it has not begun.

    Raises:
        LedgerError: The store does not answer.
    """
    if not _exists(study):
        return []
    client = connect(study)
    try:
        experiments = client.search_experiments(filter_string="name LIKE 'jfhpo/%'")
        own = client.get_experiment_by_name(_experiment_name(study))
        places = {item.experiment_id for item in (*experiments, *filter(None, [own]))}
        runs = [run for place in sorted(places) for run in _search(client, place, f"tags.`{STUDY}` != ''")]
    except MlflowException as error:
        raise LedgerError(f"warm_start: earlier studies cannot be looked up: {error.message}") from error
    begun = min((run.info.start_time for run in runs if run.data.tags[STUDY] == study.study), default=math.inf)
    earlier = [run for run in runs if run.info.start_time < begun]
    return [run.data.tags[STUDY] for run in sorted(earlier, key=lambda run: -run.info.start_time)]


def _refuse_deleted_study(client: MlflowClient, experiment_id: str, study: StudySpec) -> None:
    """Refuse to begin a study anew whose run was deleted.

    Raises:
        LedgerError: There is such a run.
    """
    deleted = _search(client, experiment_id, f"tags.`{STUDY}` = '{study.study}'", ViewType.DELETED_ONLY)
    if deleted:
        run_id = deleted[-1].info.run_id
        raise LedgerError(
            f"the MLflow run of study {study.study!r} was deleted; restore it (mlflow runs restore --run-id {run_id}), "
            "or begin the study anew by `jfhpo search --forget`, which trains and pays for everything again"
        )


def _search(client: MlflowClient, experiment_id: str, condition: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """All runs that meet a condition, oldest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], condition, view, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _read_child(run: Run, entries: Mapping[str, checkpoints.Entry]) -> _Child | None:
    """The trial in a run; None if the run is not a trial of jfhpo but something a person has nested there."""
    tags, run_id = run.data.tags, run.info.run_id
    header = _unpack(tags, HEADER)
    if header is None:
        return None
    segments: list[SegmentResult] = []
    while (text := _unpack(tags, SEGMENT.format(len(segments)))) is not None:
        segments.append(_parse(SegmentResult, text, run_id))
    text = _unpack(tags, OPEN)
    segment = _parse(Segment, text, run_id) if text is not None else None
    if segment is not None and segment.index != len(segments):
        segment = None
    trial = _parse(Trial, header, run_id).model_copy(update={"segments": tuple(segments), "open_segment": segment})
    return _Child(
        run_id, trial, bool(run.data.params), run.info.status, run.info.run_name, checkpoint=entries.get(run_id)
    )


def _unseen(child: _Child, records: Sequence[StepRecord]) -> list[StepRecord]:
    """Those records that are not logged as metrics yet."""
    return [record for record in records if child.shown.get(record.step) != record]


def _defaults(study: StudySpec) -> Configuration:
    """Hyperparameters of trials that do not name them; none where the trainer is not installed."""
    try:
        trainer = load_trainer(study.trainer.name)
    except SpecError:
        return {}
    return {**trainer.hyperparameters().model_dump(), **study.trainer.fixed}


def read_facts(parent: Run) -> dict[str, str | float]:
    """The facts of the study that a run holds.

    Raises:
        LedgerError: They were edited.
    """
    text = _unpack(parent.data.tags, FACTS)
    try:
        return dict(json.loads(text)) if text is not None else {}
    except ValueError as error:
        raise LedgerError(
            f"MLflow run {parent.info.run_id} has a tag {FACTS} that is not JSON ({error}); it was edited: delete it"
        ) from None


def _pack(name: str, text: str) -> dict[str, str]:
    """A text as tags: one, or if it is too long, one that counts the pieces, and the pieces."""
    if len(text) <= TAG_LIMIT:
        return {name: text}
    pieces = [text[start : start + TAG_LIMIT] for start in range(0, len(text), TAG_LIMIT)]
    return {name: f"+{len(pieces)}", **{f"{name}:{number}": piece for number, piece in enumerate(pieces)}}


def _unpack(tags: Mapping[str, str], name: str) -> str | None:
    """The text that `_pack` stored, under this name or the one that earlier versions gave it; None if there is none."""
    if name not in tags and name.startswith(INTERNAL):
        name = name.removeprefix("mlflow.")
    text = tags.get(name)
    if text is None or not text.startswith("+"):
        return text
    return "".join(tags.get(f"{name}:{number}", "") for number in range(int(text)))


def _parse(kind: type[AnyModel], text: str, run_id: str) -> AnyModel:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        fault: Any = error.errors(include_url=False)[0]
        raise LedgerError(
            f"MLflow run {run_id} holds a {kind.__name__} that cannot be read ({fault['msg']}); it was edited, or "
            "written by a newer jfhpo: upgrade jfhpo, or delete the run to train its trial again"
        ) from None


def _records_file(index: int) -> str:
    return f"records/segment-{index:04d}.jsonl"


def _now() -> int:
    return int(time.time() * 1000)
