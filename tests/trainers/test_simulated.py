from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from jfhpo.testing.trainers import TOTAL_STEPS, Case, TrainerConformance
from jfhpo_core.errors import SpecError
from jfhpo_core.run.worker import run_job
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import EvaluationSpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import FailureKind, Outcome, StepRecord
from jfhpo_core.trainers import load_trainer
from jfhpo_core.trainers.simulated import Landscape, Surface, study_surface, true_score
from tests.studies import simulated_study

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


class TestEverySetting(TrainerConformance):
    @pytest.fixture
    def case(self) -> Case:
        return simulated_case(
            "{agreement: 0.5, roughness: 0.3, clip_shift: 0.1, boundary_shift: 0.2, noise_growth: 0.5, divergence: 0.1}"
        )


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
    assert result.seconds == Landscape().startup_seconds


def test_a_trial_far_beyond_the_boundary_becomes_non_finite_and_is_charged_until_then(tmp_path: Path) -> None:
    case = simulated_case("{divergence: 0.2, size_exponent: 0, collapse_at: 0.5}", learning_rate=1e-2)
    result = run_job(case.job(0, TOTAL_STEPS, tmp_path), case.trainer, lambda record: None)
    assert result.outcome is Outcome.INFEASIBLE
    assert result.failure is FailureKind.NON_FINITE
    settings = Landscape()
    steps = case.job(0, TOTAL_STEPS, tmp_path).prompts_per_step * 8 / 128 * result.end_step * settings.seconds_per_step
    assert result.seconds == pytest.approx(settings.startup_seconds + settings.evaluation_seconds + steps)


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


def correlation(study: Study, one: float, other: float, count: int = 1500) -> float:
    """Of final scores at two sizes over random configurations of the study's space."""
    surface = study_surface(study.spec)
    points = np.random.default_rng(3).random((count, study.space.dimension))
    configurations = [study.complete(study.space.decode(point)) for point in points]
    scores = [[true_score(surface, item, size, 1.0) for item in configurations] for size in (one, other)]
    return float(np.corrcoef(scores)[0, 1])


def landscape_study(tmp_path: Path, **settings: float) -> Study:
    return simulated_study(tmp_path, trainer={"name": "simulated", "settings": {"boundary": 9, **settings}})


@pytest.mark.slow
@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_proxies_correlate_with_the_target_as_set(tmp_path: Path, agreement: float) -> None:
    for instance in range(3):
        study = landscape_study(tmp_path, agreement=agreement, instance=instance, size_shift=-0.05)
        assert correlation(study, 0.1, 1.0) == pytest.approx(agreement, abs=0.1)
        assert correlation(study, 0.3, 1.0) == pytest.approx(agreement, abs=0.1)


@pytest.mark.slow
def test_the_shift_of_the_learning_rate_counts_towards_disagreement(tmp_path: Path) -> None:
    without = correlation(landscape_study(tmp_path, size_shift=-0.3), 0.1, 1.0)
    assert without < 0.8
    assert correlation(landscape_study(tmp_path, size_shift=-0.3, agreement=0.5), 0.1, 1.0) == pytest.approx(
        0.5, abs=0.1
    )
    assert correlation(landscape_study(tmp_path, size_shift=-0.3, agreement=0.9), 0.1, 1.0) == pytest.approx(without)


@pytest.mark.slow
def test_proxies_of_nearer_sizes_are_more_alike(tmp_path: Path) -> None:
    study = landscape_study(tmp_path, agreement=0.0)
    assert correlation(study, 0.1, 0.12) > correlation(study, 0.1, 0.3) > correlation(study, 0.1, 0.9)


def test_instances_differ(tmp_path: Path) -> None:
    scores = set()
    for instance in range(3):
        study = landscape_study(tmp_path, roughness=0.3, instance=instance)
        scores.add(true_score(study_surface(study.spec), study.complete({"learning_rate": 5e-4}), 1.0, 1.0))
    assert len(scores) == 3


def test_every_best_value_is_best() -> None:
    settings = Landscape(
        best_learning_rate=2e-6, best_clip_high=0.3, best_kl_coefficient=1e-3, best_max_grad_norm=0.5,
        best_n_samples=4, best_temperature=0.8, best_scheduler="constant",
    )  # fmt: skip
    surface = Surface(settings)
    best = Hyperparameters(
        learning_rate=2e-6, clip_high=0.3, kl_coefficient=1e-3, max_grad_norm=0.5, n_samples=4, temperature=0.8,
        scheduler="constant",
    )  # fmt: skip
    assert true_score(surface, best.model_dump(), 1.0, 1.0) == pytest.approx(settings.ceiling)
    for name, values in {
        "learning_rate": (1e-6, 4e-6),
        "clip_high": (0.2, 0.4),
        "kl_coefficient": (0.0, 1e-2),
        "max_grad_norm": (0.25, 1.0),
        "n_samples": (2, 8),
        "temperature": (0.7, 0.9),
        "scheduler": ("cosine",),
    }.items():
        for value in values:
            other = best.model_copy(update={name: value}).model_dump()
            assert true_score(surface, other, 1.0, 1.0) < settings.ceiling - 0.001, (name, value)


def test_the_best_clip_range_moves_with_size() -> None:
    surface = Surface(Landscape(clip_shift=0.1))
    ranges = [0.1 + step / 100 for step in range(31)]

    def best(size: float) -> float:
        def score(clip: float) -> float:
            configuration = Hyperparameters(learning_rate=5e-4, clip_high=clip).model_dump()
            return true_score(surface, configuration, size, 1.0)

        return max(ranges, key=score)

    assert best(1.0) - best(0.1) == pytest.approx(0.1)


def test_the_boundary_moves_and_with_it_the_share_that_collapses() -> None:
    surface = Surface(Landscape(boundary=0.3, boundary_shift=-0.2))
    rates = [10 ** (-5 + step / 20) for step in range(61)]

    def share(size: float) -> float:
        curves = [surface.curve(Hyperparameters(learning_rate=rate).model_dump(), size) for rate in rates]
        return sum(math.isfinite(curve.onset) for curve in curves) / len(curves)

    best = math.log10(Landscape().best_learning_rate)
    assert share(1.0) == pytest.approx((-2 - best - 0.3) / 3, abs=0.02)
    assert share(0.1) == pytest.approx((-2 - best - 0.35 - 0.5) / 3, abs=0.02)


def test_short_runs_favour_high_learning_rates() -> None:
    surface = Surface(Landscape(boundary=9, speed_exponent=1.0))
    rates = [10 ** (-5 + step / 50) for step in range(151)]
    best = [
        max(rates, key=lambda rate: true_score(surface, Hyperparameters(learning_rate=rate).model_dump(), 1.0, share))
        for share in (0.1, 0.4, 1.0)
    ]
    assert best[0] > best[1] > best[2]
    assert best[2] == pytest.approx(Landscape().best_learning_rate, rel=0.03)


def test_noise_may_grow_with_the_learning_rate(tmp_path: Path) -> None:
    deviations = []
    for rate in (5e-5, 5e-4):
        case = simulated_case("{seed_noise: 0.05, noise_growth: 1.0, boundary: 9, size_shift: 0}", learning_rate=rate)
        job = case.job(0, TOTAL_STEPS, tmp_path, [TOTAL_STEPS])
        job = job.model_copy(
            update={"study": job.study.model_copy(update={"evaluation": EvaluationSpec(prompts=10**7)})}
        )
        scores = [
            run_job(job.model_copy(update={"seed": seed}), case.trainer, lambda record: None).evaluations[-1].score
            for seed in range(40)
        ]
        deviations.append(np.std(scores))
    assert deviations[0] == pytest.approx(0.005, rel=0.3)
    assert deviations[1] == pytest.approx(0.05, rel=0.3)
