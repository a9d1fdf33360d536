from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import runner, store
from benchmarks.landscapes import LANDSCAPES
from benchmarks.runner import Delivery, Run, run_one, trace
from jfhpo_core.optimizer.strategy import RandomSearch, Recommendation
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Checkpoint, SegmentResult, Trial
from tests.studies import evaluation, result

RUNS = [Run("random", "aligned", seed, {}, "random") for seed in (1, 0)]


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    said: list[str] = []
    assert runner.run(RUNS[1:], tmp_path, say=said.append) == 0
    first = (tmp_path / "random.jsonl").read_text()
    assert runner.run(RUNS, tmp_path, say=said.append) == 0
    assert said[0] == "1 runs to do, 0 done before"
    assert said[2] == "1 runs to do, 1 done before"
    assert said[3].startswith("[1/1] random aligned 1: ")
    both = (tmp_path / "random.jsonl").read_text()
    assert both.startswith(first)
    assert list(store.load(tmp_path, "random")) == [("aligned", 0), ("aligned", 1)]


@pytest.mark.slow
def test_redo_replaces_what_other_code_has_made_and_nothing_else(tmp_path: Path) -> None:
    made = run_one("random", {}, "aligned", 0)
    store.save(tmp_path, made.model_copy(update={"stamp": "older", "recommended_score": 0.0}))
    store.save(tmp_path, made.model_copy(update={"seed": 1}))
    said: list[str] = []
    runner.run(RUNS, tmp_path, say=said.append)
    assert said == ["0 runs to do, 2 done before"]
    runner.run(RUNS[1:], tmp_path, redo=True, say=said.append)
    assert said[1] == "1 runs to do, 0 done before"
    assert store.load(tmp_path, "random")["aligned", 0] == made.model_copy(
        update={"cpu_seconds_per_suggestion": store.load(tmp_path, "random")["aligned", 0].cpu_seconds_per_suggestion}
    )
    said.clear()
    runner.run(RUNS[1:], tmp_path, redo=True, say=said.append)
    assert said == ["0 runs to do, 1 done before"]


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_leaves_the_others_alone(tmp_path: Path) -> None:
    said: list[str] = []
    broken = Run("random", "aligned", 0, {"no_such_setting": 1}, "broken")
    assert runner.run([broken, RUNS[0]], tmp_path, say=said.append) == 1
    assert any("broken aligned 0: FAILED: SpecError" in line for line in said)
    assert list(store.load(tmp_path, "random")) == [("aligned", 1)]


def test_the_stamp_tells_strategies_settings_and_instances_apart() -> None:
    stamps = {
        runner.stamp("random", {}, "aligned", 0),
        runner.stamp("paper", {}, "aligned", 0),
        runner.stamp("paper", {"initial_trials": 4}, "aligned", 0),
        runner.stamp("random", {}, "aligned", 1),
        runner.stamp("random", {}, "noisy", 0),
    }
    assert len(stamps) == 5
    assert runner.stamp("random", {}, "aligned", 0) in stamps


@pytest.mark.slow
def test_a_run_is_reproducible() -> None:
    one, other = (run_one("random", {}, "unstable", 4).model_dump() for _ in range(2))
    assert one.pop("cpu_seconds_per_suggestion") >= 0
    assert other.pop("cpu_seconds_per_suggestion") >= 0
    assert one == other
    assert one["infeasible"] > 0
    assert one["segments"]["7b"] == sum(one["segments"].values())


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return LANDSCAPES["aligned"](0).study(tmp_path)


def trained(study: Study, number: int, rate: float, model: str, *segments: SegmentResult) -> Trial:
    trial = study.new_trial(number, {"learning_rate": rate}, model, 0)
    return trial.model_copy(update={"segments": segments})


def test_delivering_what_has_finished_on_the_target_costs_nothing_more(study: Study) -> None:
    configuration = {"learning_rate": 1e-6}
    full = result(0, 0, 64, evaluations=(evaluation(64, 0.5),), seconds=300.0)
    finished, proxy = trained(study, 0, 1e-6, "7b", full), trained(study, 1, 1e-6, "0.5b", full)
    assert runner.delivery(History.of(study, [finished, proxy]), configuration) == Delivery(600.0, configuration)
    assert runner.delivery(History.of(study, [proxy]), configuration).seconds > 300.0 + 1000.0


def test_delivering_a_paused_training_costs_what_is_missing(study: Study) -> None:
    checkpoint = Checkpoint(step=32, prompts=512, path="x", digest="0", size_bytes=1)
    half = result(0, 0, 32, evaluations=(evaluation(32, 0.5),), seconds=2000.0, checkpoint=checkpoint)
    paused = trained(study, 0, 1e-6, "7b", half)
    missing = [
        runner.delivery(History.of(study, trials), {"learning_rate": 1e-6}).seconds - 2000.0
        for trials in ([paused], [paused.model_copy(update={"configuration": {"learning_rate": 2e-6}})])
    ]
    assert 0.4 * missing[1] < missing[0] < 0.7 * missing[1]


def test_the_trace_has_the_true_score_of_what_would_be_delivered() -> None:
    problem = LANDSCAPES["aligned"](0)
    first, second = ({**problem.default, "learning_rate": rate} for rate in (1e-7, 5e-7))
    true = [round(problem.true_score(item), 5) for item in (problem.default, first, second)]
    points = trace(problem, [Delivery(300.0, first), Delivery(350.0, first), Delivery(400.0, second)])
    assert points == ((0.0, true[0]), (300.0, true[1]), (400.0, true[2]))


def test_forecasts_are_those_of_the_first_ranking_after_each_share_of_the_budget(study: Study) -> None:
    full = result(0, 0, 64, seconds=1.0)
    budget = study.spec.budget.device_seconds

    class Fixed(RandomSearch):
        def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
            return [Recommendation(trial.configuration, 0.5 + 0.01 * trial.number, 0.01) for trial in trials[::-1]]

    timed = runner.Timed(Fixed())
    trials: list[Trial] = []
    for number in range(12):
        seconds = budget / 10
        done = full.model_copy(update={"seconds": seconds, "evaluations": (evaluation(64, 0.5 + 0.01 * number),)})
        trials.append(trained(study, number, 1e-6 * (1 + number), "7b", done))
        timed.rank(study, trials)
    assert list(timed.forecasts) == [0.2, 0.4, 0.6, 0.8]
    assert timed.forecasts[0.2] is None, "two configurations are too few"
    shown = timed.forecasts[0.8]
    assert shown is not None
    assert shown[0] < shown[1] < shown[2]
