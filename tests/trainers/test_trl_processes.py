"""Runs of the `trl` trainer in several processes: real ones, on CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jfhpo.testing.trainers import (
    BREAK,
    TOTAL_STEPS,
    Case,
    decision_at,
    differing,
    timeless_evaluation,
    timeless_record,
)
from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.run.worker import run_job
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import load_task
from jfhpo_core.study.trial import Decision, Evaluation, FailureKind, Pause, StepRecord
from jfhpo_core.trainers import Job
from jfhpo_core.trainers.base import TrainingResult
from jfhpo_core.trainers.trl import TrlTrainer
from jfhpo_core.trainers.trl_processes import Answer, Event, command
from jfhpo_core.trainers.trl_settings import TrlSettings, VllmSettings
from tests.trainers.test_trl import MakeCase, write_model, write_task

PROCESSES = 2


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> MakeCase:
    folder = tmp_path_factory.mktemp("trl")
    (folder / "task").mkdir()
    return MakeCase(write_model(folder / "tiny"), write_task(folder / "task"))


@dataclass
class Training:
    """What came of a segment, durations left out."""

    result: TrainingResult
    records: list[StepRecord]
    stage: Path

    @property
    def evaluations(self) -> list[Evaluation]:
        return list(map(timeless_evaluation, self.result.evaluations))


def on_both(job: Job) -> Job:
    return job.model_copy(update={"devices": PROCESSES})


def train(job: Job, stage: Path, start: Path | None = None, decide: Any = lambda _: None) -> Training:
    records: list[StepRecord] = []

    def observe(event: StepRecord | Evaluation) -> Decision | Pause | None:
        if isinstance(event, StepRecord):
            records.append(timeless_record(event))
        answer: Decision | Pause | None = decide(event)
        return answer

    stage.mkdir()
    return Training(TrlTrainer().run(job, start, stage, observe), records, stage)


@pytest.fixture(scope="module")
def case(make_case: MakeCase) -> Case:
    return make_case(mini_batches=2, kl_coefficient=0.05, scheduler="cosine", warmup_ratio=0.2)


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run of two processes from end to end."""
    folder = tmp_path_factory.mktemp("whole")
    return train(on_both(case.job(0, TOTAL_STEPS, folder / "store", [0, BREAK, TOTAL_STEPS])), folder / "stage")


@pytest.mark.slow
def test_two_processes_go_on_exactly_where_they_paused_and_stopped(case: Case, whole: Training, tmp_path: Path) -> None:
    job = on_both(case.job(0, BREAK, tmp_path / "store", [0, BREAK]))
    paused = train(job, tmp_path / "paused", decide=lambda event: Pause() if event.step == 1 else None)
    assert paused.result.end_step == 1
    job = on_both(case.job(1, BREAK, tmp_path / "store", [BREAK]))
    first = train(job, tmp_path / "first", paused.stage)
    job = on_both(case.job(BREAK, TOTAL_STEPS, tmp_path / "store", [TOTAL_STEPS]))
    second = train(job, tmp_path / "second", first.stage)
    assert paused.records + first.records + second.records == whole.records
    assert paused.evaluations + first.evaluations + second.evaluations == whole.evaluations
    assert differing(second.stage, whole.stage) == []
    assert differing(second.stage, first.stage) != []
    assert {path.name for path in whole.stage.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_two_processes_train_what_one_trains(case: Case, whole: Training, tmp_path: Path) -> None:
    alone = train(case.job(0, TOTAL_STEPS, tmp_path / "store", [0]), tmp_path / "stage")
    for one, other in zip(whole.records, alone.records, strict=True):
        assert (one.step, one.prompts, one.learning_rate) == (other.step, other.prompts, other.learning_rate)
    # The untrained model, sampled with other random numbers.
    ours, theirs = whole.evaluations[0], alone.evaluations[0]
    assert ours.samples == theirs.samples
    assert abs(ours.score - theirs.score) < 4 * (ours.standard_error + theirs.standard_error)
    # It learns to write digits, as one process does.
    for training in (whole, alone):
        assert training.records[-1].tokens > 0
        assert all((record.grad_norm or 0) > 0 for record in training.records)
    assert {path.name for path in whole.stage.glob("*.safetensors")} == {"model.safetensors"}


@pytest.mark.slow
def test_a_stopping_decision_ends_both_processes_at_its_step(case: Case, whole: Training, tmp_path: Path) -> None:
    job = on_both(case.job(0, TOTAL_STEPS, tmp_path / "store", [TOTAL_STEPS]))
    stopped = train(job, tmp_path / "stage", decide=decision_at(2, stop=True))
    assert stopped.result.end_step == 2
    assert stopped.records == whole.records[:2]
    assert [evaluation.step for evaluation in stopped.evaluations] == [2]


@pytest.mark.slow
def test_a_reward_that_fails_in_any_process_is_a_verdict(make_case: MakeCase, tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, completions, **columns):\n    raise ValueError('no reward today')\n")
    case = make_case()
    study = case.study.model_copy(update={"task": case.study.task.model_copy(update={"reward": str(reward)})})
    job = on_both(case.job(0, BREAK, tmp_path / "store")).model_copy(update={"study": study})
    with pytest.raises(TrialFailure, match="no reward today") as caught:
        train(job, tmp_path / "stage")
    assert caught.value.kind == FailureKind.REWARD


def test_processes_share_a_rollout_in_order(make_case: MakeCase) -> None:
    from jfhpo_core.trainers.trl_rollout import Ranks
    from jfhpo_core.trainers.trl_training import PromptSchedule

    rows = load_task(make_case().study.task).train
    shape = {"prompts_per_step": 4, "samples": 3, "loads": 2, "steps": 5, "seed": 7}
    alone, *both = (PromptSchedule(rows, **shape, ranks=ranks) for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2)))
    for load in range(len(alone)):
        assert both[0][load] + both[1][load] == alone[load]
        assert len(both[0][load]) == len(both[1][load])


def test_what_is_not_a_number_is_told_as_such() -> None:
    decision = Decision(stop=True, rule="non_finite", signal="kl", value=float("inf"), threshold=0.0, step=2)
    for answer in (decision, Pause(), None):
        assert Answer.model_validate_json(Answer(decision=answer).model_dump_json()).decision == answer
    evaluation = Evaluation(step=1, prompts=4, score=float("nan"), standard_error=0.1, samples=4, seconds=1.0)
    told = Event.model_validate_json(Event(event=evaluation).model_dump_json()).event
    assert isinstance(told, Evaluation)
    assert told.score != told.score


def study_with(make_case: MakeCase, devices: int, cluster: dict[str, Any] | None = None, **settings: Any) -> StudySpec:
    study = make_case(settings).study
    models = [model.model_copy(update={"devices": devices}) for model in study.family.models]
    changes = {"family": study.family.model_copy(update={"models": models})}
    return StudySpec.model_validate({**study.model_copy(update=changes).model_dump(), "cluster": cluster or {}})


def test_a_model_may_have_several_devices(make_case: MakeCase) -> None:
    TrlTrainer().check(study_with(make_case, 2))
    TrlTrainer().check(study_with(make_case, 4, {"gpus_per_device": 1}, vllm={"tensor_parallel": 2}))


@pytest.mark.parametrize(
    ("devices", "cluster", "settings", "message"),
    [
        (7, {}, {}, "cannot be spread evenly over the 7 devices"),
        (2, {"gpus_per_device": 0.5}, {}, "would share a GPU"),
        (1, {}, {"vllm": {}}, "on GPUs only"),
        (1, {"gpus_per_device": 1}, {"vllm": {}, "device": "cpu"}, "on GPUs only"),
        (2, {"gpus_per_device": 1}, {"vllm": {"tensor_parallel": 4}}, "engines of 4"),
        (1, {"gpus_per_device": 1}, {"vllm": {"memory_share": 1.5}}, "memory_share"),
    ],
)
def test_devices_that_do_not_serve_are_refused(
    make_case: MakeCase, devices: int, cluster: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        TrlTrainer().check(study_with(make_case, devices, cluster, **settings))


@pytest.mark.parametrize("loss_type", ["dapo", "rloo"])
def test_settings_of_vllm_reach_trl(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    from jfhpo_core.trainers.trl_rollout import Ranks
    from jfhpo_core.trainers.trl_training import _own_process_state, configure

    job = make_case(loss_type=loss_type, mini_batches=2).job(0, TOTAL_STEPS, tmp_path)
    settings = TrlSettings(device="cpu", vllm=VllmSettings(memory_share=0.4, tensor_parallel=2, sleep=True))
    with _own_process_state(1):
        config = configure(job, settings, tmp_path, 5, Ranks(0, 2))
    assert (config.use_vllm, config.vllm_mode) == (True, "colocate")
    assert (config.vllm_gpu_memory_utilization, config.vllm_tensor_parallel_size) == (0.4, 2)
    assert config.vllm_enable_sleep_mode
    # Twelve completions in two updates, on two processes.
    assert (config.per_device_train_batch_size, config.steps_per_generation) == (3, 2)


def test_runs_apart_may_have_another_python(tmp_path: Path) -> None:
    argv = command(TrlSettings(python="/env/python"), 4, tmp_path)
    assert argv[:3] == ["/env/python", "-m", "torch.distributed.run"]
    assert argv[argv.index("--nproc-per-node") + 1] == "4"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="needs two GPUs")
def test_two_gpus_train_one_run(case: Case, tmp_path: Path) -> None:
    training = train(on_both(case.job(0, BREAK, tmp_path / "store", [0, BREAK])), tmp_path / "stage")
    assert [record.step for record in training.records] == list(range(1, BREAK + 1))
    assert [evaluation.step for evaluation in training.evaluations] == [0, BREAK]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss_type", ["dapo", "rloo"])
def test_vllm_samples_on_a_gpu(make_case: MakeCase, tmp_path: Path, loss_type: str) -> None:
    pytest.importorskip("vllm")
    case = make_case({"vllm": {"memory_share": 0.3}}, loss_type=loss_type)
    result = run_job(case.job(0, BREAK, tmp_path / "store", [0, BREAK]), TrlTrainer(), lambda _: None)
    assert result.checkpoint is not None
