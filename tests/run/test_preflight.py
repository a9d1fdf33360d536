from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.run import preflight
from jfhpo_core.run.preflight import doubts, examine
from jfhpo_core.trainers.base import Finding, Level
from tests.studies import simulated_study

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1388 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:1068 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2
   2: 00000000:2049 0100007F:0001 01 00000000:00000000 00:00000000 00000000     0        0 3
"""


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_study_in_order(tmp_path: Path) -> None:
    found = by_subject(list(examine(simulated_study(tmp_path))))
    assert {name: found[name].level for name in ("data", "reward", "disk")} == dict.fromkeys(
        ("data", "reward", "disk"), Level.OK
    )
    assert "4000 training prompts" in found["data"].message
    # A simulated training has no model that could write completions.
    assert "it scores 4 empty completions with 0, 0, 0, 0" in found["reward"].message


def test_a_reward_that_fails_is_found_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward(prompts, completions, **columns):\n    return [1 / 0]\n")
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n{{"prompt": "{name} too"}}\n')
    task = {
        "prompts": str(tmp_path / "train.jsonl"),
        "heldout": str(tmp_path / "heldout.jsonl"),
        "reward": str(tmp_path / "reward.py"),
    }
    found = by_subject(list(examine(simulated_study(tmp_path, task=task))))
    assert found["reward"].level is Level.FAILURE
    assert "ZeroDivisionError" in found["reward"].message
    assert found["data"].level is Level.WARNING


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "CHECKPOINT_BYTES", 10**15)
    found = by_subject(list(examine(simulated_study(tmp_path))))
    assert found["disk"].level is Level.FAILURE
    assert "tracking.workspace" in found["disk"].message


def test_servers_open_to_everyone_are_named(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(TCP)
    # MLflow on every interface; Prefect on loopback and a mere connection on Ray's dashboard's port are fine.
    (finding,) = preflight._ports(tmp_path)
    assert finding.level is Level.WARNING
    assert "MLflow (port 5000)" in finding.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"target": "small"}, ["no model of the family is smaller than the target 'small'"]),
        ({"target": "small", "fidelity": {"horizon_prompts": 480, "rungs": 3, "proxies": []}}, []),
        ({"budget": {"gpu_hours": 1e-6}}, ["do not pay for the cheapest trial (160 prompts on small, about"]),
    ],
)
def test_what_leaves_a_search_little_to_gain_is_told(tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    found = list(doubts(simulated_study(tmp_path, **changes)))
    assert all(one.level is Level.WARNING for one in found)
    assert len(found) == len(said)
    assert all(text in one.message for text, one in zip(said, found, strict=True))


@pytest.mark.parametrize("baselines", [[], [{"name": "recipe", "configuration": {}}]])
def test_a_budget_that_buys_nothing_says_what_is_left_to_recommend(tmp_path: Path, baselines: list[Any]) -> None:
    study = simulated_study(tmp_path, budget={"gpu_hours": 1e-6}, baselines=baselines)
    (finding,) = doubts(study)
    assert f"and {'a baseline is all that' if baselines else 'nothing'} can be recommended" in finding.message
