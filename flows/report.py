"""The flow `jfhpo/report`: a study's report and figures again, from its ledger."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from jfhpo.display.watch import Watch
from jfhpo.orchestration.artifacts import RunPage
from jfhpo.orchestration.flow_run import DEFAULT_STUDY, read, run_name
from jfhpo.session import rebuild_report
from jfhpo_core.report.findings import verdict
from jfhpo_core.study.spec import StudySpec


def _name() -> str:
    return f"report {run_name(flow_run.parameters)}"


@flow(name="jfhpo", flow_run_name=_name)
def report(study: StudySpec | str = DEFAULT_STUDY) -> State[None]:
    """Write a study's report again and show its result; trains nothing, and works while the study is being run.

    Args:
        study: Path of a study file, relative to the folder that the deployment was made from; or a whole study.
    """
    spec = read(study)
    outcome = rebuild_report(spec)
    RunPage(spec.study, Watch()).close(outcome)
    return Completed(message=verdict(outcome.result))
