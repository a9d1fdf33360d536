"""The flow `jfhpo/nightly`: tune again, on a schedule, learning from the nights before."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from jfhpo.orchestration.flow_run import DEFAULT_STUDY, read, run_name, run_with_page
from jfhpo.orchestration.nightly_studies import look_up, recorded_studies, tonight
from jfhpo_core.study.spec import StudySpec


def _name() -> str:
    return f"nightly {run_name(flow_run.parameters)}"


@flow(name="jfhpo", flow_run_name=_name)
def nightly(
    study: StudySpec | str = DEFAULT_STUDY,
    learn_from: Annotated[int, Field(ge=0, le=30)] = 3,
    approve_target: bool = False,
) -> State[None]:
    """Tune a study again as a study of its own, named after the day, with a warm start from the nights before.

    A night that was cut off is continued first. The target model of every night is registered under one name; it
    becomes the champion only if it beats the present one beyond noise, else the challenger.

    Args:
        study: Path of a study file, relative to the folder that the deployment was made from; or a whole study.
        learn_from: How many of the newest finished nights to learn from.
        approve_target: Ask a person before the target is trained to full length at the end of the search.
    """
    base = read(study)
    scheduled = flow_run.scheduled_start_time or datetime.now(UTC)
    spec = tonight(base, recorded_studies(base), partial(look_up, base), scheduled.date(), learn_from)
    learned = f", learning from {', '.join(spec.warm_start)}" if spec.warm_start else ""
    get_run_logger().info("tonight's study is %s%s", spec.study, learned)
    return run_with_page(spec, approve_target)
