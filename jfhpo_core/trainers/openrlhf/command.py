"""From a trial to OpenRLHF's command line: a mapping of typed flags; nothing of consequence is left to defaults.

`tests/trainers/openrlhf/test_environment.py` parses the result with OpenRLHF's own parser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jfhpo_core.trainers.base import Job
from jfhpo_core.trainers.external.placement import Placement, micro_batch
from jfhpo_core.trainers.openrlhf.hyperparameters import SCHEDULERS, OpenRlhfHyperparameters
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings

MODULE = "openrlhf.cli.train_ppo_ray"

Flag = bool | int | float | str | tuple[float, ...] | tuple[str, ...] | None
Flags = dict[str, Flag]
"""By name without dashes. True is a bare flag; False and None leave it out; a tuple is several values."""

REWARD_BOUND = 1e6
"""OpenRLHF clips rewards at 10 by default; a task's reward is its own affair."""


@dataclass(frozen=True)
class Files:
    """Where a run reads and writes.

    Attributes:
        folder: What stays: plan, prompts, log, events.
        work: What goes with the segment: checkpoints.
    """

    folder: Path
    work: Path

    @property
    def prompts(self) -> Path:
        """Training rows of the full horizon."""
        return self.folder / "prompts.jsonl"

    @property
    def heldout(self) -> Path:
        """Held-out rows that are scored."""
        return self.folder / "heldout.jsonl"

    @property
    def agent(self) -> Path:
        """Our part of the rollouts."""
        return self.folder / "agent.py"

    @property
    def plan(self) -> Path:
        """What the agent must know."""
        return self.folder / "plan.json"

    @property
    def control(self) -> Path:
        """What the driver tells the agent."""
        return self.folder / "control.json"

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.folder / "train.log"

    @property
    def runtime(self) -> Path:
        """Environment of a Ray job."""
        return self.work / "runtime-env.yaml"

    @property
    def checkpoints(self) -> Path:
        """OpenRLHF's checkpoint folder."""
        return self.work / "checkpoints"


def final_segment(job: Job) -> bool:
    """Whether the segment ends with the run, so that nothing will continue from its checkpoint."""
    return job.segment.stop_step == job.total_steps


def evaluation_interval(job: Job) -> int:
    """Steps between OpenRLHF's evaluations: they fall on every step asked for (more often if rungs are uneven)."""
    return math.gcd(job.segment.stop_step, *(step for step in job.evaluation_steps if step > 0))


def build_flags(job: Job, settings: OpenRlhfSettings, placement: Placement, files: Files, *, resume: bool) -> Flags:
    """The flags of a segment.

    The full horizon stands in every segment's command, so that the learning-rate schedule is that of the whole
    training: OpenRLHF makes prompts x n_samples / batch_size x epochs updates of one pass over a file of
    `total_steps` x `prompts_per_step` prompts. Segments differ in where they save and evaluate.
    """
    chosen = OpenRlhfHyperparameters.model_validate(job.configuration)
    recipe = chosen.recipe
    on_cpu = settings.device == "cpu"
    completion_tokens = job.study.task.max_completion_tokens
    tokens = settings.max_prompt_tokens + completion_tokens
    batch = chosen.completions // chosen.mini_batches
    micro = micro_batch(placement, batch // placement.training_gpus, tokens)
    sleep = placement.colocated and not on_cpu
    flags: Flags = {
        "actor.model_name_or_path": job.model_path,
        "critic.model_name_or_path": job.model_path if recipe.critic else None,
        "train.agent_func_path": str(files.agent),
        # Data: one pass over the whole horizon.
        "data.prompt_dataset": str(files.prompts),
        "data.prompt_split": "train",
        "data.input_key": "input",
        "data.label_key": "label",
        "data.apply_chat_template": settings.chat_template,
        "data.max_len": tokens,
        "data.max_samples": 10**9,
        "train.num_episodes": 1,
        "train.seed": job.seed,
        # Rollouts.
        "rollout.batch_size": chosen.prompts_per_step,
        "rollout.vllm_generate_batch_size": chosen.prompts_per_step,
        "rollout.n_samples_per_prompt": chosen.n_samples,
        "rollout.max_new_tokens": completion_tokens,
        "rollout.temperature": chosen.temperature,
        "rollout.top_p": chosen.top_p,
        "rollout.micro_batch_size": micro,
        # Updates.
        "train.batch_size": batch,
        "train.micro_batch_size": micro,
        "train.max_epochs": chosen.epochs,
        "actor.optim": "adam",
        "actor.adam.lr": chosen.learning_rate,
        "actor.adam.betas": (0.9, 0.95),
        "actor.adam.eps": 1e-8,
        "actor.adam.weight_decay": chosen.weight_decay,
        "actor.lr_scheduler": SCHEDULERS[chosen.scheduler],
        "actor.lr_warmup_ratio": chosen.warmup_ratio,
        "actor.min_lr_ratio": chosen.min_lr_ratio,
        "actor.max_norm": chosen.max_grad_norm,
        "actor.eps_clip": chosen.clip_low,
        "actor.eps_clip_low_high": (chosen.clip_low, chosen.clip_high),
        "actor.dual_clip": chosen.dual_clip or None,
        "actor.policy_loss_type": recipe.policy_loss,
        "actor.loss_agg_mode": recipe.aggregation,
        "actor.entropy_coef": chosen.entropy_coefficient,  # also with 0: then the entropy is only measured
        "actor.aux_loss_coef": 0.0,
        "actor.gradient_checkpointing_enable": settings.gradient_checkpointing and not on_cpu,
        "algo.advantage.estimator": recipe.estimator,
        "algo.advantage.gamma": 1.0,
        "algo.advantage.lambd": chosen.gae_lambda,
        "algo.advantage.is_correction_level": "off",
        "algo.kl.init_coef": chosen.kl_coefficient,
        "algo.kl.use_loss": recipe.kl_in_loss and chosen.kl_coefficient > 0,
        "algo.kl.estimator": chosen.estimator,
        "reward.clip_range": (-REWARD_BOUND, REWARD_BOUND),
        # Placement. Every count defaults to 8 GPUs.
        **_placement_flags(placement),
        "train.colocate_all": True,
        "train.async_enable": settings.asynchronous,
        "vllm.sync_backend": "gloo" if on_cpu else "nccl",
        "vllm.enforce_eager": settings.enforce_eager or on_cpu,
        "vllm.enable_sleep": sleep,
        "vllm.enable_prefix_caching": not on_cpu,
        "vllm.gpu_memory_utilization": placement.vllm_memory_share,
        "ds.enable_sleep": sleep,
        "ds.zero_stage": placement.zero_stage,
        "ds.adam_offload": placement.offload_optimizer,
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": "eager" if on_cpu else settings.attention,
        "ds.tensor_parallel_size": 1,
        "ds.ring_attn_size": 1,
        # Evaluation and checkpoints.
        "eval.dataset": str(files.heldout),
        "eval.split": "train",
        "eval.steps": evaluation_interval(job),
        "eval.temperature": job.study.evaluation.temperature,
        "eval.n_samples_per_prompt": job.study.evaluation.samples_per_prompt,
        "ckpt.path": str(files.checkpoints),
        "ckpt.output_dir": str(files.work / "final"),
        "ckpt.save_steps": job.segment.stop_step,
        "ckpt.save_hf": True,
        "ckpt.disable_ds": final_segment(job),
        "ckpt.max_num": 2,
        "ckpt.best_metric_key": "none",
        "ckpt.load_enable": resume,
        "logger.logging_steps": 1,
        "logger.tensorboard_dir": str(files.folder / "tensorboard"),
        "logger.wandb.run_name": job.trial_key,
    }
    if recipe.critic:
        flags |= {
            "critic.optim": "adam",
            "critic.adam.lr": chosen.critic_learning_rate,
            "critic.adam.betas": (0.9, 0.95),
            "critic.lr_scheduler": SCHEDULERS[chosen.scheduler],
            "critic.lr_warmup_ratio": chosen.warmup_ratio,
            "critic.min_lr_ratio": chosen.min_lr_ratio,
            "critic.max_norm": chosen.max_grad_norm,
            "critic.value_clip": chosen.value_clip,
            "critic.freezing_steps": -1,
        }
    # Last: some of them have a default above.
    options = settings.extra | chosen.extra
    flags |= {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return flags


def _placement_flags(placement: Placement) -> Flags:
    flags: Flags = {
        "vllm.num_engines": placement.engines,
        "vllm.tensor_parallel_size": placement.tensor_parallel,
    }
    for part in ("actor", "ref", "critic", "reward"):
        flags |= {f"{part}.num_nodes": placement.nodes, f"{part}.num_gpus_per_node": placement.gpus_per_node}
    return flags


def to_argv(flags: Flags) -> list[str]:
    """Arguments after the program's name."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name}")
        if isinstance(value, tuple):
            argv += [_text(item) for item in value]
        elif value is not True:
            argv.append(_text(value))
    return argv


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else repr(value)
