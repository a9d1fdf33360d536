"""Seed after seed, until there are faults enough."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults.campaign import Campaign
from benchmarks.faults.command import disturb_command
from benchmarks.faults.disks import disk
from benchmarks.faults.records import DRAWN, FILE, Kind, Place, Record, load, save
from benchmarks.tracking_server import TrackingServer


def disturb_seed(
    seed: int, place: Place = "inline", most: int = 1000, kinds: Sequence[Kind] | None = None
) -> list[Record]:
    """All faults of one seed.

    Args:
        seed: Of the study and of the faults.
        place: Where the search runs.
        most: Faults after which the study is left in peace.
        kinds: What is drawn from; None: those of the place.
    """
    kinds = kinds or DRAWN[place]
    if place == "command":
        with tempfile.TemporaryDirectory(prefix="jfhpo-faults-") as name:
            return disturb_command(seed, kinds[seed % len(kinds)], Path(name))
    with disk() as small, tempfile.TemporaryDirectory(prefix="jfhpo-faults-") as name:
        if place == "inline" and small is not None:
            return Campaign(seed, small, place, kinds).run(most)
        plain = Path(name) / "disk"
        plain.mkdir()
        if place != "server":
            return Campaign(seed, plain, place, [kind for kind in kinds if kind != "disk-full"]).run(most)
        server = TrackingServer(plain)
        try:
            server.start()
            return Campaign(seed, plain, place, kinds, server).run(most)
        finally:
            server.kill()


def run(
    faults: int,
    seeds: Sequence[int],
    place: Place,
    kinds: Sequence[Kind] | None = None,
    path: Path = FILE,
    say: Callable[[str], None] = print,
) -> int:
    """Disturb seed after seed until so many faults are on record; returns the number of violations among them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for seed in seeds:
        here = [record for record in load(path) if record.place == place]
        if sum(record.kind in (kinds or DRAWN[place]) for record in here) >= faults:
            break
        if any(record.seed == seed for record in here):
            continue
        records = disturb_seed(seed, place, kinds=kinds)
        save(records, path)
        bad = [violation for record in records for violation in record.violations]
        say(f"seed {seed}: {len(records)} faults, {len(bad)} violations{''.join(f'{chr(10)}  {text}' for text in bad)}")
    return sum(len(record.violations) for record in load(path) if record.place == place)
