"""The Prefect flow: the same job as `jfhpo search`, as a flow run that can be scheduled, watched and cancelled.

Thin on purpose: the study lives in its ledger, so a flow run that is cancelled or crashes is continued by the next one.
"""

from __future__ import annotations

import re
import time
from typing import cast
from uuid import UUID

from prefect import flow
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from flows.display import PlainDisplay, next_steps, show_value
from flows.runtime import StudyOutcome, run_study
from jfhpo_core.report.summary import caveats, contrasts, interval, verdict
from jfhpo_core.search import Progress
from jfhpo_core.spec import StudySpec, load_study

DEFAULT_STUDY = "examples/demo.yaml"

PROGRESS_SECONDS = 5.0
"""Shortest time between two updates of the progress artifact."""


@flow(name="jfhpo")
def search(study: StudySpec | str = DEFAULT_STUDY) -> State[None]:
    """Run a study, or continue it where it was interrupted.

    Args:
        study: Path of a study file, relative to the folder that the deployment was made from; or a whole study.
    """
    spec = load_study(study) if isinstance(study, str) else study
    display = PlainDisplay(get_run_logger().info)
    bar = _ProgressArtifact(spec.study)

    def on_progress(progress: Progress) -> None:
        display.progress(progress)
        bar.show(100 * display.watch.share_done())

    outcome = run_study(spec, on_progress, display.status)
    bar.close()
    _publish(spec.study, outcome)
    return Completed(message=verdict(outcome.result))


def _key(study: str, what: str) -> str:
    """Key of an artifact: Prefect takes small letters, digits and dashes."""
    return f"jfhpo-{re.sub('[^a-z0-9]+', '-', study.lower()).strip('-')}-{what}"


class _ProgressArtifact:
    """The share of the bill that has been spent, shown on the flow run's page."""

    def __init__(self, study: str) -> None:
        created = create_progress_artifact(0.0, _key(study, "progress"), f"Study {study}: share of its cost")
        # Prefect's type allows for asynchronous callers as well; this one is not.
        self._id = cast(UUID, created)
        self._updated = time.monotonic()

    def show(self, percent: float) -> None:
        """Show a new share, unless the last one is still fresh."""
        if time.monotonic() - self._updated >= PROGRESS_SECONDS:
            update_progress_artifact(self._id, percent)
            self._updated = time.monotonic()

    def close(self) -> None:
        """Show that the study is done."""
        update_progress_artifact(self._id, 100.0)


def _publish(study: str, outcome: StudyOutcome) -> None:
    """Put the result on the flow run's page: a table, and a page with the configuration and where to look next."""
    result = outcome.result
    ahead = {contrast.label: contrast for contrast in contrasts(result)}
    rows = []
    for row in result.rows:
        low, high = interval(row.score, row.standard_error)
        rows.append(
            {
                "configuration": row.label,
                "score": round(row.score, 4),
                "95 % interval": f"{low:.3f} to {high:.3f}",
                "seeds": row.seeds,
                "recommended is": ahead[row.label].verdict.removesuffix(" than") if row.label in ahead else "",
                "by": round(ahead[row.label].difference, 4) if row.label in ahead else "",
            }
        )
    create_table_artifact(rows, _key(study, "result"), verdict(result))
    lines = [f"# {study}", verdict(result)]
    if result.recommended is not None:
        lines.append("## Recommended configuration")
        lines += [f"- `{name}`: {show_value(value)}" for name, value in result.recommended.configuration.items()]
    lines += ["## Where to look next", *[f"- {name}: `{where}`" for name, where in next_steps(outcome).items()]]
    lines += ["## Notes", *[f"- {note}" for note in caveats(result)]]
    create_markdown_artifact("\n\n".join(lines), _key(study, "summary"), "Recommended configuration and next steps")
    if outcome.url is not None:
        create_link_artifact(outcome.url, "Study in MLflow", _key(study, "mlflow"))
