"""The section `trainer.settings` of a study with trainer `openrlhf`: where and how it runs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.trainers.external.settings import ExternalSettings
from jfhpo_core.trainers.openrlhf.options import Option, check_options

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
    extra: dict[str, Option] = Field(
        default_factory=dict,
        description="Further options of OpenRLHF's command line, e.g. {ds.use_liger_kernel: true}; the message for an "
        "unknown one lists them.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="vLLM without CUDA graphs: starts faster, samples slower.",
        json_schema_extra=OPERATIONAL,
    )

    @field_validator("extra")
    @classmethod
    def _known_options(cls, extra: dict[str, Option]) -> dict[str, Option]:
        check_options(extra)
        return extra
