"""From a trial to verl's command line: Hydra overrides, in which nothing of consequence is left to defaults."""

from __future__ import annotations

import json
from pathlib import Path

from jfhpo_core.trainers.base import Job
from jfhpo_core.trainers.external.placement import Placement
from jfhpo_core.trainers.openrlhf.command import evaluation_interval
from jfhpo_core.trainers.verl.settings import VerlHyperparameters, VerlSettings

MODULE = "verl.trainer.main_ppo"

Override = bool | int | float | str | list[str] | None
Overrides = dict[str, Override]
"""By dotted name."""

AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "rloo": "token-mean",
}
"""Of the loss over tokens, by algorithm."""

TOKENS_PER_GPU = 16_384
"""Tokens that go through the model at once."""

DUAL_CLIP = 3.0
"""verl's default bound on the loss of bad tokens."""


class VerlFiles:
    """Where a training reads and writes.

    Args:
        folder: What stays.
        work: What goes with the segment.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.prompts = folder / "prompts.parquet"
        self.heldout = folder / "heldout.parquet"
        self.reward = folder / "reward.py"
        self.plan = folder / "plan.json"
        self.metrics = folder / "metrics.jsonl"
        self.log = folder / "train.log"
        self.rollouts = folder / "rollouts"
        self.validations = folder / "validations"
        self.checkpoints = work / "checkpoints"


def build_overrides(
    job: Job, settings: VerlSettings, placement: Placement, files: VerlFiles, *, fresh: bool
) -> Overrides:
    """The overrides of a segment. The full horizon stands in every segment's command, as with OpenRLHF."""
    chosen = VerlHyperparameters.model_validate(job.configuration)
    in_reward = chosen.loss_type == "rloo" and chosen.kl_coefficient > 0
    actor, rollout, model = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
    completion_tokens = job.study.task.max_completion_tokens
    tokens = max(TOKENS_PER_GPU, settings.max_prompt_tokens + completion_tokens)
    overrides: Overrides = {
        f"{model}.path": job.model_path,
        f"{model}.enable_gradient_checkpointing": settings.gradient_checkpointing,
        "data.train_files": str(files.prompts),
        "data.val_files": str(files.heldout),
        "data.train_batch_size": chosen.prompts_per_step,
        "data.max_prompt_length": settings.max_prompt_tokens,
        "data.max_response_length": completion_tokens,
        "data.shuffle": False,  # the file is in the order of the seed
        "data.truncation": "error",
        "reward.custom_reward_function.path": str(files.reward),
        "reward.custom_reward_function.name": "compute_score",
        "algorithm.adv_estimator": "rloo" if chosen.loss_type == "rloo" else "grpo",
        "algorithm.norm_adv_by_std_in_grpo": chosen.loss_type != "dr_grpo",
        "algorithm.use_kl_in_reward": in_reward,
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.kl_coef": chosen.kl_coefficient,
        f"{actor}.use_kl_loss": chosen.kl_coefficient > 0 and not in_reward,
        f"{actor}.kl_loss_coef": chosen.kl_coefficient,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.loss_agg_mode": AGGREGATION[chosen.loss_type],
        f"{actor}.clip_ratio": chosen.clip_low,
        f"{actor}.clip_ratio_low": chosen.clip_low,
        f"{actor}.clip_ratio_high": chosen.clip_high,
        f"{actor}.clip_ratio_c": DUAL_CLIP,
        f"{actor}.entropy_coeff": 0.0,
        f"{actor}.calculate_entropy": True,
        f"{actor}.grad_clip": chosen.max_grad_norm,
        f"{actor}.ppo_epochs": 1,
        # In prompts.
        f"{actor}.ppo_mini_batch_size": chosen.prompts_per_step // chosen.mini_batches,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": tokens,
        f"{actor}.optim.lr": chosen.learning_rate,
        f"{actor}.optim.lr_scheduler_type": chosen.scheduler,
        f"{actor}.optim.lr_warmup_steps_ratio": chosen.warmup_ratio,
        f"{actor}.optim.weight_decay": chosen.weight_decay,
        f"{actor}.data_loader_seed": job.seed,
        f"{actor}.fsdp_config.param_offload": placement.offload_optimizer,
        f"{actor}.fsdp_config.optimizer_offload": placement.offload_optimizer,
        f"{actor}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{rollout}.name": "vllm",
        f"{rollout}.n": chosen.n_samples,
        f"{rollout}.temperature": chosen.temperature,
        f"{rollout}.tensor_model_parallel_size": placement.tensor_parallel,
        f"{rollout}.gpu_memory_utilization": placement.vllm_memory_share,
        f"{rollout}.val_kwargs.do_sample": True,
        f"{rollout}.val_kwargs.temperature": job.study.evaluation.temperature,
        f"{rollout}.val_kwargs.top_p": 1.0,
        f"{rollout}.val_kwargs.n": job.study.evaluation.samples_per_prompt,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": job.total_steps,
        "trainer.nnodes": placement.nodes,
        "trainer.n_gpus_per_node": placement.gpus_per_node,
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "jfhpo",
        "trainer.experiment_name": job.trial_key,
        "trainer.rollout_data_dir": str(files.rollouts),
        "trainer.validation_data_dir": str(files.validations),
        "trainer.val_before_train": fresh and 0 in job.evaluation_steps,
        "trainer.test_freq": evaluation_interval(job),
        "trainer.save_freq": job.segment.stop_step,
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.default_local_dir": str(files.checkpoints),
        "trainer.resume_mode": "disable" if fresh else "auto",
    }
    return overrides


def to_argv(overrides: Overrides) -> list[str]:
    """Arguments in Hydra's notation."""
    return [f"{name}={_text(value)}" for name, value in overrides.items()]


def _text(value: Override) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    # Quoted, so that no character of a path has a meaning.
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
