"""The faults that are injected, and what came of each: a line of JSON in `benchmarks/results/faults`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

FILE = Path(__file__).parents[1] / "results" / "faults" / "faults.jsonl"

Kind = Literal[
    "driver-kill", "driver-term", "disk-full", "checkpoint-damaged", "clock-jump", "duplicates", "late-result",
    "worker-kill", "raylet-kill", "mlflow-kill", "worker-hung", "memory-hog", "trial-deleted", "study-deleted",
    "store-locked", "two-drivers", "database-cut", "upgrade", "many-trials",
]  # fmt: skip

Place = Literal["inline", "ray", "server", "command"]
"""Where a search runs: in one process, with Ray workers, in one process with its ledger on an MLflow server, or as the
command `jfhpo search`."""

KINDS: dict[Kind, str] = {
    "driver-kill": "kill -9 of the process that searches (and, without Ray, trains)",
    "driver-term": "SIGTERM, and kill -9 after a grace period of 0 to 0.3 s",
    "disk-full": "the file system of checkpoints and database is full for up to 2 s",
    "checkpoint-damaged": "kill -9, and a bit flipped in, or the end cut off, a file of a newest checkpoint",
    "clock-jump": "the wall clock jumps by up to 30 days, forward or back",
    "duplicates": "every event of the dispatcher is delivered twice",
    "late-result": "a segment that is long committed is delivered again, with another bill",
    "worker-kill": "kill -9 of the Ray worker that trains",
    "raylet-kill": "kill -9 of the raylet",
    "mlflow-kill": "kill -9 of the MLflow server, which is started again after 0 to 6 s and then takes some more",
    "worker-hung": "the Ray worker that trains stands still for ever (SIGSTOP)",
    "memory-hog": "another program takes the machine's memory until Ray ends a worker for it",
    "trial-deleted": "a finished trial's run is deleted in MLflow's UI, and restored, or gone on without (`--forget`)",
    "study-deleted": "the study's run is deleted in MLflow's UI during the search, and restored, or begun anew",
    "store-locked": "another program locks the database for a minute",
    "two-drivers": "a second `jfhpo search` of a study on one MLflow server, while the first works or stands still",
    "database-cut": "the end of the database file is lost, or all of it; it is restored from a copy later",
    "upgrade": "a study of an earlier version (commit `c5cb37e`) is gone on with, and killed (-9) meanwhile",
    "many-trials": "a study with 1,000 trials on record is gone on with, and killed (-9) meanwhile",
}

DRAWN: dict[Place, tuple[Kind, ...]] = {
    "inline": (
        "driver-kill", "driver-kill", "driver-term", "driver-term", "disk-full", "clock-jump", "duplicates",
        "late-result", "checkpoint-damaged",
    ),
    "ray": ("worker-kill", "raylet-kill", "raylet-kill", "driver-kill", "worker-hung", "memory-hog"),
    "server": ("mlflow-kill", "mlflow-kill", "driver-kill"),
    "command": (
        "trial-deleted", "study-deleted", "store-locked", "two-drivers", "database-cut", "upgrade", "many-trials",
    ),
}  # fmt: skip
"""Faults of a search, drawn without replacement until each was drawn as often as it is named here; then anew.
Of a study at the command line there is one fault."""


class Record(BaseModel):
    """One fault and what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    number: int = Field(description="Among the faults of this seed, from 0.")
    kind: Kind
    place: Place
    after_seconds: float = Field(description="Since the process of the search was started.")
    acknowledged: int = Field(description="Segments whose commit had been reported before the fault.")
    recovery_seconds: float | None = Field(description="From the next start to its first commit; None if none came.")
    violations: tuple[str, ...]
    commit: str


def load(path: Path = FILE) -> list[Record]:
    """All recorded faults."""
    if not path.exists():
        return []
    return [Record.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(records: Sequence[Record], path: Path = FILE) -> None:
    """Add the faults of a seed, in place of those that it may have had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        fresh = {(record.place, record.seed) for record in records}
        kept = [record for record in load(path) if (record.place, record.seed) not in fresh]
        merged = sorted([*kept, *records], key=lambda record: (record.place, record.seed, record.number))
        path.write_text("".join(f"{record.model_dump_json()}\n" for record in merged), encoding="utf-8")
