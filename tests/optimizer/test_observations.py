"""What trials say to the models."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from jfhpo_core.optimizer import observations as evidence
from jfhpo_core.optimizer.observations import (
    CURVE_POINTS,
    as_of,
    measurement_variance,
    milestone,
    observe,
    running_points,
    target_base,
    verdicts,
)
from jfhpo_core.optimizer.surrogate import ANY_SEED
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.trial import Configuration, Decision, FailureKind, Outcome, TrialState
from tests.studies import BECAUSE, evaluation, result, simulated_study, trained


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path)


def middle(study: Study) -> Configuration:
    return study.space.middle()


def test_gains_are_measured_from_the_untrained_model_of_that_size(study: Study) -> None:
    trials = [
        trained(study, middle(study), "small", [0.1, 0.3], 0),
        trained(study, middle(study), "large", [0.2, 0.5, 0.6], 1),
    ]
    data = observe(study, trials)
    torch.testing.assert_close(data.gains, torch.tensor([0.2, 0.3, 0.4], dtype=torch.double))
    size, share, trial, belongs_to = data.inputs[:, -4:].T.tolist()
    assert size == pytest.approx([-1, 0, 0])
    assert share == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert trial == [0, 1, 1]
    assert belongs_to == [0, 0, 0]
    torch.testing.assert_close(data.variances, torch.full((3,), 4e-4, dtype=torch.double))


def test_a_training_that_went_wrong_counts_at_full_length_with_the_score_it_was_stopped_at(study: Study) -> None:
    trial = trained(study, middle(study), "small", [0.1, 0.3, 0.05], outcome=Outcome.STOPPED)
    assert trial.state is TrialState.STOPPED
    seen = observe(study, [trial])
    assert seen.gains.tolist() == pytest.approx([-0.05])
    assert seen.inputs[:, study.space.dimension + 1].tolist() == [1.0]
    assert seen.variances.tolist() == pytest.approx([0.02**2])


def test_one_that_was_stopped_before_any_score_counts_as_no_better_than_the_untrained_model(study: Study) -> None:
    trial = trained(study, middle(study), "small", [0.1], outcome=Outcome.STOPPED)
    seen = observe(study, [trial])
    assert seen.gains.tolist() == [0.0]
    assert seen.inputs[:, study.space.dimension + 1].tolist() == [1.0]
    assert seen.variances.tolist() == [measurement_variance(study, [])]


def test_a_rung_before_the_stop_says_nothing_about_what_went_wrong(study: Study) -> None:
    """Some trainers score at rungs only."""
    trial = trained(study, middle(study), "small", [0.1, 0.6], outcome=Outcome.STOPPED)
    late = trial.segments[-1].model_copy(update={"end_step": trial.step + 3})
    seen = observe(study, [trial.model_copy(update={"segments": (*trial.segments[:-1], late)})])
    assert seen.gains.tolist() == [0.0]
    assert seen.inputs[:, study.space.dimension + 1].tolist() == [1.0]


def test_one_that_others_surpass_counts_with_its_curve(study: Study) -> None:
    decision = Decision(stop=True, rule="unpromising", signal="score", value=0.1, threshold=0.2, step=20)
    trial = trained(study, middle(study), "small", [0.1, 0.3, 0.15], outcome=Outcome.STOPPED, decision=decision)
    seen = observe(study, [trial])
    assert seen.gains.tolist() == pytest.approx([0.2, 0.05])
    shares = [level / study.spec.fidelity.horizon_prompts for level in study.spec.fidelity.levels[:2]]
    assert seen.inputs[:, study.space.dimension + 1].tolist() == pytest.approx(shares)


def test_verdicts_leave_out_what_infrastructure_lost(study: Study) -> None:
    random = np.random.default_rng(0)
    outcomes = (Outcome.REACHED, Outcome.STOPPED, Outcome.INFEASIBLE, Outcome.LOST)
    trials = [
        trained(
            study,
            study.space.decode(random.random(study.space.dimension)),
            "small",
            [0.1, 0.2],
            number,
            outcome=outcome,
            failure=FailureKind.OUT_OF_MEMORY if outcome is Outcome.INFEASIBLE else None,
        )
        for number, outcome in enumerate(outcomes)
    ]
    inputs, feasible = verdicts(study, trials)
    assert feasible.tolist() == [1.0, 1.0, 0.0]
    assert inputs[:, -1].tolist() == [-1.0, -1.0, -1.0]


def test_a_continuation_that_was_lost_is_tried_once_more_from_the_checkpoint(study: Study) -> None:
    paused = trained(study, middle(study), "small", [0.1, 0.3])
    kept = paused.step * paused.prompts_per_step
    lost = result(1, paused.step, paused.step + 3, outcome=Outcome.LOST)
    once = paused.model_copy(update={"segments": (*paused.segments, lost)})
    twice = paused.model_copy(update={"segments": (*once.segments, lost)})
    again = paused.model_copy(update={"segments": (*once.segments, result(2, paused.step, paused.step + 3), lost)})
    assert [trial.is_extendable for trial in (paused, once, twice, again)] == [True, True, False, True]
    assert [trial.kept_prompts for trial in (paused, once, twice)] == [kept] * 3
    assert again.kept_prompts == kept + 3 * paused.prompts_per_step
    stopped = result(1, paused.step, paused.step + 3, outcome=Outcome.STOPPED)
    assert not paused.model_copy(update={"segments": (*paused.segments, stopped)}).is_extendable


def test_baselines_inside_the_space_are_learned_from_and_others_are_not(study: Study) -> None:
    inside = trained(study, {"learning_rate": 1e-4}, "large", [0.1, 0.4])
    outside = trained(study, {"learning_rate": 1e-6}, "large", [0.1, 0.4])
    comparison = inside.model_copy(update={"purpose": "random-search"})
    assert [len(observe(study, [trial])) for trial in (inside, outside, comparison)] == [1, 0, 0]


def test_observations_come_in_the_order_of_their_commits_and_a_past_can_be_restored(study: Study) -> None:
    random = np.random.default_rng(0)
    first, second = (study.space.decode(random.random(study.space.dimension)) for _ in range(2))
    early = trained(study, first, "small", [0.1, 0.2], 0, committed=1)
    late = trained(study, second, "small", [0.1, 0.4], 1, committed=2)
    more = result(1, 10, 20, evaluations=(evaluation(20, 0.3),), committed=3)
    grown = early.model_copy(update={"segments": (*early.segments, more)})
    assert observe(study, [grown, late]).gains.tolist() == pytest.approx([0.1, 0.3, 0.2])
    assert as_of([grown, late], 2) == [early, late]
    assert as_of([grown, late], 1) == [early]


def test_long_curves_are_thinned_to_a_few_points_with_the_last_one(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, fidelity={"horizon_prompts": 480, "rungs": 15})
    scores = [0.1, *(0.2 + 0.02 * place for place in range(15))]
    data = observe(study, [trained(study, middle(study), "small", scores)])
    assert len(data) == CURVE_POINTS
    assert data.gains[-1].item() == pytest.approx(scores[-1] - 0.1)
    steps = data.inputs[:, -3].diff()
    assert float(steps.max() - steps.min()) < 0.1


def test_thinning_keeps_the_last_evaluation_of_every_trial(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAX_OBSERVATIONS", 25)
    random = np.random.default_rng(0)
    trials = [
        trained(study, study.space.decode(random.random(study.space.dimension)), "small", [0.1, 0.2, 0.3, 0.9], number)
        for number in range(20)
    ]
    data = observe(study, trials)
    assert len(data) == 25
    assert int((data.gains > 0.7).sum()) == 20


def test_running_segments_stand_where_they_will_be_evaluated(study: Study) -> None:
    trial = trained(study, middle(study), "medium", [0.1, 0.2], 7)
    assert running_points(study, [trial]) is None
    running = trial.model_copy(update={"open_segment": study.next_segment(trial, 480, BECAUSE)})
    points = running_points(study, [running])
    assert points is not None
    assert points[0, -3].item() == 1.0
    assert points[0, -2].item() == 7.0


def test_a_point_without_a_trial_stands_for_the_expectation_over_seeds(study: Study) -> None:
    row = evidence.point(study, middle(study), "large", 480)
    assert row[-4:] == [0.0, 1.0, ANY_SEED, 0.0]


def test_the_base_is_the_targets_or_the_largest_measured(study: Study) -> None:
    small = trained(study, middle(study), "small", [0.1, 0.3], 0)
    large = trained(study, middle(study), "large", [0.2, 0.5], 1)
    assert target_base(study, []) == 0.0
    assert target_base(study, [small]) == 0.1
    assert target_base(study, [small, large]) == 0.2


def test_an_unmeasured_evaluation_is_as_noisy_as_a_coin(study: Study) -> None:
    assert measurement_variance(study, []) == pytest.approx(0.25 / 512)
    assert measurement_variance(study, [trained(study, middle(study), "small", [0.1, 0.3])]) == pytest.approx(4e-4)


def test_parameters_are_fitted_anew_at_milestones() -> None:
    reached = [milestone(commits) for commits in range(200)]
    assert reached[:13] == list(range(13))
    assert all(later >= earlier for earlier, later in pairwise(reached))
    assert all(commits - at <= max(1, 0.1 * commits) for commits, at in enumerate(reached))
    assert len(set(reached)) < 50


def test_an_earlier_study_is_observed_on_this_studys_scales(study: Study, tmp_path: Path) -> None:
    other = simulated_study(
        tmp_path,
        study="before",
        space={"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True}},
        trainer={"name": "simulated", "fixed": {"n_samples": 16, "mini_batches": 2}},
        target="medium",
        fidelity={"horizon_prompts": 960, "rungs": 2},
    )
    inside = trained(other, {"learning_rate": 1e-3}, "medium", [0.2, 0.5], 0)
    outside = trained(other, {"learning_rate": 1e-1}, "medium", [0.2, 0.3], 1)
    warm = replace(study, earlier=(EarlierStudy(other.spec, other.ladder, (inside, outside)),))
    mine = trained(study, middle(study), "large", [0.1, 0.4], 0)
    data = observe(warm, [mine])
    assert data.gains.tolist() == pytest.approx([0.3, 0.3])
    size, share, trial, belongs_to = data.inputs[0, -4:].tolist()
    assert (share, trial, belongs_to) == (1.0, 0.0, 1.0)
    assert size == pytest.approx(np.log10(0.3))
    configuration = study.space.decode(data.inputs[0, :-4].numpy())
    assert configuration["learning_rate"] == pytest.approx(1e-3, rel=1e-4)
    assert configuration["n_samples"] == 16
    assert len(verdicts(warm, [mine])[1]) == 1
