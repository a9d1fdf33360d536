"""Options of OpenRLHF's command line that a study may set itself, with their types.

For all trials in `trainer.settings.extra`, or as a hyperparameter in `trainer.fixed`, the space or a baseline.

All others are set by jfhpo from the study, or would break what it relies on: one pass over its prompts, rewards by its
agent, every step in the log, checkpoints at rungs. Names and types are those of OpenRLHF 0.11.2's parser
(`openrlhf/cli/train_ppo_ray.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

Option = bool | int | float | str | list[float]
"""Value of an option, as a study file gives it. True is a bare flag, False leaves it out."""

OPTIONS: dict[str, type[bool | int | float | str | list[float]]] = {
    # Speed and memory.
    "ds.packing_samples": bool,
    "train.dynamic_batch_enable": bool,
    "train.max_tokens_per_gpu": int,
    "rollout.max_tokens_per_gpu": int,
    "ds.use_liger_kernel": bool,
    "ds.deepcompile": bool,
    "ds.overlap_comm": bool,
    "ds.grad_accum_dtype": str,
    "ds.zpg": int,
    "ds.experts_implementation": str,
    "ds.ring_attn_head_stride": int,
    "actor.gradient_checkpointing_reentrant": bool,
    "ref.offload": bool,
    "vllm.sync_with_ray": bool,
    "data.disable_fast_tokenizer": bool,
    "data.dataloader_num_workers": int,
    # The algorithm.
    "algo.advantage.is_correction_level": str,
    "algo.advantage.is_correction_mode": str,
    "algo.advantage.is_correction_gating": str,
    "algo.advantage.is_correction_threshold": list[float],
    "algo.advantage.no_std_norm": bool,
    "algo.kl.target": float,
    "algo.kl.horizon": int,
    "algo.kl.unbiased_gradient": bool,
    "reward.overlong_buffer_len": float,
    "reward.overlong_penalty_factor": float,
    "reward.stop_properly_penalty_coef": float,
    "train.full_determinism_enable": bool,
}


REFUSED = {
    "reward.model_name_or_path": "OpenRLHF asks no reward model where rewards come from an agent, as they do here; "
    "task.reward can ask one that is served (docs/how-to/own-task.md)",
    "reward.remote_url": "rewards come from task.reward, which can ask a server (docs/how-to/own-task.md)",
    "critic.model_name_or_path": "the value model of loss_type ppo begins as the policy does",
    "actor.model_name_or_path": "set family",
    "ref.model_name_or_path": "the reference is the untrained policy",
    "data.image_key": "prompts are texts or chats, without images",
    "data.max_images_per_prompt": "prompts are texts or chats, without images",
    "actor.freeze_visual_encoder": "prompts are texts or chats, without images",
}
"""Options that people look for and a study may not set, with what to do or to know instead."""


def check_options(extra: Mapping[str, Option]) -> None:
    """Refuse options that a study may not set, and values of another type.

    Raises:
        ValueError: With the option and what it may be.
    """
    for name, value in extra.items():
        kind = OPTIONS.get(name)
        if name in REFUSED:
            raise ValueError(f"{name!r} cannot be set by a study: {REFUSED[name]}")
        if kind is None:
            raise ValueError(f"{name!r} is no option that a study may set; these are {', '.join(OPTIONS)}")
        right = (
            isinstance(value, list)
            if kind == list[float]
            else isinstance(value, bool) == (kind is bool) and isinstance(value, int | float if kind is float else kind)
        )
        if not right:
            wanted = "a list of numbers" if kind == list[float] else f"a value of type {kind.__name__}"
            raise ValueError(f"{name}: it takes {wanted}, not {value!r}")
