"""What Prefect hears of a study beside the states of its flow runs: events for automations, and assets.

| Event | Resource | When |
|---|---|---|
| `jfhpo.trial.stopped`, `.infeasible`, `.lost` | `jfhpo.trial.STUDY.NUMBER` | A trial has ended early |
| `jfhpo.study.completed`, `.unfinished` | `jfhpo.study.STUDY` | A call of the search has ended in good order |
| `jfhpo.model.champion`, `.challenger` | `jfhpo.model.NAME` | A version of a registered model was given the alias |

Assets: the report (`jfhpo://STUDY/report`) and the registered model (`mlflow://models/NAME`).
"""

from __future__ import annotations

import logging
import re
from typing import Any

import httpx
from prefect.assets import Asset, AssetProperties, materialize
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from jfhpo.display.words import describe_end
from jfhpo.session import StudyOutcome
from jfhpo_core.report.findings import verdict
from jfhpo_core.study.trial import Outcome, SegmentResult, Trial

logger = logging.getLogger(__name__)

ENDINGS = {Outcome.STOPPED: "stopped", Outcome.INFEASIBLE: "infeasible", Outcome.LOST: "lost"}
"""Last part of an event's name, by the outcome of the segment that ended a trial early."""

UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
"""What keys of assets may not contain, and more."""


def trial_ended(study: str, trial: Trial, result: SegmentResult) -> None:
    """Tell that a trial has ended early; nothing is told of a segment that reached its end."""
    if result.outcome not in ENDINGS:
        return
    payload: dict[str, Any] = {
        "study": study,
        "trial": trial.number,
        "model": trial.model,
        "step": result.end_step,
        "total_steps": trial.total_steps,
        "said": describe_end(trial, result),
        "configuration": trial.configuration,
    }
    if result.decision is not None:
        payload |= result.decision.model_dump(mode="json", include={"rule", "signal", "value", "threshold"})
    emit_event(
        f"jfhpo.trial.{ENDINGS[result.outcome]}",
        resource=_resource("trial", f"{study}.{trial.number}", f"#{trial.number} of {study}"),
        related=[{**_resource("study", study, study), "prefect.resource.role": "study"}],
        payload=payload,
    )


def study_ended(outcome: StudyOutcome) -> None:
    """Tell how a call of the search has ended, and which alias of the registered model it has moved, if any."""
    result, study = outcome.result, outcome.result.study.spec.study
    payload: dict[str, Any] = {"study": study, "verdict": verdict(result), "spent_seconds": result.spent_seconds}
    if result.recommended is not None:
        payload["recommended"] = result.recommended.configuration
    resource = _resource("study", study, study)
    emit_event(f"jfhpo.study.{'completed' if result.complete else 'unfinished'}", resource=resource, payload=payload)
    if outcome.moved_alias is not None and outcome.model_uri is not None:
        name = _model_name(outcome.model_uri)
        emit_event(
            f"jfhpo.model.{outcome.moved_alias}",
            resource=_resource("model", name, name),
            related=[{**resource, "prefect.resource.role": "study"}],
            payload={"study": study, "version": outcome.model_uri, "why": outcome.model_note},
        )


def show_assets(outcome: StudyOutcome) -> None:
    """Show report and registered model as assets that this flow run has made; a server that is away misses them."""
    spec, note = outcome.result.study.spec, verdict(outcome.result)
    report = Asset(
        key=f"jfhpo://{spec.study}/report",
        properties=AssetProperties(name=f"Report of {spec.study}", url=outcome.url, description=note),
    )
    made: dict[Asset, dict[str, Any]] = {report: {"path": str(outcome.report), "verdict": note}}
    if outcome.model_uri is not None:
        name = _model_name(outcome.model_uri)
        model = Asset(
            key=f"mlflow://models/{UNSAFE.sub('-', name)}",
            properties=AssetProperties(name=name, description=f"{spec.target}, tuned: {note}"),
        )
        made[model] = {"version": outcome.model_uri, "note": outcome.model_note, "store": outcome.tracking_uri}

    @materialize(*made, by="jfhpo", name="publish", task_run_name=f"publish {spec.study}", cache_policy=NO_CACHE)
    def publish() -> None:
        for asset, metadata in made.items():
            asset.add_metadata(metadata)

    try:
        publish()
    except httpx.HTTPError as error:
        logger.warning("Prefect's server did not take the assets of study %s: %s", spec.study, error)


def _resource(kind: str, identity: str, name: str) -> dict[str, str]:
    return {"prefect.resource.id": f"jfhpo.{kind}.{identity}", "prefect.resource.name": name}


def _model_name(uri: str) -> str:
    """The name in 'models:/NAME/VERSION'."""
    return uri.removeprefix("models:/").rpartition("/")[0]
