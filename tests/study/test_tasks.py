from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.study.data import columns_of, normalize_prompt
from jfhpo_core.study.spec import RewardSpec, TaskSpec
from jfhpo_core.study.tasks import Reward, load_task
from jfhpo_core.study.trial import FailureKind

TRL_REWARD = """
def reward(prompts, completions, answer, **kwargs):
    # As in TRL's documentation: one float per completion, columns by name, everything else in kwargs.
    return [1.0 if completion == right else 0.0 for completion, right in zip(completions, answer)]
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_reward(folder: Path, text: str, name: str = "reward.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def make_task(folder: Path, **changes: str) -> TaskSpec:
    files = {
        "prompts": write_rows(
            folder / "train.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
        ),
        "heldout": write_rows(folder / "heldout.jsonl", [{"prompt": "3+3=", "answer": "6"}]),
        "reward": write_reward(folder, TRL_REWARD),
    }
    return TaskSpec.model_validate({**files, "max_completion_tokens": 3, **changes})


def test_a_task_is_read_and_its_trl_reward_works(tmp_path: Path) -> None:
    task = load_task(make_task(tmp_path))
    assert task.train == ({"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"})
    assert task.heldout == ({"prompt": "3+3=", "answer": "6"},)
    assert task.max_completion_tokens == 3
    prompts = [row["prompt"] for row in task.train]
    with task.reward as reward:
        assert reward(prompts, ["2", "5"], **columns_of(task.train)).rewards == [1.0, 0.0]


def test_the_embedded_tasks_share_no_prompt_between_training_and_evaluation() -> None:
    task = load_task(TaskSpec(embedded="instruct"))
    trained = {normalize_prompt(row["prompt"]) for row in task.train}
    assert not trained & {normalize_prompt(row["prompt"]) for row in task.heldout}


@pytest.mark.parametrize(
    "leak", ["What is 1 + 1?", "what is 1 + 1?", " What is\t1+1? ", "WHAT IS 1 +  1?\n", "What is 1\u00a0+ 1?"]
)
def test_a_heldout_prompt_that_was_trained_on_is_refused(tmp_path: Path, leak: str) -> None:
    train = write_rows(tmp_path / "t.jsonl", [{"prompt": "What is 1 + 1?", "answer": "2"}])
    heldout = write_rows(tmp_path / "h.jsonl", [{"prompt": "fresh", "answer": "1"}, {"prompt": leak, "answer": "2"}])
    with pytest.raises(SpecError, match=r"h\.jsonl: 1 held-out prompts also stand in the training file") as caught:
        load_task(make_task(tmp_path, prompts=train, heldout=heldout))
    assert repr(leak) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my-train.jsonl").touch()
    near = r"cannot be read: there is no 'my_train\.jsonl' in .*; there is 'my-train\.jsonl'.*the study file's folder"
    with pytest.raises(SpecError, match=near):
        load_task(make_task(tmp_path, prompts=str(tmp_path / "my_train.jsonl")))
    with pytest.raises(SpecError, match=r"there is no folder .*no-folder; correct the path"):
        load_task(make_task(tmp_path, prompts=str(tmp_path / "no-folder" / "train.jsonl")))


def test_heldout_rows_need_the_same_columns(tmp_path: Path) -> None:
    heldout = write_rows(tmp_path / "other.jsonl", [{"prompt": "3+3=", "solution": "6"}])
    with pytest.raises(SpecError, match="give both the same columns"):
        load_task(make_task(tmp_path, heldout=heldout))


def test_a_missing_reward_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.py: there is no reward file here: .*'reward\.py'"):
        load_task(make_task(tmp_path, reward=str(tmp_path / "nowhere.py")))


def test_a_reward_that_does_not_load_is_refused(tmp_path: Path) -> None:
    path = write_reward(tmp_path, "import no_such_module_of_mine\n")
    with Reward([RewardSpec(function=path)]) as reward, pytest.raises(SpecError, match="fails on import: ModuleNotF"):
        reward.start()


def test_a_reward_that_fails_is_a_trial_failure(tmp_path: Path) -> None:
    path = write_reward(tmp_path, "def reward(prompts, completions):\n    return [1 / 0]\n")
    with Reward([RewardSpec(function=path)]) as reward, pytest.raises(TrialFailure, match="ZeroDivision") as caught:
        reward(["a"], ["b"])
    assert caught.value.kind == FailureKind.REWARD
