"""The section `trainer.settings` of a study with trainer `openrlhf`: where and how it runs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.trainers.external.settings import ExternalSettings

PYTHON_VARIABLE = "JFHPO_OPENRLHF_PYTHON"


class OpenRlhfSettings(ExternalSettings):
    """Settings of trainer `openrlhf`."""

    python_variable: ClassVar[str] = PYTHON_VARIABLE

    chat_template: bool = Field(
        default=False, description="Give prompts to the model as a user's message, in the model's chat template."
    )
    max_prompt_tokens: int = Field(default=1024, ge=1, description="A longer prompt ends the trial with an error.")
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
