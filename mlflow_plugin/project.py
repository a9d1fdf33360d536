"""The trainer `mlproject`: a trial is one run of an MLflow project with the trial's hyperparameters as parameters.

Any project will do whose entry point takes hyperparameters and logs a metric. Its own run becomes a child of the
trial's run. `jfhpo.project_backend` makes a study of this kind from `mlflow run . --backend jfhpo`.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.run.asktell import AnyHyperparameters
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Configuration, Evaluation, FailureKind, StepRecord
from jfhpo_core.trainers.base import Job, Observer, TrainingResult, read_settings
from mlflow_plugin.worker import EXPERIMENT

NAME = "mlproject"


class ProjectSettings(BaseModel):
    """Settings of the trainer `mlproject`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str = Field(description="Folder or Git repository of the project, as `mlflow run` takes it.")
    metric: str = Field(description="Metric that the project logs; its last value is the trial's score.")
    goal: Literal["maximize", "minimize"] = Field(default="maximize", description="Which way the metric is better.")
    standard_error: str | None = Field(
        default=None, description="Metric with the score's standard error; None means that the score has none."
    )
    entry_point: str = "main"
    version: str | None = Field(default=None, description="Commit or branch of a Git repository.")
    env_manager: Literal["local", "virtualenv", "uv", "conda"] = Field(
        default="local", description="Who makes the project's environment; 'local' uses the one of the search."
    )
    model_parameter: str | None = Field(default=None, description="Parameter that takes the `path` of the model.")
    seed_parameter: str | None = Field(default=None, description="Parameter that takes the training seed.")


class ProjectTrainer:
    """Runs an MLflow project once per trial. It is not continued from checkpoints, so a study has one rung."""

    name: ClassVar[str] = NAME
    hyperparameters: ClassVar[type[BaseModel]] = AnyHyperparameters
    settings: ClassVar[type[BaseModel]] = ProjectSettings

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`."""
        read_settings(ProjectSettings, study, NAME)
        if study.fidelity.levels != (1,):
            raise SpecError(
                f"fidelity: trainer {NAME!r} runs a project from start to end, so it needs horizon_prompts: 1 and "
                f"rungs: 1, got {study.fidelity.horizon_prompts} and {study.fidelity.rungs}"
            )

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""
        import mlflow.projects  # noqa: F401

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """See `Trainer.run`."""
        settings = read_settings(ProjectSettings, job.study, NAME)
        began = time.perf_counter()
        metrics = _run_project(settings, job)
        seconds = time.perf_counter() - began
        score = _read(metrics, settings.metric)
        error = _read(metrics, settings.standard_error) if settings.standard_error is not None else 0.0
        score = -score if settings.goal == "minimize" else score
        observe(_record(score, seconds))
        (stage / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        evaluation = Evaluation(step=1, prompts=1, score=score, standard_error=abs(error), samples=1, seconds=0.0)
        return TrainingResult(end_step=1, end_prompts=1, evaluations=(evaluation,))


def _run_project(settings: ProjectSettings, job: Job) -> dict[str, float]:
    """Metrics of one run of the project."""
    import mlflow.projects
    from mlflow.exceptions import ExecutionException
    from mlflow.tracking.context.registry import resolve_tags

    parameters = _parameters(settings, job)
    client = mlflow.MlflowClient()
    # Made here, so that it bears the trial's tags and is known if the project fails.
    run = client.create_run(job.environment.get(EXPERIMENT, "0"), tags=resolve_tags())
    for name, value in parameters.items():
        client.log_param(run.info.run_id, name, value)
    try:
        mlflow.projects.run(
            settings.uri,
            settings.entry_point,
            settings.version,
            parameters=parameters,
            experiment_id=run.info.experiment_id,
            env_manager=settings.env_manager,
            run_id=run.info.run_id,
        )
    except ExecutionException as error:
        raise TrialFailure(
            FailureKind.REJECTED, f"the project {settings.uri} failed, see MLflow run {run.info.run_id}: {error}"
        ) from error
    return dict(client.get_run(run.info.run_id).data.metrics)


def _parameters(settings: ProjectSettings, job: Job) -> dict[str, str]:
    """The project's parameters. What the search counts in, prompts per step, means nothing to it."""
    values: Configuration = {name: value for name, value in job.configuration.items() if name != "prompts_per_step"}
    if settings.model_parameter is not None:
        values[settings.model_parameter] = job.model_path
    if settings.seed_parameter is not None:
        values[settings.seed_parameter] = job.seed
    return {name: str(value) for name, value in values.items()}


def _read(metrics: dict[str, float], name: str) -> float:
    value = metrics.get(name)
    if value is None:
        logged = ", ".join(sorted(metrics)) or "none"
        raise TrialFailure(FailureKind.REJECTED, f"the project logged no metric {name!r}; it logged {logged}")
    if not math.isfinite(value):
        raise TrialFailure(FailureKind.NON_FINITE, f"the project's metric {name!r} is {value}")
    return value


def _record(score: float, seconds: float) -> StepRecord:
    """The one step that a project counts for; of its inner life nothing is known."""
    return StepRecord(
        step=1, prompts=1, tokens=0, reward=score, reward_std=0.0, zero_variance_share=0.0, kl=None, entropy=None,
        clip_fraction=None, grad_norm=None, completion_tokens=0.0, truncated_share=0.0, generation_seconds=0.0,
        training_seconds=seconds,
    )  # fmt: skip
