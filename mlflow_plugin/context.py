"""What a trainer's own MLflow logging finds while it trains a trial: tags and the study's experiment.

MLflow asks these providers through its entry points. The tags make a run that is started inside a trial a child of the
trial's run.
"""

from __future__ import annotations

import json
import os

from mlflow.tracking.context.abstract_context import RunContextProvider
from mlflow.tracking.default_experiment.abstract_context import DefaultExperimentProvider

from mlflow_plugin.worker import EXPERIMENT, TAGS


class TrialContext(RunContextProvider):  # type: ignore[misc]
    """Tags every run that is started inside a trial with study and trial. Entry point `mlflow.run_context_provider`."""

    def in_context(self) -> bool:
        """Whether this process trains a trial."""
        return TAGS in os.environ

    def tags(self) -> dict[str, str]:
        """The tags."""
        return {str(name): str(value) for name, value in json.loads(os.environ[TAGS]).items()}


class TrialExperiment(DefaultExperimentProvider):  # type: ignore[misc]
    """Runs started inside a trial belong to the study's experiment. Entry point `mlflow.default_experiment_provider`.

    A trainer that names an experiment is obeyed.
    """

    def in_context(self) -> bool:
        """Whether this process trains a trial."""
        return EXPERIMENT in os.environ

    def get_experiment_id(self) -> str:
        """The study's experiment."""
        return os.environ[EXPERIMENT]
