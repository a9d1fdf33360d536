"""What trainers in processes of their own have in common in the section `trainer.settings`."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from jfhpo_core.study.operational import OPERATIONAL

PER_MODEL = frozenset(
    {
        "enforce_eager", "gradient_checkpointing", "micro_batch", "offload_optimizer", "tensor_parallel",
        "vllm_memory_share", "zero_stage",
    }
)  # fmt: skip
"""Settings that may differ between the models of a family: they decide about memory and speed, not about results."""


class ExternalSettings(BaseModel):
    """Where and how such a trainer runs: its environment, its GPUs, its patience."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python_variable: ClassVar[str]
    """Environment variable with the trainer's Python, for studies that do not name it."""

    optimizer_sleeps: ClassVar[bool]
    """Whether the optimizer leaves the GPUs while vLLM samples, offloaded or not."""

    optimizer_on_host: ClassVar[bool]
    """Whether an offloaded optimizer is not brought back to the GPUs for updates."""

    python: str | None = Field(
        default=None,
        description="Python of the trainer's environment, the same path on every node; None: from the trainer's "
        "environment variable.",
        json_schema_extra=OPERATIONAL,
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="'cpu' runs the same trainer on CPUs by a shim: for tests, with tiny models."
    )
    max_prompt_tokens: int = Field(default=1024, ge=1, description="A longer prompt ends the trial with an error.")
    gpus_per_node: int = Field(default=8, ge=1, description="GPUs of a node.", json_schema_extra=OPERATIONAL)
    gpu_memory_gib: float = Field(
        default=80.0, gt=0, description="Memory of one GPU, for the placement.", json_schema_extra=OPERATIONAL
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Completions that go through the model at once, per GPU; None: by their length.",
    )
    offload_optimizer: bool | None = Field(
        default=None, description="Optimizer in host memory; None: if it must be.", json_schema_extra=OPERATIONAL
    )
    tensor_parallel: int | None = Field(
        default=None,
        ge=1,
        description="GPUs per vLLM engine; None: as few as hold the model.",
        json_schema_extra=OPERATIONAL,
    )
    vllm_memory_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of a GPU's memory for vLLM; None: from the placement.",
        json_schema_extra=OPERATIONAL,
    )
    gradient_checkpointing: bool = Field(
        default=True, description="Save memory by computing activations twice.", json_schema_extra=OPERATIONAL
    )
    attention: str = Field(
        default="sdpa",
        description="Implementation of attention in training (GPU): 'sdpa' is torch's own, 'flash_attention_2' needs "
        "flash-attn in the environment.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="vLLM without CUDA graphs: starts faster, samples slower.",
        json_schema_extra=OPERATIONAL,
    )
    models: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Other values for single models of the family, e.g. {small: {gradient_checkpointing: false}}.",
        json_schema_extra=OPERATIONAL,
    )
    startup_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="A run counts as hung if it is silent for this time before its second step.",
        json_schema_extra=OPERATIONAL,
    )
    hang_seconds: float = Field(
        default=900.0,
        gt=0,
        description="So does one that is silent for this time, and for 20 of its own steps, later.",
        json_schema_extra=OPERATIONAL,
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Further environment variables of the trainer, e.g. NCCL_SOCKET_IFNAME.",
        json_schema_extra=OPERATIONAL,
    )

    @field_validator("models")
    @classmethod
    def _valid_for_models(cls, models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, own in models.items():
            for field in own:
                if field not in PER_MODEL or field not in cls.model_fields:
                    known = ", ".join(sorted(PER_MODEL & cls.model_fields.keys()))
                    raise ValueError(f"{name}.{field} cannot differ between models; what can: {known}")
            cls.model_validate(own)
        return models

    def of_model(self, name: str) -> Self:
        """The settings as they apply to a model of the family."""
        own = self.models.get(name, {})
        valid = type(self).model_validate(own)
        return self.model_copy(update={field: getattr(valid, field) for field in own})

    @property
    def interpreter(self) -> str | None:
        """The trainer's Python, if any is named."""
        return self.python or os.environ.get(self.python_variable) or None

    @property
    def layouts(self) -> tuple[tuple[int, bool], ...]:
        """Ways to share a model among GPUs, cheapest first: ZeRO stage, and whether the optimizer is offloaded."""
        raise NotImplementedError

    @property
    def apart(self) -> bool:
        """Whether rollouts have GPUs of their own."""
        return False

    @property
    def jobs(self) -> str | None:
        """Ray cluster that runs are submitted to as jobs."""
        return None
