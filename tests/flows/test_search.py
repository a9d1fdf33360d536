"""The flow on a real Prefect server with a real worker, from `prefect deploy` to the artifacts."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.search import search
from jfhpo_core.errors import SpecError
from tests.flows.ledgers import committed, count, kept

ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
START_SECONDS = 240
RUN_SECONDS = 300


class Prefect:
    """A server of its own, with its own home, and the clone that is deployed from.

    Args:
        folder: Takes home and clone.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
        shutil.copy(ROOT / "prefect.yaml", self.clone)
        shutil.copytree(ROOT / "examples", self.clone / "examples")
        self.study = self.clone / "examples" / "simulated.yaml"
        slow = "trainer: {name: simulated, settings: {real_seconds_per_step: 0.02}}"
        self.study.write_text(
            self.study.read_text(encoding="utf-8").replace("trainer: simulated", slow), encoding="utf-8"
        )
        shutil.copytree(ROOT / "flows", self.clone / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        self.server = self.start("server", "start", "--host", "127.0.0.1", "--port", str(port))
        self.worker: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [PREFECT, *arguments], cwd=self.clone, env=self.environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PREFECT, *arguments], cwd=self.clone, env=self.environment, capture_output=True, text=True, check=False,
            timeout=seconds,
        )  # fmt: skip

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.server.poll() is None, "the Prefect server ended"
            try:
                if httpx.get(f"{self.api}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail("the Prefect server did not come up")

    def ask(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.api}/{path}", json=body, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def deployment(self) -> Any:
        return httpx.get(f"{self.api}/deployments/name/jfhpo/search", timeout=30).raise_for_status().json()

    def close(self) -> None:
        for process in (self.worker, self.server):
            if process is not None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    server = Prefect(tmp_path_factory.mktemp("prefect"))
    try:
        server.wait_until_up()
        created = server.run("work-pool", "create", "jfhpo", "--type", "process")
        assert created.returncode == 0, created.stdout + created.stderr
        deployed = server.run("--no-prompt", "deploy", "--all")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        server.worker = server.start("worker", "start", "--pool", "jfhpo")
        yield server
    finally:
        server.close()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.5)


def state(server: Prefect, flow_run: str) -> str:
    answer = httpx.get(f"{server.api}/flow_runs/{flow_run}", timeout=30).json()
    return str(answer["state_type"])


def log(server: Prefect, flow_run: str) -> str:
    lines = server.ask("logs/filter", logs={"flow_run_id": {"any_": [flow_run]}})
    return "\n".join(line["message"] for line in lines)


def artifacts(server: Prefect, flow_run: str) -> dict[str, dict[str, Any]]:
    found = server.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run]}})
    return {item["type"]: item for item in found}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_deployed_search_is_cancelled_continued_and_shows_its_result(prefect: Prefect) -> None:
    study = "examples/simulated.yaml"
    deployment = prefect.deployment()["id"]
    first = prefect.ask(f"deployments/{deployment}/create_flow_run", parameters={"study": study})["id"]
    wait_for(lambda: " left | #" in log(prefect, first), "the end of a first segment")
    prefect.ask(f"flow_runs/{first}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    wait_for(lambda: state(prefect, first) == "CANCELLED", "the cancellation")
    before = committed(prefect.clone, prefect.study)

    done = prefect.run("deployment", "run", "jfhpo/search", "--param", f"study={study}", "--watch", seconds=RUN_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    run = prefect.ask("flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)[0]
    assert run["state"]["type"] == "COMPLETED"
    assert run["state"]["message"].startswith("The recommended configuration scores 0.")
    shown = artifacts(prefect, run["id"])
    assert re.match(r'\[\{"configuration": "recommended", "score": 0\.\d+', shown["table"]["data"])
    assert "size-appropriate" in shown["table"]["data"]
    assert "- `learning_rate`:" in shown["markdown"]["data"]
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in shown["markdown"]["data"]
    assert shown["progress"]["data"] == 100
    after = committed(prefect.clone, prefect.study)
    assert 0 < count(before) < count(after)
    assert kept(before, after)
    assert (prefect.clone / ".jfhpo" / "simulated" / "report.html").exists()


@pytest.mark.slow
def test_the_parameter_is_a_path_or_a_whole_study_and_bad_ones_are_refused(prefect: Prefect) -> None:
    deployment = prefect.deployment()
    study = deployment["parameter_openapi_schema"]["properties"]["study"]
    assert {"type": "string"} in study["anyOf"]
    assert {"$ref": "#/definitions/StudySpec"} in study["anyOf"]
    refused = httpx.post(
        f"{prefect.api}/deployments/{deployment['id']}/create_flow_run",
        json={"parameters": {"study": {"study": "x"}}}, timeout=30,
    )  # fmt: skip
    assert refused.status_code == httpx.codes.CONFLICT


def test_a_study_file_that_cannot_be_read_fails_the_run() -> None:
    with pytest.raises(SpecError, match=r"no\.yaml: the study file cannot be read"):
        search.fn("no.yaml")
