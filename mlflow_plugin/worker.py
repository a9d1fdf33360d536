"""What a worker knows of the trial that it trains, and what it does beside the run.

The ledger hands store, experiment, tags and the trial's run to workers as environment variables, so they reach every
process that a trainer starts. This module does not import MLflow: workers that need none of it shall start fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jfhpo_core.study.trial import Trial

if TYPE_CHECKING:
    from jfhpo_core.trainers import Job

EXPERIMENT = "JFHPO_EXPERIMENT_ID"
TRIAL_RUN = "JFHPO_TRIAL_RUN_ID"
TAGS = "JFHPO_RUN_TAGS"
"""Tags as JSON."""
TRACKING_URI = "MLFLOW_TRACKING_URI"
SYSTEM_METRICS = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
"""MLflow's own switch."""


def trial_environment(uri: str, experiment_id: str, study: str, trial: Trial, run_id: str) -> dict[str, str]:
    """Environment variables for the workers of a trial.

    Args:
        uri: Tracking store.
        experiment_id: The study's experiment.
        study: Name of the study.
        trial: The trial.
        run_id: The trial's run.
    """
    tags = {
        "mlflow.parentRunId": run_id,
        # Not the names by which the ledger finds its own runs.
        "jfhpo.in_study": study,
        "jfhpo.in_trial": trial.key,
        "jfhpo.trial_number": str(trial.number),
        "jfhpo.model": trial.model,
    }
    environment = {TRACKING_URI: uri, EXPERIMENT: experiment_id, TRIAL_RUN: run_id, TAGS: json.dumps(tags)}
    if SYSTEM_METRICS in os.environ:
        environment[SYSTEM_METRICS] = os.environ[SYSTEM_METRICS]
    return environment


@contextmanager
def system_metrics(job: Job) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU of the worker to the trial's run, if MLflow's own switch asks for it.

    A companion of the run (`jfhpo_core.run.worker.COMPANIONS`).
    """
    run_id = job.environment.get(TRIAL_RUN)
    if run_id is None or os.environ.get(SYSTEM_METRICS, "").lower() not in ("1", "true"):
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=job.environment[TRACKING_URI])
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
