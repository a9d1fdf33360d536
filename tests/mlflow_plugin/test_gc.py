from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from jfhpo.checkpoint_usage import parse_size
from jfhpo.cli import app
from jfhpo_core.errors import SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.checkpoints import CheckpointStore
from mlflow_plugin.ledger import MlflowLedger
from tests.studies import simulated_study

SMALL = {"trial_seconds": 100, "max_parallel": 2}


def checkpoints(folder: Path) -> set[Path]:
    return set(folder.rglob("step-*"))


@pytest.mark.slow
def test_gc_shows_first_and_deletes_when_told(tracking_uri: str, tmp_path: Path) -> None:
    tracking = {"workspace": str(tmp_path / "work"), "uri": tracking_uri}
    study = simulated_study(tmp_path / "work", tracking=tracking, budget=SMALL)
    client = MlflowClient(tracking_uri=tracking_uri)
    ledger = MlflowLedger(client)
    outcome = run_search(study, ledger, InlineDispatcher(2))
    before = checkpoints(study.store)
    assert outcome.target_trial is not None
    assert outcome.target_trial.checkpoint is not None
    best = study.store / outcome.target_trial.checkpoint.path
    (tmp_path / "study.yaml").write_text(study.spec.to_yaml())
    cut_off = CheckpointStore(study.store).stage(outcome.trials[0].key)
    (cut_off / "state").write_bytes(b"half of it")
    log = study.folder / "trainings" / outcome.trials[0].key / "train.log"
    log.parent.mkdir(parents=True)
    log.write_text("loss\n" * 400)

    shown = CliRunner().invoke(app, ["gc", str(tmp_path / "study.yaml")])
    assert shown.exit_code == 0, shown.output
    assert f"{len(before)} of {len(before) + 1} checkpoints would go" in shown.output
    assert "it was never finished" in shown.output
    assert "never deleted here): 2.0 KB" in " ".join(shown.output.split())
    assert checkpoints(study.store) == before

    done = CliRunner().invoke(app, ["gc", str(tmp_path / "study.yaml"), "--delete"])
    assert done.exit_code == 0, done.output
    assert checkpoints(study.store) == {best}
    assert not list(cut_off.parent.iterdir())
    assert log.exists()
    there = client.search_logged_models([ledger.experiment_id], "tags.`jfhpo.available` = 'true'")
    assert [model.source_run_id for model in there] == [ledger.run_id(outcome.target_trial.key)]
    # The ledger's trials are untouched, and opening it again does not offer what is gone.
    again = MlflowLedger(client)
    again.open(study.spec)
    assert again.trials() == ledger.trials()
    assert len(client.search_logged_models([ledger.experiment_id], "tags.`jfhpo.available` = 'true'")) == 1


@pytest.mark.slow
def test_gc_deletes_nothing_while_trials_wait_for_the_ledger(tracking_uri: str, tmp_path: Path) -> None:
    tracking = {"workspace": str(tmp_path / "work"), "uri": tracking_uri}
    study = simulated_study(tmp_path / "work", tracking=tracking, budget=SMALL)
    run_search(study, MlflowLedger(MlflowClient(tracking_uri=tracking_uri)), InlineDispatcher(2))
    before = checkpoints(study.store)
    (study.folder / "outbox.jsonl").write_text("")
    (tmp_path / "study.yaml").write_text(study.spec.to_yaml())
    done = CliRunner().invoke(app, ["gc", str(tmp_path / "study.yaml"), "--delete"])
    assert done.exit_code == 2
    assert "run `jfhpo search` first" in " ".join(done.output.split())
    assert checkpoints(study.store) == before


def test_a_size_that_is_none_is_refused() -> None:
    for text in ("", "much", "5", "-1GB", "1e3MB"):
        with pytest.raises(SpecError, match="--limit"):
            parse_size(text)
