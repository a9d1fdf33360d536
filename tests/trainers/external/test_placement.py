from __future__ import annotations

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.trainers.external.placement import GIB, Placement, micro_batch, place, training_bytes
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings


def placed(billions: float, devices: int, *, critic: bool = False, share: float = 1.0, **settings: object) -> Placement:
    chosen = OpenRlhfSettings.model_validate(settings)
    return place(chosen, int(billions * 1e9), devices, reference=True, critic=critic, share=share)


def test_memory_by_the_rule_of_sixteen_bytes() -> None:
    billion = 10**9
    alone = training_bytes(billion, 1, 2, offload=False, reference=False, critic=False)
    assert alone == 16 * billion
    shared = training_bytes(billion, 8, 3, offload=False, reference=True, critic=False)
    assert shared == pytest.approx((16 + 2) * billion / 8)
    # Stage 2 shares all but the weights.
    assert training_bytes(billion, 8, 2, offload=False, reference=False, critic=False) == pytest.approx(
        2 * billion + 14 * billion / 8
    )
    assert training_bytes(billion, 1, 2, offload=True, reference=False, critic=False) == 4 * billion


def test_small_models_need_no_measures() -> None:
    placement = placed(1.5, 1)
    assert (placement.zero_stage, placement.offload_optimizer, placement.tensor_parallel) == (2, False, 1)
    assert placement.training_bytes < 30 * GIB
    assert placement.colocated


def test_larger_models_get_stage_three_then_offloading() -> None:
    assert placed(7, 2).zero_stage == 3
    assert not placed(7, 4).offload_optimizer
    assert placed(14, 4).offload_optimizer


def test_a_model_that_does_not_fit_is_refused_with_the_devices_it_needs() -> None:
    with pytest.raises(SpecError, match=r"devices: \d+"):
        placed(70, 1)
    with pytest.raises(SpecError, match="no number of GPUs"):
        placed(70, 1, zero_stage=2)


def test_a_critic_is_trained_like_the_policy() -> None:
    more = placed(3, 8, critic=True).training_bytes - placed(3, 8).training_bytes
    assert more == pytest.approx(3e9 * (2 + 14 / 8))


def test_engines_take_as_few_gpus_as_hold_the_model() -> None:
    assert placed(7, 8).tensor_parallel == 1
    assert placed(7, 8).engines == 8
    large = placed(32, 16, gpus_per_node=8)
    assert large.tensor_parallel > 1
    assert large.engines * large.tensor_parallel == 16
    assert (large.nodes, large.gpus_per_node) == (2, 8)


def test_asynchronous_training_parts_the_gpus() -> None:
    placement = placed(1.5, 8, asynchronous=True)
    assert (placement.training_gpus, placement.engines, placement.colocated) == (4, 4, False)
    with pytest.raises(SpecError, match="asynchronous"):
        placed(1.5, 1, asynchronous=True)


def test_trials_that_share_a_gpu_share_its_memory() -> None:
    assert placed(0.5, 1, share=0.5).vllm_memory_share == pytest.approx(placed(0.5, 1).vllm_memory_share / 2, abs=0.01)
    with pytest.raises(SpecError, match=r"share 0\.1"):
        placed(3, 1, share=0.1)


def test_uneven_layouts_are_refused() -> None:
    with pytest.raises(SpecError, match="spread evenly"):
        placed(1.5, 9)
    with pytest.raises(SpecError, match="tensor_parallel"):
        placed(1.5, 4, tensor_parallel=3)


def test_micro_batches_divide_the_batch_and_follow_the_length() -> None:
    settings = OpenRlhfSettings()
    assert micro_batch(settings, 64, 100_000) == 1
    assert micro_batch(settings, 48, 1024) == 16
    assert micro_batch(settings, 7, 16) == 7
    assert micro_batch(OpenRlhfSettings(micro_batch=5), 48, 16) == 4
