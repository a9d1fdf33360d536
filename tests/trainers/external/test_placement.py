from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.trainers.external.memory import GIB, Shape, resting_bytes, training_bytes
from jfhpo_core.trainers.external.placement import Demand, Placement, micro_batch, place, safer, whole_gpus
from jfhpo_core.trainers.external.settings import ExternalSettings
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from jfhpo_core.trainers.verl.settings import VerlSettings

QWEN_7B = Shape(7_615_616_512, 152_064, 3584, 28)


def demand(billions: float, gpus: int, *, critic: bool = False, share: float = 1.0, tokens: int = 1536) -> Demand:
    return Demand(Shape.typical(int(billions * 1e9)), gpus, tokens, reference=True, critic=critic, share=share)


def placed(
    billions: float, gpus: int, *, critic: bool = False, share: float = 1.0, safety: int = 0, **settings: object
) -> Placement:
    return place(OpenRlhfSettings.model_validate(settings), demand(billions, gpus, critic=critic, share=share), safety)


def peaks(settings: ExternalSettings, what: Demand, placement: Placement) -> tuple[float, float]:
    """Memory in updates and in rollouts."""
    each = what.shape.token_bytes(checkpointing=settings.gradient_checkpointing)
    return placement.training_bytes + placement.tokens * each, placement.rollout_bytes


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
    # While vLLM samples, gradients are gone, and the optimizer sleeps or does not.
    assert resting_bytes(billion, 1, 2, sleeps=True, reference=True, critic=False) == 4 * billion
    assert resting_bytes(billion, 4, 3, sleeps=False, reference=False, critic=True) == pytest.approx(7 * billion)


def test_logits_count_by_the_vocabulary() -> None:
    # 12,288 tokens at once: 21 GiB of logits with Qwen's vocabulary, 4.4 with Llama 2's.
    qwen, llama = QWEN_7B, replace(QWEN_7B, vocabulary=32_000)
    more = 12_288 * (qwen.token_bytes(checkpointing=True) - llama.token_bytes(checkpointing=True))
    assert pytest.approx(20.9, abs=0.1) == 12_288 * 12 * 152_064 / GIB
    assert more / GIB == pytest.approx(20.9 - 4.4, abs=0.1)


def test_the_shape_is_that_of_the_models_configuration(tmp_path: Path) -> None:
    config = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Shape.of(str(tmp_path), 10**6) == Shape(10**6, 500, 64, 3)
    # Of a model with several parts the language model counts.
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config, "vision_config": {}}))
    assert Shape.of(str(tmp_path), 10**6) == Shape(10**6, 500, 64, 3)
    unknown = Shape.of("nobody/has-this", 7_615_616_512)
    assert unknown.vocabulary == 152_064
    assert unknown.width * unknown.layers == pytest.approx(QWEN_7B.width * QWEN_7B.layers, rel=0.3)


def test_seven_billion_on_four_gpus_train_on_fewer_tokens_at_once() -> None:
    # Stage 2 leaves 15 GiB for logits: not 21 for 12,288 tokens, but enough for half as many.
    what = Demand(QWEN_7B, 4, 1536, reference=True)
    placement = place(OpenRlhfSettings(), what)
    assert placement.tokens < 12_288
    assert micro_batch(placement, 64, 1536) == 4
    update, rollouts = peaks(OpenRlhfSettings(), what, placement)
    assert update <= 0.85 * 80 * GIB
    assert rollouts <= 0.93 * 80 * GIB
    # A micro-batch that the study insists on is not lowered: more is shared instead.
    assert place(OpenRlhfSettings(micro_batch=8), what).zero_stage == 3


def test_rollouts_hold_engine_policy_and_reference() -> None:
    # 9.3B on 8 x 80 GiB: with 55 % for vLLM, 44 + 2 x 17.3 GiB were 78.6 of 79.6.
    what = replace(demand(9.3, 8), shape=replace(QWEN_7B, parameters=9_300_000_000))
    settings = OpenRlhfSettings(zero_stage=2)
    placement = place(settings, what)
    assert placement.rollout_bytes <= 0.93 * 80 * GIB
    assert placement.vllm_memory_share < 0.55
    with pytest.raises(SpecError, match=r"in rollouts vLLM takes 44\.0 GiB"):
        place(OpenRlhfSettings(zero_stage=2, vllm_memory_share=0.55), what)
    # Where the study leaves the stage open, sharing the weights makes room.
    assert place(OpenRlhfSettings(vllm_memory_share=0.55), what).zero_stage == 3


def test_verls_optimizer_stays_in_rollouts_unless_it_is_offloaded() -> None:
    # 3B on one GPU: 39 GiB of it stay beside vLLM, which gets less than elsewhere, or the optimizer has to go.
    assert place(VerlSettings(), demand(3, 1)).vllm_memory_share == pytest.approx(0.37, abs=0.01)
    assert place(VerlSettings(vllm_memory_share=0.5), demand(3, 1)).offload_optimizer
    assert not place(VerlSettings(), demand(3, 4)).offload_optimizer
    # It comes back for the update, so offloading does not make a model fit.
    with pytest.raises(SpecError, match="an update takes"):
        place(VerlSettings(), demand(7, 1))


def test_every_placement_fits() -> None:
    for kind in (OpenRlhfSettings, VerlSettings):
        for billions in (0.5, 1.5, 3, 7, 14, 32):
            for gpus in (1, 2, 4, 8):
                settings, what = kind(), demand(billions, gpus)
                try:
                    placement = place(settings, what)
                except SpecError:
                    continue
                update, rollouts = peaks(settings, what, placement)
                assert update <= 0.85 * 80 * GIB
                assert rollouts <= 0.93 * 80 * GIB
                assert placement.tokens >= 1536


def test_small_models_need_no_measures() -> None:
    placement = placed(1.5, 1)
    assert (placement.zero_stage, placement.offload_optimizer, placement.tensor_parallel) == (2, False, 1)
    assert (placement.tokens, placement.vllm_memory_share) == (16_384, 0.55)
    assert placement.colocated


def test_larger_models_get_stage_three_then_offloading() -> None:
    assert (placed(7, 4).zero_stage, placed(7, 2).zero_stage) == (2, 3)
    assert placed(14, 8).zero_stage == 3
    assert not placed(14, 4).offload_optimizer
    assert placed(14, 2).offload_optimizer


def test_a_model_that_does_not_fit_is_refused_with_the_gpus_it_needs() -> None:
    with pytest.raises(SpecError, match=r"\d+ GPUs are enough \(`devices`\)"):
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


def test_devices_are_parts_of_a_gpu_or_whole_ones() -> None:
    assert whole_gpus(1, 0.25) == (1, 0.25)
    assert whole_gpus(4, 0.25) == (1, 1.0)
    assert whole_gpus(32, 0.25) == (8, 1.0)
    assert whole_gpus(8, 0) == (8, 1.0)
    with pytest.raises(SpecError, match=r"6 of 0\.25 GPU each .* are 1\.5 GPUs"):
        whole_gpus(6, 0.25)


def test_uneven_layouts_are_refused() -> None:
    with pytest.raises(SpecError, match="spread evenly"):
        placed(1.5, 9)
    with pytest.raises(SpecError, match="tensor_parallel"):
        placed(1.5, 4, tensor_parallel=3)


def test_safer_placements_leave_more_free() -> None:
    one, two = placed(7, 4), placed(7, 4, safety=1)
    assert two.tokens < one.tokens or two.zero_stage > one.zero_stage
    assert two.rollout_bytes < one.rollout_bytes
    assert safer(OpenRlhfSettings(), demand(7, 4), 0)
    # Nothing is left to choose where the study says everything.
    given = OpenRlhfSettings(micro_batch=1, vllm_memory_share=0.3, zero_stage=2)
    assert not safer(given, demand(1.5, 1), 0)


def test_micro_batches_divide_the_batch_and_follow_the_length() -> None:
    placement = placed(1.5, 1)
    assert micro_batch(placement, 64, 100_000) == 1
    assert micro_batch(placement, 48, 1024) == 16
    assert micro_batch(placement, 7, 16) == 7
    assert micro_batch(placed(1.5, 1, micro_batch=5), 48, 1536) == 4


def test_models_have_settings_of_their_own() -> None:
    settings = OpenRlhfSettings.model_validate(
        {"micro_batch": 4, "models": {"small": {"micro_batch": 16, "gradient_checkpointing": False}}}
    )
    assert settings.of_model("small").micro_batch == 16
    assert not settings.of_model("small").gradient_checkpointing
    assert settings.of_model("large").micro_batch == 4
    with pytest.raises(ValueError, match=r"small\.python cannot differ between models"):
        OpenRlhfSettings.model_validate({"models": {"small": {"python": "x"}}})
    with pytest.raises(ValueError, match="micro_batch"):
        OpenRlhfSettings.model_validate({"models": {"small": {"micro_batch": 0}}})
    with pytest.raises(ValueError, match="zero_stage cannot differ"):
        VerlSettings.model_validate({"models": {"small": {"zero_stage": 2}}})
