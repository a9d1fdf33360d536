"""The run of a study in MLflow: finding it, and refusing what has another meaning, other data or was deleted."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run, ViewType
from mlflow.exceptions import MlflowException

from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.report.text import without_credentials
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.store.ledger import mismatch_message
from jfhpo_core.study.contents import changed
from jfhpo_core.study.resolved import checkpoint_store
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import Trial
from mlflow_plugin.owner import TAG as OWNER
from mlflow_plugin.runs import search_runs
from mlflow_plugin.tags import (
    CHANGED,
    CONTENTS,
    FORGOTTEN,
    IDENTITY,
    PARENT,
    STUDY,
    Child,
    read_child,
    unpack,
)
from mlflow_plugin.tracking import connect, experiment_name, store_exists


def find_study_run(client: MlflowClient, experiment_id: str, study: StudySpec) -> Run | None:
    """The run of a study; None if there is none."""
    return next(iter(_study_runs(client, experiment_id, study)), None)


def remove_duplicates(client: MlflowClient, experiment_id: str, study: StudySpec) -> None:
    """Remove the runs of a study beside the one that `find_study_run` returns, as far as they are empty.

    A run is empty that no process has owned and below which there is none: trials are only written by an owner. It also
    loses the tag of the study, so that nobody who looks for a deleted study finds it instead.
    """
    for run in _study_runs(client, experiment_id, study)[1:]:
        run_id = run.info.run_id
        if OWNER not in run.data.tags and not search_runs(client, experiment_id, f"tags.`{PARENT}` = '{run_id}'"):
            client.set_tag(run_id, STUDY, "")  # like the next request, it may be sent twice
            client.delete_run(run_id)


def _study_runs(client: MlflowClient, experiment_id: str, study: StudySpec) -> list[Run]:
    """All runs of a study, the one that counts first.

    A `create_run` that was sent twice, or by two processes at a time, leaves two runs: the one that a process has owned
    counts, or else the oldest.
    """
    runs = search_runs(client, experiment_id, f"tags.`{STUDY}` = '{study.study}'")
    return sorted(runs, key=lambda run: OWNER not in run.data.tags)


def refuse_other_meaning(client: MlflowClient, run: Run, study: StudySpec) -> None:
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
            text = path.read_text(encoding="utf-8")
            recorded = parse_study(text, f"study {study.study!r} in the ledger", recorded=True)
        except (MlflowException, OSError, SpecError):
            raise LedgerError(mismatch_message(study.study)) from None
    if recorded.identity() != study.identity():
        raise LedgerError(mismatch_message(study.study, recorded.changes(study)))


def changed_contents(run: Run, known: Mapping[str, str]) -> list[str]:
    """Fields whose files have changed since the run noted them."""
    return changed(json.loads(unpack(run.data.tags, CONTENTS) or "{}"), known)


def accepted_changes(run: Run) -> tuple[str, ...]:
    """Fields whose changes have been accepted."""
    return tuple(json.loads(unpack(run.data.tags, CHANGED) or "[]"))


def find_study_anywhere(client: MlflowClient, study: StudySpec, name: str) -> tuple[Experiment, Run] | None:
    """The run of a study by its name, in the experiment of `study`, in its own, or else in any other jfhpo/...."""
    likely = [client.get_experiment_by_name(one) for one in (experiment_name(study), f"jfhpo/{name}")]
    wanted = study.model_copy(update={"study": name})
    for experiment in (*filter(None, likely), *client.search_experiments(filter_string="name LIKE 'jfhpo/%'")):
        run = find_study_run(client, experiment.experiment_id, wanted)
        if run is not None:
            return experiment, run
    return None


def recorded_before(study: StudySpec) -> list[str]:
    """Names of the studies in the store of `study` that began before it, newest first; of all, if it has not begun.

    Raises:
        LedgerError: The store does not answer.
    """
    if not store_exists(study):
        return []
    client = connect(study)
    try:
        experiments = client.search_experiments(filter_string="name LIKE 'jfhpo/%'")
        own = client.get_experiment_by_name(experiment_name(study))
        places = {item.experiment_id for item in (*experiments, *filter(None, [own]))}
        runs = [run for place in sorted(places) for run in search_runs(client, place, f"tags.`{STUDY}` != ''")]
    except MlflowException as error:
        raise LedgerError(f"warm_start: earlier studies cannot be looked up: {error.message}") from error
    begun = min((run.info.start_time for run in runs if run.data.tags[STUDY] == study.study), default=math.inf)
    earlier = [run for run in runs if run.info.start_time < begun]
    # A request whose answer was lost may have created a run twice.
    names = (run.data.tags[STUDY] for run in sorted(earlier, key=lambda run: -run.info.start_time))
    return list(dict.fromkeys(names))


def refuse_deleted_study(client: MlflowClient, experiment_id: str, study: StudySpec) -> None:
    """Refuse to begin a study anew whose run was deleted.

    Raises:
        LedgerError: There is such a run.
    """
    deleted = search_runs(client, experiment_id, f"tags.`{STUDY}` = '{study.study}'", ViewType.DELETED_ONLY)
    if deleted:
        run_id = deleted[-1].info.run_id
        raise LedgerError(
            f"the MLflow run of study {study.study!r} was deleted; restore it (mlflow runs restore --run-id {run_id}), "
            "or begin the study anew by `jfhpo search --forget`, which trains and pays for everything again"
        )


def refuse_lost_study(client: MlflowClient, study: StudySpec) -> None:
    """Refuse to begin a study anew whose checkpoints are there while the tracking store knows nothing of it.

    Raises:
        LedgerError: It is so: the store was emptied or replaced, or is another one than before.
    """
    store = checkpoint_store(study)
    count = len({folder.parent for folder in CheckpointStore(store).folders()})
    if count:
        raise LedgerError(
            f"{without_credentials(client.tracking_uri)} knows nothing of study {study.study!r}, but {store} holds "
            f"checkpoints of {count} of its trials: the database was emptied or moved, or is another one than before; "
            "restore it, or correct tracking.uri (or MLFLOW_TRACKING_URI, or the folder you are in), or begin anew by "
            "`jfhpo search --forget`, which trains and pays for everything again"
        )


@dataclass(frozen=True)
class DeletedParts:
    """What was deleted of a study.

    Attributes:
        runs: Trials whose runs can be restored.
        gone: Ranks of commits whose runs are gone for good.
        forgotten: What the user already goes on without: ids of runs and ranks of commits.
    """

    runs: tuple[Child, ...]
    gone: frozenset[int]
    forgotten: frozenset[str | int]

    def __bool__(self) -> bool:
        return bool(self.runs or self.gone)

    def describe(self) -> str:
        """What is missing, and how it comes back."""
        lines = [f"trial {child.name!r}, back by `mlflow runs restore --run-id {child.run_id}`" for child in self.runs]
        lines += [f"{len(self.gone)} finished segment(s) whose runs are gone for good"] if self.gone else []
        return ", ".join(lines)

    def noted(self) -> str:
        """The tag `FORGOTTEN` of a study that goes on without them."""
        held = {result.committed for child in self.runs for result in child.trial.segments}
        return json.dumps(sorted(self.forgotten | {child.run_id for child in self.runs} | held | self.gone, key=str))


def deleted_parts(client: MlflowClient, experiment_id: str, parent: Run, trials: Sequence[Trial]) -> DeletedParts:
    """Notice runs of a study's trials that are deleted, and finished segments that are missing with their runs."""
    forgotten = frozenset(json.loads(unpack(parent.data.tags, FORGOTTEN) or "[]"))
    condition = f"tags.`{PARENT}` = '{parent.info.run_id}'"
    runs = search_runs(client, experiment_id, condition, ViewType.DELETED_ONLY)
    read = (read_child(run, {}) for run in runs if run.info.run_id not in forgotten)
    known = {trial.key for trial in trials}
    deleted = tuple(child for child in read if child is not None and child.trial.key not in known)
    held = {result.committed for child in deleted for result in child.trial.segments}
    ranks = {result.committed for trial in trials for result in trial.segments}
    gone = frozenset(set(range(1, max(ranks, default=0))) - ranks - held - forgotten)
    return DeletedParts(deleted, gone, forgotten)
