"""The flow `jfhpo/search`: the same job as `jfhpo search`, as a flow run that can be watched, cancelled and resumed."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from jfhpo.orchestration.flow_run import DEFAULT_STUDY, name_search, read, run_with_page
from jfhpo_core.study.spec import StudySpec


@flow(name="jfhpo", flow_run_name=name_search)
def search(study: StudySpec | str = DEFAULT_STUDY, approve_target: bool = False) -> State[None]:
    """Run a study, or continue it where it was interrupted.

    Args:
        study: Path of a study file, relative to the folder that the deployment was made from; or a whole study.
        approve_target: Ask a person before the target is trained to full length at the end of the search.
    """
    return run_with_page(read(study), approve_target)
