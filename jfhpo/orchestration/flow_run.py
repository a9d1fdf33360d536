"""A study as a flow run: what the flows `search`, `nightly` and `target` share.

The study lives in its ledger, so a flow run that is cancelled, crashes or is suspended is continued by the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from jfhpo.display.live import PlainDisplay
from jfhpo.display.words import duration
from jfhpo.orchestration.artifacts import RunPage
from jfhpo.orchestration.events import show_assets, study_ended
from jfhpo.orchestration.study_lock import LEASE_SECONDS, give_back, hold
from jfhpo.orchestration.task_runs import TaskRuns
from jfhpo.session import INLINE, StudyOutcome, rebuild_report, run_study
from jfhpo_core.errors import InfrastructureError, Interruption
from jfhpo_core.report.findings import verdict
from jfhpo_core.run.dispatch import Dispatcher
from jfhpo_core.run.search import Progress
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import load_study
from jfhpo_core.study.trial import VALIDATION, Trial
from jfhpo_core.trainers import Job

DEFAULT_STUDY = "examples/demo.yaml"

DEVICES = "jfhpo-devices"
"""Global concurrency limit of Prefect that bounds the devices of all flow runs together, if somebody creates it."""

RETRIES = 2
RETRY_SECONDS = 60.0
"""Pause before the first retry after an infrastructure failure; the second one is twice as long."""

APPROVAL_SECONDS = 7 * 24 * 3600
"""A flow run that waits longer than this for an approval fails. Its study can be continued all the same."""

GATED = ("confirmation", "random-search")
"""Purposes of trials that train on the target at full length once the search is over; validations do, too."""

Answer = TypeVar("Answer")


class Approval(RunInput):
    """What a person answers before the target is trained."""

    approve: bool = Field(default=True, description="Train the target now; otherwise the run ends here.")


class DeclinedError(Interruption):
    """A person has declined the target run."""


def read(study: StudySpec | str) -> StudySpec:
    """A flow's parameter `study`: a whole study, or the path of a study file."""
    return load_study(study) if isinstance(study, str) else study


def run_name(parameters: dict[str, Any]) -> str:
    """Name of a flow run: that of its study, as far as the parameters tell."""
    study = parameters.get("study", DEFAULT_STUDY)
    if isinstance(study, str):
        return Path(study).stem
    return str(study.study if isinstance(study, StudySpec) else study.get("study"))


def name_search() -> str:
    """Name of a flow run of `search`."""
    return f"search {run_name(flow_run.parameters)}"


def run_with_page(spec: StudySpec, approve_target: bool = False) -> State[None]:
    """Run or continue a study in a flow run, and show it there.

    Args:
        spec: The study.
        approve_target: Suspend the flow run before the target is trained to full length at the end of the search.
            Workers are released meanwhile.

    Raises:
        SpecError: The study is not usable.
        LedgerError: The study is run by someone outside Prefect, or the ledger holds a different one of its name.
        InfrastructureError: It still fails after the retries.
    """
    log = get_run_logger()
    display = PlainDisplay(log.info)
    page = RunPage(spec.study, display.watch)
    gate = Gate(spec, page) if approve_target else None
    ledgers: list[Ledger] = []

    def on_open(ledger: Ledger) -> None:
        ledgers.append(ledger)
        page.opened(ledger)

    def on_progress(progress: Progress) -> None:
        display.progress(progress)
        page.progress(progress)

    def around(dispatcher: Dispatcher) -> Dispatcher:
        return TaskRuns(spec.study, dispatcher, ledgers[-1], gate.check if gate is not None else lambda *_: None)

    with hold(spec.study), _devices(spec), display:
        try:
            outcome = persist(
                lambda: run_study(spec, on_progress, display.status, display.note, on_open, around), log.warning
            )
        except DeclinedError as declined:
            rebuild_report(spec)
            return Completed(name="Declined", message=str(declined))
    page.close(outcome)
    study_ended(outcome)
    show_assets(outcome)
    return _final_state(outcome)


def persist(
    call: Callable[[], Answer],
    warn: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> Answer:
    """Try again after infrastructure failures, and only after those: a bad study does not become better by waiting."""
    for attempt in range(1, RETRIES + 1):
        try:
            return call()
        except InfrastructureError as error:
            seconds = RETRY_SECONDS * attempt
            warn(f"{error}; attempt {attempt + 1} of {RETRIES + 1} follows in {duration(seconds)}")
            pause(seconds)
    return call()


def _final_state(outcome: StudyOutcome) -> State[None]:
    if not outcome.result.complete:
        return Completed(name="Unfinished", message=outcome.result.note)
    model = f" {outcome.model_uri}: {outcome.model_note}." if outcome.model_uri is not None else ""
    return Completed(message=f"{verdict(outcome.result)}{model}")


@contextmanager
def _devices(spec: StudySpec) -> Iterator[None]:
    """Hold as many slots of the limit `DEVICES` as the study uses devices at the same time."""
    limit = _limit(DEVICES)
    if limit is None:
        yield
        return
    largest = max(model.devices for model in resolve(spec).ladder.models)
    if spec.cluster.address == INLINE:
        count = 1
    else:
        count = spec.cluster.devices or (limit if spec.slots is None else spec.slots * largest)
    get_run_logger().info("waiting for %d slots of the concurrency limit %s", count, DEVICES)
    slots = concurrency(DEVICES, occupy=count, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
    with ExitStack() as held:
        held.enter_context(slots)
        try:
            yield
        finally:
            give_back(held)


def _limit(name: str) -> int | None:
    """Slots of a concurrency limit; None if there is none of that name."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(name).limit
        except ObjectNotFound:
            return None


class Gate:
    """Lets no run of the target begin at the end of the search before a person has agreed."""

    def __init__(self, spec: StudySpec, page: RunPage) -> None:
        self._spec, self._page = spec, page
        self._approved = False

    def check(self, job: Job, trial: Trial) -> None:
        """Suspend the flow run, or, once it is resumed, go on or end it.

        Raises:
            DeclinedError: The answer was no.
        """
        after_search = trial.purpose in GATED or job.segment.suggestion.source == VALIDATION
        if self._approved or not after_search:
            return
        seconds = job.segment.suggestion.expected_cost_seconds
        cost = f" It should take {duration(seconds)} of trial time." if seconds is not None else ""
        question = (
            f"The search of study **{self._spec.study}** is over. Next, **{job.model}** is trained to full length: "
            f"{job.segment.suggestion.explanation}.{cost}"
        )
        self._page.asks(question)
        answer = suspend_flow_run(
            wait_for_input=Approval.with_initial_data(description=question), timeout=APPROVAL_SECONDS, key="target-run"
        )
        if not answer.approve:
            raise DeclinedError(
                f"The run of {job.model} was declined; run study {self._spec.study} again to be asked again"
            )
        self._approved = True
