"""The tracking store of a study: which it is, how to reach it, and the experiment that holds the study."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from jfhpo_core.errors import LedgerError
from jfhpo_core.report.text import without_credentials
from jfhpo_core.study.spec import StudySpec
from mlflow_plugin.failures import short
from mlflow_plugin.presentation import NOTE, experiment_note

DEFAULT_URI = "sqlite:///mlflow.db"
CONNECT_SECONDS = 10
REMOTE_NAMES = {"databricks", "databricks-uc", "uc"}
"""Tracking URIs without a scheme that are no folders."""
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""The outbox tries again by itself: the driver shall not stand still for the minutes that MLflow's defaults take."""


def connect(study: StudySpec) -> MlflowClient:
    """A client for the study's tracking store: the study file's, else `MLFLOW_TRACKING_URI`, else `DEFAULT_URI`.

    Raises:
        LedgerError: A tracking server does not answer. MLflow itself would try again for minutes.
    """
    uri = store_uri(study)
    # MLflow prints a link for every run that ends and a bar for every file; the search has its own display.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if is_server(uri):
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

    _refuse_damaged_file(study)
    try:
        return MlflowClient(tracking_uri=uri)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise LedgerError(
            f"MLflow cannot use the tracking URI {without_credentials(uri)!r}: {short(error)}; start the database (or "
            "install its driver), or correct tracking.uri in the study file or MLFLOW_TRACKING_URI"
        ) from None


def _refuse_damaged_file(study: StudySpec) -> None:
    """Look into an SQLite file: MLflow's own words for one whose end is lost name no remedy.

    Raises:
        LedgerError: It is damaged.
    """
    store = local_store(study)
    if store is None or not store.is_file() or not store.stat().st_size:
        return
    try:
        with contextlib.closing(sqlite3.connect(store)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        pass  # locked or away: MLflow waits for it
    except sqlite3.DatabaseError as error:
        raise LedgerError(
            f"the database {store} is damaged ({error}); restore it from a copy. Without one, move it away and begin "
            "the study anew by `jfhpo search --forget`, which trains and pays for everything again"
        ) from None


def store_uri(study: StudySpec) -> str:
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def local_store(study: StudySpec) -> Path | None:
    """The file or folder that is the study's tracking store, which MLflow makes if it is missing; None for others."""
    uri = store_uri(study)
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return Path(parts.path.removeprefix("/"))
    return Path(parts.path) if parts.scheme in ("", "file") and uri not in REMOTE_NAMES else None


def store_exists(study: StudySpec) -> bool:
    store = local_store(study)
    return store is None or store.exists()


def absolute_uri(uri: str) -> str:
    """The same store for a process that was started in another folder."""
    prefix, parts = "sqlite:///", urlsplit(uri)
    if uri.startswith(prefix) and parts.path.strip("/"):
        return prefix + str(Path(uri.removeprefix(prefix)).absolute())
    return str(Path(uri).absolute()) if parts.scheme == "" and uri not in REMOTE_NAMES else uri


def is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def experiment_name(study: StudySpec) -> str:
    return study.tracking.experiment or f"jfhpo/{study.study}"


def open_experiment(client: MlflowClient, study: StudySpec) -> Experiment:
    name = experiment_name(study)
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
