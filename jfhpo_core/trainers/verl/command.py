"""From a trial to verl's command line: Hydra overrides, in which nothing of consequence is left to defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jfhpo_core.trainers.base import Job
from jfhpo_core.trainers.external.placement import Placement
from jfhpo_core.trainers.verl.options import ACTOR, MODEL, ROLLOUT, Option
from jfhpo_core.trainers.verl.settings import Algorithm, VerlHyperparameters, VerlSettings

MAIN = Path(__file__).with_name("inside") / "main.py"
"""verl's main program, held after every step."""

Overrides = dict[str, Option]
"""By dotted name."""


@dataclass(frozen=True)
class Recipe:
    """What an algorithm is to verl.

    Attributes:
        estimator: `algorithm.adv_estimator`.
        aggregation: `loss_agg_mode`, of the loss over tokens.
        kl_in_loss: The KL penalty as a term of the loss, by its estimator; None: it is taken off the reward.
    """

    estimator: str
    aggregation: str = "token-mean"
    kl_in_loss: str | None = "low_var_kl"


RECIPES: dict[Algorithm, Recipe] = {
    "grpo": Recipe("grpo", "seq-mean-token-mean"),
    "dapo": Recipe("grpo"),
    "bnpo": Recipe("grpo"),
    "dr_grpo": Recipe("grpo", "seq-mean-token-sum-norm"),
    "rloo": Recipe("rloo", kl_in_loss=None),
    "reinforce": Recipe("reinforce_plus_plus", kl_in_loss=None),
    "reinforce_baseline": Recipe("reinforce_plus_plus_baseline", kl_in_loss="mse"),
    "ppo": Recipe("gae", kl_in_loss=None),
}
"""By what OpenRLHF's recipes mean; see `openrlhf/hyperparameters.py` for the papers."""

ON_CPU: Overrides = {
    "trainer.device": "cpu",
    f"{ROLLOUT}.enforce_eager": True,
    # vLLM's CPU build cannot sleep, and what it would free is not the trainer's.
    f"{ROLLOUT}.free_cache_engine": False,
    f"+{ROLLOUT}.enable_sleep_mode": False,
    # In the engine's own process: one fewer to start.
    f"+{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend": "uni",
    f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": 64,
}

DUAL_CLIP = 3.0
"""verl's default bound on the loss of bad tokens."""


class VerlFiles:
    """Where a run reads and writes.

    Args:
        folder: What stays.
        work: What goes with the segment.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.prompts = folder / "prompts.parquet"
        self.heldout = folder / "heldout.parquet"
        self.reward = folder / "reward.py"
        self.plan = folder / "plan.json"
        self.control = folder / "control.json"
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
    recipe = RECIPES[chosen.loss_type]
    in_loss = recipe.kl_in_loss is not None and chosen.kl_coefficient > 0
    completion_tokens = job.study.task.max_completion_tokens
    overrides: Overrides = {
        f"{MODEL}.path": job.model_path,
        f"{MODEL}.enable_gradient_checkpointing": settings.gradient_checkpointing,
        f"{MODEL}.use_remove_padding": settings.attention.startswith("flash_attention"),
        f"+{MODEL}.override_config.attn_implementation": settings.attention,
        "data.train_files": str(files.prompts),
        "data.val_files": str(files.heldout),
        "data.train_batch_size": chosen.prompts_per_step,
        "data.max_prompt_length": settings.max_prompt_tokens,
        "data.max_response_length": completion_tokens,
        "data.shuffle": False,  # the file is in the order of the seed
        "data.truncation": "error",
        "data.dataloader_num_workers": settings.workers,
        "reward.custom_reward_function.path": str(files.reward),
        "reward.custom_reward_function.name": "compute_score",
        "reward.num_workers": settings.workers,
        "algorithm.adv_estimator": recipe.estimator,
        "algorithm.gamma": 1.0,
        "algorithm.lam": chosen.gae_lambda,
        "algorithm.norm_adv_by_std_in_grpo": chosen.loss_type != "dr_grpo",
        "algorithm.use_kl_in_reward": chosen.kl_coefficient > 0 and not in_loss,
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.kl_coef": chosen.kl_coefficient,
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.use_kl_loss": in_loss,
        f"{ACTOR}.kl_loss_coef": chosen.kl_coefficient,
        f"{ACTOR}.kl_loss_type": recipe.kl_in_loss or "low_var_kl",
        f"{ACTOR}.loss_agg_mode": recipe.aggregation,
        f"{ACTOR}.clip_ratio": chosen.clip_low,
        f"{ACTOR}.clip_ratio_low": chosen.clip_low,
        f"{ACTOR}.clip_ratio_high": chosen.clip_high,
        f"{ACTOR}.clip_ratio_c": DUAL_CLIP,
        f"{ACTOR}.entropy_coeff": 0.0,
        f"{ACTOR}.calculate_entropy": True,
        f"{ACTOR}.grad_clip": chosen.max_grad_norm,
        f"{ACTOR}.ppo_epochs": 1,
        # In prompts.
        f"{ACTOR}.ppo_mini_batch_size": chosen.prompts_per_step // chosen.mini_batches,
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": placement.tokens,
        f"{ACTOR}.optim.lr": chosen.learning_rate,
        f"{ACTOR}.optim.lr_scheduler_type": chosen.scheduler,
        f"{ACTOR}.optim.lr_warmup_steps_ratio": chosen.warmup_ratio,
        f"{ACTOR}.optim.weight_decay": chosen.weight_decay,
        f"{ACTOR}.data_loader_seed": job.seed,
        f"{ACTOR}.fsdp_config.param_offload": placement.offload_optimizer,
        f"{ACTOR}.fsdp_config.optimizer_offload": placement.offload_optimizer,
        f"{ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.agent.num_workers": settings.workers,
        f"{ROLLOUT}.enforce_eager": settings.enforce_eager,
        f"{ROLLOUT}.n": chosen.n_samples,
        f"{ROLLOUT}.temperature": chosen.temperature,
        f"{ROLLOUT}.tensor_model_parallel_size": placement.tensor_parallel,
        f"{ROLLOUT}.gpu_memory_utilization": placement.vllm_memory_share,
        f"{ROLLOUT}.val_kwargs.do_sample": True,
        f"{ROLLOUT}.val_kwargs.temperature": job.study.evaluation.temperature,
        f"{ROLLOUT}.val_kwargs.top_p": 1.0,
        f"{ROLLOUT}.val_kwargs.n": job.study.evaluation.samples_per_prompt,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": job.total_steps,
        "trainer.nnodes": placement.nodes,
        "trainer.n_gpus_per_node": placement.gpus_per_node,
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "jfhpo",
        "trainer.experiment_name": job.trial_key,
        "trainer.rollout_data_dir": str(files.rollouts),
        "trainer.validation_data_dir": str(files.validations),
        # The driver asks for evaluations, but for the one of the last step, which nothing follows.
        "trainer.val_before_train": False,
        "trainer.test_freq": job.total_steps,
        "trainer.save_freq": job.segment.stop_step,
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.default_local_dir": str(files.checkpoints),
        "trainer.resume_mode": "disable" if fresh else "auto",
        "+ray_kwargs.ray_init.include_dashboard": False,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": settings.workers,
    }
    if chosen.trains_critic:
        overrides |= _critic(job, settings, placement, chosen)
    return overrides | (ON_CPU if settings.device == "cpu" else {}) | settings.extra | chosen.extra


def _critic(job: Job, settings: VerlSettings, placement: Placement, chosen: VerlHyperparameters) -> Overrides:
    """PPO's value model: as the policy, but for its learning rate. What is left out it takes from the policy's."""
    return {
        "critic.enable": True,
        "critic.strategy": "fsdp2",
        "critic.model.path": job.model_path,
        "critic.model.enable_gradient_checkpointing": settings.gradient_checkpointing,
        "critic.model.use_remove_padding": settings.attention.startswith("flash_attention"),
        "+critic.model.override_config.attn_implementation": settings.attention,
        "critic.ppo_max_token_len_per_gpu": placement.tokens,
        "critic.cliprange_value": chosen.value_clip,
        "critic.grad_clip": chosen.max_grad_norm,
        "critic.data_loader_seed": job.seed,
        "critic.optim.lr": chosen.critic_learning_rate,
        "critic.optim.lr_scheduler_type": chosen.scheduler,
        "critic.optim.lr_warmup_steps_ratio": chosen.warmup_ratio,
        "critic.optim.weight_decay": chosen.weight_decay,
        "critic.fsdp.param_offload": placement.offload_optimizer,
        "critic.fsdp.optimizer_offload": placement.offload_optimizer,
        "trainer.critic_warmup": 0,
        "trainer.max_critic_ckpt_to_keep": 2,
    }


def to_argv(overrides: Overrides) -> list[str]:
    """Arguments in Hydra's notation."""
    return [f"{name}={_text(value)}" for name, value in overrides.items()]


def _text(value: Option) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    # Quoted, so that no character of a path has a meaning.
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
