from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prices import PUBLISHED, Published, deviation, recorded
from jfhpo_core.optimizer.cost import CostEstimate, CostModel
from jfhpo_core.optimizer.price import CHECKPOINT_BYTES, DISK_BYTES_PER_SECOND, ENGINES, Setup, Work, prices
from jfhpo_core.study.hardware import gpus
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers import load_trainer
from tests.studies import evaluation, result, simulated_study, step_record, study_data

WORK = Work(completions=1024, prompt_tokens=256, mean_tokens=512, longest_tokens=1024, updates=4, forward_passes=2)
H100 = gpus()["H100-80GB"]
VLLM = ENGINES["vllm"]


@pytest.mark.parametrize("item", PUBLISHED, ids=lambda item: f"{item.name}, {item.count} x {item.gpu}")
def test_a_price_is_within_a_factor_of_two_and_a_half_of_a_published_step_time(item: Published) -> None:
    assert 1 / 2.5 < item.price / item.seconds < 2.5


def test_prices_of_the_recorded_runs_are_typically_within_a_factor_of_two() -> None:
    ratios = recorded()
    assert len(ratios) > 1000
    assert deviation(ratios) < 2


@given(st.floats(1e5, 1e11), st.sampled_from(sorted(gpus())), st.integers(1, 64), st.sampled_from(sorted(ENGINES)))
def test_more_work_costs_more_and_more_devices_take_less_time(
    parameters: float, gpu: str, count: int, engine: str
) -> None:
    setup = Setup(parameters, gpus()[gpu], count, ENGINES[engine])  # type: ignore[index]
    base = setup.step_seconds(WORK)
    assert base > 0
    for more in (
        replace(WORK, completions=2 * WORK.completions),
        replace(WORK, mean_tokens=1024.0),
        replace(WORK, longest_tokens=4096.0),
        replace(WORK, prompt_tokens=1024.0),
        replace(WORK, updates=16),
        replace(WORK, forward_passes=3),
    ):
        assert setup.step_seconds(more) > base
    assert replace(setup, parameters=10 * parameters).step_seconds(WORK) > base
    assert replace(setup, count=64 * count).step_seconds(WORK) <= base


def test_work_is_counted_by_the_usual_formulas() -> None:
    setup = Setup(7e9, H100, 8, VLLM)
    assert setup.checkpoint_seconds() == pytest.approx(CHECKPOINT_BYTES * 7e9 / DISK_BYTES_PER_SECOND)
    sampling = replace(WORK, updates=0, forward_passes=0)
    one = setup.update_seconds(replace(sampling, forward_passes=1)) - setup.update_seconds(sampling)
    assert one == pytest.approx(2 * 7e9 * 1024 * 768 / (8 * 989e12 * 0.2))


# --- in a study ---------------------------------------------------------------------------------------------------


def priced_study(tmp_path: Path, parameters: int = 7_600_000_000, limit: int = 1024, **cluster: object) -> Study:
    """A study of OpenRLHF on GPUs that is never run: its environment and files are not looked for."""
    spec = StudySpec.model_validate(
        study_data(
            tmp_path,
            family=[{"name": "large", "path": "simulated", "parameters": parameters, "devices": 8}],
            task={"prompts": "a", "heldout": "b", "reward": "r.py", "max_completion_tokens": limit},
            trainer="openrlhf",
            space="llm",
            cluster={"gpus_per_device": 1, **cluster},
        )
    )
    return Study(spec, build_ladder(spec), load_trainer("openrlhf"))


def full_run(study: Study, **changes: object) -> CostEstimate:
    return CostModel.fit(study, [], **changes).estimate({}, "large", 0, 480)  # type: ignore[arg-type]


def test_model_tokens_and_hardware_set_the_price_before_anything_is_timed(tmp_path: Path) -> None:
    qwen7 = full_run(priced_study(tmp_path)).seconds
    qwen14 = full_run(priced_study(tmp_path, 14_800_000_000, 4096)).seconds
    llama8 = full_run(priced_study(tmp_path, 8_030_000_000, 512)).seconds
    assert llama8 < qwen7 < qwen14 / 3
    assert (
        full_run(priced_study(tmp_path, gpu="H100-80GB")).seconds
        < qwen7
        < full_run(priced_study(tmp_path, gpu="L4")).seconds
    )


def test_a_price_is_sharper_than_a_guess(tmp_path: Path) -> None:
    estimate = full_run(priced_study(tmp_path))
    guess = CostModel.fit(simulated_study(tmp_path), []).estimate({}, "large", 0, 480)
    assert 2 < estimate.high / estimate.low < 8 < guess.high / guess.low


def test_the_first_measured_step_corrects_the_price(tmp_path: Path) -> None:
    study = priced_study(tmp_path)
    listed = prices(study)
    assert listed is not None
    slow = 4 * listed.step(study.complete({}), "large")
    trial = study.new_trial(0, {}, "large", 0)
    record = step_record(1, generation_seconds=slow / 2, training_seconds=slow / 2)
    costs = CostModel.fit(study, [trial], {trial.key: record})
    before, after = full_run(study), costs.estimate({}, "large", 0, 480)
    steps = 30 * slow * 8
    assert after.seconds - before.seconds > 0.6 * (steps - steps / 4)
    assert after.high / after.low < before.high / before.low


def test_an_earlier_study_of_the_same_trainer_and_gpu_sets_the_price(tmp_path: Path) -> None:
    study = priced_study(tmp_path)
    before = full_run(study)
    step = 3 * prices(study).step(study.complete({}), "large")  # type: ignore[union-attr]
    trials = []
    for number in range(6):
        done = result(
            0, 0, 30, seconds=200 + 30 * step, startup_seconds=100.0, evaluation_seconds=100.0,
            evaluations=(evaluation(30, seconds=100.0),),
        )  # fmt: skip
        trials.append(study.new_trial(number, {}, "large", number).model_copy(update={"segments": (done,)}))
    informed = replace(study, earlier=(EarlierStudy(study.spec, study.ladder, tuple(trials)),))
    assert full_run(informed).seconds > 1.8 * before.seconds
    assert full_run(informed).high / full_run(informed).low < before.high / before.low
    elsewhere = study.spec.model_copy(update={"cluster": study.spec.cluster.model_copy(update={"gpu": "L4"})})
    other = replace(study, earlier=(EarlierStudy(elsewhere, study.ladder, tuple(trials)),))
    assert full_run(other) == before
