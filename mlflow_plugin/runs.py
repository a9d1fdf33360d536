"""Runs of MLflow: finding them, logging to them, reading a file of theirs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunInfo, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from jfhpo_core.errors import LedgerError, LedgerUnavailable
from mlflow_plugin.tracking import is_server

METRICS_PER_CALL = 800
"""MLflow takes 1000 entities in one call, tags and parameters included."""
PARAMETERS_PER_CALL = 100


def now() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return int(time.time() * 1000)


def search_runs(
    client: MlflowClient, experiment_id: str, condition: str, view: int = ViewType.ACTIVE_ONLY
) -> list[Run]:
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


def _holds(client: MlflowClient, run_id: str, path: str) -> bool:
    """Whether a run has an artifact, by the store's own list."""
    folder = str(PurePosixPath(path).parent)
    listed = client.list_artifacts(run_id, None if folder == "." else folder)
    return path in {file.path for file in listed}


def read_text(client: MlflowClient, run: RunInfo, path: str) -> str:
    """A text file among the artifacts of a run.

    By the address that the run has noted: MLflow's own download by run looks for logged models as well, which takes
    several queries for each file of a study with a thousand trials.

    MLflow raises an MlflowException for whatever goes wrong while it downloads a file, and passes on the HTTP errors of
    the listing before it, which are OSErrors. A file that is not text counts as lost.

    Raises:
        LedgerUnavailable: The run has it, but its server does not send it.
        LedgerError: The run has lost it.
    """
    with tempfile.TemporaryDirectory(prefix="jfhpo-") as folder:
        try:
            repository = get_artifact_repository(run.artifact_uri, tracking_uri=client.tracking_uri)
            return Path(repository.download_artifacts(path, folder)).read_text(encoding="utf-8")
        except (MlflowException, OSError, UnicodeDecodeError) as error:
            # MLflow says the same of a server that does not answer and of a file that is not there.
            if is_server(client.tracking_uri) and _holds(client, run.run_id, path):
                raise LedgerUnavailable(f"artifact {path} of MLflow run {run.run_id} does not come: {error}") from error
            raise LedgerError(
                f"MLflow run {run.run_id} has lost its artifact {path} ({error}); was the artifact folder moved or "
                "deleted? Restore it, or delete the run to train its trial again"
            ) from error


def log(
    client: MlflowClient,
    run_id: str,
    metrics: Sequence[Metric] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log in as few calls as MLflow allows; the tags are written last and together."""
    metrics, entries = list(metrics), [Param(name, value) for name, value in (params or {}).items()]
    while len(metrics) > METRICS_PER_CALL or len(entries) > PARAMETERS_PER_CALL:
        client.log_batch(run_id, metrics[:METRICS_PER_CALL], entries[:PARAMETERS_PER_CALL])
        del metrics[:METRICS_PER_CALL], entries[:PARAMETERS_PER_CALL]
    if metrics or entries or tags:
        client.log_batch(run_id, metrics, entries, [RunTag(k, v) for k, v in (tags or {}).items()])
