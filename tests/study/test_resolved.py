from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.resolved import base_scores
from jfhpo_core.study.trial import Checkpoint, TrialState, trial_key
from tests.studies import BECAUSE, evaluation, result, simulated_study, step_record

BATCHES = {
    "prompts_per_step": {"type": "choice", "values": [8, 16, 32]},
    "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, prompts=16 * step, path=f"{'0' * 16}/step-{step:08d}", digest="d", size_bytes=1)


def test_complete_fills_in_fixed_values_and_defaults(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, trainer={"name": "simulated", "fixed": {"temperature": 0.7}})
    full = study.complete({"learning_rate": 1e-3})
    assert full.keys() == Hyperparameters.model_fields.keys()
    assert full["learning_rate"] == 1e-3
    assert full["temperature"] == 0.7
    assert full["prompts_per_step"] == Hyperparameters().prompts_per_step


def test_a_configuration_wins_over_fixed_values(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, trainer={"name": "simulated", "fixed": {"temperature": 0.7}})
    assert study.complete({"temperature": 0.9})["temperature"] == 0.9


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"speed": 1}, r"trainer 'simulated' refuses speed=1: .* its hyperparameters are learning_rate, scheduler"),
        ({"learning_rate": -1.0}, r"refuses learning_rate=-1.0: .*greater than 0"),
        ({"scheduler": "sawtooth"}, "refuses scheduler='sawtooth'"),
    ],
)
def test_what_the_trainer_does_not_know_is_refused(tmp_path: Path, configuration: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        simulated_study(tmp_path).complete(configuration)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "nonsense"}, r"trainer.name: no trainer 'nonsense'; there are .*simulated"),
        ({"trainer": {"name": "simulated", "settings": {"gravity": 9.8}}}, "trainer.settings.gravity"),
        ({"trainer": {"name": "simulated", "fixed": {"speed": 1}}}, "refuses speed=1"),
        (
            {"space": {"speed": {"type": "int", "low": 1, "high": 2}}},
            "space.speed: trainer 'simulated' refuses speed=1",
        ),
        ({"space": {"learning_rate": {"type": "float", "low": 0.1, "high": 2}}}, "space.learning_rate: .*=2.0"),
        ({"space": {"loss_type": {"type": "choice", "values": ["grpo", "ppo"]}}}, "space.loss_type: .*'ppo'"),
        (
            {"space": {"n_samples": {"type": "float", "low": 4, "high": 16}}},
            r"space: trainer 'simulated' refuses n_samples=\d+\.\d+: .*integer",
        ),
        (
            {"baselines": [{"name": "r", "configuration": {"speed": 1}}]},
            "baselines.0.configuration: 'r': trainer",
        ),
        ({"stopping": {"override": {"kl": False}}}, "stopping.override: no rule 'kl'"),
        ({"stopping": {"override": {"kl_growth": {"patience": 0}}}}, "stopping.override.kl_growth.patience"),
    ],
)
def test_resolve_refuses_what_cannot_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        simulated_study(tmp_path, **changes)


def test_a_new_trial_has_its_own_number_of_steps(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, space=BATCHES)
    trials = [study.new_trial(0, {"prompts_per_step": batch}, "small", 0) for batch in (8, 16, 32)]
    assert [trial.total_steps for trial in trials] == [60, 30, 15]
    assert [trial.prompts_per_step for trial in trials] == [8, 16, 32]
    assert trials[0].key == trial_key("test", {"prompts_per_step": 8}, "small", 0)
    assert trials[0].state is TrialState.PENDING


def test_segments_begin_at_the_last_checkpoint(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trial = study.new_trial(0, {}, "small", 0)
    first = study.next_segment(trial, 160, BECAUSE)
    assert (first.index, first.start_step, first.stop_step) == (0, 0, 10)
    paused = trial.model_copy(update={"segments": (result(0, 0, 10, checkpoint=checkpoint(10)),)})
    second = study.next_segment(paused, 480, BECAUSE)
    assert (second.index, second.start_step, second.stop_step) == (1, 10, 30)


def test_a_job_holds_what_a_worker_needs(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trial = study.new_trial(0, {"learning_rate": 1e-3}, "small", 3).model_copy(
        update={"segments": (result(0, 0, 10, checkpoint=checkpoint(10)),)}
    )
    records = [step_record(step) for step in range(1, 11)]
    job = study.job(trial, study.next_segment(trial, 480, BECAUSE), records, None)
    assert job.configuration == study.complete({"learning_rate": 1e-3})
    assert (job.model, job.parameters, job.target_parameters) == ("small", 100_000, 1_000_000)
    assert (job.seed, job.total_steps, job.prompts_per_step) == (3, 30, 16)
    assert job.evaluation_steps == (20, 30)
    assert job.history == tuple(records)
    assert Path(job.store).is_absolute()
    assert type(job).model_validate_json(job.model_dump_json()) == job


def test_the_untrained_model_is_scored_once(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trial = study.new_trial(0, {}, "small", 0)
    segment = study.next_segment(trial, 320, BECAUSE)
    assert study.job(trial, segment, (), None).evaluation_steps == (0, 10, 20)
    assert study.job(trial, segment, (), evaluation(0, 0.2)).evaluation_steps == (10, 20)


def test_base_scores_are_those_at_step_zero(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    first = study.new_trial(0, {}, "small", 0).model_copy(
        update={"segments": (result(0, 0, 10, evaluations=(evaluation(0, 0.11), evaluation(10, 0.4))),)}
    )
    second = study.new_trial(1, {}, "large", 0).model_copy(
        update={"segments": (result(0, 0, 10, evaluations=(evaluation(10, 0.6),)),)}
    )
    assert base_scores([first, second]) == {"small": 0.11}
    assert base_scores([]) == {}


def test_everything_of_a_study_lies_in_its_folder(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    assert study.folder == tmp_path / "test"
    assert study.store == tmp_path / "test" / "checkpoints"
