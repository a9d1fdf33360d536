"""What a study may set of trainer `verl`: the section `trainer.settings`, and its hyperparameters."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.trainers.external.settings import ExternalSettings
from jfhpo_core.trainers.verl.options import Option, refuse_owned

Algorithm = Literal["grpo", "dapo", "bnpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline", "ppo"]

WITHOUT_GROUPS = ("reinforce", "ppo")
"""Algorithms that compare no completions of one prompt."""

PYTHON_VARIABLE = "JFHPO_VERL_PYTHON"
"""Environment variable with verl's Python, for studies that do not name it."""


class VerlSettings(ExternalSettings):
    """Settings of trainer `verl`. Prompts are always given in the model's chat template: verl knows no other way."""

    python_variable: ClassVar[str] = PYTHON_VARIABLE
    optimizer_sleeps: ClassVar[bool] = False
    optimizer_on_host: ClassVar[bool] = False

    extra: dict[str, Option] = Field(
        default_factory=dict,
        description="Further options of verl's configuration, by dotted name; `+` in front of a name adds one.",
    )
    workers: int = Field(
        default=8,
        ge=1,
        description="Processes each that hold, generate and score samples; those that hold take a CPU.",
        json_schema_extra=OPERATIONAL,
    )

    @field_validator("extra")
    @classmethod
    def _not_owned(cls, extra: dict[str, Option]) -> dict[str, Option]:
        for name in extra:
            refuse_owned(name)
        return extra

    @property
    def layouts(self) -> tuple[tuple[int, bool], ...]:
        """See `ExternalSettings.layouts`. FSDP shares what ZeRO stage 3 shares."""
        return tuple((3, offload) for offload in (False, True) if self.offload_optimizer in (None, offload))


class VerlHyperparameters(Hyperparameters):
    """The hyperparameters that all trainers share, as far as verl has them, and any option of verl by dotted name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    scheduler: Literal["constant", "cosine"] = Field(
        default="constant", description="Learning-rate schedule over the full horizon."
    )
    n_samples: int = Field(default=8, ge=1, description="Completions sampled per prompt (group size).")
    # More of them than all trainers know.
    loss_type: Algorithm = Field(  # type: ignore[assignment]
        default="grpo", description="Algorithm: loss and advantage estimator."
    )
    critic_learning_rate: float = Field(default=9e-6, gt=0, le=1, description="Of PPO's value model.")
    value_clip: float = Field(default=0.5, gt=0, description="Clip range of PPO's value loss.")
    gae_lambda: float = Field(default=1.0, ge=0, le=1, description="PPO: lambda of the advantage estimation.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values.keys() - cls.model_fields.keys():
            if name.startswith("+"):
                raise ValueError(f"{name}: what verl's configuration lacks is set in trainer.settings.extra")
            refuse_owned(name)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.n_samples < 2 and self.loss_type not in WITHOUT_GROUPS:
            raise ValueError(
                f"loss_type {self.loss_type!r} compares completions of one prompt, so n_samples={self.n_samples} would "
                "train nothing; use 2 or more, or loss_type reinforce or ppo"
            )
        if self.prompts_per_step % self.mini_batches:
            raise ValueError(
                f"verl parts a step by its prompts, and prompts_per_step={self.prompts_per_step} is no multiple of "
                f"mini_batches={self.mini_batches}; change one of the two"
            )
        return self

    @property
    def trains_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.loss_type == "ppo"

    @property
    def extra(self) -> dict[str, Any]:
        """Options of verl among them, by dotted name."""
        return self.model_extra or {}
