"""A real Prefect server with a real worker and a webhook, for the tests of the flows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx

from benchmarks.tracking_server import Tethered, free_port
from tests.run.support import descendants, wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 600
ENDS = ("Completed", "Suspended", "Failed", "Crashed", "Cancelled")
"""States that a run does not leave by itself."""


class Webhook:
    """Takes notifications."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/notify"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Prefect:
    """A server of its own, with its own home, and the clone that is deployed from.

    Args:
        folder: Takes home and clone.
        database: An MLflow database without content; the clone gets a copy.
    """

    def __init__(self, folder: Path, database: Path) -> None:
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        self.clone = folder / "clone with a space"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))},
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        # What the deployment needs of the clone; the packages themselves are installed.
        self.clone.mkdir()
        shutil.copyfile(database, self.clone / "mlflow.db")
        shutil.copy(ROOT / "prefect.yaml", self.clone)
        shutil.copytree(ROOT / "examples", self.clone / "examples")
        shutil.copytree(ROOT / "flows", self.clone / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        self.webhook = Webhook()
        self._serve = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
        self.server = self.start(*self._serve)
        self.worker: Tethered | None = None

    def start(self, *arguments: str) -> Tethered:
        return Tethered([str(BIN / "prefect"), *arguments], self.clone, self.environment)

    def run(self, *command: str) -> None:
        """Run a command of the environment in the clone; it must succeed."""
        done = subprocess.run(
            [BIN / command[0], *command[1:]], cwd=self.clone, env=self.environment, capture_output=True, text=True,
            check=False, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def revive(self) -> None:
        """Kill the server without a chance to clean up, and start it again."""
        self.server.kill()
        self.server = self.start(*self._serve)
        self.wait_until_up()

    def wait_until_up(self) -> None:
        def up() -> bool:
            assert not self.server.ended, "the Prefect server ended"
            try:
                return httpx.get(f"{self.api}/health", timeout=5).is_success
            except httpx.TransportError:
                return False

        wait_until(up, "the start of the Prefect server")

    def ask(self, path: str, **body: Any) -> Any:
        return self._answer("POST", path, body)

    def read(self, path: str) -> Any:
        return self._answer("GET", path, None)

    def _answer(self, method: str, path: str, body: Any) -> Any:
        """Ask again while the server is too busy, as Prefect's own client does."""
        while True:
            answer = httpx.request(method, f"{self.api}/{path}", json=body, timeout=60)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return answer.raise_for_status().json()
            time.sleep(1)

    def deployment(self, name: str = "search") -> Any:
        return self.read(f"deployments/name/jfhpo/{name}")

    def submit(self, deployment: str = "search", **parameters: Any) -> str:
        """Start a run of a deployment; returns its id."""
        identity = self.deployment(deployment)["id"]
        return str(self.ask(f"deployments/{identity}/create_flow_run", parameters=parameters)["id"])

    def named(self, name: str) -> set[str]:
        """Ids of the flow runs of a name."""
        return {run["id"] for run in self.ask("flow_runs/filter", flow_runs={"name": {"any_": [name]}})}

    def cancel(self, run: str) -> None:
        """As the UI does it."""
        self.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})

    def state(self, run: str) -> str:
        return str(self.read(f"flow_runs/{run}")["state_name"])

    def until(self, run: str, expected: str) -> None:
        """Wait for a state; another one that ends the run fails the test with the run's log."""

        def reached() -> bool:
            state = self.state(run)
            assert state == expected or state not in ENDS, self.log(run)
            return state == expected

        wait_until(reached, f"state {expected} of the flow run")

    def log(self, run: str) -> str:
        return "\n".join(line["message"] for line in self.ask("logs/filter", logs={"flow_run_id": {"any_": [run]}}))

    def artifacts(self, run: str) -> dict[str, Any]:
        """Data of the run's artifacts, by the last part of their keys."""
        found = self.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {item["key"].rpartition("-")[2]: item["data"] for item in found}

    def events(self, name: str, about: str) -> list[dict[str, Any]]:
        """Events of a name whose resource has a text in its id."""
        found = self.ask("events/filter", filter={"event": {"name": [name]}})["events"]
        return [event for event in found if about in event["resource"]["prefect.resource.id"]]

    def task_runs(self, run: str) -> dict[str, str]:
        """State names by names."""
        found = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return {item["name"]: item["state_name"] for item in found}

    def processes(self) -> dict[int, str]:
        """Those of the worker's flow runs: id to command."""
        assert self.worker is not None
        return descendants(self.worker.processes()[0])

    def told(self, state: str) -> bool:
        """Whether the webhook has heard of such an end."""
        return any(item["state"] == state for item in self.webhook.heard)

    def close(self) -> None:
        for process in (self.worker, self.server):
            if process is not None:
                process.kill()
        self.webhook.close()
