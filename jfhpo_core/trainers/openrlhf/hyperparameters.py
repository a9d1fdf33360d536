"""The hyperparameters of an OpenRLHF training, under the names that all trainers share, and what they mean to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jfhpo_core.study.hyperparameters import DEFAULT_PROMPTS_PER_STEP
from jfhpo_core.trainers.openrlhf.options import check_options

Algorithm = Literal["grpo", "dapo", "bnpo", "dr_grpo", "gspo", "rloo", "reinforce", "reinforce_baseline", "ppo"]
Estimator = Literal["k1", "k2", "k3"]
Scheduler = Literal["constant", "cosine", "linear", "cosine_with_min_lr"]


@dataclass(frozen=True)
class Recipe:
    """What an algorithm is to OpenRLHF.

    Attributes:
        estimator: `--algo.advantage.estimator`.
        aggregation: `--actor.loss_agg_mode`.
        policy_loss: `--actor.policy_loss_type`.
        kl_in_loss: Whether the KL penalty is a term of the loss; else it is taken off the reward of every token.
        kl_estimator: Estimator of the KL unless the configuration names one.
        critic: Whether a value model is trained beside the policy.
        groups: Whether advantages compare completions of one prompt, so that it takes two at least.
    """

    estimator: str
    aggregation: str
    policy_loss: str = "ppo"
    kl_in_loss: bool = True
    kl_estimator: Estimator = "k3"
    critic: bool = False
    groups: bool = True


TOKENS, SEQUENCES = "token-mean", "seq-mean-token-mean"

RECIPES: dict[Algorithm, Recipe] = {
    # arXiv 2402.03300: completions weigh alike, whatever their length.
    "grpo": Recipe("group_norm", SEQUENCES),
    # arXiv 2503.14476, but for its dynamic sampling: tokens weigh alike. Set clip_high above clip_low.
    "dapo": Recipe("group_norm", TOKENS),
    # The same loss under TRL's name for it.
    "bnpo": Recipe("group_norm", TOKENS),
    # arXiv 2503.20783: no division by the group's standard deviation.
    "dr_grpo": Recipe("dr_grpo", TOKENS),
    # arXiv 2507.18071: the probability ratio of whole completions; clip ranges are about a thousand times smaller.
    "gspo": Recipe("group_norm", SEQUENCES, policy_loss="gspo"),
    # arXiv 2402.14740.
    "rloo": Recipe("rloo", TOKENS, kl_in_loss=False, kl_estimator="k1"),
    # REINFORCE++ (arXiv 2501.03262), and its variant with the group's mean as baseline.
    "reinforce": Recipe("reinforce", TOKENS, kl_in_loss=False, kl_estimator="k1", groups=False),
    "reinforce_baseline": Recipe("reinforce_baseline", TOKENS, kl_estimator="k2"),
    # arXiv 1707.06347 with generalized advantage estimation.
    "ppo": Recipe("gae", TOKENS, kl_in_loss=False, kl_estimator="k1", critic=True, groups=False),
}

SCHEDULERS: dict[Scheduler, str] = {
    "constant": "constant_with_warmup",
    "cosine": "cosine",
    "linear": "linear",
    "cosine_with_min_lr": "cosine_with_min_lr",
}
"""Our names to those of transformers."""


class OpenRlhfHyperparameters(BaseModel):
    """Hyperparameters of trainer `openrlhf`, and any option of `OPTIONS` by its dotted name.

    Those that other trainers have, too, mean the same there.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    learning_rate: float = Field(default=1e-6, gt=0, le=1, description="Peak learning rate of AdamW.")
    scheduler: Scheduler = Field(default="constant", description="Learning-rate schedule over the full horizon.")
    min_lr_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Where scheduler `cosine_with_min_lr` ends, relative to the peak."
    )
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="Share of the horizon spent on linear warm-up.")
    kl_coefficient: float = Field(
        default=0.001,
        ge=0,
        description="Weight of the KL penalty; with 0 there is no reference, and no KL to measure.",
    )
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        default="auto", description="'auto': what the algorithm's authors use."
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="Lower clip range of the probability ratio.")
    clip_high: float = Field(default=0.2, gt=0, description="Upper clip range of the probability ratio.")
    dual_clip: float = Field(default=0.0, ge=0, description="Bound on the loss of bad tokens, above 1; 0: none.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping threshold (L2 norm).")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    entropy_coefficient: float = Field(default=0.0, ge=0, description="Weight of an entropy bonus.")
    n_samples: int = Field(default=8, ge=1, description="Completions sampled per prompt (group size).")
    prompts_per_step: int = Field(
        default=DEFAULT_PROMPTS_PER_STEP, ge=1, description="Prompts per training step (rollout batch)."
    )
    mini_batches: int = Field(
        default=1, ge=1, description="Optimizer updates per step; with one, the clip range has no effect."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the completions of a step.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of the rollouts.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the rollouts' sampling.")
    loss_type: Algorithm = Field(default="grpo", description="Algorithm: loss and advantage estimator.")
    critic_learning_rate: float = Field(default=9e-6, gt=0, le=1, description="Of PPO's value model.")
    value_clip: float = Field(default=0.5, gt=0, description="Clip range of PPO's value loss.")
    gae_lambda: float = Field(default=1.0, ge=0, le=1, description="PPO: lambda of the advantage estimation.")

    @property
    def recipe(self) -> Recipe:
        """What the algorithm is to OpenRLHF."""
        return RECIPES[self.loss_type]

    @property
    def estimator(self) -> Estimator:
        """Estimator of the KL."""
        return self.recipe.kl_estimator if self.kl_estimator == "auto" else self.kl_estimator

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.prompts_per_step * self.n_samples

    @property
    def extra(self) -> dict[str, Any]:
        """Options of OpenRLHF's command line among them, by dotted name."""
        return self.model_extra or {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: dict[str, Any]) -> dict[str, Any]:
        names = values.keys() - cls.model_fields.keys()
        for name in sorted(names):
            if "." not in name:
                raise ValueError(f"{name!r} is no hyperparameter; these are {', '.join(cls.model_fields)}")
        check_options({name: values[name] for name in names})
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.recipe.groups and self.n_samples < 2:
            raise ValueError(
                f"loss_type {self.loss_type!r} compares completions of one prompt, so n_samples={self.n_samples} would "
                "train nothing; use 2 or more, or loss_type reinforce or ppo"
            )
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip:g} is neither 0 (off) nor above 1")
        if self.recipe.kl_in_loss and self.kl_estimator == "k1":
            raise ValueError(
                f"kl_estimator k1 has no gradient as a term of the loss, where loss_type {self.loss_type!r} puts "
                "the KL; use k2 or k3"
            )
        if self.completions % self.mini_batches:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} x n_samples={self.n_samples} = {self.completions} "
                f"completions cannot be parted into mini_batches={self.mini_batches} equal updates; change one of "
                "the three"
            )
        return self

    def ineffective(self) -> dict[str, str]:
        """Hyperparameters that change nothing in this configuration, each with the reason."""
        notes: dict[str, str] = {}
        if self.mini_batches == 1 and self.epochs == 1:
            why = "one update per step is made on the very policy that sampled, so no ratio ever leaves the clip range"
            notes |= dict.fromkeys(("clip_low", "clip_high", "dual_clip"), why)
        if self.loss_type != "ppo":
            why = f"loss_type {self.loss_type!r} trains no value model"
            notes |= dict.fromkeys(("critic_learning_rate", "value_clip", "gae_lambda"), why)
        if self.scheduler != "cosine_with_min_lr":
            notes["min_lr_ratio"] = f"scheduler {self.scheduler!r} does not use it"
        if self.kl_coefficient == 0:
            notes["kl_estimator"] = "kl_coefficient is 0, so no KL is estimated"
        return notes
