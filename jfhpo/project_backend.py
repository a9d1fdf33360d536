"""`mlflow run . --backend jfhpo`: search over the parameters of any MLflow project that logs a metric.

The backend configuration is a study file without what the project knows itself, and names the metric:

    {"metric": "accuracy", "space": {"lr": {"type": "float", "low": 1e-5, "high": 1e-1, "log": true}},
     "budget": {"trial_seconds": 600}}

Parameters given by `-P` are the same in every trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import RunStatus
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun

from jfhpo.session import run_study
from jfhpo_core.errors import JfhpoError, SpecError
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import validate_study
from jfhpo_core.study.yaml_text import Document
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.project import NAME, ProjectSettings

OF_MLFLOW = {"SYNCHRONOUS", "DOCKER_ARGS", "STORAGE_DIR", "build_image", "docker_auth"}
"""What MLflow adds to every backend's configuration, beside the manager of environments."""
ENV_MANAGER = "ENV_MANAGER"


class SearchBackend(AbstractBackend):  # type: ignore[misc]
    """Entry point `mlflow.project_backend` named `jfhpo`."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, str],
        version: str | None,
        backend_config: Mapping[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> SubmittedRun:
        """Search until the budget is spent; the same command again continues an interrupted search.

        Raises:
            ExecutionException: The configuration is not usable, or the search failed.
        """
        experiment = MlflowClient(tracking_uri=tracking_uri).get_experiment(experiment_id).name
        tracking = {"uri": tracking_uri, "experiment": experiment, "registered_model": ""}
        try:
            spec = project_study(project_uri, entry_point, params, version, backend_config, tracking)
            outcome = run_study(spec)
            ledger = MlflowLedger()
            ledger.look(spec)
        except JfhpoError as error:
            raise ExecutionException(str(error)) from error
        return _FinishedSearch(ledger.study_run_id, complete=outcome.result.complete)


def project_study(
    uri: str,
    entry_point: str,
    params: Mapping[str, str],
    version: str | None,
    config: Mapping[str, Any],
    tracking: Mapping[str, Any],
) -> StudySpec:
    """The study that searches over a project.

    Args:
        uri: Folder or Git repository of the project.
        entry_point: Of the project.
        params: Parameters that are the same in every trial.
        version: Commit or branch of a Git repository.
        config: The backend configuration.
        tracking: Where to log, unless the configuration says so.

    Raises:
        SpecError: The configuration is not usable.
    """
    given = {name: value for name, value in config.items() if name not in {*OF_MLFLOW, ENV_MANAGER}}
    own = {name: given.pop(name) for name in ProjectSettings.model_fields if name in given}
    if "metric" not in own:
        raise SpecError(
            "--backend-config: `metric` is missing; give the name of a metric that the project logs, beside `space` "
            'and `budget`: {"metric": "accuracy", "space": {"lr": {"type": "float", "low": 1e-5, "high": 1e-1, '
            '"log": true}}, "budget": {"trial_seconds": 600}}'
        )
    local = Path(uri).expanduser()
    place = str(local.resolve()) if local.exists() else uri
    manager = {"env_manager": config[ENV_MANAGER]} if config.get(ENV_MANAGER) else {}
    settings = {**manager, **own, "uri": place, "entry_point": entry_point, "version": version}
    budget = {"max_parallel": 1, **given.get("budget", {})}
    data = {
        "study": f"{Path(place).name.removesuffix('.git')}-{entry_point}",
        "family": [{"name": "project", "path": NAME, "parameters": 1}],
        "target": "project",
        "task": NAME,
        "seeds": {"training": [0]},
        "stopping": {"rules": "none"},
        "tracking": dict(tracking),
        # One trial after the other needs no Ray.
        **({"cluster": {"address": "inline"}} if budget["max_parallel"] == 1 else {}),
        **given,
        "budget": budget,
        "fidelity": {"horizon_prompts": 1, "rungs": 1},
        "trainer": {"name": NAME, "fixed": {**params, "prompts_per_step": 1}, "settings": settings},
    }
    return validate_study(Document(data), "--backend-config")


class _FinishedSearch(SubmittedRun):  # type: ignore[misc]
    """A search that has ended: `run` returns when it has, because `mlflow run` does not wait for other backends."""

    def __init__(self, run_id: str, *, complete: bool) -> None:
        super().__init__()
        self._run_id = run_id
        self._complete = complete

    @property
    def run_id(self) -> str:
        """MLflow's id of the study's run."""
        return self._run_id

    def wait(self) -> bool:
        """Whether the search has come to its end."""
        return self._complete

    def get_status(self) -> str:
        """MLflow's status of the run."""
        return str(RunStatus.to_string(RunStatus.FINISHED if self._complete else RunStatus.KILLED))

    def cancel(self) -> None:
        """Nothing is running any more."""
