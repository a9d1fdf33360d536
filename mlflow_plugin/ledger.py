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

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from jfhpo_core.errors import LedgerError
from jfhpo_core.report.text import without_credentials
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.store.ledger import changes_message, check_begin, check_commit
from jfhpo_core.study.contents import contents
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import Segment, SegmentResult, StepRecord, Trial, canonical_json
from mlflow_plugin import checkpoints
from mlflow_plugin.failures import explained, meaning
from mlflow_plugin.owner import Owner
from mlflow_plugin.presentation import (
    NOTE,
    STATE,
    STUDY_STATUS,
    StudyState,
    outcome_labels,
    outcome_metrics,
    study_metrics,
    study_note,
    study_parameters,
    view_page,
)
from mlflow_plugin.provenance import environment
from mlflow_plugin.runs import log, now, read_text
from mlflow_plugin.study_run import (
    accepted_changes,
    changed_contents,
    deleted_parts,
    find_study_anywhere,
    find_study_run,
    refuse_deleted_study,
    refuse_lost_study,
    refuse_other_meaning,
    remove_duplicates,
)
from mlflow_plugin.tags import (
    CHANGED,
    CONTENTS,
    DESCRIBED,
    FACTS,
    FORGOTTEN,
    IDENTITY,
    STUDY,
    pack,
    read_facts,
    unpack,
)
from mlflow_plugin.tracking import (
    absolute_uri,
    connect,
    experiment_name,
    is_server,
    open_experiment,
    store_exists,
)
from mlflow_plugin.trial_runs import Particulars, TrialRuns
from mlflow_plugin.views import saved_views
from mlflow_plugin.worker import trial_environment

logger = logging.getLogger(__name__)


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
        self._particulars: Particulars
        self._trial_runs: TrialRuns | None = None
        self._facts: dict[str, str | float] = {}
        self._owner: Owner | None = None

    @explained
    def open(self, study: StudySpec) -> None:
        """See `Ledger.open`.

        Raises:
            LedgerError: Also if the tracking store cannot be reached or holds something that cannot be read, or if runs
                of the study were deleted there.
        """
        client = self._given or connect(study)
        experiment = open_experiment(client, study)
        parent = find_study_run(client, experiment.experiment_id, study)
        if parent is None and not self._forget:
            refuse_deleted_study(client, experiment.experiment_id, study)
            refuse_lost_study(client, study)
        if parent is not None:
            refuse_other_meaning(client, parent, study)
        known = contents(study)
        changes = changed_contents(parent, known) if parent is not None else []
        if changes and not self._accept_changes:
            raise LedgerError(changes_message(study.study, changes))
        self._particulars = Particulars.of(study)
        self._opened, self._study, self._experiment_id = client, study, experiment.experiment_id
        self._parent = parent if parent is not None else self._create_study()
        self._note_contents(known, changes)
        self._facts = read_facts(self._parent)
        shown = self._parent.data.tags.get(STATE)
        self._state = next((state for state in StudyState if state.value == shown), StudyState.RUNNING)
        self._trial_runs = TrialRuns(client, study, self._experiment_id, self.study_run_id, self._particulars)
        self._account_for_deleted()
        self._owner = Owner.claim(client, self.study_run_id, study.study)
        remove_duplicates(client, self._experiment_id, study)
        self._describe_study()
        self._trial_runs.put_right(self.changed if changes else ())
        if any(trial.open_segment is not None for trial in self.trials()):
            self._show(StudyState.RUNNING)

    @explained
    def look(self, study: StudySpec) -> bool:
        """Open for reading only, also while another process runs the study. Nothing is created or changed.

        Returns:
            False if the tracking store holds no such study; the ledger is not open then.

        Raises:
            LedgerError: As `open`.
        """
        if self._given is None and not store_exists(study):
            return False
        client = self._given or connect(study)
        experiment = client.get_experiment_by_name(experiment_name(study))
        parent = find_study_run(client, experiment.experiment_id, study) if experiment is not None else None
        if parent is None:
            return False
        refuse_other_meaning(client, parent, study)
        self._opened, self._study, self._experiment_id = client, study, experiment.experiment_id
        self._parent, self._facts = parent, read_facts(parent)
        self._trial_runs = TrialRuns(client, study, self._experiment_id, self.study_run_id)
        return True

    def refuse_changes(self) -> None:
        """Refuse data, rewards and models that have changed since the study began.

        Raises:
            LedgerError: With what has changed, and the ways on.
        """
        changes = changed_contents(self._parent, contents(self._study))
        if changes:
            raise LedgerError(changes_message(self._study.study, changes))

    @property
    def changed(self) -> tuple[str, ...]:
        """Fields of the study whose files were changed, and the change accepted, since it began."""
        self._client  # noqa: B018  refuses a ledger that is not open
        return accepted_changes(self._parent)

    @explained
    def recall(self, study: StudySpec, name: str) -> StudySpec:
        """Open an earlier study in the store of `study` for reading only, and return its study file.

        Raises:
            LedgerError: The store holds no study of this name, or its study file is lost.
        """
        client = self._given or (connect(study) if store_exists(study) else None)
        found = find_study_anywhere(client, study, name) if client is not None else None
        if found is None:
            raise LedgerError(
                f"warm_start: the ledger holds no study {name!r} in experiment "
                f"{experiment_name(study)!r} or any jfhpo/...; correct the name, or remove it"
            )
        self._opened = client
        experiment, run = found
        spec = parse_study(read_text(client, run.info, "study.yaml"), f"study {name!r} in the ledger", recorded=True)
        spec = spec.model_copy(update={"tracking": study.tracking.model_copy(update={"experiment": experiment.name})})
        self.look(spec)
        return spec

    def trials(self) -> list[Trial]:
        """See `Ledger.trials`."""
        return self._trial_runs.trials() if self._trial_runs is not None else []

    @explained
    def begin(self, trial: Trial, segment: Segment) -> None:
        """See `Ledger.begin`."""
        child = self._runs.get(trial.key)
        known = child.trial if child else trial.model_copy(update={"segments": (), "open_segment": None})
        check_begin(known, segment)
        if known.open_segment is not None:
            if child is not None:
                self._runs.settle(child)
            return
        self._check_owner()
        self._show(StudyState.RUNNING)
        self._runs.begin(known.model_copy(update={"open_segment": segment}))

    @explained
    def stream(self, key: str, records: Sequence[StepRecord]) -> None:
        """See `Ledger.stream`; written at most every `trial_runs.STREAM_SECONDS`."""
        self._runs.stream(self._runs[key], records)

    @explained
    def commit(self, key: str, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        """See `Ledger.commit`."""
        child = self._runs[key]
        if not check_commit(child.trial, result):
            self._runs.settle(child)
            return
        self._check_owner()
        self._runs.commit(child, result, records)
        trials = self.trials()
        log(
            self._client,
            self.study_run_id,
            study_metrics(self._study, trials, now()),
            tags={NOTE: study_note(self._study, trials)},
        )

    @explained
    def step_records(self, key: str) -> list[StepRecord]:
        """See `Ledger.step_records`."""
        child = self._trial_runs.get(key) if self._trial_runs is not None else None
        if child is None:
            return []
        records = self._runs.records(child)
        return [records[step] for step in sorted(records)]

    @explained
    def summarize(self, facts: Mapping[str, str | float], artifacts: Sequence[Path] = ()) -> None:
        """See `Ledger.summarize`."""
        for path in artifacts:
            self._client.log_artifact(self.study_run_id, str(path))
        known = {**self._facts, **facts}
        log(self._client, self.study_run_id, tags=pack(FACTS, json.dumps(known, ensure_ascii=False)))
        self._facts = known

    @explained
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
        moment = now()
        further = [Metric(name, value, moment, 0) for name, value in (figures or {}).items()]
        metrics = [*outcome_metrics(result, moment), *further]
        log(self._client, self.study_run_id, metrics, tags={**outcome_labels(result), NOTE: note})

    def forget_checkpoint(self, key: str) -> None:
        """Note that the newest checkpoint of a trial was deleted, so that the index offers it no longer."""
        entry = self._runs[key].checkpoint
        if entry is not None:
            checkpoints.mark_deleted(self._client, entry)

    def end(self, state: StudyState) -> None:
        """Show that this process works on the study no longer; segments that are open wait for the next one.

        Nothing depends on it, so a store that does not take it is no error.
        """
        try:
            if self._owner is not None:
                self._owner.release()
            if self._trial_runs is not None:
                self._trial_runs.interrupt()
            self._show(state)
        except MlflowException as error:
            logger.warning("MLflow still shows study %r as running: %s", self._study.study, error.message)

    def explain(self, error: Exception) -> LedgerError | None:
        """See `failures.meaning`."""
        if self._opened is None:
            return meaning(error, None, remote=False)
        return meaning(error, self.tracking_uri, self.remote)

    def signals_wait(self) -> bool:
        """Whether a signal must not interrupt a call: it would leave the database locked."""
        return self._opened is not None and not self.remote

    def facts(self) -> dict[str, str | float]:
        """See `Ledger.facts`."""
        return dict(self._facts)

    def environment(self, key: str) -> dict[str, str]:
        """See `Ledger.environment`: runs that are started for the trial become children of its run."""
        child = self._runs[key]
        uri = absolute_uri(self._client.tracking_uri)
        return trial_environment(uri, self._experiment_id, self._study.study, child.trial, child.run_id)

    def url(self) -> str | None:
        """The study's run in the UI of the tracking server; None without a server (see `tracking_uri`)."""
        if not is_server(self.tracking_uri):
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
        return is_server(self._client.tracking_uri)

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
        return self._runs[key].run_id

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            raise LedgerError("the ledger is not open; call open(study) first")
        return self._opened

    @property
    def _runs(self) -> TrialRuns:
        """The runs of the trials; refuses a ledger that is not open."""
        if self._trial_runs is None:
            raise LedgerError("the ledger is not open; call open(study) first")
        return self._trial_runs

    def _create_study(self) -> Run:
        tags = {STUDY: self._study.study, IDENTITY: self._study.identity(), STATE: StudyState.RUNNING.value}
        created = self._client.create_run(
            self._experiment_id, tags={**self._particulars.source, **tags}, run_name=self._study.study
        )
        # The answer may name another run than the one that later processes will find.
        return find_study_run(self._client, self._experiment_id, self._study) or created

    def _note_contents(self, known: Mapping[str, str], changes: Sequence[str]) -> None:
        """Keep the digests of what the study reads, and which of them changed; those of old studies begin today."""
        tags = self._parent.data.tags
        noted = json.loads(unpack(tags, CONTENTS) or "{}")
        accepted = sorted({*accepted_changes(self._parent), *changes})
        fresh = {
            IDENTITY: self._study.identity(),
            **pack(CONTENTS, canonical_json({**noted, **known})),
            **(pack(CHANGED, json.dumps(accepted)) if accepted else {}),
        }
        if any(tags.get(name) != value for name, value in fresh.items()):
            log(self._client, self.study_run_id, tags=fresh)
            self._parent = self._client.get_run(self.study_run_id)

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
        digest = hashlib.sha256(canonical_json([text, versions, self._particulars.source]).encode()).hexdigest()
        if self._parent.data.tags.get(DESCRIBED) == digest:
            return
        self._client.log_text(self.study_run_id, text, "study.yaml")
        self._client.log_text(self.study_run_id, json.dumps(versions, indent=1), "environment.json")
        self._client.log_inputs(self.study_run_id, self._particulars.data.inputs())
        for name, view in saved_views(self._study, self._particulars.ladder, now()).items():
            self._client.set_experiment_tag(self._experiment_id, name, view)
        tags = {
            **self._particulars.source,
            "jfhpo.version": version("jfhpo"),
            "jfhpo.strategy": self._study.strategy.name,
            NOTE: study_note(self._study, self.trials()),
            DESCRIBED: digest,
        }
        # What a study may change (folders, expectations) is in the file; MLflow's parameters stay as they began.
        known = self._parent.data.params
        params = {name: value for name, value in study_parameters(self._study).items() if name not in known}
        log(self._client, self.study_run_id, params=params, tags=tags)

    def _check_owner(self) -> None:
        """Refuse to write to a study that another process has taken over."""
        if self._owner is not None:
            self._owner.check()

    def _account_for_deleted(self) -> None:
        """Notice what was deleted of the study: refuse to go on, or, if told to, note that it is forgotten.

        Raises:
            LedgerError: Runs of trials are deleted, or finished segments are missing with the runs that held them.
        """
        parts = deleted_parts(self._client, self._experiment_id, self._parent, self.trials())
        if not parts:
            return
        if not self._forget:
            raise LedgerError(
                f"a part of study {self._study.study!r} was deleted in MLflow ({parts.describe()}); restore it, or go "
                "on without it by `jfhpo search --forget`, which may train and pay for the same again"
            )
        self._client.set_tag(self.study_run_id, FORGOTTEN, parts.noted())
