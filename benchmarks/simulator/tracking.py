"""A tracking server in memory, and the client by which the real MLflow ledger talks to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.entities import LifecycleStage

TAG_CHARACTERS = 5000
"""What is longer is cut off, as MLflow does."""
CONDITION = re.compile(r"tags\.`([^`]+)` = '([^']*)'")
PAGE = 4
"""Runs per page of a search: small, so that the ledger has to turn pages."""


@dataclass
class StoredRun:
    """A run as the server has it."""

    identity: str
    name: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    lifecycle_stage: str = LifecycleStage.ACTIVE

    def shown(self) -> Any:
        """As the client returns it."""
        info = SimpleNamespace(
            run_id=self.identity,
            run_name=self.name,
            status=self.status,
            lifecycle_stage=self.lifecycle_stage,
            experiment_id="1",
            artifact_uri=self.identity,
        )
        return SimpleNamespace(info=info, data=SimpleNamespace(tags=dict(self.tags), params=dict(self.params)))


class Page(list[Any]):
    """A list with the token of the next page."""

    token: str | None = None


@dataclass
class Server:
    """What is stored.

    Attributes:
        on_tags: Called before tags of a run change, with the run and the new tags.
    """

    on_tags: Callable[[StoredRun, Mapping[str, str]], None]
    experiments: dict[str, str] = field(default_factory=dict)
    runs: dict[str, StoredRun] = field(default_factory=dict)
    models: dict[str, SimpleNamespace] = field(default_factory=dict)

    def tag(self, run: StoredRun, tags: Mapping[str, str]) -> None:
        """Set tags."""
        cut = {name: value[:TAG_CHARACTERS] for name, value in tags.items()}
        self.on_tags(run, cut)
        run.tags.update(cut)


class Client:
    """As much of `MlflowClient` as the ledger uses.

    Args:
        server: The server.
        request: Sends a change or a question to it; may lose the question, the answer, or the sender.
    """

    tracking_uri = "http://simulated"

    def __init__(self, server: Server, request: Callable[[Callable[[], Any]], Any]) -> None:
        self._server, self._request = server, request

    def get_experiment_by_name(self, name: str) -> Any:
        known = self._request(lambda: self._server.experiments.get(name))
        return None if known is None else self.get_experiment(known)

    def get_experiment(self, identity: str) -> Any:
        return SimpleNamespace(experiment_id=identity, lifecycle_stage="active", name="simulated")

    def create_experiment(self, name: str, folder: str | None) -> str:
        return str(self._request(lambda: self._server.experiments.setdefault(name, "1")))

    def set_experiment_tag(self, *arguments: object) -> None:
        self._request(lambda: None)

    def create_run(self, experiment_id: str, tags: Mapping[str, str], run_name: str) -> Any:
        def create() -> Any:
            run = StoredRun(f"{len(self._server.runs):032x}", run_name)
            self._server.tag(run, tags)
            self._server.runs[run.identity] = run
            return run.shown()

        return self._request(create)

    def get_run(self, run_id: str) -> Any:
        return self._request(lambda: self._server.runs[run_id].shown())  # noqa: PLW0108  asked when it arrives

    def search_runs(
        self, experiments: Sequence[str], condition: str, view: int, order_by: object, page_token: str | None
    ) -> Page:
        wanted = CONDITION.findall(condition)

        def search() -> Page:
            stages = LifecycleStage.view_type_to_stages(view)
            runs = [run for run in self._server.runs.values() if run.lifecycle_stage in stages]
            found = [run for run in runs if all(run.tags.get(name) == value for name, value in wanted)]
            start = int(page_token or 0)
            page = Page(run.shown() for run in found[start : start + PAGE])
            page.token = str(start + PAGE) if start + PAGE < len(found) else None
            return page

        page: Page = self._request(search)
        return page

    def log_batch(
        self, run_id: str, metrics: Sequence[Any], params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> None:
        def log() -> None:
            run = self._server.runs[run_id]
            run.params.update({one.key: one.value for one in params})
            self._server.tag(run, {one.key: one.value for one in tags})

        self._request(log)

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self._request(lambda: self._server.tag(self._server.runs[run_id], {name: value}))

    def delete_run(self, run_id: str) -> None:
        self._request(lambda: setattr(self._server.runs[run_id], "lifecycle_stage", LifecycleStage.DELETED))

    def update_run(self, run_id: str, status: str) -> None:
        self._request(lambda: setattr(self._server.runs[run_id], "status", status))

    set_terminated = update_run

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self._request(lambda: self._server.runs[run_id].artifacts.update({path: text}))

    def list_artifacts(self, run_id: str, folder: str | None) -> list[Any]:
        paths = self._request(lambda: list(self._server.runs[run_id].artifacts))
        return [SimpleNamespace(path=path) for path in paths]

    def log_inputs(self, run_id: str, inputs: object) -> None:
        self._request(lambda: None)

    log_outputs = log_inputs

    def log_table(self, run_id: str, table: object, path: str) -> None:
        """Log a table."""
        self.log_text(run_id, str(table), path)

    def create_logged_model(self, experiment_id: str, **values: Any) -> Any:
        def create() -> Any:
            name = f"m-{len(self._server.models)}"
            model = SimpleNamespace(model_id=name, source_run_id=values["source_run_id"], tags=dict(values["tags"]))
            self._server.models[name] = model
            return model

        return self._request(create)

    def finalize_logged_model(self, model_id: str, status: str) -> None:
        self._request(lambda: None)

    def set_logged_model_tags(self, model_id: str, tags: Mapping[str, str]) -> None:
        self._request(lambda: self._server.models[model_id].tags.update(tags))

    def search_logged_models(self, *arguments: object, **keywords: object) -> Page:
        return self._request(lambda: Page(self._server.models.values()))  # type: ignore[no-any-return]


@dataclass
class Artifacts:
    """The artifacts of one run, as MLflow's repositories offer them."""

    run: StoredRun
    request: Callable[[Callable[[], Any]], Any]

    def download_artifacts(self, path: str, folder: str) -> str:
        """Write an artifact into a folder; returns where."""
        text = self.request(lambda: self.run.artifacts.get(path))
        if text is None:
            raise FileNotFoundError(path)
        local = Path(folder) / Path(path).name
        local.write_text(text, encoding="utf-8")
        return str(local)
