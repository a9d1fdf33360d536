"""The runs of a study's trials in MLflow, nested in the run of the study; `ledger` has the order of writes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Run

from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.study.models import Ladder, build_ladder
from jfhpo_core.study.resolved import checkpoint_store
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Configuration, SegmentResult, StepRecord, Trial
from jfhpo_core.trainers import load_trainer
from mlflow_plugin import checkpoints
from mlflow_plugin.presentation import (
    STATE,
    STATUS,
    StudyState,
    completions_table,
    result_metrics,
    run_name,
    step_metrics,
    trial_labels,
    trial_parameters,
)
from mlflow_plugin.provenance import TaskData, source_tags, task_data
from mlflow_plugin.runs import log, now, read_text, search_runs
from mlflow_plugin.tags import HEADER, OPEN, PARENT, SEGMENT, TRIAL_KEY, Child, pack, parse, read_child, unseen

STREAM_SECONDS = 2.0
"""Shortest time between two writes of a running trial's metrics: a write costs about 20 ms of CPU."""
COMPLETIONS = "completions.json"
"""Artifact of a trial that has ended: MLflow shows it as a table, and compares those of several runs."""


@dataclass(frozen=True)
class Particulars:
    """What the runs of a study and of its trials show beside their course.

    Attributes:
        ladder: The models of the family.
        data: What the task reads.
        source: Tags that tell which code runs.
        defaults: Hyperparameters of trials that do not name them.
    """

    ladder: Ladder
    data: TaskData
    source: Mapping[str, str]
    defaults: Configuration

    @classmethod
    def of(cls, study: StudySpec) -> Particulars:
        """Look them up."""
        return cls(build_ladder(study), task_data(study.task), source_tags(), _defaults(study))


class TrialRuns:
    """The trials of a study. They are read once; from then on this process is the only writer.

    Args:
        client: Talks to the tracking store.
        study: The study.
        experiment_id: MLflow's id of its experiment.
        parent_id: MLflow's id of its run.
        particulars: What is shown of it; None: nothing will be written.
    """

    def __init__(
        self,
        client: MlflowClient,
        study: StudySpec,
        experiment_id: str,
        parent_id: str,
        particulars: Particulars | None = None,
    ) -> None:
        self._client, self._study = client, study
        self._experiment_id, self._parent_id = experiment_id, parent_id
        self._particulars = particulars
        self._uncertain: set[str] = set()
        self._children = self._read()

    def __getitem__(self, key: str) -> Child:
        if key not in self._children:
            raise LedgerError(f"trial {key} is unknown; begin a segment first")
        return self._children[key]

    def get(self, key: str) -> Child | None:
        """The run of a trial; None if there is none."""
        return self._children.get(key)

    def trials(self) -> list[Trial]:
        """All of them, in order of creation."""
        return [child.trial for child in self._children.values()]

    def put_right(self, changed: Sequence[str]) -> None:
        """Put right what people would see wrong after a crash.

        Args:
            changed: What interrupted segments will be trained with that was not as it is when they began.
        """
        for child in self._children.values():
            segment = child.trial.open_segment
            if changed and segment is not None:
                marked = segment.model_copy(update={"changed": tuple(changed)})
                child.trial = child.trial.model_copy(update={"open_segment": marked})
                log(self._client, child.run_id, tags=_open_tags(child.trial))
            self.settle(child)
            self._index(child, child.trial)

    def begin(self, trial: Trial) -> None:
        """Note the open segment of a trial; its run is created if it has none."""
        child = self._children.get(trial.key)
        if child is None:
            run = self._created(trial.key) or self._create(trial)
            child = Child(run.info, trial, False, run.info.status, run.info.run_name, records={})
            self._children[trial.key] = child
        else:
            log(self._client, child.run_id, tags=_open_tags(trial))
            child.trial = trial
        self.settle(child)

    def stream(self, child: Child, records: Sequence[StepRecord]) -> None:
        """Show records of a segment that is trained, at most every `STREAM_SECONDS`."""
        child.waiting.extend(records)
        if time.monotonic() - child.streamed_at >= STREAM_SECONDS:
            log(self._client, child.run_id, step_metrics(unseen(child, child.waiting), now()))
            child.shown.update({record.step: record for record in child.waiting})
            child.waiting = []
            child.streamed_at = time.monotonic()

    def commit(self, child: Child, result: SegmentResult, records: Sequence[StepRecord]) -> None:
        """Make a segment count: its records first, then in one call the tag that commits it."""
        trial = child.trial.model_copy(update={"segments": (*child.trial.segments, result), "open_segment": None})
        known = self.records(child)
        lines = "".join(f"{record.model_dump_json()}\n" for record in records)
        self._client.log_text(child.run_id, lines, _records_file(result.segment.index))
        self._index(child, trial)
        model_id = child.checkpoint.model_id if child.checkpoint is not None else None
        secondary = self._study.secondary_metrics
        steps = step_metrics(unseen(child, records), now())
        log(
            self._client,
            child.run_id,
            [*steps, *result_metrics(trial, result, now(), model_id, self._shown.data, secondary)],
            tags={**pack(SEGMENT.format(result.segment.index), result.model_dump_json()), **trial_labels(trial)},
        )
        child.trial, child.waiting, child.shown = trial, [], {}
        if (table := completions_table(trial)) is not None:
            self._client.log_table(child.run_id, table, COMPLETIONS)
        known.update({record.step: record for record in records})
        self.settle(child)

    def records(self, child: Child) -> dict[int, StepRecord]:
        """Step records of a trial's committed segments, by step."""
        if child.records is None:
            records = {}
            for result in child.trial.segments:
                text = read_text(self._client, child.run, _records_file(result.segment.index))
                for line in text.splitlines():
                    record = parse(StepRecord, line, child.run_id)
                    records[record.step] = record
            child.records = records
        return child.records

    def settle(self, child: Child) -> None:
        """Bring inputs, parameters, status and name of a trial's run up to date."""
        trial = child.trial
        if not child.described:
            self._client.log_inputs(child.run_id, self._shown.data.inputs())
            size = self._shown.ladder[trial.model].parameters
            params = trial_parameters(trial, size, self._study.space, self._shown.defaults)
            log(self._client, child.run_id, params=params)
            child.described = True
        status, name = STATUS[trial.state], run_name(trial)
        if status != child.status:
            if status == "RUNNING":
                log(self._client, child.run_id, tags={STATE: trial.state.value})
                self._client.update_run(child.run_id, status)
            else:
                self._client.set_terminated(child.run_id, status)
            child.status = status
        if name != child.name:
            self._client.set_tag(child.run_id, "mlflow.runName", name)
            child.name = name

    def interrupt(self) -> None:
        """Show that open segments wait for the next process."""
        for child in self._children.values():
            if child.trial.open_segment is not None and child.status != "KILLED":
                log(self._client, child.run_id, tags={STATE: StudyState.INTERRUPTED.value})
                self._client.set_terminated(child.run_id, "KILLED")
                child.status = "KILLED"

    @property
    def _shown(self) -> Particulars:
        assert self._particulars is not None
        return self._particulars

    def _read(self) -> dict[str, Child]:
        entries = checkpoints.read_index(self._client, self._experiment_id)
        runs = search_runs(self._client, self._experiment_id, f"tags.`{PARENT}` = '{self._parent_id}'")
        children = [child for run in runs if (child := read_child(run, entries)) is not None]
        # A create_run sent twice (its answer was lost) leaves two runs of one trial: the one that got further counts.
        children.sort(key=lambda child: (child.trial.number, -len(child.trial.segments)))
        by_key: dict[str, Child] = {}
        for child in children:
            by_key.setdefault(child.trial.key, child)
        return by_key

    def _create(self, trial: Trial) -> Run:
        header = trial.model_copy(update={"segments": (), "open_segment": None}).model_dump_json()
        self._uncertain.add(trial.key)
        run = self._client.create_run(
            self._experiment_id,
            tags={
                **self._shown.source, PARENT: self._parent_id, TRIAL_KEY: trial.key, **pack(HEADER, header),
                **_open_tags(trial),
            },
            run_name=run_name(trial),
        )  # fmt: skip
        self._uncertain.discard(trial.key)
        return run

    def _created(self, key: str) -> Run | None:
        """The run of a trial that was created, but whose creation was not answered, if there is one."""
        if key not in self._uncertain:
            return None
        condition = f"tags.`{PARENT}` = '{self._parent_id}' and tags.`{TRIAL_KEY}` = '{key}'"
        return next(iter(search_runs(self._client, self._experiment_id, condition)), None)

    def _index(self, child: Child, trial: Trial) -> None:
        """Bring the index up to the newest checkpoint of `trial`."""
        child.checkpoint = checkpoints.write_index(
            self._client,
            self._experiment_id,
            child.run_id,
            trial,
            child.checkpoint,
            checkpoint_store(self._study),
        )


def _open_tags(trial: Trial) -> dict[str, str]:
    """Tags of a trial with an open segment."""
    assert trial.open_segment is not None
    return {**pack(OPEN, trial.open_segment.model_dump_json()), **trial_labels(trial)}


def _defaults(study: StudySpec) -> Configuration:
    """Hyperparameters of trials that do not name them; none where the trainer is not installed."""
    try:
        trainer = load_trainer(study.trainer.name)
    except SpecError:
        return {}
    return {**trainer.hyperparameters().model_dump(), **study.trainer.fixed}


def _records_file(index: int) -> str:
    return f"records/segment-{index:04d}.jsonl"
