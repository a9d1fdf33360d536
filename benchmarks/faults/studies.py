"""The small studies that are disturbed, and what of them must not depend on what happened around them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.records import Place
from jfhpo.session import OUTBOX
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.store.outbox import waiting
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Outcome, SegmentResult, Trial
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.runs import search_runs
from mlflow_plugin.tags import HEADER, PARENT, SEGMENT


@dataclass(frozen=True)
class Piece:
    """A committed segment, as far as it must not depend on what happened around it."""

    key: str
    index: int
    start: int
    stop: int
    outcome: Outcome
    scores: tuple[tuple[int, float], ...]
    charge: float

    @classmethod
    def of(cls, trial: Trial, result: SegmentResult) -> Piece:
        """The piece of a trial."""
        scores = tuple((evaluation.step, evaluation.score) for evaluation in result.evaluations)
        segment = result.segment
        return cls(
            trial.key, segment.index, segment.start_step, segment.stop_step, result.outcome, scores,
            round(result.charge_seconds, 6),
        )  # fmt: skip


def pieces(trials: Sequence[Trial]) -> list[Piece]:
    """All committed segments in the order of their commits."""
    done = [(result.committed, Piece.of(trial, result)) for trial in trials for result in trial.segments]
    return [piece for _, piece in sorted(done, key=lambda item: item[0])]


def study_data(seed: int, folder: Path, place: Place = "inline", uri: str | None = None) -> dict[str, Any]:
    """A small study that continues trials from checkpoints, stops some and trains on three sizes.

    Args:
        seed: Of the search and of the landscape.
        folder: Takes the workspace.
        place: Where the search runs.
        uri: Of the MLflow store; None for a database in the folder.
    """
    return {
        "study": f"faults-{seed}",
        "family": [
            {"name": name, "path": "simulated", "parameters": count}
            for name, count in (("small", 100_000), ("medium", 300_000), ("large", 1_000_000))
        ],
        "target": "large",
        "task": "instruct",
        "trainer": {
            "name": "simulated",
            "settings": {"instance": seed, "real_seconds_per_step": 0.1 if place == "ray" else 0.002},
        },
        "space": "tiny",
        "fidelity": {"horizon_prompts": 480, "rungs": 3},
        "budget": {"trial_seconds": 100, "max_parallel": 1},
        "strategy": {"name": "jfhpo", "settings": {"initial_trials": 5, "pool": 64, "fresh": 6, "local": 6}},
        "baselines": [{"name": "recipe", "configuration": {"learning_rate": 1e-4}}],
        "seeds": {"search": seed, "training": [0, 1]},
        "cluster": {"address": "local" if place == "ray" else "inline", "segment_retries": 5},
        "tracking": {"workspace": str(folder / "work"), "uri": uri or f"sqlite:///{folder / 'mlflow.db'}"},
    }


def study_of(seed: int, folder: Path, place: Place = "inline", uri: str | None = None) -> StudySpec:
    """See `study_data`."""
    return StudySpec.model_validate(study_data(seed, folder, place, uri))


def undisturbed(seed: int) -> list[Piece]:
    """What the study of a seed comes to when nothing happens."""
    with tempfile.TemporaryDirectory(prefix="jfhpo-calm-") as folder:
        return calm_pieces(study_data(seed, Path(folder)))


def calm_pieces(data: dict[str, Any], trials: Sequence[Trial] = ()) -> list[Piece]:
    """What a study comes to when nothing happens, in memory.

    Args:
        data: The study; without trials its workspace is not used.
        trials: What it has on record already.
    """
    with tempfile.TemporaryDirectory(prefix="jfhpo-calm-") as folder:
        tracking = {"workspace": folder} if not trials else data["tracking"]
        settings = {**data["trainer"].get("settings", {}), "real_seconds_per_step": 0.0}
        calm = {**data, "trainer": {**data["trainer"], "settings": settings}, "tracking": tracking}
        ledger = MemoryLedger(trials)
        run_search(resolve(StudySpec.model_validate(calm)), ledger, InlineDispatcher(1))
        return pieces(ledger.trials())


def digest(piece: Piece) -> str:
    return hashlib.sha256(repr(piece).encode()).hexdigest()[:16]


def look(spec: StudySpec) -> tuple[list[Trial], list[str]]:
    """Trials as ledger and outbox have them, and the trial key of each run in MLflow that has been charged."""
    ledger = MlflowLedger()
    if not ledger.look(spec):
        return [], []
    children = f"tags.`{PARENT}` = '{ledger.study_run_id}'"
    runs = search_runs(ledger.client, ledger.experiment_id, children)
    charged = [run.data.tags for run in runs if SEGMENT.format(0) in run.data.tags]
    whole = MemoryLedger(ledger.trials())
    for entry in waiting(resolve(spec).folder / OUTBOX):
        entry.deliver(whole)
    return whole.trials(), [json.loads(tags[HEADER])["key"] for tags in charged]
