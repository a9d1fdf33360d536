from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo.display.watch import Watch
from jfhpo.orchestration.artifacts import RunPage, artifact_key, result_rows, trial_rows
from jfhpo.orchestration.flow_run import RETRIES, Approval, DeclinedError, Gate, persist, run_name
from jfhpo.orchestration.task_runs import TaskRuns, task_run_name
from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers import Job
from tests.studies import BECAUSE, simulated_study, study_data


@pytest.mark.parametrize("failures", range(RETRIES + 2))
def test_infrastructure_failures_are_retried_after_growing_pauses(failures: int) -> None:
    left, pauses, warnings = [failures], list[float](), list[str]()

    def call() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise InfrastructureError("Ray did not start")
        return "done"

    if failures > RETRIES:
        with pytest.raises(InfrastructureError):
            persist(call, warnings.append, pauses.append)
    else:
        assert persist(call, warnings.append, pauses.append) == "done"
    assert pauses == [60.0, 120.0][:failures]
    assert len(warnings) == len(pauses)


def test_a_bad_study_is_not_retried() -> None:
    def call() -> None:
        raise SpecError("no such model")

    with pytest.raises(SpecError):
        persist(call, pytest.fail, pytest.fail)


def test_a_flow_run_is_named_after_its_study(tmp_path: Path) -> None:
    data = study_data(tmp_path)
    assert run_name({"study": "folder/mine.yaml"}) == "mine"
    assert run_name({"study": data}) == run_name({"study": StudySpec.model_validate(data)}) == "test"
    assert run_name({}) == "demo"


def test_a_task_run_says_what_is_trained_and_who_chose_it(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trial = study.new_trial(7, {"learning_rate": 1e-4}, "medium", 0)
    job = study.job(trial, study.next_segment(trial, 320, BECAUSE), (), None)
    assert task_run_name(trial, job) == "#7 medium, steps 0 to 20 of 30 (test)"
    confirmation = study.new_trial(8, {}, "large", 3, "confirmation", "recipe")
    job = study.job(confirmation, study.next_segment(confirmation, 480, BECAUSE), (), None)
    assert task_run_name(confirmation, job) == "#8 large, steps 0 to 30 of 30 (recipe, seed 3)"


def test_the_gate_asks_before_whatever_trains_the_target_once_the_search_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = simulated_study(tmp_path, random_search=True, seeds={"training": [0]})
    asked: list[str] = []

    class Recording(TaskRuns):
        def submit(self, job: Job) -> None:
            self._gate(job, self._trial(job.trial_key))
            self._inner.submit(job)

    def answer(**_: object) -> Approval:
        asked.append("asked")
        return Approval(approve=False)

    monkeypatch.setattr("jfhpo.orchestration.flow_run.suspend_flow_run", answer)
    ledger = MemoryLedger()
    gate = Gate(study.spec, RunPage(study.spec.study, Watch()))
    with pytest.raises(DeclinedError):
        run_search(study, ledger, Recording(study.spec.study, InlineDispatcher(1), ledger, gate.check))
    assert asked == ["asked"]
    begun = ledger.trials()[-1]
    assert begun.purpose == "random-search"
    assert begun.open_segment is not None


def test_tables_have_a_row_for_every_trial_and_every_configuration(tmp_path: Path) -> None:
    result = run_search(simulated_study(tmp_path), MemoryLedger(), InlineDispatcher(2))
    rows = trial_rows(result.trials)
    assert len(rows) == len(result.trials)
    assert len({tuple(row) for row in rows}) == 1, "the rows of a table have the same columns"
    assert any(row["state"].startswith("stopped by ") for row in rows)
    assert [row["configuration"] for row in result_rows(result)] == ["recommended", "recipe"]


def test_keys_of_artifacts_are_what_prefect_takes() -> None:
    assert artifact_key("My.Study_7", "trials") == "jfhpo-my-study-7-trials"
