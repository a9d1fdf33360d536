from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo.overrides import read_study
from jfhpo_core.errors import SpecError
from jfhpo_core.study.study_file import load_study

STUDY = Path("examples/simulated.yaml")


def test_values_are_read_by_the_rules_of_the_study_file() -> None:
    spec = read_study(
        STUDY,
        ["budget.trial_seconds=9e2", "seeds.training=[3, 4]", "trainer.settings.speed=2", "random_search=true"],
    )
    assert spec.budget.trial_seconds == 900
    assert spec.seeds.training == [3, 4]
    assert spec.trainer.settings == {"speed": 2}
    assert spec.random_search


def test_a_short_form_replaces_a_section_and_a_position_names_a_list_item() -> None:
    spec = read_study(STUDY, ["strategy=paper", "baselines.1.name=mine"])
    assert spec.strategy.name == "paper"
    assert [baseline.name for baseline in spec.baselines] == ["recipe", "mine"]


def test_everything_else_stays_as_in_the_file() -> None:
    changed = read_study(STUDY, ["budget.max_parallel=3"])
    file = load_study(STUDY)
    assert changed == file.model_copy(update={"budget": file.budget.model_copy(update={"max_parallel": 3})})


def test_paths_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = STUDY.resolve()
    monkeypatch.chdir(tmp_path)
    files = {"prompts": "a.jsonl", "heldout": "b.jsonl", "reward": "r.py:score"}
    spec = read_study(study, [f"task={{prompts: {files['prompts']}, heldout: b.jsonl, reward: 'r.py:score'}}"])
    assert spec.task.prompts == str(tmp_path / "a.jsonl")
    assert spec.task.reward == f"{tmp_path / 'r.py'}:score"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.trial_seconds", "key=value"),
        ("=3", "key=value"),
        ("budget.trial_seconds=-1", "budget.trial_seconds = -1: Input should be greater than 0"),
        (
            "budget.trial_second=3",
            "budget.trial_second = 3: Extra inputs are not permitted",
        ),
        ("budjet.trial_seconds=3", "there is no field 'budjet'"),
        ("baselines.7.name=x", "'7' is not a position in a list of 2"),
        ("study.name=x", "'name' lies below a plain value"),
        ("target=huge", "'huge' is not in the family"),
        ("seeds.training=[1,", "not valid YAML"),
    ],
)
def test_refusals_name_the_override_and_the_fault(override: str, message: str) -> None:
    with pytest.raises(SpecError, match=r".") as refusal:
        read_study(STUDY, [override])
    assert message in str(refusal.value)
    assert f"--set {override}" in str(refusal.value)
