"""The settings of the `trl` trainer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.study.prompting import Bos


class LoraSettings(BaseModel):
    """Train low-rank adapters (LoRA, arXiv 2106.09685) instead of all weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0, description="Adapters are scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear",
        description="Names of the adapted modules; 'all-linear' is every linear layer but the head.",
    )


class VllmSettings(BaseModel):
    """Sample rollouts by vLLM engines that share the GPUs of the run (TRL's mode `colocate`).

    Held-out completions are sampled by transformers all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_share: float = Field(default=0.3, gt=0, lt=1, description="Share of a GPU's memory for its engine.")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs per engine; divides the model's devices.")
    sleep: bool = Field(default=False, description="Free the engine's memory while the model is trained.")


class TrlSettings(BaseModel):
    """The section `trainer.settings` of a study with trainer `trl`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora: LoraSettings | None = Field(default=None, description="None trains all weights.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision of the computation. The trained weights stay in float32 in both cases: in bfloat16 the "
        "updates of a usual learning rate would vanish.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="'auto' takes a GPU if there is one.", json_schema_extra=OPERATIONAL
    )
    threads: int = Field(
        default=1, ge=1, description="CPU threads of a trial, per device.", json_schema_extra=OPERATIONAL
    )
    vllm: VllmSettings | None = Field(
        default=None, description="Sample rollouts by vLLM, on GPUs; None: by transformers."
    )
    python: str | None = Field(
        default=None,
        description="Python of an environment with jfhpo, TRL and vLLM, for runs in processes of their own (several "
        "devices, or vLLM): vLLM does not live beside Prefect. The same path on every node; None: jfhpo's own.",
        json_schema_extra=OPERATIONAL,
    )
    generation_batch: int = Field(default=512, ge=1, description="At most this many completions are sampled at once.")
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="At most this many completions go through the model at once in training; None: a whole mini-batch.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Save memory by computing activations twice.", json_schema_extra=OPERATIONAL
    )
    chat_template: bool = Field(
        default=False, description="Give prompts to the model as a user's message, in the model's chat template."
    )
    bos: Bos = Field(
        default="tokenizer",
        description="Whether text prompts begin with the beginning-of-text token: as the tokenizer adds it or not, "
        "'always' or 'never'. Chat templates have their own.",
    )
