"""The section `trainer.settings` of a study with trainer `openrlhf`: where and how it runs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.trainers.external.settings import ExternalSettings
from jfhpo_core.trainers.openrlhf.options import Option, check_options

PYTHON_VARIABLE = "JFHPO_OPENRLHF_PYTHON"


class OpenRlhfSettings(ExternalSettings):
    """Settings of trainer `openrlhf`."""

    python_variable: ClassVar[str] = PYTHON_VARIABLE
    optimizer_sleeps: ClassVar[bool] = True
    optimizer_on_host: ClassVar[bool] = True

    chat_template: bool = Field(
        default=False, description="Give prompts to the model as a user's message, in the model's chat template."
    )
    extra: dict[str, Option] = Field(
        default_factory=dict,
        description="Further options of OpenRLHF's command line, e.g. {ds.use_liger_kernel: true}; the message for an "
        "unknown one lists them.",
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
    zero_stage: Literal[2, 3] | None = Field(
        default=None, description="None: the lowest that fits into memory.", json_schema_extra=OPERATIONAL
    )

    @field_validator("extra")
    @classmethod
    def _known_options(cls, extra: dict[str, Option]) -> dict[str, Option]:
        check_options(extra)
        return extra

    @property
    def layouts(self) -> tuple[tuple[int, bool], ...]:
        """See `ExternalSettings.layouts`."""
        return tuple(
            (stage, offload)
            for stage, offload in ((2, False), (3, False), (3, True))
            if self.zero_stage in (None, stage) and self.offload_optimizer in (None, offload)
        ) or ((self.zero_stage or 2, bool(self.offload_optimizer)),)

    @property
    def apart(self) -> bool:
        """See `ExternalSettings.apart`."""
        return self.asynchronous

    @property
    def jobs(self) -> str | None:
        """See `ExternalSettings.jobs`."""
        return self.jobs_address
