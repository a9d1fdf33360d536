from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfhpo_core.optimizer.cost import (
    FLOOR_SECONDS,
    REFERENCE_COMPLETIONS,
    CostModel,
    LogLinearLaw,
    evaluation_law,
    startup_law,
    step_law,
)
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Outcome, Trial
from tests.studies import evaluation, result, simulated_study

STEP = np.array([math.log(0.8), 0.8, 0.9, 0.15])
EVALUATION = np.array([math.log(2.0), 0.7])
STARTUP = np.array([math.log(5.0), 0.3])
"""The true laws of the synthetic segments below."""

SPACE = {
    "prompts_per_step": {"type": "choice", "values": [8, 16, 32]},
    "n_samples": {"type": "choice", "values": [4, 8, 16]},
    "mini_batches": {"type": "choice", "values": [1, 2, 4]},
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path, space=SPACE, baselines=[])


def true_parts(study: Study, configuration: Configuration, model: str) -> tuple[float, float, float]:
    """Seconds of start-up, of one step and of one evaluation by the true laws."""
    size = math.log(study.ladder[model].parameters / study.ladder.target.parameters)
    full = study.complete(configuration)
    completions = float(full["prompts_per_step"]) * float(full["n_samples"])
    step = [1.0, size, math.log(completions / REFERENCE_COMPLETIONS), math.log(float(full["mini_batches"]))]
    return math.exp(STARTUP @ [1.0, size]), math.exp(STEP @ step), math.exp(EVALUATION @ [1.0, size])


def synthetic_trials(study: Study, count: int, seed: int, noise: float = 1.0) -> list[Trial]:
    """Finished trials whose durations follow the true laws, with the laws' own noise times `noise`."""
    random = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        configuration: Configuration = {
            name: int(random.choice(parameter["values"])) for name, parameter in SPACE.items()
        }
        model = str(random.choice([item.name for item in study.ladder.models]))
        trial = study.new_trial(number, configuration, model, 0)
        startup, step, evaluating = true_parts(study, configuration, model)
        startup *= math.exp(noise * startup_law().noise * random.normal())
        step *= math.exp(noise * step_law().noise * random.normal())
        evaluating *= math.exp(noise * evaluation_law().noise * random.normal())
        end = trial.total_steps // 3
        done = result(
            0,
            0,
            end,
            evaluations=(evaluation(end, seconds=evaluating),),
            seconds=startup + end * step + evaluating,
            startup_seconds=startup,
            evaluation_seconds=evaluating,
        )
        trials.append(trial.model_copy(update={"segments": (done,)}))
    return trials


# --- the law ------------------------------------------------------------------------------------------------------


def test_one_coefficient_is_updated_by_the_textbook_formula() -> None:
    law = LogLinearLaw(np.array([1.0]), np.array([[4.0]]), noise=0.5)
    seconds = np.array([2.0, 3.0, 5.0])
    posterior = law.updated(np.ones((3, 1)), seconds)
    precision = 1 / 4 + 3 / 0.25
    assert posterior.covariance[0, 0] == pytest.approx(1 / precision)
    assert posterior.mean[0] == pytest.approx((1.0 / 4 + np.log(seconds).sum() / 0.25) / precision)


def test_the_update_is_least_squares_with_the_prior_as_further_rows() -> None:
    random = np.random.default_rng(0)
    law = step_law()
    features, seconds = random.normal(size=(6, 4)), random.lognormal(size=6)
    posterior = law.updated(features, seconds)
    root = np.linalg.inv(np.linalg.cholesky(law.covariance))
    rows = np.vstack([root, features / law.noise])
    values = np.concatenate([root @ law.mean, np.log(seconds) / law.noise])
    assert posterior.mean == pytest.approx(np.linalg.lstsq(rows, values)[0])
    assert posterior.covariance == pytest.approx(np.linalg.inv(rows.T @ rows))


def test_observations_may_come_one_by_one() -> None:
    random = np.random.default_rng(1)
    features, seconds = random.normal(size=(5, 4)), random.lognormal(size=5)
    together = step_law().updated(features, seconds)
    single = step_law()
    for row, value in zip(features, seconds, strict=True):
        single = single.updated(row[None], np.array([value]))
    assert single.mean == pytest.approx(together.mean)
    assert single.covariance == pytest.approx(together.covariance)


def test_without_observations_the_prior_stays() -> None:
    law = step_law()
    assert law.updated(np.empty((0, 4)), np.empty(0)) is law


def test_expected_seconds_are_those_of_the_log_normal() -> None:
    law = LogLinearLaw(np.array([0.3, -0.2]), np.diag([0.2, 0.1]), noise=0.1)
    features = np.array([[1.0, 2.0]])
    draws = np.random.default_rng(0).multivariate_normal(law.mean, law.covariance, size=200_000)
    assert law.expected(features)[0] == pytest.approx(np.exp(draws @ features[0]).mean(), rel=0.01)


@given(st.lists(st.floats(-30, 30), min_size=4, max_size=4), st.floats(0, 1e9))
def test_predictions_are_positive_and_finite(features: list[float], seconds: float) -> None:
    row = np.array([features])
    for law in (step_law(), step_law().updated(row, np.array([seconds]))):
        assert 0 < law.expected(row)[0] < math.inf


# --- the model ----------------------------------------------------------------------------------------------------


def test_known_coefficients_are_recovered(study: Study) -> None:
    costs = CostModel.fit(study, synthetic_trials(study, 120, seed=0))
    for law, truth in ((costs.step, STEP), (costs.evaluation, EVALUATION), (costs.startup, STARTUP)):
        deviations = np.sqrt(np.diag(law.covariance))
        assert np.all(np.abs(law.mean - truth) < 3 * deviations)
        assert np.all(deviations < 0.15)


def test_without_noise_the_estimate_is_the_duration(study: Study) -> None:
    costs = CostModel.fit(study, synthetic_trials(study, 120, seed=0, noise=0.0))
    configuration: Configuration = {"prompts_per_step": 16, "n_samples": 16, "mini_batches": 4}
    for model in ("small", "medium", "large"):
        startup, step, evaluating = true_parts(study, configuration, model)
        estimate = costs.estimate(configuration, model, 0, 480)
        assert estimate.seconds == pytest.approx(startup + 30 * step + 3 * evaluating, rel=0.05)


def test_nine_tenths_of_new_segments_fall_into_the_interval(study: Study) -> None:
    costs = CostModel.fit(study, synthetic_trials(study, 60, seed=0))
    inside = []
    for trial in synthetic_trials(study, 400, seed=1):
        estimate = costs.estimate(trial.configuration, trial.model, 0, 160)
        inside.append(estimate.low <= trial.segments[0].seconds <= estimate.high)
    assert 0.85 <= np.mean(inside) <= 0.97


def test_before_any_trial_the_estimate_is_finite_and_unsure(study: Study) -> None:
    costs = CostModel.fit(study, [])
    for model in ("small", "medium", "large"):
        estimate = costs.estimate({"n_samples": 8}, model, 0, 480)
        assert 0 < estimate.low < estimate.seconds < estimate.high < math.inf
        assert estimate.high / estimate.low > 10


def test_the_interval_narrows_with_evidence(study: Study) -> None:
    trials = synthetic_trials(study, 50, seed=0)
    widths = []
    for count in (0, 5, 50):
        estimate = CostModel.fit(study, trials[:count]).estimate({"n_samples": 8}, "large", 0, 480)
        widths.append(estimate.high / estimate.low)
    assert widths[0] > widths[1] > widths[2]


def test_a_continuation_saves_the_steps_and_evaluations_already_paid_for(study: Study) -> None:
    costs = CostModel.fit(study, synthetic_trials(study, 50, seed=0))
    configuration: Configuration = {"n_samples": 8}
    size = np.array([[1.0, math.log(0.1)]])
    step = np.array([[1.0, math.log(0.1), math.log(16 * 8 / REFERENCE_COMPLETIONS), 0.0]])
    fresh = costs.estimate(configuration, "small", 0, 480).seconds
    continued = costs.estimate(configuration, "small", 320, 480).seconds
    saved = 20 * costs.step.expected(step)[0] + 2 * costs.evaluation.expected(size)[0]
    assert fresh - continued == pytest.approx(saved)
    assert continued > costs.startup.expected(size)[0]


def test_batches_of_equal_completions_differ_in_their_number_of_steps(study: Study) -> None:
    costs = CostModel.fit(study, [])
    wide = costs.estimate({"prompts_per_step": 16, "n_samples": 8}, "large", 0, 480).seconds
    narrow = costs.estimate({"prompts_per_step": 8, "n_samples": 16}, "large", 0, 480).seconds
    assert narrow > wide
    # In either order: estimates are remembered.
    assert CostModel.fit(study, []).estimate(
        {"prompts_per_step": 8, "n_samples": 16}, "large", 0, 480
    ).seconds == pytest.approx(narrow)


def test_devices_multiply_the_bill(tmp_path: Path) -> None:
    family = [
        {"name": "small", "path": "simulated", "parameters": 100_000},
        {"name": "large", "path": "simulated", "parameters": 1_000_000, "devices": 4},
    ]
    one, four = simulated_study(tmp_path), simulated_study(tmp_path, family=family)
    alone = CostModel.fit(one, []).estimate({}, "large", 0, 480)
    together = CostModel.fit(four, []).estimate({}, "large", 0, 480)
    assert together.seconds == pytest.approx(4 * alone.seconds)
    assert together.high / together.low == pytest.approx(alone.high / alone.low)


def test_the_floor_keeps_the_cost_above_zero(study: Study) -> None:
    instant = [
        trial.model_copy(
            update={
                "segments": (
                    result(
                        0,
                        0,
                        10,
                        seconds=3e-9,
                        startup_seconds=1e-9,
                        evaluation_seconds=1e-9,
                        evaluations=(evaluation(10, seconds=1e-9),),
                    ),
                )
            }
        )
        for trial in synthetic_trials(study, 200, seed=0)
    ]
    estimate = CostModel.fit(study, instant).estimate({"n_samples": 8}, "small", 0, 160)
    assert FLOOR_SECONDS <= estimate.seconds < 1


@pytest.mark.parametrize("outcome", [Outcome.INFEASIBLE, Outcome.LOST])
@pytest.mark.parametrize("end", [0, 3])
def test_segments_that_were_cut_off_teach_nothing(study: Study, outcome: Outcome, end: int) -> None:
    cut = result(0, 0, 10, end_step=end, outcome=outcome)
    failed = study.new_trial(0, {"n_samples": 16}, "large", 0).model_copy(update={"segments": (cut,)})
    configuration: Configuration = {"n_samples": 8}
    assert CostModel.fit(study, [failed]).estimate(configuration, "large", 0, 480) == CostModel.fit(study, []).estimate(
        configuration, "large", 0, 480
    )


def test_what_was_repeated_after_a_damaged_checkpoint_does_not_look_expensive(study: Study) -> None:
    (whole,) = synthetic_trials(study, 1, 0, noise=0.0)
    (done,) = whole.segments
    late = {"segment": done.segment.model_copy(update={"start_step": done.end_step - 1})}
    repeated, short = (done.model_copy(update={**late, "moved_to": step}) for step in (0, None))
    prices = [
        CostModel.fit(study, [whole.model_copy(update={"segments": (segment,)})]).step.mean[0]
        for segment in (done, repeated, short)
    ]
    assert prices[1] == prices[0] < prices[2]
