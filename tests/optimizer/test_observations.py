"""What trials say to the models."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jfhpo_core.optimizer import observations as evidence
from jfhpo_core.optimizer.observations import (
    CURVE_POINTS,
    Row,
    measurement_variance,
    milestone,
    observe,
    observed_rows,
    running_points,
    scale_of,
    verdicts,
)
from jfhpo_core.optimizer.surrogate import ANY_SEED
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.trial import Configuration, Decision, FailureKind, Outcome, Trial, TrialState
from tests.studies import BECAUSE, evaluation, result, simulated_study, trained


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path)


def middle(study: Study) -> Configuration:
    return study.space.middle()


def rows_of(study: Study, *trials: Trial) -> list[Row]:
    return observed_rows(History.of(study, trials))


def scores(rows: list[Row]) -> list[float]:
    return [row.score for row in rows]


def shares(rows: list[Row]) -> list[float]:
    return [row.inputs[-3] for row in rows]


def test_every_evaluation_of_a_trained_model_is_a_row(study: Study) -> None:
    rows = rows_of(
        study,
        trained(study, middle(study), "small", [0.1, 0.3], 0),
        trained(study, middle(study), "large", [0.2, 0.5, 0.6], 1),
    )
    assert scores(rows) == pytest.approx([0.3, 0.5, 0.6])
    size, share, trial, belongs_to = zip(*(row.inputs[-4:] for row in rows), strict=True)
    assert size == pytest.approx([-1, 0, 0])
    assert share == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert trial == (0, 1, 1)
    assert belongs_to == (0, 0, 0)
    assert [row.variance for row in rows] == pytest.approx([4e-4] * 3)


def test_rows_become_values_on_the_scale_with_their_slopes(study: Study) -> None:
    random = np.random.default_rng(0)
    trials = [
        trained(study, study.space.decode(random.random(study.space.dimension)), "small", [0.1, score], number)
        for number, score in enumerate([0.2, 0.5, 0.6, 0.7, 0.8])
    ]
    rows = rows_of(study, *trials)
    scale = scale_of(rows)
    data = observe(rows, scale, study.space.dimension)
    assert scale.unit() == pytest.approx(0.15)
    assert data.values.tolist() == pytest.approx([-np.log1p(d / 0.15) for d in (0.6, 0.3, 0.2, 0.1, 0.0)])
    slopes = [1 / (0.15 + d) for d in (0.6, 0.3, 0.2, 0.1, 0.0)]
    assert data.variances.tolist() == pytest.approx([4e-4 * slope**2 for slope in slopes])


def test_a_training_that_went_wrong_counts_at_full_length_with_the_score_it_was_stopped_at(study: Study) -> None:
    trial = trained(study, middle(study), "small", [0.1, 0.3, 0.05], outcome=Outcome.STOPPED)
    assert trial.state is TrialState.STOPPED
    seen = rows_of(study, trial)
    assert scores(seen) == pytest.approx([0.05])
    assert shares(seen) == [1.0]
    assert seen[0].variance == pytest.approx(0.02**2)


def test_one_that_was_stopped_before_any_score_counts_with_the_lowest_of_its_model(study: Study) -> None:
    trial = trained(study, middle(study), "small", [0.1], outcome=Outcome.STOPPED)
    seen = rows_of(study, trial)
    assert scores(seen) == [0.1]
    assert shares(seen) == [1.0]
    assert seen[0].variance == measurement_variance(study, [])
    worse = trained(study, {**middle(study), "n_samples": 4}, "small", [0.1, 0.05], 1)
    assert scores(rows_of(study, trial, worse))[0] == 0.05


def test_a_rung_before_the_stop_says_nothing_about_what_went_wrong(study: Study) -> None:
    """Some trainers score at rungs only."""
    trial = trained(study, middle(study), "small", [0.1, 0.6], outcome=Outcome.STOPPED)
    late = trial.segments[-1].model_copy(update={"end_step": trial.step + 3})
    seen = rows_of(study, trial.model_copy(update={"segments": (*trial.segments[:-1], late)}))
    assert scores(seen) == [0.1]
    assert shares(seen) == [1.0]


def test_one_that_others_surpass_counts_with_its_curve(study: Study) -> None:
    decision = Decision(stop=True, rule="unpromising", signal="score", value=0.1, threshold=0.2, step=20)
    trial = trained(study, middle(study), "small", [0.1, 0.3, 0.15], outcome=Outcome.STOPPED, decision=decision)
    seen = rows_of(study, trial)
    assert scores(seen) == pytest.approx([0.3, 0.15])
    rungs = [level / study.spec.fidelity.horizon_prompts for level in study.spec.fidelity.levels[:2]]
    assert shares(seen) == pytest.approx(rungs)


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
    inputs, feasible = verdicts(History.of(study, trials))
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


def test_a_recipe_inside_the_space_is_learned_from_and_others_are_not(study: Study) -> None:
    """A baseline that sets what the study holds fixed at another value is another thing than its searched part."""
    inside = {"learning_rate": 1e-4}
    others = [{"learning_rate": 1e-6}, {"learning_rate": 1e-4, "prompts_per_step": 32}]
    spec = study.spec.model_copy(
        update={
            "baselines": [
                study.spec.baselines[0].model_copy(update={"name": f"b{index}", "configuration": configuration})
                for index, configuration in enumerate([inside, *others])
            ]
        }
    )
    study = replace(study, spec=spec)
    runs = [
        trained(study, configuration, "large", [0.1, 0.4]).model_copy(update={"purpose": "baseline"})
        for configuration in (inside, *others)
    ]
    assert [len(rows_of(study, run)) for run in runs] == [1, 0, 0]
    comparison = runs[0].model_copy(update={"purpose": "random-search"})
    assert rows_of(study, comparison) == []


def test_rows_come_in_the_order_of_their_commits(study: Study) -> None:
    random = np.random.default_rng(0)
    first, second = (study.space.decode(random.random(study.space.dimension)) for _ in range(2))
    early = trained(study, first, "small", [0.1, 0.2], 0, committed=1)
    late = trained(study, second, "small", [0.1, 0.4], 1, committed=2)
    more = result(1, 10, 20, evaluations=(evaluation(20, 0.3),), committed=3)
    grown = early.model_copy(update={"segments": (*early.segments, more)})
    rows = rows_of(study, grown, late)
    assert scores(rows) == pytest.approx([0.2, 0.4, 0.3])
    assert [row.order[0] for row in rows] == [1, 2, 3]


def test_long_curves_are_thinned_to_a_few_points_with_the_first_and_the_last_one(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, fidelity={"horizon_prompts": 480, "rungs": 15})
    curve = [0.1, *(0.2 + 0.02 * place for place in range(15))]
    rows = rows_of(study, trained(study, middle(study), "small", curve))
    assert len(rows) == CURVE_POINTS
    assert rows[0].score == pytest.approx(curve[1])
    assert rows[-1].score == pytest.approx(curve[-1])
    steps = np.diff(shares(rows))
    assert float(steps.max() - steps.min()) < 0.1


def test_thinning_keeps_the_last_evaluation_of_every_trial(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAX_OBSERVATIONS", 25)
    random = np.random.default_rng(0)
    trials = [
        trained(study, study.space.decode(random.random(study.space.dimension)), "small", [0.1, 0.2, 0.3, 0.9], number)
        for number in range(20)
    ]
    rows = rows_of(study, *trials)
    data = observe(rows, scale_of(rows), study.space.dimension)
    assert len(data) == 25
    assert sorted(set(data.inputs[data.inputs[:, -3] == 1.0, -2].tolist())) == list(range(20))


def test_running_segments_stand_where_they_will_be_evaluated(study: Study) -> None:
    trial = trained(study, middle(study), "medium", [0.1, 0.2], 7)
    assert running_points(History.of(study, [trial])) is None
    running = trial.model_copy(update={"open_segment": study.next_segment(trial, 480, BECAUSE)})
    points = running_points(History.of(study, [running]))
    assert points is not None
    assert points[0, -3].item() == 1.0
    assert points[0, -2].item() == 7.0


def test_a_point_without_a_trial_stands_for_the_expectation_over_seeds(study: Study) -> None:
    row = evidence.point(study, middle(study), "large", 480)
    assert row[-4:] == [0.0, 1.0, ANY_SEED, 0.0]


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
    rows = rows_of(warm, mine)
    assert scores(rows) == pytest.approx([0.5, 0.4])
    size, share, trial, belongs_to = rows[0].inputs[-4:]
    assert (share, trial, belongs_to) == (1.0, 0.0, 1.0)
    assert size == pytest.approx(np.log10(0.3))
    configuration = study.space.decode(rows[0].inputs[:-4])
    assert configuration["learning_rate"] == pytest.approx(1e-3, rel=1e-4)
    assert configuration["n_samples"] == 16
    assert len(verdicts(History.of(warm, [mine]))[1]) == 1
