"""The hyperparameters of LLM reinforcement learning under one set of names, and the default spaces over them.

Sources of the bounds: recipes of VeRL, OpenRLHF and TRL. A trainer may know more names, or refuse some of these.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LossType = Literal["grpo", "dapo", "dr_grpo", "bnpo", "rloo"]
Scheduler = Literal["constant", "cosine", "linear"]


DEFAULT_PROMPTS_PER_STEP = 16
"""Prompts per step, in all trainers, where a study does not say."""


class Hyperparameters(BaseModel):
    """Hyperparameters that every trainer of the GRPO family understands, with the field's usual defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(default=1e-6, gt=0, le=1, description="Peak learning rate of AdamW.")
    scheduler: Scheduler = Field(default="constant", description="Learning-rate schedule over the full horizon.")
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="Share of the horizon spent on linear warm-up.")
    kl_coefficient: float = Field(default=0.001, ge=0, description="Weight of the KL penalty to the reference model.")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="Lower clip range of the probability ratio.")
    clip_high: float = Field(default=0.2, gt=0, description="Upper clip range of the probability ratio.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping threshold (L2 norm).")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    n_samples: int = Field(default=8, ge=2, description="Completions sampled per prompt (group size).")
    prompts_per_step: int = Field(
        default=DEFAULT_PROMPTS_PER_STEP, ge=1, description="Prompts per training step (rollout batch)."
    )
    mini_batches: int = Field(
        default=1, ge=1, description="Optimizer updates per step; with one, the clip range has no effect."
    )
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of the rollouts.")
    loss_type: LossType = Field(default="grpo", description="Loss and advantage estimator.")


def default_spaces() -> dict[str, dict[str, dict[str, object]]]:
    """Named spaces that a study file may ask for instead of spelling one out.

    `llm` is for models of 0.5B parameters and more; `tiny` for the embedded families (0.1M to 2M parameters), whose
    learning rates lie three orders of magnitude higher.
    """
    shared: dict[str, dict[str, object]] = {
        "scheduler": {"type": "choice", "values": ["constant", "cosine"]},
        "clip_high": {"type": "float", "low": 0.1, "high": 0.4, "shifts_with_size": True},
        "max_grad_norm": {"type": "float", "low": 0.1, "high": 2.0, "log": True},
    }
    llm: dict[str, dict[str, object]] = {
        "learning_rate": {"type": "float", "low": 1e-7, "high": 1e-5, "log": True, "shifts_with_size": True},
        "kl_coefficient": {"type": "float", "low": 1e-5, "high": 3e-2, "log": True, "zero": True},
        **shared,
        "n_samples": {"type": "choice", "values": [4, 8, 16]},
        "temperature": {"type": "float", "low": 0.6, "high": 1.2},
    }
    tiny: dict[str, dict[str, object]] = {
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True, "shifts_with_size": True},
        "kl_coefficient": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True, "zero": True},
        **shared,
        "n_samples": {"type": "choice", "values": [4, 8, 16]},
        "mini_batches": {"type": "choice", "values": [1, 2, 4]},
    }
    return {"llm": llm, "tiny": tiny}
