"""One flow run of a study at a time, on whatever machine it is: a second one queues.

A global concurrency limit of Prefect does so as long as the server lives. But Prefect keeps the slots of a limit in its
database and their leases in the memory of its server: a slot that is held while the server dies would stay taken for
ever. The holder therefore also sends heartbeats; a waiting run releases a lock whose heartbeats have stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from typing import Self
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
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

LEASE_SECONDS = 60.0
"""How long a study stays locked after its flow run is killed (Prefect's minimum)."""


class LockSettings(BaseSettings):
    """Times of the lock. Environment variables change them, for instance `JFHPO_LOCK_EXPIRY_SECONDS=300`."""

    model_config = SettingsConfigDict(env_prefix="JFHPO_LOCK_", frozen=True)

    retry_seconds: float = Field(default=5.0, gt=0, description="Time between two attempts of a waiting flow run.")
    heartbeat_seconds: float = Field(default=15.0, gt=0, description="Time between two heartbeats of the holder.")
    expiry_seconds: float = Field(
        default=90.0, gt=0, description="A lock without heartbeats for this time is released; several heartbeats long."
    )

    @model_validator(mode="after")
    def _patient(self) -> Self:
        if self.expiry_seconds < 2 * self.heartbeat_seconds:
            raise ValueError(
                f"JFHPO_LOCK_EXPIRY_SECONDS={self.expiry_seconds:g} is less than two heartbeats of "
                f"{self.heartbeat_seconds:g} s: one that is late would cost the holder its lock"
            )
        return self


@contextmanager
def hold(study: str) -> Iterator[None]:
    """Queue behind another flow run of the study, then hold it."""
    name, settings = f"jfhpo-study-{study}", LockSettings()
    with get_client(sync_client=True) as client, ExitStack() as held:
        client.upsert_global_concurrency_limit_by_name(name, 1)
        run = client.read_flow_run(UUID(flow_run.id))
        others = {*run.tags} - {name}
        if name in run.tags:  # it has held the study before it was suspended
            client.update_flow_run(run.id, tags=others)
        get_run_logger().info("waiting until no other flow run holds study %s", study)
        _wait(client, name, held, settings)
        ended = threading.Event()
        heartbeats = threading.Thread(
            target=_send_heartbeats,
            args=(run.id, {*others, name}, ended, settings.heartbeat_seconds),
            name="heartbeats",
            daemon=True,
        )
        heartbeats.start()
        try:
            yield
        finally:
            ended.set()
            heartbeats.join(settings.heartbeat_seconds)
            give_back(held)


def give_back(held: ExitStack) -> None:
    """Give slots back. If no server answers, they become free when their leases end, or by a waiting run."""
    try:
        held.close()
    except httpx.TransportError as error:
        get_run_logger().warning("what this flow run held could not be given back: %s", error)


def _wait(client: SyncPrefectClient, name: str, held: ExitStack, settings: LockSettings) -> None:
    """Take the slot of a limit as soon as it is free, or its heartbeats have stopped."""
    seen, since = _heartbeats(client, name), time.monotonic()
    while True:
        try:
            if _take(name, held):
                return
        except httpx.TransportError:
            since = time.monotonic()  # without a server, heartbeats cannot arrive
        else:
            now = _heartbeats(client, name)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > settings.expiry_seconds:
                get_run_logger().warning("%s is held without heartbeats; its lock is released", name)
                client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
                since = time.monotonic()
        time.sleep(settings.retry_seconds)


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


def _send_heartbeats(run: UUID, tags: set[str], ended: threading.Event, seconds: float) -> None:
    """Send heartbeats: writing a flow run's tags, the same ones too, changes the time of its last update."""
    with get_client(sync_client=True) as client:
        while True:
            with suppress(httpx.HTTPError):  # while the server is away; the next one may reach it
                client.update_flow_run(run, tags=tags)
            if ended.wait(seconds):
                return


def _heartbeats(client: SyncPrefectClient, tag: str) -> dict[UUID, datetime | None]:
    """When each running flow run with a tag was last updated."""
    working = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING]))
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), state=working))
    return {run.id: run.updated for run in runs}
