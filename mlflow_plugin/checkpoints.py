"""An index of reusable checkpoints: one external logged model per trial, kept at its newest checkpoint.

The files stay in the checkpoint store; MLflow's `search_logged_models` finds them by model, step, score or digest.
One entry per trial, because the store keeps only a trial's newest checkpoints. The ledger never reads training state
from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from jfhpo_core.study.trial import Trial
from mlflow_plugin.artifacts import checkpoint_uri

MODEL_TYPE = "jfhpo-checkpoint"
EXTERNAL = "mlflow.model.isExternal"
"""MLflow's mark of a model whose files it does not hold."""
DIGEST = "jfhpo.digest"
AVAILABLE = "jfhpo.available"
"""'true', or 'false' once `jfhpo gc` has deleted the files."""
PAGE = 100


@dataclass(frozen=True)
class IndexEntry:
    """Where a trial's checkpoint is indexed, and which checkpoint that is."""

    model_id: str
    digest: str | None


def read_index(client: MlflowClient, experiment_id: str) -> dict[str, IndexEntry]:
    """All entries of an experiment by the run that they belong to."""
    entries: dict[str, IndexEntry] = {}
    token: str | None = None
    while True:
        page = client.search_logged_models(
            [experiment_id], f"attributes.model_type = '{MODEL_TYPE}'", max_results=PAGE, page_token=token
        )
        for model in page:
            entries[model.source_run_id] = IndexEntry(model.model_id, model.tags.get(DIGEST))
        token = page.token
        if not token:
            return entries


def write_index(
    client: MlflowClient, experiment_id: str, run_id: str, trial: Trial, entry: IndexEntry | None, store: Path
) -> IndexEntry | None:
    """Bring a trial's entry up to its newest checkpoint; returns it, or None if the trial has no checkpoint.

    Args:
        client: Talks to the tracking store.
        experiment_id: The study's experiment.
        run_id: The trial's run.
        trial: The trial.
        entry: What the index has of it.
        store: Root of the checkpoint store.
    """
    checkpoint = trial.checkpoint
    if checkpoint is None or (entry is not None and entry.digest == checkpoint.digest):
        return entry
    tags: Mapping[str, Any] = {
        "jfhpo.trial_key": trial.key,
        "jfhpo.step": str(checkpoint.step),
        "jfhpo.path": checkpoint.path,
        "jfhpo.uri": checkpoint_uri(store / checkpoint.path),
        AVAILABLE: "true",
        "jfhpo.bytes": str(checkpoint.size_bytes),
        DIGEST: checkpoint.digest,
    }
    if entry is None:
        params = {name: str(value) for name, value in {**trial.configuration, "model": trial.model}.items()}
        model = client.create_logged_model(
            experiment_id,
            name=f"{trial.number:03d}-{trial.model}-checkpoint",
            source_run_id=run_id,
            tags={**tags, EXTERNAL: "true"},
            params={**params, "seed": str(trial.seed)},
            model_type=MODEL_TYPE,
        )
        model_id = model.model_id
        client.finalize_logged_model(model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model_id, checkpoint.step)])
    else:
        model_id = entry.model_id
        client.set_logged_model_tags(model_id, dict(tags))
    return IndexEntry(model_id, checkpoint.digest)


def mark_deleted(client: MlflowClient, entry: IndexEntry) -> None:
    """Note in the index that the files of an entry are gone."""
    client.set_logged_model_tags(entry.model_id, {AVAILABLE: "false"})
