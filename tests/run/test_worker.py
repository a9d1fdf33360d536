from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import CheckpointError, InfrastructureError, TrialFailure
from jfhpo_core.run.parts import Paused, cut
from jfhpo_core.run.worker import Cancelled, Staged, run_job, store_staged, train_job
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study, base_evaluations
from jfhpo_core.study.trial import Evaluation, FailureKind, Outcome, SegmentResult, StepRecord, Trial
from jfhpo_core.trainers import Job, Observer, TrainingResult, load_trainer
from jfhpo_core.trainers.scripted import STATE
from jfhpo_core.trainers.simulated import SimulatedTrainer
from tests.studies import BECAUSE, simulated_study


def calm_records(bench: Bench, after: int, until: int) -> list[StepRecord]:
    """Records of some of a trial's steps."""
    return [record for record in bench.ledger.step_records(bench.key) if after < record.step <= until]


class Bench:
    """One trial of a study with its ledger: trains segments and, if asked to, forgets to commit them."""

    def __init__(self, study: Study, learning_rate: float = 3e-4) -> None:
        self.study = study
        self.ledger = MemoryLedger()
        self.ledger.open(study.spec)
        self.key = study.new_trial(0, {"learning_rate": learning_rate}, "large", seed=0).key
        self._new = study.new_trial(0, {"learning_rate": learning_rate}, "large", seed=0)
        self.store = CheckpointStore(study.store)

    @property
    def trial(self) -> Trial:
        return next(iter(self.ledger.trials()), self._new)

    def begin(self, prompts: int) -> Job:
        """Begin the next segment, or the open one again, as the search does."""
        trial = self.trial
        segment = trial.open_segment or self.study.next_segment(trial, prompts, BECAUSE)
        self.ledger.begin(trial, segment)
        base = base_evaluations(self.ledger.trials()).get("large")
        return self.study.job(self.trial, segment, self.ledger.step_records(self.key), base)

    def train(self, prompts: int, trainer: Any = None, commit: bool = True) -> SegmentResult:
        job, records = self.begin(prompts), []
        result = run_job(job, trainer or load_trainer("simulated"), records.append)
        if commit:
            self.ledger.commit(self.key, result, records)
        return result

    def damage(self, step: int) -> None:
        """Flip the last bit of a checkpoint."""
        path = self.study.store / self.key / f"step-{step:08d}" / STATE
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(bytes(raw))

    def stored(self) -> list[int]:
        """Steps of the checkpoints on disk."""
        return sorted(int(path.name[5:]) for path in (self.study.store / self.key).iterdir())

    def outcome(self) -> tuple[Any, Any]:
        """All that an optimizer sees of the trial."""
        return self.trial.evaluations, self.ledger.step_records(self.key)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(simulated_study(tmp_path))


@pytest.fixture
def calm(tmp_path: Path) -> Bench:
    """The same trial, trained without a disturbance."""
    bench = Bench(simulated_study(tmp_path / "calm"))
    for prompts in (160, 320, 480):
        bench.train(prompts)
    return bench


def test_the_two_newest_checkpoints_stay(bench: Bench) -> None:
    for prompts, stored in ((160, [10]), (320, [10, 20]), (480, [20, 30])):
        assert bench.train(prompts).outcome is Outcome.REACHED
        assert bench.stored() == stored
    assert list((bench.study.store / "staging").iterdir()) == []


@pytest.mark.parametrize("crashes", [1, 2, 5])
def test_a_crash_between_checkpoint_and_ledger_changes_nothing(bench: Bench, calm: Bench, crashes: int) -> None:
    """The disk then holds a newer checkpoint than the ledger knows; the one that it knows must stay and serve."""
    bench.train(160)
    for prompts in (320, 480):
        for _ in range(crashes):
            bench.train(prompts, commit=False)
            known = bench.trial.checkpoint
            assert known is not None
            bench.store.verify(known)
        bench.train(prompts)
    assert bench.outcome() == calm.outcome()
    assert bench.trial.charge_seconds == calm.trial.charge_seconds
    assert bench.stored() == [20, 30]


def test_a_damaged_checkpoint_is_passed_over(bench: Bench, calm: Bench) -> None:
    bench.train(160)
    bench.train(320)
    bench.damage(20)
    result = bench.train(480)
    assert result.message is not None
    assert "from step 10 instead of 20" in result.message
    assert "quarantine" in result.message
    assert (result.began_step, result.segment.start_step) == (10, 20)
    assert bench.outcome() == calm.outcome()
    assert bench.stored() == [10, 30]
    # It pays for what it had to repeat.
    assert bench.trial.charge_seconds > calm.trial.charge_seconds


def test_a_damaged_checkpoint_then_a_crash(bench: Bench, calm: Bench) -> None:
    """The one before the damaged one is all that the ledger knows; it must outlive the uncommitted attempt."""
    bench.train(160)
    bench.train(320)
    bench.damage(20)
    bench.train(480, commit=False)
    bench.train(480)
    assert bench.outcome() == calm.outcome()


def test_with_every_checkpoint_damaged_the_trial_starts_again(bench: Bench, calm: Bench) -> None:
    bench.train(160)
    bench.train(320)
    bench.damage(10)
    bench.damage(20)
    result = bench.train(480)
    assert "from step 0 instead of 20" in str(result.message)
    assert bench.outcome() == calm.outcome()
    assert bench.stored() == [30]


def test_what_is_written_to_a_disk_of_the_node_is_the_same(
    tmp_path: Path, calm: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    study = simulated_study(tmp_path, cluster={"local_folder": "$SCRATCH/jfhpo"})
    bench = Bench(study)
    stages: list[Path] = []

    class Watched(SimulatedTrainer):
        def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
            stages.append(stage)
            return super().run(job, start, stage, observe)

    for prompts in (160, 320, 480):
        bench.train(prompts, Watched())
    assert bench.outcome() == calm.outcome()
    assert bench.stored() == [20, 30]
    assert all(stage.is_relative_to(tmp_path / "scratch" / "jfhpo") for stage in stages)
    assert not any(stage.exists() for stage in stages)


def test_a_variable_that_a_node_does_not_have_is_named(tmp_path: Path) -> None:
    bench = Bench(simulated_study(tmp_path, cluster={"local_folder": "$NO_SUCH_VARIABLE/jfhpo"}))
    with pytest.raises(InfrastructureError, match=r"\$NO_SUCH_VARIABLE.*set the variable on every node"):
        bench.train(160)


def test_a_trial_goes_on_from_the_checkpoint_before_one_that_was_not_stored(bench: Bench, calm: Bench) -> None:
    bench.train(160)
    result = bench.train(320, commit=False)
    bench.ledger.commit(bench.key, result.model_copy(update={"checkpoint": None}), calm_records(calm, 10, 20))
    assert [evaluation.step for evaluation in bench.trial.evaluations] == [0, 10, 20]
    job = bench.begin(480)
    assert (job.segment.start_step, job.start_checkpoints[0].step) == (20, 10)
    result = bench.train(480)
    assert result.began_step == 10
    assert result.message == "trained again from step 10 instead of 20: the checkpoint there was not stored"
    assert bench.outcome() == calm.outcome()
    # It pays for what it had to repeat.
    assert bench.trial.charge_seconds > calm.trial.charge_seconds


def test_a_checkpoint_that_could_not_be_stored_keeps_its_stage_for_another_attempt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = train_job(bench.begin(160), load_trainer("simulated"), lambda _: None)
    assert isinstance(staged, Staged)

    def refuse(*_: object) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "commit", refuse)
        with pytest.raises(CheckpointError):
            store_staged(staged, again=True)
    assert store_staged(staged).checkpoint is not None
    assert not staged.stage.exists()


def test_a_checkpoint_beyond_the_ledger_is_not_used(bench: Bench) -> None:
    bench.train(160)
    bench.train(320, commit=False)
    job = bench.begin(320)
    assert bench.stored() == [10, 20]
    assert [checkpoint.step for checkpoint in job.start_checkpoints] == [10]
    records: list[StepRecord] = []
    run_job(job, SimulatedTrainer(), records.append)
    assert [record.step for record in records] == list(range(11, 21))


class Failing(SimulatedTrainer):
    """Raises at step 5."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        def failing(record: StepRecord | Evaluation) -> Any:
            decision = observe(record)
            if record.step == 5:
                (stage / "half").write_text("written")
                raise self.error
            return decision

        return super().run(job, start, stage, failing)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TrialFailure(FailureKind.OUT_OF_MEMORY, "CUDA out of memory"), FailureKind.OUT_OF_MEMORY),
        (TrialFailure("reward", "reward.py raised KeyError"), FailureKind.REWARD),
        (MemoryError(), FailureKind.OUT_OF_MEMORY),
    ],
)
def test_the_configurations_fault_is_a_verdict(bench: Bench, error: BaseException, kind: FailureKind) -> None:
    result = bench.train(160, Failing(error))
    assert (result.outcome, result.failure, result.end_step) == (Outcome.INFEASIBLE, kind, 5)
    assert result.checkpoint is None
    assert str(error) in str(result.message)
    assert list((bench.study.store / "staging").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("bug"), KeyboardInterrupt()])
def test_anything_else_is_no_verdict(bench: Bench, calm: Bench, error: BaseException) -> None:
    with pytest.raises(type(error)):
        bench.train(160, Failing(error))
    assert list((bench.study.store / "staging").iterdir()) == []
    for prompts in (160, 320, 480):
        bench.train(prompts)
    assert bench.outcome() == calm.outcome()


def test_cancelled_at_the_next_step(bench: Bench) -> None:
    records: list[StepRecord] = []
    with pytest.raises(Cancelled):
        run_job(bench.begin(480), SimulatedTrainer(), records.append, lambda: len(records) == 7)
    assert len(records) == 7
    assert not (bench.study.store / bench.key).exists()


class Impatient(SimulatedTrainer):
    """Returns a step too early."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        result = super().run(job, start, stage, observe)
        return result.model_copy(update={"end_step": result.end_step - 1})


def test_a_trainer_that_returns_too_early_is_found_out(bench: Bench) -> None:
    with pytest.raises(InfrastructureError, match="returned at step 9"):
        bench.train(160, Impatient())
    assert not (bench.study.store / bench.key).exists()


class Exploding(SimulatedTrainer):
    """Its gradient norm is not finite from step 4 on."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        def exploding(event: StepRecord | Evaluation) -> Any:
            exploded = isinstance(event, StepRecord) and event.step >= 4
            return observe(event.model_copy(update={"grad_norm": float("nan")}) if exploded else event)

        return super().run(job, start, stage, exploding)


def test_a_non_finite_signal_makes_the_trial_infeasible(bench: Bench) -> None:
    result = bench.train(480, Exploding())
    assert (result.outcome, result.failure, result.end_step) == (Outcome.INFEASIBLE, FailureKind.NON_FINITE, 4)
    assert "grad_norm" in str(result.message)
    assert bench.trial.charge_seconds > 0


def test_a_stopping_rule_ends_the_segment_without_a_checkpoint(tmp_path: Path) -> None:
    # A learning rate far beyond the best collapses.
    bench = Bench(simulated_study(tmp_path), learning_rate=2e-2)
    result = bench.train(480)
    assert result.outcome is Outcome.STOPPED
    assert result.decision is not None
    assert result.decision.step == result.end_step == result.evaluations[-1].step < 30
    assert not (bench.study.store / bench.key).exists()


def test_the_rules_see_the_steps_of_earlier_segments(tmp_path: Path) -> None:
    """Whether a trial is trained in one piece or in three, a rule stops it at the same step."""
    whole, parts = (Bench(simulated_study(tmp_path / name), learning_rate=2e-2) for name in ("whole", "parts"))
    whole.train(480)
    for prompts in (160, 320, 480):
        if parts.train(prompts).outcome is Outcome.STOPPED:
            break
    assert parts.trial.decision == whole.trial.decision
    assert parts.trial.decision is not None


def test_a_jobs_state_is_plain_json(bench: Bench) -> None:
    """A job crosses machines; nothing of it may depend on this process."""
    job = bench.begin(160)
    assert Job.model_validate(json.loads(job.model_dump_json())) == job


def test_a_segment_that_is_paused_goes_on_where_it_was(bench: Bench, calm: Bench) -> None:
    bench.train(160)
    steps = []
    for _ in range(4):
        job = bench.begin(480).model_copy(update={"deadline": 0.0})
        with pytest.raises(Paused) as caught:
            run_job(job, SimulatedTrainer(), lambda record: None)
        steps.append(caught.value.step)
    assert steps == [11, 12, 13, 14]
    assert bench.stored() == [10, 14]
    result = bench.train(480)
    assert bench.outcome() == calm.outcome()
    assert (result.began_step, result.end_step) == (10, 30)
    assert bench.stored() == [10, 30]
    whole = sum(part.seconds - part.startup_seconds for part in calm.trial.segments[1:])
    assert result.startup_seconds == 5 * calm.trial.segments[0].startup_seconds
    assert result.seconds - result.startup_seconds == pytest.approx(whole)


def test_a_damaged_part_costs_what_it_had_saved(bench: Bench, calm: Bench) -> None:
    bench.train(160)
    with pytest.raises(Paused):
        run_job(bench.begin(480).model_copy(update={"deadline": 0.0}), SimulatedTrainer(), lambda record: None)
    bench.damage(11)
    bench.train(480)
    assert bench.outcome() == calm.outcome()


def test_a_failure_after_a_pause_is_charged_as_a_whole(bench: Bench) -> None:
    with pytest.raises(Paused):
        run_job(bench.begin(480).model_copy(update={"deadline": 0.0}), SimulatedTrainer(), lambda record: None)

    class Fails(SimulatedTrainer):
        def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
            raise TrialFailure(FailureKind.OUT_OF_MEMORY, "out of memory", seconds=100.0)

    result = bench.train(480, Fails())
    assert result.outcome is Outcome.INFEASIBLE
    assert result.seconds > 101.0
    assert [item.step for item in result.evaluations] == [0]


def test_a_trainer_that_cannot_be_paused_is_cut_at_the_last_rung_in_time() -> None:
    def stop(seconds_left: float, pace: float = 1.0) -> int:
        study = simulated_study(Path("unused"))
        trial = study.new_trial(0, {"learning_rate": 1e-3}, "large", 0)
        told = BECAUSE.model_copy(update={"expected_cost_seconds": 30 * pace})
        job = study.job(trial, study.next_segment(trial, 480, told), (), None)
        return cut(job.model_copy(update={"deadline": time.time() + seconds_left})).segment.stop_step

    assert [stop(seconds) for seconds in (1000.0, 39.5, 35.0, 20.0, 5.0, 0.0)] == [30, 30, 20, 10, 10, 10]
    assert stop(35.0, pace=0.5) == 30
