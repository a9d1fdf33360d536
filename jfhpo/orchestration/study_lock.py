"""One flow run of a study at a time, on whatever machine it is: a second one queues.

A global concurrency limit of Prefect does so as long as the server lives. But Prefect keeps the slots of a limit in its
database and their leases in the memory of its server: what is held while the server dies would be held for ever. So who
holds a study also shows signs of life, and what nobody shows them for is freed by the run that waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

LEASE_SECONDS = 60.0
"""So long after a flow run was killed is its study held for it. Prefect takes no less."""

QUEUE_SECONDS = 5.0
"""Between two attempts of a queued flow run to take its study."""

SIGN_SECONDS = 15.0
"""Between two signs of life of the flow run that holds a study."""

FREED_SECONDS = 90.0
"""A study is freed when whoever held it has shown no sign of life for so long."""


@contextmanager
def hold(study: str) -> Iterator[None]:
    """Queue behind another flow run of the study, then hold it."""
    name = f"jfhpo-study-{study}"
    with get_client(sync_client=True) as client, ExitStack() as held:
        client.upsert_global_concurrency_limit_by_name(name, 1)
        run = client.read_flow_run(UUID(flow_run.id))
        others = {*run.tags} - {name}
        if name in run.tags:  # it has held the study before it was suspended
            client.update_flow_run(run.id, tags=others)
        get_run_logger().info("waiting until no other flow run holds study %s", study)
        _wait(client, name, held)
        ended = threading.Event()
        signs = threading.Thread(target=_live, args=(run.id, {*others, name}, ended), name="signs-of-life", daemon=True)
        signs.start()
        try:
            yield
        finally:
            ended.set()
            signs.join(SIGN_SECONDS)
            give_back(held)


def give_back(held: ExitStack) -> None:
    """Give slots back. If no server answers, the end of their leases does it, or who waits for them."""
    try:
        held.close()
    except httpx.TransportError as error:
        get_run_logger().warning("what this flow run held could not be given back: %s", error)


def _wait(client: SyncPrefectClient, name: str, held: ExitStack) -> None:
    """Take the slot of a limit as soon as it is free, or deserted."""
    seen, since = _signs(client, name), time.monotonic()
    while True:
        try:
            if _take(name, held):
                return
        except httpx.TransportError:
            since = time.monotonic()  # without a server, nobody can show that he lives
        else:
            now = _signs(client, name)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > FREED_SECONDS:
                get_run_logger().warning("%s is held by no flow run that shows signs of life, and is freed", name)
                client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
                since = time.monotonic()
        time.sleep(QUEUE_SECONDS)


def _take(name: str, held: ExitStack) -> bool:
    """Try to take the slot of a limit; it is given back when `held` is closed.

    Raises:
        httpx.TransportError: The server does not answer.
    """
    slot = concurrency(
        name, max_retries=0, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False
    )
    try:
        held.enter_context(slot)
    except ConcurrencySlotAcquisitionError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.TransportError):
            raise cause from error
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED:
            return False
        raise
    return True


def _live(run: UUID, tags: set[str], ended: threading.Event) -> None:
    """Show signs of life: writing a flow run's tags, the same ones too, changes the time of its last update."""
    with get_client(sync_client=True) as client:
        while True:
            with suppress(httpx.HTTPError):  # while the server is away; the next sign may reach it
                client.update_flow_run(run, tags=tags)
            if ended.wait(SIGN_SECONDS):
                return


def _signs(client: SyncPrefectClient, tag: str) -> dict[UUID, datetime | None]:
    """When each running flow run with a tag was last updated."""
    working = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING]))
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), state=working))
    return {run.id: run.updated for run in runs}
