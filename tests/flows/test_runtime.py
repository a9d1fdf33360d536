from __future__ import annotations

from pathlib import Path

from flows.runtime import run_study
from jfhpo_core.spec import StudySpec
from tests.studies import study_data


def test_a_checkpoint_that_is_gone_hides_no_result(tmp_path: Path) -> None:
    spec = StudySpec.model_validate(
        study_data(
            tmp_path / "workspace",
            cluster={"address": "inline"},
            budget={"trial_seconds": 120, "max_parallel": 1},
            tracking={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "workspace": str(tmp_path / "workspace")},
        )
    )
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
