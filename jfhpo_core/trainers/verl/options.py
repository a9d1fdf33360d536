"""Options of verl's configuration that a study may set itself, by dotted name, and those that it may not."""

from __future__ import annotations

import re

Scalar = bool | int | float | str
Option = Scalar | list[Scalar] | None
"""Value of an option, as a study file gives it."""

NAME = re.compile(r"\+{0,2}[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
"""Name of an option in Hydra's notation: `+` adds one that verl's configuration lacks, `++` sets it in any case."""

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))

OWNED = {
    "data.train_files": "task.prompts",
    "data.val_files": "task.heldout",
    "data.train_batch_size": "prompts_per_step",
    "data.gen_batch_size": "prompts_per_step",
    "data.max_prompt_length": "trainer.settings.max_prompt_tokens",
    "data.max_response_length": "task.max_completion_tokens",
    "data.shuffle": "seeds.training",
    "data.truncation": "trainer.settings.max_prompt_tokens",
    "data.dataloader_num_workers": "trainer.settings.workers",
    "reward.custom_reward_function": "task.reward",
    "reward.reward_model": "task.reward, which can ask a reward model that is served (docs/how-to/own-task.md)",
    "data.image_key": None,
    "data.video_key": None,
    "reward.num_workers": "trainer.settings.workers",
    "algorithm.adv_estimator": "loss_type",
    "algorithm.norm_adv_by_std_in_grpo": "loss_type",
    "algorithm.filter_groups": None,
    "algorithm.use_kl_in_reward": "kl_coefficient",
    "algorithm.kl_penalty": "kl_coefficient",
    "algorithm.kl_ctrl": "kl_coefficient",
    f"{MODEL}.path": "family",
    f"{MODEL}.enable_gradient_checkpointing": "trainer.settings.gradient_checkpointing",
    f"{MODEL}.use_remove_padding": "trainer.settings.attention",
    f"{MODEL}.override_config.attn_implementation": "trainer.settings.attention",
    f"{ACTOR}.strategy": None,
    f"{ACTOR}.use_kl_loss": "kl_coefficient",
    f"{ACTOR}.kl_loss_coef": "kl_coefficient",
    f"{ACTOR}.kl_loss_type": "kl_coefficient",
    f"{ACTOR}.loss_agg_mode": "loss_type",
    f"{ACTOR}.clip_ratio": "clip_low and clip_high",
    f"{ACTOR}.clip_ratio_low": "clip_low",
    f"{ACTOR}.clip_ratio_high": "clip_high",
    f"{ACTOR}.grad_clip": "max_grad_norm",
    f"{ACTOR}.calculate_entropy": None,
    f"{ACTOR}.ppo_epochs": None,
    f"{ACTOR}.ppo_mini_batch_size": "mini_batches",
    f"{ACTOR}.use_dynamic_bsz": None,
    f"{ACTOR}.optim.lr": "learning_rate",
    f"{ACTOR}.optim.lr_scheduler_type": "scheduler",
    f"{ACTOR}.optim.lr_warmup_steps": "warmup_ratio",
    f"{ACTOR}.optim.lr_warmup_steps_ratio": "warmup_ratio",
    f"{ACTOR}.optim.total_training_steps": "fidelity.horizon_prompts",
    f"{ACTOR}.optim.weight_decay": "weight_decay",
    f"{ACTOR}.data_loader_seed": "seeds.training",
    f"{ACTOR}.fsdp_config.param_offload": None,
    f"{ACTOR}.fsdp_config.optimizer_offload": None,
    f"{ACTOR}.checkpoint": None,
    f"{ROLLOUT}.name": None,
    f"{ROLLOUT}.mode": None,
    f"{ROLLOUT}.n": "n_samples",
    f"{ROLLOUT}.temperature": "temperature",
    f"{ROLLOUT}.agent.num_workers": "trainer.settings.workers",
    f"{ROLLOUT}.enable_sleep_mode": "trainer.settings.device",
    f"{ROLLOUT}.free_cache_engine": "trainer.settings.device",
    f"{ROLLOUT}.enforce_eager": "trainer.settings.enforce_eager",
    f"{ROLLOUT}.tensor_model_parallel_size": "trainer.settings.tensor_parallel",
    f"{ROLLOUT}.gpu_memory_utilization": "trainer.settings.vllm_memory_share",
    f"{ROLLOUT}.val_kwargs": "evaluation",
    "algorithm.gamma": None,
    "algorithm.lam": "gae_lambda",
    "critic.enable": "loss_type",
    "critic.strategy": None,
    "critic.model.path": "family",
    "critic.model.enable_gradient_checkpointing": "trainer.settings.gradient_checkpointing",
    "critic.model.use_remove_padding": "trainer.settings.attention",
    "critic.model.override_config.attn_implementation": "trainer.settings.attention",
    "critic.cliprange_value": "value_clip",
    "critic.grad_clip": "max_grad_norm",
    "critic.data_loader_seed": "seeds.training",
    "critic.optim.lr": "critic_learning_rate",
    "critic.optim.lr_scheduler_type": "scheduler",
    "critic.optim.lr_warmup_steps": "warmup_ratio",
    "critic.optim.lr_warmup_steps_ratio": "warmup_ratio",
    "critic.optim.total_training_steps": "fidelity.horizon_prompts",
    "critic.optim.weight_decay": "weight_decay",
    "critic.fsdp.param_offload": None,
    "critic.fsdp.optimizer_offload": None,
    "critic.checkpoint": None,
    "trainer.critic_warmup": None,
    "trainer.max_critic_ckpt_to_keep": None,
    "trainer.v1.trainer_mode": None,
    "trainer.use_v1": None,
    "trainer.total_epochs": "fidelity.horizon_prompts",
    "trainer.total_training_steps": "fidelity.horizon_prompts",
    "trainer.device": "trainer.settings.device",
    "trainer.nnodes": "family (devices)",
    "trainer.n_gpus_per_node": "family (devices)",
    "trainer.logger": None,
    "trainer.project_name": None,
    "trainer.experiment_name": None,
    "trainer.rollout_data_dir": None,
    "trainer.validation_data_dir": None,
    "trainer.val_before_train": "evaluation",
    "trainer.val_only": None,
    "trainer.test_freq": "evaluation",
    "trainer.save_freq": "fidelity.rungs",
    "trainer.max_actor_ckpt_to_keep": None,
    "trainer.default_local_dir": "tracking.workspace",
    "trainer.default_hdfs_dir": None,
    "trainer.del_local_ckpt_after_load": None,
    "trainer.resume_mode": None,
    "trainer.resume_from_path": None,
    "ray_kwargs.ray_init.include_dashboard": None,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": "trainer.settings.workers",
}
"""What jfhpo sets, or must leave as it is, for what it measures to be what was asked for; with what sets it instead."""


def refuse_owned(name: str) -> None:
    """Whether an option may be set by a study.

    Args:
        name: In Hydra's notation.

    Raises:
        ValueError: It may not.
    """
    if NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no hyperparameter, and no option of verl either: those have dots in their names")
    plain = name.lstrip("+")
    for owned, instead in OWNED.items():
        if plain == owned or plain.startswith(f"{owned}.") or owned.startswith(f"{plain}."):
            remedy = f"set {instead}" if instead else "leave it out"
            raise ValueError(f"option {name!r} of verl cannot be set here, because jfhpo sets {owned}; {remedy}")
