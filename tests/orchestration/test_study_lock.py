"""A Prefect server that is killed while a search runs: the search goes on, and its study can be run again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from tests.flows.ledgers import committed, count
from tests.flows.prefect_server import PATIENCE_SECONDS, Prefect
from tests.run.support import wait_until
from tests.studies import simulated_study, study_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 1
IMPATIENT = {
    "JFHPO_LOCK_EXPIRY_SECONDS": "15",
    "JFHPO_LOCK_HEARTBEAT_SECONDS": "2",
    "JFHPO_LOCK_RETRY_SECONDS": "0.5",
}


@pytest.fixture
def prefect(tmp_path: Path, empty_database: Path) -> Iterator[Prefect]:
    server = Prefect(tmp_path, empty_database)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.close()


def test_a_prefect_server_that_is_killed_costs_no_result_and_keeps_no_study(prefect: Prefect) -> None:
    changes = {
        "seeds": {"training": [0]},
        "cluster": {"address": "inline"},
        "budget": {"trial_seconds": 100, "max_parallel": 1},
        "trainer": {"name": "simulated", "settings": {"real_seconds_per_step": 0.1}},
    }
    (prefect.clone / "test.yaml").write_text(yaml.safe_dump(study_data(Path(".jfhpo"), **changes)), encoding="utf-8")
    log, environment = prefect.clone / "log", prefect.environment | IMPATIENT
    call = "from flows.search import search; search(study='test.yaml')"

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            command = [sys.executable, "-c", call]
            return subprocess.Popen(command, cwd=prefect.clone, env=environment, stdout=file, stderr=file)

    def until_results(number: int) -> None:
        def there() -> bool:
            assert run.poll() is None, log.read_text()
            return log.read_text().count(" left | #") >= number

        wait_until(there, f"result {number}")

    run = start()
    try:
        for number in range(1, KILLS + 1):
            until_results(number)
            prefect.revive()
        assert run.wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()
        (first,) = prefect.named("search test")
        wait_until(lambda: prefect.state(first) == "Completed", "the end of the flow run")
        found = committed(prefect.clone, prefect.clone / "test.yaml")

        # The server has forgotten who holds the study, but not that it is held.
        run = start()
        assert run.wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()
        assert "its lock is released" in log.read_text()
        assert committed(prefect.clone, prefect.clone / "test.yaml") == found
    finally:
        run.kill()

    calm = MemoryLedger()
    run_search(simulated_study(prefect.clone / "calm", **changes), calm, InlineDispatcher(1))
    assert count(found) == sum(len(trial.segments) for trial in calm.trials())
    for trial in calm.trials():
        scores = [[evaluation.score for evaluation in result.evaluations] for result in trial.segments]
        assert [[one.score for one in result.evaluations] for result in found[trial.key]] == scores
        assert [one.charge_seconds for one in found[trial.key]] == [one.charge_seconds for one in trial.segments]
