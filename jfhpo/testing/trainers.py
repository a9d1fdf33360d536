"""The contract of `jfhpo_core.trainers.base.Trainer`. Every trainer passes it: subclass `TrainerConformance`.

A subclass gives the fixture `case`. Everything but durations is compared exactly, checkpoint files byte by byte: on a
CPU a segmented training must be the same run.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jfhpo_core.errors import SpecError
from jfhpo_core.run.worker import run_job
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    Checkpoint,
    Configuration,
    Decision,
    Evaluation,
    Outcome,
    Pause,
    Record,
    Segment,
    StepRecord,
    Suggestion,
)
from jfhpo_core.trainers import Job, Trainer, TrainingResult, load_trainer

TOTAL_STEPS = 6
"""Full horizon of the suite's runs."""

BREAK = 3
"""Where a run is broken off and continued."""

KEY = "0123456789abcdef"

PROCESS = """
import sys, time
from pathlib import Path
from jfhpo_core.run.worker import run_job
from jfhpo_core.trainers import Job
from jfhpo_core.trainers import load_trainer

job = Job.model_validate_json(Path(sys.argv[1]).read_text())
def on_record(record):
    print(record.step, flush=True)
    if record.step == int(sys.argv[2]):
        time.sleep(600)
run_job(job, load_trainer(job.study.trainer.name), on_record)
"""


@dataclass(frozen=True)
class Case:
    """What a trainer is tried with.

    Attributes:
        study: A study with this trainer; its stopping rules are off.
        model_path: Model to train.
        configuration: Hyperparameters; the rest keep the trainer's defaults.
        other: Another configuration, for a job that runs before.
    """

    study: StudySpec
    model_path: str
    configuration: Configuration
    other: Configuration

    @property
    def trainer(self) -> Trainer:
        return load_trainer(self.study.trainer.name)

    def job(
        self,
        start: int,
        stop: int,
        store: Path,
        evaluation_steps: Sequence[int] = (),
        checkpoints: Sequence[Checkpoint] = (),
    ) -> Job:
        full = self.trainer.hyperparameters.model_validate(self.configuration).model_dump()
        return Job(
            study=self.study,
            trial_key=KEY,
            trial_number=0,
            model="small",
            model_path=self.model_path,
            parameters=10_000,
            target_parameters=20_000,
            configuration=full,
            seed=7,
            total_steps=TOTAL_STEPS,
            prompts_per_step=int(full["prompts_per_step"]),
            segment=Segment(
                index=int(start > 0),
                start_step=start,
                stop_step=stop,
                suggestion=Suggestion(source="test", explanation=""),
            ),
            evaluation_steps=tuple(evaluation_steps),
            store=str(store),
            start_checkpoints=tuple(checkpoints),
        )


@dataclass(frozen=True)
class Training:
    """What came of a segment, durations left out."""

    result: TrainingResult
    records: list[StepRecord]
    evaluations: list[Evaluation]
    stage: Path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(one: Path, other: Path) -> list[str]:
    """Files of two checkpoints that are not the same byte by byte."""
    left, right = contents(one), contents(other)
    assert left
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def timeless_record(record: StepRecord) -> StepRecord:
    return record.model_copy(update={"generation_seconds": 0.0, "training_seconds": 0.0})


def timeless_evaluation(evaluation: Evaluation) -> Evaluation:
    training = {name: value for name, value in evaluation.training.items() if name != "device_seconds"}
    return evaluation.model_copy(update={"seconds": 0.0, "training": training})


def process_state() -> tuple[object, ...]:
    """What a job might leave behind in the process."""
    numpy_state = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]  # noqa: NPY002
    return random.getstate(), numpy_state, torch.get_rng_state().tolist(), torch.get_num_threads()


Decide = Callable[[StepRecord | Evaluation], Decision | Pause | None]


def decision_at(step: int, *, stop: bool, on: type[Record] = StepRecord) -> Decide:
    def decide(event: StepRecord | Evaluation) -> Decision | None:
        if event.step != step or not isinstance(event, on):
            return None
        return Decision(stop=stop, rule="test", signal="kl", value=2.0, threshold=1.0, step=step)

    return decide


class TrainerConformance:
    """Inherit, and give the fixture `case`."""

    @pytest.fixture
    def case(self) -> Case:
        raise NotImplementedError

    @pytest.fixture
    def train(self, case: Case, tmp_path: Path) -> Callable[..., Training]:
        """Train a segment with the trainer alone, in a fresh stage."""

        def run(
            start: int,
            stop: int,
            evaluation_steps: Sequence[int] = (),
            *,
            resume: Path | None = None,
            decide: Decide = lambda record: None,
            case: Case = case,
        ) -> Training:
            stage = tmp_path / f"stage-{len(list(tmp_path.glob('stage-*')))}"
            stage.mkdir()
            records: list[StepRecord] = []
            shown: list[Evaluation] = []

            def observe(event: StepRecord | Evaluation) -> Decision | Pause | None:
                assert contents(stage) == {}, "a checkpoint before the segment's end"
                if isinstance(event, Evaluation):
                    assert event.step == (records[-1].step if records else start), "an evaluation out of turn"
                    shown.append(timeless_evaluation(event))
                else:
                    records.append(timeless_record(event))
                return decide(event)

            job = case.job(start, stop, tmp_path / "store", evaluation_steps)
            result = case.trainer.run(job, resume, stage, observe)
            evaluations = [timeless_evaluation(evaluation) for evaluation in result.evaluations]
            stops = result.end_step < stop
            assert shown == (evaluations[: len(shown)] if stops else evaluations)
            return Training(result, records, evaluations, stage)

        return run

    def test_training_in_two_segments_is_training_in_one(self, train: Callable[..., Training]) -> None:
        whole = train(0, TOTAL_STEPS, [0, BREAK, TOTAL_STEPS])
        first = train(0, BREAK, [0, BREAK])
        second = train(BREAK, TOTAL_STEPS, [TOTAL_STEPS], resume=first.stage)
        assert first.records + second.records == whole.records
        assert first.evaluations + second.evaluations == whole.evaluations
        assert differing(second.stage, whole.stage) == []
        assert differing(second.stage, first.stage) != []

    def test_every_step_is_observed_once_and_in_order(self, case: Case, train: Callable[..., Training]) -> None:
        training = train(0, BREAK)
        batch = training.records[0].prompts
        assert [record.step for record in training.records] == list(range(1, BREAK + 1))
        assert [record.prompts for record in training.records] == [batch * step for step in range(1, BREAK + 1)]
        assert training.result.end_step == BREAK
        assert training.result.end_prompts == batch * BREAK
        tokens = [record.tokens for record in training.records]
        assert tokens == sorted(set(tokens))
        assert tokens[0] > 0

    def test_it_evaluates_at_the_steps_asked_for(self, train: Callable[..., Training]) -> None:
        training = train(0, BREAK, [0, 2, BREAK, BREAK + 1])
        assert [evaluation.step for evaluation in training.evaluations] == [0, 2, BREAK]
        assert all(evaluation.standard_error > 0 for evaluation in training.evaluations)

    def test_evaluations_leave_no_trace_in_the_training(self, train: Callable[..., Training]) -> None:
        watched, unwatched = train(0, BREAK, [0, 1, 2, BREAK]), train(0, BREAK)
        assert watched.records == unwatched.records
        assert differing(watched.stage, unwatched.stage) == []

    def test_a_stopping_decision_ends_the_segment_after_an_evaluation(self, train: Callable[..., Training]) -> None:
        training = train(0, TOTAL_STEPS, [TOTAL_STEPS], decide=decision_at(2, stop=True))
        assert [record.step for record in training.records] == [1, 2]
        assert training.result.end_step == 2
        assert [evaluation.step for evaluation in training.evaluations] == [2]

    def test_a_stopping_decision_on_an_evaluation_ends_the_segment(self, train: Callable[..., Training]) -> None:
        training = train(0, TOTAL_STEPS, [0, 2, TOTAL_STEPS], decide=decision_at(2, stop=True, on=Evaluation))
        assert [record.step for record in training.records] == [1, 2]
        assert training.result.end_step == 2
        assert [evaluation.step for evaluation in training.evaluations] == [0, 2]

    def test_a_decision_that_does_not_stop_changes_nothing(self, train: Callable[..., Training]) -> None:
        assert train(0, BREAK, decide=decision_at(2, stop=False)).records == train(0, BREAK).records

    def test_a_pause_saves_what_was_trained(self, case: Case, train: Callable[..., Training]) -> None:
        if not getattr(case.trainer, "pauses", False):
            pytest.skip("this trainer is never asked to pause")
        whole = train(0, TOTAL_STEPS, [0, 2, TOTAL_STEPS])
        first = train(0, TOTAL_STEPS, [0, 2, TOTAL_STEPS], decide=lambda event: Pause() if event.step == 2 else None)
        assert first.result.end_step == 2
        second = train(2, TOTAL_STEPS, [TOTAL_STEPS], resume=first.stage)
        assert first.records + second.records == whole.records
        assert first.evaluations + second.evaluations == whole.evaluations
        assert differing(second.stage, whole.stage) == []

    def test_the_checkpoint_holds_no_pickled_code(self, train: Callable[..., Training]) -> None:
        stage = train(0, 1).stage
        files = [path for path in stage.rglob("*") if path.is_file()]
        assert files
        for path in files:
            if path.suffix in {".pt", ".pth"}:
                from transformers.trainer_pt_utils import safe_globals

                with safe_globals():
                    torch.load(path, weights_only=True)
            else:
                assert path.suffix in {".json", ".safetensors", ".md", ".txt", ".jinja"}, path.name

    def test_a_job_leaves_nothing_to_the_next(self, case: Case, train: Callable[..., Training]) -> None:
        alone = train(0, 2, [2])
        before = process_state()
        train(0, 2, [0], case=replace(case, configuration=case.other))
        assert process_state() == before
        random.seed(99)
        np.random.seed(99)  # noqa: NPY002
        torch.manual_seed(99)
        following = train(0, 2, [2])
        assert following.records == alone.records
        assert following.evaluations == alone.evaluations
        assert differing(following.stage, alone.stage) == []

    def test_unknown_hyperparameters_and_settings_are_refused(self, case: Case) -> None:
        trainer = case.study.trainer
        for change, message in (
            ({"fixed": {**trainer.fixed, "learning_rat": 1e-3}}, "learning_rat"),
            ({"settings": {**trainer.settings, "no_such_setting": 1}}, "no_such_setting"),
        ):
            study = case.study.model_copy(update={"trainer": trainer.model_copy(update=change)})
            with pytest.raises(SpecError, match=message):
                resolve(study)

    def test_a_kill_costs_at_most_the_steps_since_the_last_checkpoint(self, case: Case, tmp_path: Path) -> None:
        undisturbed = tmp_path / "undisturbed"
        records: list[StepRecord] = []
        whole = run_job(case.job(0, TOTAL_STEPS, undisturbed, [BREAK, TOTAL_STEPS]), case.trainer, records.append)

        store = tmp_path / "store"
        again: list[StepRecord] = []
        first = run_job(case.job(0, BREAK, store, [BREAK]), case.trainer, again.append)
        assert first.checkpoint is not None
        job = case.job(BREAK, TOTAL_STEPS, store, [TOTAL_STEPS], [first.checkpoint])
        job = job.model_copy(update={"history": tuple(again)})
        _kill_at(job, BREAK + 2, tmp_path)
        assert [path.name for path in (store / KEY).iterdir()] == [Path(first.checkpoint.path).name]

        second = run_job(job, case.trainer, again.append)
        assert second.outcome is Outcome.REACHED
        assert [timeless_record(record) for record in again] == [timeless_record(record) for record in records]
        evaluations = [*first.evaluations, *second.evaluations]
        assert list(map(timeless_evaluation, evaluations)) == list(map(timeless_evaluation, whole.evaluations))
        assert second.checkpoint is not None
        assert whole.checkpoint is not None
        assert differing(store / second.checkpoint.path, undisturbed / whole.checkpoint.path) == []


def _kill_at(job: Job, step: int, folder: Path) -> None:
    """Run a job in a process of its own and kill it (SIGKILL) once it has reported a step."""
    path = folder / "job.json"
    path.write_text(job.model_dump_json(), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(path), str(step)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        reported = []
        for line in process.stdout:
            reported.append(int(line))
            if reported[-1] == step:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert reported == list(range(job.segment.start_step + 1, step + 1))
