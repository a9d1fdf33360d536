"""What is read back of a run: tags with JSON, long texts cut into pieces, and the trial that they make up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlflow.entities import Run, RunInfo
from pydantic import BaseModel, ValidationError

from jfhpo_core.errors import LedgerError
from jfhpo_core.study.trial import Segment, SegmentResult, StepRecord, Trial
from mlflow_plugin import checkpoints

STUDY = "jfhpo.study"
IDENTITY = "jfhpo.identity"
INTERNAL = "mlflow.jfhpo."
"""Begins tags that only the ledger reads: MLflow's pages hide what begins with `mlflow.`."""
CONTENTS = f"{INTERNAL}contents"
CHANGED = f"{INTERNAL}changed"
DESCRIBED = "jfhpo.study_sha256"
HEADER = f"{INTERNAL}trial"
OPEN = f"{INTERNAL}open"
SEGMENT = INTERNAL + "segment.{:04d}"
FACTS = f"{INTERNAL}facts"
PARENT = "mlflow.parentRunId"
FORGOTTEN = f"{INTERNAL}forgotten"
"""Tag of the study's run with what a user goes on without: ids of deleted runs and ranks of their commits."""
TAG_LIMIT = 5000
"""Characters of a tag. MLflow takes 8000 since version 2.15 and 5000 before; what is longer it cuts off silently."""
TRIAL_KEY = "jfhpo.trial_key"
AnyModel = TypeVar("AnyModel", bound=BaseModel)


@dataclass
class Child:
    """A trial and its run.

    Attributes:
        run: What MLflow says of the run when it is found or created; status and name may have changed since.
        described: Whether the run has its parameters.
        status: The run's status, as MLflow has it.
        name: The run's name, as MLflow has it.
        checkpoint: Where the trial's checkpoint is indexed, as MLflow has it.
        records: Step records of the committed segments by step; None until they are read.
        shown: Step records that this process has logged as metrics.
        waiting: Streamed records that are not logged yet.
        streamed_at: When metrics were last streamed, by the monotonic clock.
    """

    run: RunInfo
    trial: Trial
    described: bool
    status: str
    name: str
    checkpoint: checkpoints.IndexEntry | None = None
    records: dict[int, StepRecord] | None = None
    shown: dict[int, StepRecord] = field(default_factory=dict)
    waiting: list[StepRecord] = field(default_factory=list)
    streamed_at: float = -math.inf

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return str(self.run.run_id)


def read_child(run: Run, entries: Mapping[str, checkpoints.IndexEntry]) -> Child | None:
    """The trial in a run; None if the run is not a trial of jfhpo but something a person has nested there."""
    tags, run_id = run.data.tags, run.info.run_id
    header = unpack(tags, HEADER)
    if header is None:
        return None
    segments: list[SegmentResult] = []
    while (text := unpack(tags, SEGMENT.format(len(segments)))) is not None:
        segments.append(parse(SegmentResult, text, run_id))
    text = unpack(tags, OPEN)
    segment = parse(Segment, text, run_id) if text is not None else None
    if segment is not None and segment.index != len(segments):
        segment = None
    trial = parse(Trial, header, run_id).model_copy(update={"segments": tuple(segments), "open_segment": segment})
    return Child(
        run.info, trial, bool(run.data.params), run.info.status, run.info.run_name, checkpoint=entries.get(run_id)
    )


def unseen(child: Child, records: Sequence[StepRecord]) -> list[StepRecord]:
    """Those records that are not logged as metrics yet."""
    return [record for record in records if child.shown.get(record.step) != record]


def read_facts(parent: Run) -> dict[str, str | float]:
    """The facts of the study that a run holds.

    Raises:
        LedgerError: They were edited.
    """
    text = unpack(parent.data.tags, FACTS)
    try:
        return dict(json.loads(text)) if text is not None else {}
    except ValueError as error:
        raise LedgerError(
            f"MLflow run {parent.info.run_id} has a tag {FACTS} that is not JSON ({error}); it was edited: delete it"
        ) from None


def pack(name: str, text: str) -> dict[str, str]:
    """A text as tags: one, or if it is too long, one that counts the pieces, and the pieces."""
    if len(text) <= TAG_LIMIT:
        return {name: text}
    pieces = [text[start : start + TAG_LIMIT] for start in range(0, len(text), TAG_LIMIT)]
    return {name: f"+{len(pieces)}", **{f"{name}:{number}": piece for number, piece in enumerate(pieces)}}


def unpack(tags: Mapping[str, str], name: str) -> str | None:
    """The text that `pack` stored, under this name or the one that earlier versions gave it; None if there is none."""
    if name not in tags and name.startswith(INTERNAL):
        name = name.removeprefix("mlflow.")
    text = tags.get(name)
    if text is None or not text.startswith("+"):
        return text
    return "".join(tags.get(f"{name}:{number}", "") for number in range(int(text)))


def parse(kind: type[AnyModel], text: str, run_id: str) -> AnyModel:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        fault: Any = error.errors(include_url=False)[0]
        raise LedgerError(
            f"MLflow run {run_id} holds a {kind.__name__} that cannot be read ({fault['msg']}); it was edited, or "
            "written by a newer jfhpo: upgrade jfhpo, or delete the run to train its trial again"
        ) from None
