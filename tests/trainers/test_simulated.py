from __future__ import annotations

import math
from pathlib import Path

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.execution import run_job
from jfhpo_core.hyperparameters import Hyperparameters
from jfhpo_core.spec import parse_study
from jfhpo_core.trainers import load_trainer
from jfhpo_core.trainers.simulated import Landscape, Surface, true_score
from jfhpo_core.trial import FailureKind, Outcome, StepRecord
from tests.trainers.conformance import TOTAL_STEPS, Case, TrainerConformance

STUDY = """
study: simulated-conformance
family:
  - {name: small, path: simulated, parameters: 10000}
  - {name: large, path: simulated, parameters: 20000}
target: large
task: instruct
trainer: {name: simulated, settings: SETTINGS}
space: {learning_rate: {type: float, low: 1.0e-6, high: 1.0e-2, log: true}}
fidelity: {horizon_prompts: 96, rungs: 1}
budget: {trial_seconds: 100}
stopping: {rules: none}
"""


def simulated_case(settings: str = "{}", learning_rate: float = 3e-4) -> Case:
    return Case(
        study=parse_study(STUDY.replace("SETTINGS", settings)),
        model_path="simulated",
        configuration={"learning_rate": learning_rate},
        other={"learning_rate": 1e-5, "n_samples": 4},
    )


class TestSimulatedTrainer(TrainerConformance):
    @pytest.fixture
    def case(self) -> Case:
        return simulated_case()


def test_a_job_runs_on_the_simulated_clock(tmp_path: Path) -> None:
    case = simulated_case("{startup_seconds: 5, evaluation_seconds: 2, seconds_per_step: 3, size_exponent: 0}")
    records: list[StepRecord] = []
    result = run_job(case.job(0, TOTAL_STEPS, tmp_path, [0, TOTAL_STEPS]), case.trainer, records.append)
    assert result.seconds == pytest.approx(5 + 2 * 2 + TOTAL_STEPS * 3)
    assert result.evaluation_seconds == pytest.approx(4)
    assert sum(record.generation_seconds + record.training_seconds for record in records) == pytest.approx(18)


def test_a_trial_beyond_the_memory_limit_is_infeasible(tmp_path: Path) -> None:
    case = simulated_case("{memory_limit: 63}")
    result = run_job(case.job(0, TOTAL_STEPS, tmp_path), case.trainer, lambda record: None)
    assert result.outcome is Outcome.INFEASIBLE
    assert result.failure is FailureKind.OUT_OF_MEMORY


def test_settings_out_of_bounds_are_refused_by_name() -> None:
    case = simulated_case("{ceiling: 2.0}")
    with pytest.raises(SpecError, match=r"trainer\.settings\.ceiling"):
        load_trainer("simulated").check(case.study)


def test_the_best_learning_rate_moves_with_size_and_high_ones_collapse() -> None:
    settings = Landscape()
    surface = Surface(settings)

    def score(rate: float, size: float, share: float = 1.0) -> float:
        return true_score(surface, Hyperparameters(learning_rate=rate).model_dump(), size, share)

    rates = [10 ** (-5 + step / 20) for step in range(61)]
    best = {size: max(rates, key=lambda rate: score(rate, size)) for size in (1.0, 0.1)}
    shift = math.log10(best[1.0] / best[0.1])
    assert shift == pytest.approx(settings.size_shift, abs=0.1)
    assert score(best[1.0] * 30, 1.0) < 0.01
    assert score(best[1.0] * 30, 1.0, 0.05) > 0.05
    curve = [score(best[1.0], 1.0, share / 10) for share in range(11)]
    assert curve == sorted(curve)
    assert curve[0] == pytest.approx(settings.base_score)
