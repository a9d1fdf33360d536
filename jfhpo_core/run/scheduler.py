"""Which job starts when, on a cluster of devices: reservations and backfill. Knows neither Ray nor a clock.

Jobs start in the order of submission. One that does not fit is promised a node as soon as enough of its devices are
free, by the expected ends of the jobs that run there; until then, others start on that node only if they end before, or
leave enough devices over. This is EASY backfilling (Mu'alem & Feitelson 2001, IEEE TPDS 12(6)), with two differences:
each node can be promised, to one job; and a promised node is kept, so that wrong expectations cannot starve a job.

A job stays within one node, as the runs of the trainers here do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

PATIENCE = 1.0
"""A job that would have to wait is chosen only if it would start within this multiple of its own length. Half of what a
trial may wait (twice its length), because the ends of running jobs are estimates."""

POOL = ""
"""The one node of a cluster whose nodes are not told apart."""


@dataclass(frozen=True)
class Request(Generic[Key]):
    """A job that is to run.

    Attributes:
        key: Identifies it.
        devices: Devices that it holds while it runs.
        seconds: Expected length; inf if unknown.
    """

    key: Key
    devices: int
    seconds: float


@dataclass(frozen=True)
class Gap:
    """What may start on a node now.

    Attributes:
        devices: Free devices.
        spare: Of these, those that the job which the node is promised to will leave over (all without such a job): what
            fits into them may run for any time.
        seconds: Time until that job should start; inf if nobody knows.
    """

    devices: int
    spare: int
    seconds: float = math.inf

    def admits(self, devices: int, seconds: float) -> bool:
        """Whether a job may start here."""
        return devices <= self.devices and (devices <= self.spare or seconds <= self.seconds < math.inf)


@dataclass(frozen=True)
class Opening:
    """What one more job may be.

    Attributes:
        gaps: One for each node.
        waits: Seconds until a job of so many devices could start, if one may be made to wait; empty if one is waiting.
    """

    gaps: tuple[Gap, ...]
    waits: Mapping[int, float]

    def fits(self, devices: int, seconds: float) -> bool:
        """Whether a job can start now without delaying the one that waits."""
        return any(gap.admits(devices, seconds) for gap in self.gaps)

    def admits(self, devices: int, seconds: float) -> bool:
        """Whether it is worth submitting a job: it can start now, or within `PATIENCE` times its length."""
        return self.fits(devices, seconds) or self.waits.get(devices, math.inf) <= PATIENCE * seconds


@dataclass(frozen=True)
class Load:
    """How busy a cluster is.

    Attributes:
        busy: Devices that are held.
        devices: Devices that there are; None if they are not counted.
        waiting: Expected seconds until each waiting job starts, in order; inf where nothing is known.
    """

    busy: int
    devices: int | None
    waiting: Mapping[str, float]


@dataclass
class _Running(Generic[Key]):
    request: Request[Key]
    node: str
    ends: float


class Scheduler(Generic[Key]):
    """See the module.

    Args:
        nodes: Devices of each node by name; None: devices are not counted.
        slots: Jobs that may run at the same time; None: as many as there are devices for.

    Raises:
        ValueError: Neither is given.
    """

    def __init__(self, nodes: Mapping[str, int] | None, slots: int | None = None) -> None:
        if nodes is None and slots is None:
            raise ValueError("without a number of devices or of slots, jobs without end could start")
        self._nodes = None if nodes is None else dict(nodes)
        self._slots = slots
        self._queue: list[Request[Key]] = []
        self._running: dict[Key, _Running[Key]] = {}
        self._promised: dict[str, Key] = {}

    @property
    def busy(self) -> int:
        """Devices that are held."""
        return sum(item.request.devices for item in self._running.values())

    @property
    def devices(self) -> int | None:
        """Devices that there are; None if they are not counted."""
        return None if self._nodes is None else sum(self._nodes.values())

    @property
    def largest(self) -> int:
        """Devices of the largest node: as many as a job may have."""
        return sys.maxsize if self._nodes is None else max(self._nodes.values(), default=0)

    def resize(self, nodes: Mapping[str, int]) -> None:
        """Nodes have come or gone."""
        self._nodes = dict(nodes)
        self._promised = {node: key for node, key in self._promised.items() if node in nodes}

    def submit(self, request: Request[Key]) -> None:
        """Put a job at the end of the queue."""
        self._queue.append(request)

    def finish(self, key: Key) -> None:
        """A job has ended, or is withdrawn while it waits."""
        self._running.pop(key, None)
        self._queue = [request for request in self._queue if request.key != key]
        self._promised = {node: waiting for node, waiting in self._promised.items() if waiting != key}

    def expect(self, key: Key, ends: float) -> None:
        """A running job shows when it will end."""
        if key in self._running:
            self._running[key].ends = ends

    def start(self, now: float) -> list[tuple[Key, str]]:
        """Let start what may; each job that starts, with its node (`POOL` where nodes are not told apart)."""
        started: list[tuple[Key, str]] = []
        for request in list(self._queue):
            if self._slots is not None and len(self._running) >= self._slots:
                break
            node = self._place(request, now)
            if node is None:
                self._promise(request, now)
                continue
            self.finish(request.key)
            self._running[request.key] = _Running(request, node, now + request.seconds)
            started.append((request.key, node))
        return started

    def opening(self, now: float) -> Opening | None:
        """What one more job may be; None if nothing may start or wait now. Call `start` before."""
        if self._slots is not None and len(self._running) + len(self._queue) >= self._slots:
            return None
        if self._nodes is None:
            return Opening((Gap(sys.maxsize, sys.maxsize),), {})
        profiles = {node: self._profile(node, now) for node in self._nodes}
        gaps = [self._gap(node, profile, now) for node, profile in profiles.items()]
        if not any(gap.devices > 0 for gap in gaps):
            return None
        waits: dict[int, float] = {}
        if len(self._promised) == len(self._queue):
            for node in self._nodes.keys() - self._promised.keys():
                for at, free in reversed(profiles[node]):
                    for devices in range(1, free + 1):
                        waits[devices] = min(at - now, waits.get(devices, math.inf))
        return Opening(tuple(gap for gap in gaps if gap.devices > 0), waits)

    def waiting(self, now: float) -> dict[Key, float]:
        """Expected seconds until each waiting job starts, in order; inf for those without a promise."""
        return {request.key: self._start_of(request, now) - now for request in self._queue}

    def free(self, node: str) -> int | None:
        """Devices of a node that no running job holds; None if they are not counted, 0 if the node has gone."""
        if self._nodes is None:
            return None
        return self._free(node) if node in self._nodes else 0

    def _free(self, node: str) -> int:
        assert self._nodes is not None
        held = sum(item.request.devices for item in self._running.values() if item.node == node)
        return self._nodes[node] - held

    def _place(self, request: Request[Key], now: float) -> str | None:
        """The fullest node on which a job may start: the emptier ones are kept for larger jobs."""
        if self._nodes is None:
            return POOL
        free = {}
        for node in self._nodes:
            own = self._promised.get(node) == request.key
            gap = Gap(self._free(node), self._free(node)) if own else self._gap(node, self._profile(node, now), now)
            if gap.admits(request.devices, request.seconds):
                free[node] = gap.devices
        return min(free, key=lambda node: (free[node], node), default=None)

    def _promise(self, request: Request[Key], now: float) -> None:
        """Promise a waiting job the node that is free for it first, of those that are promised to nobody."""
        assert self._nodes is not None
        if request.key in self._promised.values():
            return
        starts = {
            node: _free_at(self._profile(node, now), request.devices)
            for node, devices in self._nodes.items()
            if devices >= request.devices and node not in self._promised
        }
        if starts:
            self._promised[min(starts, key=lambda node: (starts[node], node))] = request.key

    def _start_of(self, request: Request[Key], now: float) -> float:
        node = next((node for node, key in self._promised.items() if key == request.key), None)
        return math.inf if node is None else _free_at(self._profile(node, now), request.devices)

    def _profile(self, node: str, now: float) -> list[tuple[float, int]]:
        """How many devices of a node should be free from when on, ascending; what is overdue may end at any moment."""
        ends = sorted(
            (max(now, item.ends), item.request.devices) for item in self._running.values() if item.node == node
        )
        profile = [(now, self._free(node))]
        for at, devices in ends:
            profile.append((at, profile[-1][1] + devices))
        return profile

    def _gap(self, node: str, profile: list[tuple[float, int]], now: float) -> Gap:
        """What may start on a node without delaying the job that it is promised to."""
        free = profile[0][1]
        reserved = next((request for request in self._queue if self._promised.get(node) == request.key), None)
        if reserved is None:
            return Gap(free, free)
        start = _free_at(profile, reserved.devices)
        then = max(free for at, free in profile if at <= start)
        return Gap(free, then - reserved.devices, start - now)


def _free_at(profile: list[tuple[float, int]], devices: int) -> float:
    """When so many devices should be free; inf if never."""
    return next((at for at, free in profile if free >= devices), math.inf)
