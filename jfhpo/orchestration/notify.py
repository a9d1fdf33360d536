"""Automations of Prefect that tell people how flow runs end, and that notice when one has died."""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import urlsplit

import httpx
from prefect.automations import EventTrigger
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, Posture
from prefect.settings import PREFECT_API_URL
from prefect.types import SecretDict
from pydantic import SecretStr

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.report.text import without_credentials

BLOCK = "jfhpo-notifications"
NOTIFICATIONS = "jfhpo: tell how flow runs end"
DEAD_RUNS = "jfhpo: mark dead flow runs as crashed"

TOLD = ("Completed", "Unfinished", "Declined", "Suspended", "Failed", "Crashed", "TimedOut", "Cancelled")
"""States of flow runs that people are told of."""

SILENCE_SECONDS = 600
"""A flow run is dead when nothing is heard of it for so long. It gives a sign of life every 180 s by default."""

FLOW = {"prefect.resource.role": "flow", "prefect.resource.name": "jfhpo"}

PAYLOAD = (
    '{"text": {{ (flow_run.name ~ ": " ~ flow_run.state.name ~ ". " ~ (flow_run.state.message or "") ~ " "'
    ' ~ (flow_run|ui_url)) | tojson }}, "flow_run": {{ flow_run.name | tojson }}, "state": {{ flow_run.state.name'
    ' | tojson }}, "message": {{ (flow_run.state.message or "") | tojson }}, "url": {{ (flow_run|ui_url) | tojson }}}'
)
"""`text` is what Slack, Mattermost and the like show."""


def set_up(url: str) -> list[str]:
    """Create the webhook block and the automations on the server that PREFECT_API_URL names, or replace them.

    Args:
        url: Webhook that takes a JSON object by POST. Prefect keeps it as a secret.

    Returns:
        Names of the automations.

    Raises:
        SpecError: `url` is no web address, or no server is named.
        InfrastructureError: The server does not answer, or refuses.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise SpecError("the webhook is no web address: give one that begins with https:// or http://")
    server = PREFECT_API_URL.value()
    if not server:
        raise SpecError(
            "PREFECT_API_URL is not set, so there is no server to keep automations: start one (prefect server start) "
            "and set it, e.g. to http://127.0.0.1:4200/api, or log in with: prefect cloud login"
        )
    block = Webhook(method="POST", url=SecretStr(url), headers=SecretDict({"Content-Type": "application/json"}))
    try:
        identity = block.save(BLOCK, overwrite=True, _sync=True)  # type: ignore[call-arg]  # Prefect's dispatch adds it
        automations = [_notifications(str(identity)), _dead_runs()]
        with get_client(sync_client=True) as client:
            for automation in automations:
                for known in client.read_automations_by_name(automation.name):
                    client.delete_automation(known.id)
                client.create_automation(automation)
    except httpx.HTTPError as error:
        raise InfrastructureError(
            f"the Prefect server at {without_credentials(server)} made no automations: {error}; is it running?"
        ) from error
    return [automation.name for automation in automations]


def _notifications(block: str) -> AutomationCore:
    return AutomationCore(
        name=NOTIFICATIONS,
        description="Made by `jfhpo notify`.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{state}" for state in TOLD},
            match_related=FLOW,
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[CallWebhook(block_document_id=block, payload=PAYLOAD)],
    )


def _dead_runs() -> AutomationCore:
    return AutomationCore(
        name=DEAD_RUNS,
        description="Made by `jfhpo notify`. The next run of the study continues it.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match_related=FLOW,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENCE_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No sign of life for {SILENCE_SECONDS} s: its process is gone."
            )
        ],
    )
