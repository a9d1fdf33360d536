"""Take the pictures of the documentation: `python docs/pictures.py FOLDER`.

Runs the demo in FOLDER as a Prefect flow run, with an MLflow server, unless it was run there before. Then opens report,
MLflow and Prefect in Chromium, and writes what it sees into `docs/images/`.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from mlflow import MlflowClient
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tracking_server import Tethered, TrackingServer, free_port  # noqa: E402  found from the clone
from jfhpo_core.report.page import REPORT  # noqa: E402
from mlflow_plugin.presentation import view_page  # noqa: E402

IMAGES = ROOT / "docs" / "images"
STUDY = ROOT / "examples" / "demo.yaml"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REPORT_HEIGHT = 1480
"""Pixels of the report that are shown: down to the recommended configuration."""

ASSISTANT = '[data-component-id="mlflow.assistant.chat_panel.close"]'
"""MLflow opens the panel of its assistant at the first visit; this closes it."""

REST_SECONDS = 4
"""How long a page is left alone after it has loaded or was clicked on."""

PATIENCE_SECONDS = 180


class Page:
    """The page of a browser without a window.

    Args:
        url: Of its debugger, a WebSocket.
    """

    def __init__(self, url: str) -> None:
        self._socket = connect(url, max_size=None)
        self._numbers = itertools.count()

    def call(self, method: str, **parameters: Any) -> Any:
        """A command of the Chrome DevTools protocol, and its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv(PATIENCE_SECONDS))).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def open(self, url: str, text: str, width: int = 1400, height: int = 900) -> None:
        """Open a page in a window of so many pixels and wait until it shows a text and has come to rest."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait_for(f"document.body?.innerText.includes({json.dumps(text)})", f"{text!r} on {url}")
        time.sleep(REST_SECONDS)

    def wait_for(self, condition: str, what: str) -> None:
        """Wait until a condition on the page holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {PATIENCE_SECONDS} seconds")
            time.sleep(0.5)

    def click(self, selector: str) -> None:
        """Click on the first element that a CSS selector finds, if there is one."""
        self.evaluate(f"document.querySelector({json.dumps(selector)})?.click()")
        time.sleep(REST_SECONDS)

    def save(self, path: Path, height: int | None = None) -> None:
        """Save what the window shows, or the upper pixels of the page, as PNG."""
        size: dict[str, Any] = {}
        if height is not None:
            width = self.evaluate("innerWidth")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            size = {"clip": clip, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **size)["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A fresh Chromium with one page."""
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is installed.")
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        port = free_port()
        flags = (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", f"--remote-debugging-port={port}",
        )  # fmt: skip
        process = Tethered([command, *flags, "about:blank"], Path(profile), os.environ)
        try:
            targets = answer(f"http://127.0.0.1:{port}/json/list")
            yield Page(next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"))
        finally:
            process.kill()


def answer(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """What a server that may still be starting answers, from JSON."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return (
                httpx.request("GET" if body is None else "POST", url, json=body, timeout=60).raise_for_status().json()
            )
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """A Prefect server that keeps its data in a folder; its address."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    process = Tethered([*command], folder, environment)
    try:
        answer(f"http://127.0.0.1:{port}/api/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server over the database in a folder; its address."""
    server = TrackingServer(folder)
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


def run_demo(folder: Path, mlflow: str, prefect: str, fresh: bool) -> None:
    """The real run: the flow `jfhpo/search`, as a process of its own. One that was made before: only its report."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"{prefect}/api",
        "MLFLOW_TRACKING_URI": mlflow,
    }
    if not fresh:
        write = (sys.executable, "-m", "jfhpo.cli", "report", str(STUDY))
        subprocess.run(write, cwd=folder, env=environment, check=True)  # noqa: S603  our own
        return
    script = f"from flows.search import search; search({str(STUDY)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True)  # noqa: S603  our own


def take(page: Page, folder: Path, mlflow: str, prefect: str) -> None:
    """Take all pictures of a finished demo."""
    page.open((folder / ".jfhpo" / "demo" / REPORT).as_uri(), "How sure is that?", width=1100)
    page.save(IMAGES / "report.png", height=REPORT_HEIGHT)
    client = MlflowClient(mlflow)
    experiment = client.get_experiment_by_name("jfhpo/demo")
    assert experiment is not None, f"no study in {folder}"
    trials = f"{mlflow}/{view_page(experiment.experiment_id)}"
    newest = max(int(version.version) for version in client.search_model_versions("name='demo'"))
    for name, url, text in (
        ("mlflow-trials", trials, "jfhpo.state"),
        ("mlflow-charts", f"{trials}&compareRunsMode=CHART", "eval/score"),
        ("mlflow-version", f"{mlflow}/#/models/demo/versions/{newest}?workflowType=machine_learning", "champion"),
    ):
        page.open(url, text)
        page.click(ASSISTANT)
        page.save(IMAGES / f"{name}.png")
    found = answer(f"{prefect}/api/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    page.open(f"{prefect}/runs/flow-run/{found[0]['id']}", "Task Runs", height=1200)
    page.save(IMAGES / "prefect-run.png")
    page.click("#artifacts")
    page.save(IMAGES / "prefect-artifacts.png")


def main() -> None:
    """Run the demo if need be, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the demo is run, or was run by this script")
    folder = parser.parse_args().folder.resolve()
    fresh = not (folder / "prefect").exists()
    (folder / "prefect").mkdir(parents=True, exist_ok=True)
    with mlflow_server(folder) as mlflow, prefect_server(folder / "prefect") as prefect:
        run_demo(folder, mlflow, prefect, fresh)
        with browser() as page:
            take(page, folder, mlflow, prefect)


if __name__ == "__main__":
    main()
