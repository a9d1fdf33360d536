"""What trainers in processes of their own have in common in the section `trainer.settings`."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from jfhpo_core.study.operational import OPERATIONAL


class ExternalSettings(BaseModel):
    """Where and how such a trainer runs: its environment, its GPUs, its patience."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python_variable: ClassVar[str]
    """Environment variable with the trainer's Python, for studies that do not name it."""

    python: str | None = Field(
        default=None,
        description="Python of the trainer's environment, the same path on every node; None: from the trainer's "
        "environment variable.",
        json_schema_extra=OPERATIONAL,
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="'cpu' runs the same trainer on CPUs by a shim: for tests, with tiny models."
    )
    jobs_address: str | None = Field(
        default=None,
        description="Submit every run to this Ray cluster as a job (http://HEAD:8265): for runs over several "
        "nodes. None: a run is a group of processes on the node of its worker, with the GPUs that Ray gave it.",
        json_schema_extra=OPERATIONAL,
    )
    asynchronous: bool = Field(
        default=False,
        description="Generate the next rollouts during training, on GPUs of their own: faster, one step off-policy. A "
        "trial that a rule stops is then not evaluated at that very step.",
    )
    gpus_per_node: int = Field(
        default=8, ge=1, description="Largest part of a run that stays on one node.", json_schema_extra=OPERATIONAL
    )
    gpu_memory_gib: float = Field(
        default=80.0, gt=0, description="Memory of one GPU, for the placement.", json_schema_extra=OPERATIONAL
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Completions that go through the model at once, per GPU; None: by their length.",
    )
    zero_stage: Literal[2, 3] | None = Field(
        default=None, description="None: the lowest that fits into memory.", json_schema_extra=OPERATIONAL
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

    @property
    def interpreter(self) -> str | None:
        """The trainer's Python, if any is named."""
        return self.python or os.environ.get(self.python_variable) or None
