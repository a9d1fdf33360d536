"""What a person deletes in MLflow while, or after, a study is searched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jfhpo_core.errors import LedgerError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Outcome
from mlflow_plugin.ledger import MlflowLedger
from tests.studies import simulated_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path, budget={"trial_seconds": 100, "max_parallel": 1}, seeds={"training": [0]})


@pytest.fixture
def search(study: Study, tracking_uri: str) -> Callable[..., tuple[SearchResult, MlflowLedger]]:
    def search(
        on_progress: Callable[[Progress], None] | None = None, **keywords: bool
    ) -> tuple[SearchResult, MlflowLedger]:
        ledger = MlflowLedger(MlflowClient(tracking_uri=tracking_uri), **keywords)
        return run_search(study, ledger, InlineDispatcher(), on_progress), ledger

    return search


@pytest.mark.slow
def test_a_deleted_run_of_a_trial_is_missed_until_it_is_restored_or_forgotten(
    search: Callable[..., tuple[SearchResult, MlflowLedger]],
) -> None:
    whole, ledger = search()
    gone = whole.trials[1]
    ledger.client.delete_run(ledger.run_id(gone.key))
    for _ in range(2):
        with pytest.raises(LedgerError, match=rf"restore --run-id {ledger.run_id(gone.key)}.*--forget"):
            search()
    ledger.client.restore_run(ledger.run_id(gone.key))
    assert search()[0].trials == whole.trials
    ledger.client.delete_run(ledger.run_id(gone.key))
    again, _ = search(forget=True)
    assert again.complete
    numbers = [trial.number for trial in again.trials]
    assert len(set(numbers)) == len(numbers)
    assert gone.number not in numbers
    ranks = [part.committed for trial in again.trials for part in trial.segments]
    assert len(set(ranks)) == len(ranks)
    assert search()[0].trials == again.trials, "what was forgotten once is not asked for again"


@pytest.mark.slow
def test_a_run_that_is_gone_for_good_is_missed_too(search: Callable[..., tuple[SearchResult, MlflowLedger]]) -> None:
    whole, ledger = search()
    run_id = ledger.run_id(whole.trials[1].key)
    ledger.client.delete_run(run_id)
    ledger.client._tracking_client.store._hard_delete_run(run_id)  # what `mlflow gc` does
    with pytest.raises(LedgerError, match=r"1 finished segment\(s\) whose runs are gone for good"):
        search()
    assert search(forget=True)[0].complete


@pytest.mark.slow
def test_a_deleted_study_is_not_begun_anew_unasked(search: Callable[..., tuple[SearchResult, MlflowLedger]]) -> None:
    whole, ledger = search()
    ledger.client.delete_run(ledger.study_run_id)
    with pytest.raises(LedgerError, match=rf"restore --run-id {ledger.study_run_id}.*--forget"):
        search()
    ledger.client.restore_run(ledger.study_run_id)
    assert search()[0].trials == whole.trials
    ledger.client.delete_run(ledger.study_run_id)
    again, other = search(forget=True)
    assert other.study_run_id != ledger.study_run_id
    assert [trial.key for trial in again.trials] == [trial.key for trial in whole.trials]


@pytest.mark.parametrize("what", ["study", "experiment", "open trial"])
def test_what_is_deleted_while_it_is_searched_ends_the_call_with_a_way_on(
    search: Callable[..., tuple[SearchResult, MlflowLedger]], tracking_uri: str, what: str, study: Study
) -> None:
    client = MlflowClient(tracking_uri=tracking_uri)
    deleted: list[str] = []

    def delete(progress: Progress) -> None:
        if len(progress.trials) != 2 or progress.trials[1].segments or deleted:
            return
        deleted.append(what)
        experiment = client.get_experiment_by_name(f"jfhpo/{study.spec.study}")
        runs = client.search_runs([experiment.experiment_id])
        parent = next(run for run in runs if "jfhpo.study" in run.data.tags)
        if what == "experiment":
            client.delete_experiment(experiment.experiment_id)
        elif what == "study":
            client.delete_run(parent.info.run_id)
        else:
            client.delete_run(next(run for run in runs if run.info.run_name.startswith("001 ")).info.run_id)

    with pytest.raises(LedgerError, match="deleted"):
        search(delete)
    with pytest.raises(LedgerError, match=r"restore"):
        search()


def test_a_store_that_lost_its_newest_segment_trains_it_again(
    search: Callable[..., tuple[SearchResult, MlflowLedger]],
) -> None:
    """A database restored from a backup has no gaps: it is an earlier state of the study."""
    whole, ledger = search()
    last = max(whole.trials, key=lambda trial: max(part.committed for part in trial.segments))
    ledger.client.delete_tag(ledger.run_id(last.key), f"mlflow.jfhpo.segment.{len(last.segments) - 1:04d}")
    again, _ = search()
    assert [trial.key for trial in again.trials] == [trial.key for trial in whole.trials]
    assert all(part.outcome is not Outcome.LOST for trial in again.trials for part in trial.segments)


@pytest.fixture
def own_study(tmp_path: Path) -> Callable[[str], Study]:
    """A study with its tracking store in a file of its own, by the file's name."""

    def own_study(name: str) -> Study:
        tracking = {"uri": f"sqlite:///{tmp_path / name}", "workspace": str(tmp_path / "work")}
        budget = {"trial_seconds": 60, "max_parallel": 1}
        return simulated_study(tmp_path, budget=budget, seeds={"training": [0]}, tracking=tracking)

    return own_study


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_database_that_lost_its_end_is_refused_until_it_is_restored(
    own_study: Callable[[str], Study], tmp_path: Path, kept: float
) -> None:
    study, file = own_study("mlflow.db"), tmp_path / "mlflow.db"
    whole = run_search(study, MlflowLedger(), InlineDispatcher())
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(LedgerError, match=rf"{file} is damaged \(.*\); restore it from a copy.*--forget"):
        run_search(study, MlflowLedger(), InlineDispatcher())
    file.write_bytes(content)
    assert run_search(study, MlflowLedger(), InlineDispatcher()).trials == whole.trials


@pytest.mark.slow
def test_a_store_that_knows_nothing_of_checkpoints_that_are_there_is_refused(
    own_study: Callable[[str], Study], tmp_path: Path
) -> None:
    whole = run_search(own_study("mlflow.db"), MlflowLedger(), InlineDispatcher())
    other = own_study("other.db")
    for _ in range(2):
        with pytest.raises(LedgerError, match=rf"{tmp_path / 'other.db'} knows nothing of study.*--forget"):
            run_search(other, MlflowLedger(), InlineDispatcher())
    again = run_search(other, MlflowLedger(forget=True), InlineDispatcher())
    assert [trial.key for trial in again.trials] == [trial.key for trial in whole.trials]
    assert run_search(other, MlflowLedger(), InlineDispatcher()).trials == again.trials
