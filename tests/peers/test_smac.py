from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo.testing.strategies import SPACE, search
from jfhpo_core.peers.smac import configuration_space
from jfhpo_core.study.space import Space
from tests.peers.test_peers import peer_study


def test_the_space_is_handed_over_with_its_conditions() -> None:
    space = configuration_space(Space.model_validate(SPACE))
    assert list(space) == sorted(SPACE)
    for chosen in space.sample_configuration(50):
        assert ("warmup_ratio" in chosen) == (chosen["scheduler"] in (1, 2))
        assert chosen["mini_batches"] in (1, 2)
        assert chosen["n_samples"] in (0, 1, 2)
        assert 0 <= chosen["learning_rate"] <= 1


def test_several_conditions_must_all_hold() -> None:
    data = {
        "loss_type": {"type": "choice", "values": ["grpo", "dr_grpo", "dapo"]},
        "n_samples": {"type": "choice", "values": [4, 8, 16]},
        "clip_high": {"type": "float", "low": 0.1, "high": 0.4, "when": {"loss_type": ["dapo"], "n_samples": [8, 16]}},
    }
    chosen = configuration_space(Space.model_validate(data)).sample_configuration(100)
    assert {item["loss_type"] == 2 and item["n_samples"] > 0 for item in chosen} == {True, False}
    assert all(("clip_high" in item) == (item["loss_type"] == 2 and item["n_samples"] > 0) for item in chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smac3", "dehb"])
def test_the_library_leaves_no_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    search(peer_study(tmp_path, name, seconds=150))
    assert list(elsewhere.iterdir()) == []


def test_a_bracket_promotes_its_best(tmp_path: Path) -> None:
    outcome, recorded = search(peer_study(tmp_path, "successive-halving"))
    asked = [proposal.stop_prompts for _, _, _, proposal in recorded.calls if proposal]
    assert asked[:13] == [48] * 9 + [160] * 3 + [480]
    first = {trial.key: trial.evaluations[-1].score for trial in recorded.calls[9][0]}
    promoted = [trial.key for trial in outcome.trials if trial.key in first and len(trial.segments) > 1]
    assert sorted(promoted) == sorted(sorted(first, key=lambda key: -first[key])[:3])
