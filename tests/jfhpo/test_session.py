from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import jfhpo.session
from jfhpo.orchestration.flow_run import DeclinedError
from jfhpo.session import promote_model, run_study
from jfhpo_core.errors import LedgerError
from jfhpo_core.run.dispatch import Dispatcher
from jfhpo_core.study.spec import StudySpec
from mlflow_plugin.ledger import MlflowLedger
from tests.studies import study_data


@pytest.fixture
def spec(tmp_path: Path, tracking_uri: str) -> StudySpec:
    return StudySpec.model_validate(
        study_data(
            tmp_path / "workspace",
            strategy={"name": "random"},
            cluster={"address": "inline"},
            budget={"trial_seconds": 120, "max_parallel": 1},
            tracking={"uri": tracking_uri, "workspace": str(tmp_path / "workspace")},
        )
    )


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_hides_no_result(spec: StudySpec, tmp_path: Path) -> None:
    first = run_study(spec)
    trial = first.result.target_trial
    assert trial is not None
    assert trial.checkpoint is not None
    folder = Path(spec.tracking.workspace) / spec.study / "checkpoints" / trial.checkpoint.path
    folder.rename(tmp_path / "away")
    first.report.unlink()
    without = run_study(spec)
    assert without.result.recommended == first.result.recommended
    assert without.report.exists()
    assert without.model_uri is None
    assert "cannot be registered" in without.model_note
    (tmp_path / "away").rename(folder)
    assert run_study(spec).model_note == first.model_note


def test_what_a_person_ends_has_not_failed(spec: StudySpec) -> None:
    def declined(dispatcher: Dispatcher) -> Dispatcher:
        raise DeclinedError("not today")

    with pytest.raises(DeclinedError):
        run_study(spec, around=declined)
    client = MlflowClient(spec.tracking.uri)
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    (study,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{spec.study}'")
    assert (study.info.status, study.data.tags["jfhpo.state"]) == ("KILLED", "interrupted")


@pytest.mark.slow
def test_a_model_that_is_named_later_is_registered_then(spec: StudySpec) -> None:
    named, nameless = (
        spec.model_copy(update={"tracking": spec.tracking.model_copy(update={"registered_model": name})})
        for name in ("later", "")
    )
    assert "registered_model is empty" in run_study(nameless).model_note
    # The simulated trainer has no weights, which is noticed only where a name is given.
    assert "holds no weights" in run_study(named).model_note
    with pytest.raises(LedgerError, match="registered no model, so there is none to promote: the checkpoint"):
        promote_model(named)


def test_the_version_of_a_study_is_promoted(spec: StudySpec) -> None:
    client = MlflowClient(spec.tracking.uri)
    client.create_registered_model("test")
    for _ in range(2):
        client.create_model_version("test", source="/nowhere")
    client.set_registered_model_alias("test", "champion", "1")
    ledger = MlflowLedger(client)
    ledger.open(spec)
    ledger.summarize({"model_uri": "models:/test/2", "model_note": "challenger: it does not beat the champion"})
    assert "models:/test/2, champion: version 2 is served: study 'test' was promoted by hand" in promote_model(spec)
    assert int(client.get_registered_model("test").aliases["champion"]) == 2
    reader = MlflowLedger(client)
    assert reader.look(spec)
    assert "in place of version 1" in str(reader.facts()["model_note"])


@pytest.mark.slow
def test_ctrl_c_while_the_report_is_written_leaves_the_study_finished(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jfhpo.session, "write_plots", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(spec)
    client = MlflowClient(spec.tracking.uri)
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    (study,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{spec.study}'")
    assert (study.info.status, study.data.tags["jfhpo.state"]) == ("FINISHED", "finished")
    assert run_study(spec).report.exists()


@pytest.mark.slow
def test_trials_after_an_accepted_change_are_marked(tmp_path: Path, tracking_uri: str) -> None:
    for name in ("train.jsonl", "heldout.jsonl", "reward.py"):
        (tmp_path / name).write_text(name)

    def study(seconds: float) -> StudySpec:
        return StudySpec.model_validate(
            study_data(
                tmp_path,
                task={"prompts": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl"),
                      "reward": str(tmp_path / "reward.py")},
                cluster={"address": "inline"},
                budget={"trial_seconds": seconds, "max_parallel": 1},
                baselines=[],
                seeds={"training": [0]},
                tracking={"uri": tracking_uri, "workspace": str(tmp_path)},
            )
        )  # fmt: skip

    first = run_study(study(60)).result
    (tmp_path / "reward.py").write_text("another reward")
    with pytest.raises(LedgerError, match=r"task\.reward"):
        run_study(study(120))
    outcome = run_study(study(120), accept_changes=True)
    marked = {trial.number: trial.changed for trial in outcome.result.trials}
    assert {marked[trial.number] for trial in first.trials} == {()}
    later = [marked[trial.number] for trial in outcome.result.trials[len(first.trials) :]]
    assert later
    assert set(later) == {("task.reward",)}
    assert "contents of task.reward were changed" in outcome.report.read_text(encoding="utf-8")
    # Accepted once, it is accepted; the mark stays.
    assert all(trial.changed for trial in run_study(study(160)).result.trials[len(first.trials) :])
