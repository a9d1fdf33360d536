"""Reservations and backfill, and what a mix of sizes comes to on a simulated clock."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np
import pytest

from jfhpo_core.run.scheduler import PATIENCE, POOL, Opening, Request, Scheduler

SIZES = (1, 2, 4, 8)


def scheduler(devices: int = 8, slots: int | None = None, **running: tuple[int, float]) -> Scheduler[str]:
    """A pool with jobs that run since time 0: devices and expected seconds by name."""
    made: Scheduler[str] = Scheduler({POOL: devices}, slots)
    for key, (size, seconds) in running.items():
        made.submit(Request(key, size, seconds))
    assert [key for key, _ in made.start(0.0)] == list(running)
    return made


def submit(made: Scheduler[str], key: str, devices: int, seconds: float, now: float = 0.0) -> list[str]:
    made.submit(Request(key, devices, seconds))
    return [started for started, _ in made.start(now)]


def opening(made: Scheduler[str], now: float = 0.0) -> Opening:
    found = made.opening(now)
    assert found is not None
    return found


def test_a_job_that_does_not_fit_is_not_overtaken_by_what_would_delay_it() -> None:
    made = scheduler(a=(4, 10.0), b=(2, 20.0))
    assert submit(made, "large", 8, 30.0) == []
    assert made.waiting(0.0) == {"large": 20.0}
    assert submit(made, "long", 2, 21.0) == []
    assert submit(made, "short", 2, 20.0) == ["short"]
    made.finish("a")
    assert made.start(10.0) == []
    made.finish("b")
    made.finish("short")
    assert made.start(20.0) == [("large", POOL)]
    made.finish("large")
    assert made.start(50.0) == [("long", POOL)]


def test_what_the_reserved_job_leaves_over_may_run_for_long() -> None:
    made = scheduler(a=(6, 10.0))
    submit(made, "large", 5, 30.0)
    # 8 - 5 devices are left over once it starts.
    assert submit(made, "beside", 2, 100.0) == ["beside"]
    assert submit(made, "too much", 2, 100.0) == []


def test_an_overdue_job_gives_no_time_to_backfill_and_its_node_stays_promised() -> None:
    made = scheduler(a=(6, 10.0))
    submit(made, "large", 8, 30.0)
    assert submit(made, "short", 1, 1.0, now=15.0) == []
    made.expect("a", 40.0)
    assert [key for key, _ in made.start(16.0)] == ["short"]


def test_of_unknown_lengths_nothing_overtakes() -> None:
    made = scheduler(a=(4, math.inf), b=(2, math.inf))
    assert submit(made, "large", 8, math.inf) == []
    assert submit(made, "small", 1, math.inf) == []
    assert submit(made, "short", 1, 1.0) == []
    made.finish("a")
    made.finish("b")
    assert [key for key, _ in made.start(10.0)] == ["large"]


def test_a_promise_is_kept_though_another_node_would_now_be_free_sooner() -> None:
    made: Scheduler[str] = Scheduler({"a": 8, "b": 8})
    for key, seconds in (("first", 10.0), ("second", 20.0)):
        submit(made, key, 8, seconds)
    submit(made, "large", 8, 5.0)
    made.expect("first", 1000.0)
    assert made.waiting(11.0) == {"large": 989.0}
    assert submit(made, "another", 8, 5.0, now=11.0) == []
    assert made.waiting(11.0) == {"large": 989.0, "another": 9.0}, "each node is promised to one job"
    made.finish("another")
    # If the other node is free at once, it is taken all the same.
    made.finish("second")
    assert made.start(20.0) == [("large", "b")]


def test_small_jobs_fill_up_the_fullest_node() -> None:
    made: Scheduler[str] = Scheduler({"a": 8, "b": 8})
    made.submit(Request("one", 1, 9.0))
    made.submit(Request("two", 2, 9.0))
    made.submit(Request("large", 8, 9.0))
    assert dict(made.start(0.0)) == {"one": "a", "two": "a", "large": "b"}
    assert made.busy == 11
    assert made.devices == 16


def test_what_may_be_asked_for_next() -> None:
    made = scheduler(a=(4, 10.0), b=(2, 20.0))
    free = opening(made)
    assert free.fits(2, math.inf)
    assert not free.fits(4, 1.0)
    # 4 devices are free after 10 seconds: a job of that length may wait for them, a shorter one had better not.
    assert free.admits(4, 10.0 / PATIENCE)
    assert not free.admits(4, 9.0 / PATIENCE)
    submit(made, "large", 8, 30.0)
    reserved = opening(made)
    assert reserved.admits(2, 20.0)
    assert not reserved.admits(2, 21.0)
    assert not reserved.admits(4, 1000.0), "a second job would wait"
    submit(made, "short", 2, 20.0)
    assert made.opening(0.0) is None


def test_slots_bound_how_many_jobs_run_and_wait() -> None:
    made = scheduler(slots=2, a=(1, 10.0))
    assert submit(made, "b", 1, 10.0) == ["b"]
    assert made.opening(0.0) is None
    assert submit(made, "c", 1, 10.0) == []
    made.finish("a")
    assert made.start(5.0) == [("c", POOL)]


def test_without_a_number_of_devices_slots_alone_count() -> None:
    made: Scheduler[str] = Scheduler(None, 2)
    assert submit(made, "a", 8, 10.0) == ["a"]
    assert opening(made).fits(8, math.inf)
    assert submit(made, "b", 8, 10.0) == ["b"]
    assert made.opening(0.0) is None
    assert (made.busy, made.devices, made.waiting(0.0)) == (16, None, {})
    with pytest.raises(ValueError, match="jobs without end"):
        Scheduler(None, None)


def test_a_withdrawn_job_no_longer_holds_its_promise() -> None:
    made = scheduler(a=(4, 10.0))
    submit(made, "large", 8, 30.0)
    assert submit(made, "long", 4, 100.0) == []
    made.finish("large")
    assert made.start(1.0) == [("long", POOL)]


def test_nodes_may_come_and_go() -> None:
    made: Scheduler[str] = Scheduler({})
    assert made.opening(0.0) is None
    assert submit(made, "large", 8, 10.0) == []
    assert made.waiting(0.0) == {"large": math.inf}
    made.resize({"a": 8})
    assert made.start(1.0) == [("large", "a")]
    submit(made, "next", 8, 10.0)
    assert made.waiting(1.0) == {"next": 10.0}
    made.resize({"b": 8})
    assert made.start(2.0) == [("next", "b")]


def mixed_jobs(random: np.random.Generator) -> Iterator[Request[str]]:
    """Sizes with equal shares of the device time, lengths over a factor of five."""
    count = 0
    while True:
        count += 1
        size = int(random.choice(SIZES, p=[8 / 15, 4 / 15, 2 / 15, 1 / 15]))
        yield Request(f"{count}x{size}", size, float(random.choice([20.0, 40.0, 60.0, 80.0, 100.0])))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_mix_of_sizes_keeps_the_devices_busy_and_nobody_waiting(seed: int, nodes: int) -> None:
    random = np.random.default_rng(seed)
    made: Scheduler[str] = Scheduler({str(node): 8 for node in range(nodes)})
    jobs, now, held = mixed_jobs(random), 0.0, 0.0
    ends: list[tuple[float, str]] = []
    lengths: dict[str, float] = {}
    submitted: dict[str, float] = {}
    waits: dict[str, float] = {}

    def start() -> None:
        for key, _ in made.start(now):
            heapq.heappush(ends, (now + lengths[key], key))
            waits[key] = now - submitted[key]
            made.expect(key, now + lengths[key])  # its first steps have shown it

    while now < 3000.0:
        # As the search does: of what is wanted next, the first that is admitted.
        while (free := made.opening(now)) is not None:
            wanted = next((job for _, job in zip(range(20), jobs, strict=False)
                           if free.admits(job.devices, job.seconds)), None)  # fmt: skip
            if wanted is None:
                break
            lengths[wanted.key] = wanted.seconds * random.lognormal(0, 0.15)
            submitted[wanted.key] = now
            made.submit(wanted)
            start()
        later, key = heapq.heappop(ends)
        held += made.busy * (later - now)
        now = later
        made.finish(key)
        start()
    assert held / (now * 8 * nodes) > 0.85
    assert all(wait <= 2 * lengths[key] for key, wait in waits.items())
    assert any(waits.values())
    assert min(sum(key.endswith(f"x{size}") for key in waits) for size in SIZES) > 3
