from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import jfhpo
from jfhpo.testing.samples import study_data


def test_every_public_name_is_there() -> None:
    assert all(getattr(jfhpo, name) for name in jfhpo.__all__)
    assert set(jfhpo.__all__) <= set(dir(jfhpo))
    with pytest.raises(AttributeError, match="'jfhpo' has no attribute 'serach'"):
        jfhpo.serach  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, jfhpo, jfhpo.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "mlflow", "ray", "prefect", "pandas", "numpy", "pydantic"} & set(loaded)


@pytest.fixture
def study(tmp_path: Path, tracking_uri: str) -> jfhpo.Study:
    return jfhpo.load_study(
        study_data(
            tmp_path / "workspace",
            cluster={"address": "inline"},
            budget={"trial_seconds": 120, "max_parallel": 1},
            tracking={"uri": tracking_uri, "workspace": str(tmp_path / "workspace")},
        )
    )


@pytest.mark.slow
def test_a_study_before_its_first_trial(study: jfhpo.Study) -> None:
    assert study.trials.empty
    assert "score" in study.trials
    assert "Nothing has been recorded yet" in study._repr_html_()
    with pytest.raises(jfhpo.JfhpoError, match="no trials of study"):
        _ = study.result


@pytest.mark.slow
def test_a_study_that_was_run(study: jfhpo.Study, tmp_path: Path) -> None:
    seen = []
    outcome = jfhpo.run(study, on_progress=seen.append)
    assert seen
    trials = study.trials
    assert list(trials.index) == [trial.number for trial in outcome.result.trials]
    assert list(trials["score"]) == [trial.evaluations[-1].score for trial in outcome.result.trials]
    first = outcome.result.trials[0]
    row = trials.loc[first.number]
    assert (row["model"], row["state"], row["purpose"]) == (first.model, str(first.state), first.purpose)
    assert row["params_learning_rate"] == first.configuration["learning_rate"]

    table = study.comparison
    assert table.index[0] == "recommended"
    assert (table["low"] < table["score"]).all()
    assert (table["score"] < table["high"]).all()

    recommended = study.recommended
    assert recommended is not None
    assert outcome.result.recommended is not None
    assert outcome.result.recommended.configuration.items() <= recommended.items()
    assert "prompts_per_step" in recommended

    names = [path.name for path in study.plots(tmp_path / "plots")]
    assert "learning-curves.png" in names
    assert all((tmp_path / "plots" / name).stat().st_size > 1000 for name in names)

    page = study._repr_html_()
    assert f"{len(trials)} trials" in page
    assert "The recommended configuration scores" in page
    assert page.count("<table") == 2


def test_a_file_can_be_changed_as_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "study: mine\nfamily: [{name: a, path: simulated, parameters: 100000}]\ntarget: a\ntask: instruct\n"
        "trainer: simulated\nspace: tiny\nbudget: {trial_seconds: 10}\n"
    )
    assert jfhpo.load_study(path, ["budget.trial_seconds=20"]).spec.budget.trial_seconds == 20
    with pytest.raises(jfhpo.SpecError, match="no_such_field"):
        jfhpo.load_study({"no_such_field": 1})
