from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import runner, store
from benchmarks.landscapes import LANDSCAPES
from benchmarks.runner import Run, run_one, trace
from jfhpo_core.study import Study
from jfhpo_core.trial import Segment, SegmentResult, Trial
from tests.studies import BECAUSE, evaluation, result

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


def test_the_incumbent_is_the_best_observed_at_full_length_on_the_target(study: Study) -> None:
    problem = LANDSCAPES["aligned"](0)
    rates = [1e-7, 5e-7, 1e-6, 2e-6, 5e-6]

    def done(committed: int, score: float, end: int = 64) -> SegmentResult:
        return result(0, 0, end, evaluations=(evaluation(end, score),), seconds=100.0, committed=committed)

    trials = [
        trained(study, 0, rates[0], "7b", done(4, 0.5)),
        trained(study, 1, rates[1], "0.5b", done(1, 0.9)),  # a proxy
        trained(study, 2, rates[2], "7b", done(2, 0.8, end=56)),  # not yet at full length
        trained(study, 3, rates[3], "7b", done(3, 0.4)),
        trained(study, 4, rates[4], "7b", done(5, 0.45)),  # worse than what was observed before
    ]
    true = {rate: round(problem.true_score({**problem.default, "learning_rate": rate}), 5) for rate in rates}
    assert trace(problem, study, runner.in_order(trials)) == (
        (0.0, round(problem.true_score(problem.default), 5)),
        (300.0, true[rates[3]]),
        (400.0, true[rates[0]]),
    )


def test_a_trial_that_is_continued_counts_when_it_reaches_the_end(study: Study) -> None:
    problem = LANDSCAPES["aligned"](0)
    halves = [
        result(0, 0, 32, evaluations=(evaluation(32, 0.6),), seconds=50.0, committed=1),
        SegmentResult(
            segment=Segment(index=1, start_step=32, stop_step=64, suggestion=BECAUSE), outcome="reached", end_step=64,
            end_prompts=1024, evaluations=(evaluation(64, 0.7),), seconds=60.0, committed=3,
        ),
    ]  # fmt: skip
    other = result(0, 0, 64, evaluations=(evaluation(64, 0.65),), seconds=100.0, committed=2)
    trials = [trained(study, 0, 1e-6, "7b", *halves), trained(study, 1, 3e-7, "7b", other)]
    points = trace(problem, study, runner.in_order(trials))
    assert [seconds for seconds, _ in points] == [0.0, 150.0, 210.0]
