"""The flows on a real Prefect server with a real worker, from `prefect deploy` to the artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.search import search
from jfhpo.orchestration.notify import set_up
from jfhpo_core.errors import SpecError
from jfhpo_core.study.trial import Outcome
from tests.flows.ledgers import committed, count, kept
from tests.flows.prefect_server import PATIENCE_SECONDS, Prefect
from tests.run.support import all_gone, wait_until
from tests.studies import study_data

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Prefect]:
    server = Prefect(tmp_path_factory.mktemp("prefect"), empty_database)
    try:
        server.wait_until_up()
        server.ask("work_pools/", name="jfhpo", type="process")
        server.worker = server.start("worker", "start", "--pool", "jfhpo")
        server.run("prefect", "--no-prompt", "deploy", "--all")
        with temporary_settings({PREFECT_API_URL: server.api}):
            set_up(server.webhook.url)
        yield server
    finally:
        server.close()


def write_study(prefect: Prefect, name: str, **changes: Any) -> str:
    """A small simulated study as a file of the clone; returns its path there."""
    data = study_data(Path(".jfhpo"), **{"study": name, "seeds": {"training": [0]}, **changes})
    (prefect.clone / f"{name}.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return f"{name}.yaml"


@pytest.mark.slow
def test_a_cancelled_search_frees_its_workers_and_the_run_that_queued_behind_it_continues_it(prefect: Prefect) -> None:
    settings: dict[str, Any] = {"seeds": {"training": [0]}, "budget": {"trial_seconds": 200, "max_parallel": 1}}
    # The first run takes minutes, far longer than the second one needs to come, so that only the cancellation ends it.
    slow = {"name": "simulated", "settings": {"real_seconds_per_step": 1.0}}
    study = write_study(prefect, "cancelled", **settings, cluster={"address": "local"}, trainer=slow)
    same = study_data(Path(".jfhpo"), study="cancelled", **settings, cluster={"address": "inline"})
    first = prefect.submit(study=study)
    wait_until(lambda: "starting workers" in prefect.log(first), "the start of the first run")
    # Another machine would start the flow like this; the deployment's own queue would hide ours.
    call = f"from flows.search import search; search(study={same!r})"
    second = subprocess.Popen([sys.executable, "-c", call], cwd=prefect.clone, env=prefect.environment)
    try:
        wait_until(lambda: len(prefect.named("search cancelled")) == 2, "a second run")
        (other,) = prefect.named("search cancelled") - {first}
        wait_until(lambda: "waiting until no other flow run" in prefect.log(other), "the queueing of the second run")
        wait_until(lambda: " left | #" in prefect.log(first), "the end of a first segment")
        before = committed(prefect.clone, prefect.clone / study)
        training = set(prefect.processes())
        assert any("WorkerProcess" in command for command in prefect.processes().values())
        prefect.cancel(first)
        assert all_gone(training), "the flow run was cancelled and its workers train on"
        prefect.until(first, "Cancelled")
        assert second.wait(timeout=PATIENCE_SECONDS) == 0
    finally:
        second.kill()
    assert prefect.state(other) == "Completed"
    after = committed(prefect.clone, prefect.clone / study)
    assert count(before) > 0
    assert kept(before, after)

    tasks = prefect.task_runs(first)
    assert tasks["#0 large, steps 0 to 30 of 30 (recipe)"] == "Completed"
    assert "Cancelled" in tasks.values()
    ended = sum(state in ("Completed", "Stopped") for state in tasks.values())
    continued = {name for name in prefect.task_runs(other) if name.startswith("#")}
    assert continued, "the second run found nothing left to do"
    assert ended + len(continued) == count(after)
    wait_until(lambda: prefect.told("Cancelled") and prefect.told("Completed"), "the notifications of both ends")
    told = next(item for item in prefect.webhook.heard if item["state"] == "Completed")
    assert told["flow_run"] == "search cancelled"
    assert told["message"].startswith("The recommended configuration scores 0.")
    assert prefect.api.removesuffix("/api") in told["url"]


@pytest.mark.slow
def test_a_person_approves_the_target_run_and_the_page_shows_the_result(prefect: Prefect) -> None:
    study = write_study(
        prefect, "gated", cluster={"address": "inline"}, strategy={"name": "paper", "settings": {"initial_trials": 4}},
        budget={"trial_seconds": 100, "max_parallel": 1},
    )  # fmt: skip
    run = prefect.submit(study=study, approve_target=True)
    prefect.until(run, "Suspended")
    before = committed(prefect.clone, prefect.clone / study)
    asking = prefect.artifacts(run)["summary"]
    assert "# gated: search" in asking
    assert "**large** is trained to full length" in asking
    wait_until(lambda: prefect.told("Suspended"), "the notification")
    wait_until(lambda: not any("flow_run" in name for name in prefect.processes().values()), "the end of the process")

    prefect.ask(f"flow_runs/{run}/resume", run_input={"approve": True})
    wait_until(lambda: prefect.state(run) != "Suspended", "the end of the suspension")
    prefect.until(run, "Completed")
    after = committed(prefect.clone, prefect.clone / study)
    assert kept(before, after)
    assert count(after) > count(before)
    shown = prefect.artifacts(run)
    result = json.loads(shown["result"])
    assert result[0]["configuration"] == "recommended"
    assert {"score", "95 % interval", "seeds"} <= result[0].keys()
    assert len(json.loads(shown["trials"])) == len(after)
    assert "- `learning_rate`:" in shown["summary"]
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in shown["summary"]
    assert "- trials: <http://" in shown["summary"]
    assert shown["progress"] == 100
    assert (prefect.clone / ".jfhpo" / "gated" / "report.html").exists()

    stopped = sum(parts[-1].outcome is Outcome.STOPPED for parts in after.values())
    wait_until(lambda: prefect.events("jfhpo.study.completed", "gated") != [], "the event of the end")
    assert len(prefect.events("jfhpo.trial.stopped", "gated")) == stopped
    (end,) = prefect.events("jfhpo.study.completed", "gated")
    assert end["payload"]["verdict"].startswith("The recommended configuration scores 0.")
    assert run in {related["prefect.resource.id"].rpartition(".")[2] for related in end["related"]}
    made = "prefect.asset.materialization.succeeded"
    wait_until(lambda: prefect.events(made, "jfhpo://gated/report") != [], "the asset of the report")


@pytest.mark.slow
def test_nights_are_scheduled_and_the_form_has_the_schema_of_study_files_and_refuses_bad_values(
    prefect: Prefect,
) -> None:
    schedule = prefect.deployment("nightly")["schedules"][0]["schedule"]
    assert (schedule["cron"], schedule["timezone"]) == ("0 2 * * *", "Europe/Berlin")
    deployment = prefect.deployment()
    study = deployment["parameter_openapi_schema"]["properties"]["study"]
    assert {"type": "string"} in study["anyOf"]
    assert {"$ref": "#/definitions/StudySpec"} in study["anyOf"]
    good = study_data(Path(".jfhpo"), family={"embedded": "instruct"}, task={"embedded": "instruct"}, target="m")
    good |= {"trainer": {"name": "trl"}, "strategy": {"name": "random"}, "space": yaml.safe_load(SPACE)}
    for change, code in (
        ({}, httpx.codes.CREATED),
        ({"budget": {"trial_seconds": -5}}, httpx.codes.CONFLICT),
        ({"fidelity": {"horizon_prompts": "many"}}, httpx.codes.CONFLICT),
        ({"budgt": {}}, httpx.codes.CONFLICT),
        ({"space": {"learning_rate": {"type": "float", "low": "a", "high": 1}}}, httpx.codes.CONFLICT),
    ):
        answer = httpx.post(
            f"{prefect.api}/deployments/{deployment['id']}/create_flow_run", timeout=30,
            json={"parameters": {"study": good | change}, "state": {"type": "PAUSED"}},
        )  # fmt: skip
        assert answer.status_code == code, change


SPACE = "learning_rate: {type: float, low: 1.0e-5, high: 1.0e-2, log: true}"


def test_a_study_file_that_cannot_be_read_fails_the_run() -> None:
    with pytest.raises(SpecError, match=r"no\.yaml: the study file cannot be read"):
        search.fn("no.yaml")
