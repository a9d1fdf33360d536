from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers.openrlhf.command import Files, Flags, build_flags, evaluation_interval, to_argv
from jfhpo_core.trainers.openrlhf.options import OPTIONS
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from tests.trainers.openrlhf.conftest import job, placed, study

FILES = Files(Path("/folder"), Path("/work"))


def flags(
    spec: StudySpec | None = None, settings: dict[str, Any] | None = None, devices: int = 1, **hyper: Any
) -> Flags:
    chosen = OpenRlhfSettings.model_validate(settings or {})
    task = job(spec or study(), Path("/store"), devices=devices, **hyper)
    critic = task.configuration["loss_type"] == "ppo"
    placement = placed(chosen, devices, critic=critic)
    return build_flags(task, chosen, placement, FILES, resume=False)


def test_the_full_horizon_stands_in_every_segment() -> None:
    chosen, spec = OpenRlhfSettings(), study()
    placement = placed(chosen)
    first = build_flags(job(spec, Path("/s"), stop=2), chosen, placement, FILES, resume=False)
    second = build_flags(job(spec, Path("/s"), start=2, stop=6), chosen, placement, FILES, resume=True)
    differing = {name for name in first | second if first.get(name) != second.get(name)}
    assert differing == {"ckpt.load_enable", "ckpt.save_steps", "eval.steps", "ckpt.disable_ds"}
    # Nothing continues after the last step, so the optimizer's state is not written there.
    assert (first["ckpt.disable_ds"], second["ckpt.disable_ds"]) == (False, True)
    # Six steps of 8 prompts x 4 completions in two updates each: 12 updates set the schedule.
    built = flags(mini_batches=2)
    assert built["train.batch_size"] == 16
    assert built["rollout.batch_size"] == 8


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", {"algo.advantage.estimator": "group_norm", "actor.loss_agg_mode": "seq-mean-token-mean"}),
        ("dapo", {"algo.advantage.estimator": "group_norm", "actor.loss_agg_mode": "token-mean"}),
        ("dr_grpo", {"algo.advantage.estimator": "dr_grpo", "algo.kl.use_loss": True}),
        ("gspo", {"actor.policy_loss_type": "gspo"}),
        ("rloo", {"algo.advantage.estimator": "rloo", "algo.kl.use_loss": False, "algo.kl.estimator": "k1"}),
        ("reinforce", {"algo.advantage.estimator": "reinforce", "algo.kl.use_loss": False}),
        ("reinforce_baseline", {"algo.advantage.estimator": "reinforce_baseline", "algo.kl.estimator": "k2"}),
        ("ppo", {"algo.advantage.estimator": "gae", "critic.adam.lr": 9e-6}),
    ],
)
def test_algorithms(loss_type: str, expected: dict[str, object]) -> None:
    built = flags(loss_type=loss_type)
    assert {name: built[name] for name in expected} == expected
    assert (built["critic.model_name_or_path"] is not None) == (loss_type == "ppo")


def test_every_gpu_count_is_given() -> None:
    built = flags(devices=4)
    counts = {name: value for name, value in built.items() if name.endswith("num_gpus_per_node")}
    assert counts == {f"{part}.num_gpus_per_node": 4 for part in ("actor", "ref", "critic", "reward")}
    assert (built["vllm.num_engines"], built["vllm.tensor_parallel_size"]) == (4, 1)


def test_colocated_engines_sleep_and_others_do_not() -> None:
    assert flags(devices=2)["vllm.enable_sleep"] is True
    apart = flags(devices=2, settings={"asynchronous": True})
    assert (apart["vllm.enable_sleep"], apart["train.async_enable"]) == (False, True)


def test_the_cpu_needs_neither_nccl_nor_flash_attention() -> None:
    built = flags(settings={"device": "cpu"})
    assert (built["vllm.sync_backend"], built["ds.attn_implementation"]) == ("gloo", "eager")
    assert built["vllm.enable_sleep"] is False


def test_no_reference_means_no_kl_loss() -> None:
    assert flags(kl_coefficient=0.0)["algo.kl.use_loss"] is False


def test_evaluations_fall_on_the_rungs_of_the_segment() -> None:
    spec = study()
    assert evaluation_interval(job(spec, Path("/s"), stop=4)) == 4
    uneven = job(spec, Path("/s"), stop=6).model_copy(update={"evaluation_steps": (0, 4, 6)})
    assert evaluation_interval(uneven) == 2


def test_arguments_are_texts_in_order() -> None:
    assert to_argv({"a": 1, "b": True, "c": False, "d": None, "e": (0.5, 1e-6), "f": "x y"}) == [
        "--a", "1", "--b", "--e", "0.5", "1e-06", "--f", "x y",
    ]  # fmt: skip
    argv = to_argv(flags())
    assert all(isinstance(item, str) and item for item in argv)
    assert not any("wandb.key" in item for item in argv)


def test_further_options_reach_the_command_line() -> None:
    extra = {"ds.use_liger_kernel": True, "ref.offload": False, "algo.advantage.is_correction_level": "token",
             "algo.advantage.is_correction_threshold": [0.5, 2.0]}  # fmt: skip
    argv = to_argv(flags(settings={"extra": extra}))
    assert "--ds.use_liger_kernel" in argv
    assert "--ref.offload" not in argv
    assert argv[argv.index("--algo.advantage.is_correction_level") + 1] == "token"
    place_of = argv.index("--algo.advantage.is_correction_threshold")
    assert argv[place_of + 1 : place_of + 3] == ["0.5", "2.0"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"actor.adam.lr": 1e-6}, "no option that a study may set"),
        ({"logger.wandb.key": "secret"}, "no option that a study may set"),
        ({"ds.use_liger": True}, "ds.use_liger_kernel"),
        ({"reward.model_name_or_path": "rm"}, "asks no reward model.*task.reward can ask one that is served"),
        ({"reward.remote_url": "http://rm"}, "task.reward, which can ask a server"),
        ({"critic.model_name_or_path": "rm"}, "begins as the policy does"),
        ({"data.max_images_per_prompt": 1}, "without images"),
        ({"ds.use_liger_kernel": 1}, "type bool"),
        ({"ds.zpg": True}, "type int"),
        ({"algo.kl.target": "high"}, "type float"),
        ({"algo.advantage.is_correction_threshold": 2.0}, "a list of numbers"),
    ],
)
def test_options_that_jfhpo_sets_and_wrong_ones_are_refused(extra: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenRlhfSettings.model_validate({"extra": extra})


def test_an_option_may_be_a_hyperparameter() -> None:
    name = "algo.kl.target"
    built = flags(settings={"extra": {name: 0.5, "ref.offload": True}}, **{name: 0.1})
    assert (built[name], built["ref.offload"]) == (0.1, True)


def test_a_study_may_set_no_option_that_jfhpo_sets() -> None:
    assert OPTIONS.keys() & flags(loss_type="ppo").keys() == {"algo.advantage.is_correction_level"}
