"""The artifacts of a flow run: progress, trials, summary and the link to MLflow, kept up to date while it runs."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import Artifact, LinkArtifact, MarkdownArtifact, ProgressArtifact, TableArtifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.runtime import flow_run

from jfhpo.display.result import next_steps
from jfhpo.display.watch import Watch, standings
from jfhpo.display.words import bill, duration, show_quality, show_score, show_value
from jfhpo.session import StudyOutcome
from jfhpo_core.report.findings import NOT_FINISHED, caveats, contrasts, interval_text, verdict
from jfhpo_core.report.page import is_address
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.search import Progress
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.trial import Trial, TrialState

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 5.0
"""Shortest time between two updates."""

TRIALS_SHOWN = 200
"""Newest trials in the table; MLflow has all."""


class RunPage:
    """What the page of a flow run shows of a study.

    Args:
        study: Its name.
        watch: Follows the study; fed by someone else, before `progress` is called.
    """

    def __init__(self, study: str, watch: Watch) -> None:
        self._study = study
        self._watch = watch
        self._updated = -UPDATE_SECONDS
        self._newest: Progress | None = None
        self._shown: dict[str, UUID] = {}

    def opened(self, ledger: Ledger) -> None:
        """Link the study's page in MLflow, if its store is a server."""
        url = ledger.url()
        if url is not None:
            self._show(
                "mlflow",
                LinkArtifact(link=url, link_text=f"Study {self._study} in MLflow", description="The study in MLflow"),
                url,
            )

    def progress(self, progress: Progress) -> None:
        """Show a new snapshot, unless the last one is still fresh."""
        self._newest = progress
        if time.monotonic() - self._updated >= UPDATE_SECONDS:
            self._snapshot(progress)

    def asks(self, question: str) -> None:
        """Show how the study stands, however fresh the last snapshot is, and what a person is asked."""
        if self._newest is not None:
            self._snapshot(self._newest, f"\n\n## Waiting for an answer\n\n{question}")

    def _snapshot(self, progress: Progress, more: str = "") -> None:
        self._updated = time.monotonic()
        self._share(100 * self._watch.share_done())
        self._trials(progress.trials)
        self._text("summary", f"{_progress_page(progress, self._watch)}{more}", "What the study is doing")

    def close(self, outcome: StudyOutcome) -> None:
        """Show the outcome."""
        result = outcome.result
        self._share(100.0 if result.complete else 100 * self._watch.share_done())
        self._trials(result.trials)
        self._table("result", result_rows(result), verdict(result))
        self._text("summary", _result_page(outcome), "Recommended configuration and next steps")

    def _share(self, percent: float) -> None:
        description = f"Study {self._study}: share of its cost"
        self._show("progress", ProgressArtifact(progress=percent, description=description), percent)

    def _trials(self, trials: Sequence[Trial]) -> None:
        newest = sorted(trials, key=lambda trial: -trial.number)[:TRIALS_SHOWN]
        more = f", the newest {TRIALS_SHOWN} of {len(trials)}" if len(trials) > TRIALS_SHOWN else ""
        if newest:
            self._table("trials", trial_rows(newest), f"Trials of study {self._study}{more}")

    def _table(self, what: str, rows: list[dict[str, Any]], description: str) -> None:
        self._show(what, TableArtifact(table=rows, description=description), json.dumps(rows))

    def _text(self, what: str, text: str, description: str) -> None:
        self._show(what, MarkdownArtifact(markdown=text, description=description), text)

    def _show(self, what: str, artifact: Artifact, data: Any) -> None:
        """Show an artifact; if the server is away the search goes on, and the next update shows it."""
        try:
            self._put(what, artifact, data)
        except httpx.HTTPError as error:
            logger.warning("Prefect's server did not take artifact %r: %s", what, error)

    def _put(self, what: str, artifact: Artifact, data: Any) -> None:
        """Create an artifact, or change the one of this flow run in its place, also after a suspension."""
        key = artifact_key(self._study, what)
        with get_client(sync_client=True) as client:
            if what not in self._shown and (known := client.read_artifacts(artifact_filter=_mine(key))):
                self._shown[what] = known[0].id
            if what in self._shown:
                change = ArtifactUpdate(data=data, description=artifact.description)
                client.update_artifact(self._shown[what], change)
                return
        artifact.key = key
        created: Any = artifact.create(_sync=True)  # type: ignore[call-arg]  # Prefect's dispatch adds it
        self._shown[what] = created.id


def _mine(key: str) -> ArtifactFilter:
    """This flow run's artifact of a key."""
    run = [UUID(str(flow_run.id))] if flow_run.id else []
    return ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=run), key=ArtifactFilterKey(any_=[key]))


def artifact_key(study: str, what: str) -> str:
    """Key of an artifact: Prefect takes small letters, digits and dashes."""
    return f"jfhpo-{re.sub('[^a-z0-9]+', '-', study.lower()).strip('-')}-{what}"


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One row per trial: what it is, how it stands, and its hyperparameters."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.configuration))
    rows = []
    for trial in trials:
        evaluation = trial.evaluations[-1] if trial.evaluations else None
        part = trial.open_segment or (trial.segments[-1].segment if trial.segments else None)
        state = str(trial.state)
        if trial.decision is not None and trial.state is TrialState.STOPPED:
            state += f" by {trial.decision.rule}"
        rows.append(
            {
                "trial": f"#{trial.number}",
                "model": trial.model,
                "state": state,
                "step": f"{trial.step} of {trial.total_steps}",
                "score": show_score(evaluation) if evaluation is not None else "",
                "chosen by": trial.label or (part.suggestion.source if part is not None else ""),
                "seconds": round(trial.charge_seconds, 1),
                **{
                    name: show_value(trial.configuration[name]) if name in trial.configuration else "" for name in names
                },
            }
        )
    return rows


def result_rows(result: SearchResult) -> list[dict[str, Any]]:
    """The final table: each configuration with its interval, and how far the recommended one is ahead."""
    ahead = {contrast.label: contrast for contrast in contrasts(result)}
    return [
        {
            "configuration": row.label,
            "score": round(row.score, 4) if row.seeds else NOT_FINISHED,
            "95 % interval": interval_text(row),
            "seeds": row.seeds,
            "recommended is": ahead[row.label].verdict.removesuffix(" than") if row.label in ahead else "",
            "by": round(ahead[row.label].difference, 4) if row.label in ahead else "",
        }
        for row in result.rows
    ]


def _progress_page(progress: Progress, watch: Watch) -> str:
    spec = progress.study.spec
    left = watch.left()
    spent, budget = progress.spent_seconds, spec.budget
    lines = [
        f"# {spec.study}: {progress.phase}",
        f"- {duration(spent)} of {duration(budget.device_seconds)} of trial time spent{budget.in_money(spent)}",
        f"- {bill(left)} left" if left is not None else "",
        f"- final score: {show_quality(watch.quality)}",
        *[f"- {name}: {item.sentence()}" for name, item in standings(progress.study, progress.trials)],
    ]
    running = [trial for trial in progress.trials if trial.open_segment is not None]
    if running:
        lines.append("\n## In training\n")
    for trial in running:
        assert trial.open_segment is not None
        segment = trial.open_segment
        record = progress.live.get(trial.key)
        at = f"step {record.step if record else segment.start_step} of {segment.stop_step}"
        lines.append(f"- #{trial.number} on {trial.model}, {at}: {segment.suggestion.explanation}")
    return "\n".join(line for line in lines if line)


def _result_page(outcome: StudyOutcome) -> str:
    result = outcome.result
    lines = [f"# {result.study.spec.study}", verdict(result)]
    if not result.complete:
        lines.append("The study is not finished: the next run goes on where it is.")
    if result.recommended is not None:
        lines.append("## Recommended configuration")
        lines.append(
            "\n".join(f"- `{name}`: {show_value(value)}" for name, value in result.recommended.configuration.items())
        )
    places = {**next_steps(outcome), "folder": str(Path.cwd())}
    shown = {name: f"<{at}>" if is_address(at) else f"`{at}`" for name, at in places.items()}
    lines += ["## Where to look next", "\n".join(f"- {name}: {at}" for name, at in shown.items())]
    lines += ["## Notes", "\n".join(f"- {note}" for note in caveats(result))]
    return "\n\n".join(lines)
