"""Reading back what a search of another process has left in MLflow."""

from __future__ import annotations

from pathlib import Path

from jfhpo_core.study.study_file import load_study
from jfhpo_core.study.trial import SegmentResult
from mlflow_plugin.ledger import MlflowLedger

Committed = dict[str, tuple[SegmentResult, ...]]


def committed(folder: Path, study: Path) -> Committed:
    """Committed segments by trial, from the database in a folder."""
    spec = load_study(study)
    tracking = spec.tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
    ledger = MlflowLedger()
    assert ledger.look(spec.model_copy(update={"tracking": tracking}))
    return {trial.key: trial.segments for trial in ledger.trials()}


def count(segments: Committed) -> int:
    """Number of segments."""
    return sum(map(len, segments.values()))


def kept(before: Committed, after: Committed) -> bool:
    """Whether every segment that was committed before is still there, unchanged and in its place."""
    return all(after[key][: len(parts)] == parts for key, parts in before.items())
