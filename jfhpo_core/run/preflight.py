"""What is checked before a search that a study file alone cannot tell: environment, hardware, disk, reward, data.

A check yields findings; none of them changes anything. A trainer adds its own with a method
`preflight(study) -> Iterator[Finding]`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from jfhpo_core.errors import JfhpoError
from jfhpo_core.study.data import columns_of
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.tasks import Task, load_task
from jfhpo_core.trainers.base import Finding, Level

GIB = 2**30

CHECKPOINT_BYTES = 16
"""Of a checkpoint per parameter: weights for resuming and for use, and Adam's moments."""

CHECKPOINTS_PER_TRIAL = 2
"""A trial keeps the checkpoint that it started from beside the newest one."""

SAMPLED_ROWS = 4

PORTS = {4200: "Prefect", 5000: "MLflow", 6379: "Ray", 8265: "Ray's dashboard", 10001: "Ray Client"}
"""Whoever reaches one of these can run code, or read and change results."""

LISTENING = "0A"
ANY_ADDRESS = ("00000000", "0" * 32)


def examine(study: Study) -> Iterator[Finding]:
    """Everything but dispatcher and ledger, which this package does not know."""
    try:
        task = load_task(study.spec.task)
    except JfhpoError as error:
        yield Finding(Level.FAILURE, "task", str(error))
    else:
        yield from _data(study, task)
        yield _reward(task)
    yield _disk(study)
    yield from _ports(Path("/proc/net"))
    own = getattr(study.trainer, "preflight", None)
    if own is not None:
        yield from own(study)


def _data(study: Study, task: Task) -> Iterator[Finding]:
    horizon = study.spec.fidelity.horizon_prompts
    scored = len(task.heldout[: study.spec.evaluation.prompts])
    yield Finding(
        Level.OK, "data",
        f"{len(task.train)} training prompts ({horizon / len(task.train):.2g} passes in a full trial), "
        f"{len(task.heldout)} held-out prompts, of which {scored} are scored; none is in both",
    )  # fmt: skip
    error = 0.5 / scored**0.5
    if error > 0.05:
        yield Finding(
            Level.WARNING, "data",
            f"{scored} held-out prompts give a standard error of up to {error:.3f}: differences below about "
            f"{2 * error:.2f} cannot be told; score more (evaluation.prompts, evaluation.samples_per_prompt)",
        )  # fmt: skip


def _reward(task: Task) -> Finding:
    rows = task.heldout[:SAMPLED_ROWS]
    try:
        rewards = task.reward([row["prompt"] for row in rows], [""] * len(rows), **columns_of(rows)).rewards
    except JfhpoError as error:
        return Finding(Level.FAILURE, "reward", f"{error} (empty completions of {len(rows)} held-out prompts)")
    shown = ", ".join(f"{value:g}" for value in rewards)
    return Finding(Level.OK, "reward", f"it scores empty completions of {len(rows)} held-out prompts with {shown}")


def _disk(study: Study) -> Finding:
    folder = study.folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    one = CHECKPOINT_BYTES * study.ladder.target.parameters
    needed = CHECKPOINTS_PER_TRIAL * (study.spec.budget.max_parallel + study.spec.budget.top_k) * one
    text = (
        f"about {one / GIB:.3g} GiB for a checkpoint of the target, {needed / GIB:.3g} GiB for those in use at a time "
        f"(paused trials come on top); {free / GIB:.3g} GiB are free at {folder}"
    )
    if free < needed:
        return Finding(Level.FAILURE, "disk", f"{text}: free some, or set tracking.workspace elsewhere")
    return Finding(Level.OK, "disk", text)


def _ports(tables: Path) -> Iterator[Finding]:
    """Well-known servers that listen on every interface of this machine."""
    open_ports = set()
    for name in ("tcp", "tcp6"):
        path = tables / name
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        for fields in map(str.split, lines):
            address, _, number = fields[1].partition(":")
            if fields[3] == LISTENING and address in ANY_ADDRESS:
                open_ports.add(int(number, 16))
    for port in sorted(open_ports & set(PORTS)):
        yield Finding(
            Level.WARNING, "ports",
            f"{PORTS[port]} (port {port}) listens on every interface of this machine; bind it to 127.0.0.1, or close "
            "the port in the firewall",
        )  # fmt: skip
