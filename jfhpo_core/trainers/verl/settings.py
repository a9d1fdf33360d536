"""What a study may set of trainer `verl`: the section `trainer.settings`, and its hyperparameters."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.trainers.verl.options import Option, refuse_owned

PYTHON_VARIABLE = "JFHPO_VERL_PYTHON"
"""Environment variable with verl's Python, for studies that do not name it."""


class VerlSettings(BaseModel):
    """Settings of trainer `verl`. Prompts are always given in the model's chat template: verl knows no other way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str | None = Field(
        default=None,
        description=f"Python of verl's environment, the same path on every node; None: ${PYTHON_VARIABLE}.",
        json_schema_extra=OPERATIONAL,
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="'cpu' runs the same trainer on CPUs by a shim: for tests, with tiny models."
    )
    extra: dict[str, Option] = Field(
        default_factory=dict,
        description="Further options of verl's configuration, by dotted name; `+` in front of a name adds one.",
    )
    max_prompt_tokens: int = Field(default=1024, ge=1, description="A longer prompt ends the trial with an error.")
    gpus_per_node: int = Field(
        default=8, ge=1, description="GPUs of a node; a training stays within one.", json_schema_extra=OPERATIONAL
    )
    gpu_memory_gib: float = Field(
        default=80.0, gt=0, description="Memory of one GPU, for the placement.", json_schema_extra=OPERATIONAL
    )
    tensor_parallel: int | None = Field(
        default=None, ge=1, description="GPUs per vLLM engine; None: few.", json_schema_extra=OPERATIONAL
    )
    vllm_memory_share: float | None = Field(
        default=None, gt=0, lt=1, description="None: from the placement.", json_schema_extra=OPERATIONAL
    )
    attention: str = Field(
        default="sdpa",
        description="Implementation of attention in training. flash_attention_2 needs package flash-attn, and packs "
        "completions without padding: faster.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="vLLM without CUDA graphs: starts faster, samples slower.",
        json_schema_extra=OPERATIONAL,
    )
    workers: int = Field(
        default=8,
        ge=1,
        description="Processes each that hold, generate and score samples; those that hold take a CPU.",
        json_schema_extra=OPERATIONAL,
    )
    gradient_checkpointing: bool = Field(
        default=True, description="Save memory by computing activations twice.", json_schema_extra=OPERATIONAL
    )
    startup_seconds: float = Field(
        default=1800.0, gt=0, description="Silence allowed before the second step.", json_schema_extra=OPERATIONAL
    )
    hang_seconds: float = Field(
        default=900.0, gt=0, description="Silence always allowed later.", json_schema_extra=OPERATIONAL
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Further environment variables of verl.", json_schema_extra=OPERATIONAL
    )

    @field_validator("extra")
    @classmethod
    def _not_owned(cls, extra: dict[str, Option]) -> dict[str, Option]:
        for name in extra:
            refuse_owned(name)
        return extra

    @property
    def interpreter(self) -> str | None:
        """Verl's Python, if any is named."""
        return self.python or os.environ.get(PYTHON_VARIABLE) or None


class VerlHyperparameters(Hyperparameters):
    """The hyperparameters that all trainers share, as far as verl has them, and any option of verl by dotted name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    scheduler: Literal["constant", "cosine"] = Field(
        default="constant", description="Learning-rate schedule over the full horizon."
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values.keys() - cls.model_fields.keys():
            if name.startswith("+"):
                raise ValueError(f"{name}: what verl's configuration lacks is set in trainer.settings.extra")
            refuse_owned(name)
        return values

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.prompts_per_step % self.mini_batches:
            raise ValueError(
                f"verl parts a step by its prompts, and prompts_per_step={self.prompts_per_step} is no multiple of "
                f"mini_batches={self.mini_batches}; change one of the two"
            )
        return self

    @property
    def extra(self) -> dict[str, Any]:
        """Options of verl among them, by dotted name."""
        return self.model_extra or {}
