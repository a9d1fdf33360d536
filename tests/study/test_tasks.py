from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.study.spec import TaskSpec
from jfhpo_core.study.tasks import columns_of, load_reward, load_task, normalize_prompt, read_rows, refuse_leak
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
    assert task.reward(prompts=prompts, completions=["2", "5"], **columns_of(task.train)) == [1.0, 0.0]


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


def test_prompts_that_differ_in_more_than_case_and_space_are_no_leak() -> None:
    refuse_leak([{"prompt": "1+1="}], [{"prompt": "1-1="}, {"prompt": "11+="}], "heldout")


def test_all_leaks_are_counted() -> None:
    with pytest.raises(SpecError, match="2 held-out prompts"):
        refuse_leak([{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "A"}, {"prompt": "c"}, {"prompt": "b "}], "heldout")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', 2, "not valid JSON"),
        ('{"prompt": "a"}\n\n["b"]\n', 3, "non-empty text 'prompt'"),
        ('{"question": "a"}\n', 1, "non-empty text 'prompt'"),
        ('{"prompt": ""}\n', 1, "non-empty text 'prompt'"),
        ('{"prompt": 7}\n', 1, "non-empty text 'prompt'"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b", "y": 1}\n', 2, "differ from line 1's"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b"}\n', 2, "differ from line 1's"),
        ('{"prompt": "a", "completions": 1}\n', 1, "reserved"),
        ('{"prompt": "a", "prompts": 1}\n', 1, "reserved"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=rf"rows\.jsonl, line {line}: .*{message}"):
        read_rows(path)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b"}\n\n', encoding="utf-8")
    assert [row["prompt"] for row in read_rows(path)] == ["a", "b"]


def test_separators_inside_a_text_end_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}'.encode())
    assert [row["prompt"] for row in read_rows(path)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b'{"prompt": "\xff"}', "cannot be read")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        read_rows(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_task(make_task(tmp_path, prompts=str(tmp_path / "nowhere.jsonl")))


def test_heldout_rows_need_the_same_columns(tmp_path: Path) -> None:
    heldout = write_rows(tmp_path / "other.jsonl", [{"prompt": "3+3=", "solution": "6"}])
    with pytest.raises(SpecError, match="give both files the same columns"):
        load_task(make_task(tmp_path, heldout=heldout))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no parser')", "raised ValueError: no parser"),
        ("return [1.0]", "returned 1 rewards for 2 completions"),
        ("return [1.0, 2.0, 3.0]", "returned 3 rewards for 2 completions"),
        ("return None", "raised TypeError"),
        ("return 1.0", "raised TypeError"),
        ("return [1.0, float('nan')]", "returned nan, not a finite number"),
        ("return [float('inf'), 1.0]", "returned inf, not a finite number"),
        ("return [1.0, 'good']", "returned 'good', not a finite number"),
        ("return [1.0, None]", "returned None, not a finite number"),
        ("return [1.0, [1.0]]", r"returned \[1.0\], not a finite number"),
    ],
)
def test_a_reward_fault_is_a_trial_failure(tmp_path: Path, body: str, message: str) -> None:
    reward = load_reward(write_reward(tmp_path, f"def reward(prompts, completions, **columns):\n    {body}\n"))
    with pytest.raises(TrialFailure, match=message) as caught:
        reward(prompts=["a", "b"], completions=["c", "d"])
    assert caught.value.kind == FailureKind.REWARD


@pytest.mark.parametrize(
    "body",
    ["return [True, 0]", "return (float(len(c)) for c in ['x', ''])", "import numpy\n    return numpy.array([1, 0])"],
)
def test_whatever_counts_as_a_number_is_a_reward(tmp_path: Path, body: str) -> None:
    reward = load_reward(write_reward(tmp_path, f"def reward(prompts, completions, **columns):\n    {body}\n"))
    rewards = reward(prompts=["a", "b"], completions=["c", "d"])
    assert rewards == [1.0, 0.0]
    assert all(type(value) is float for value in rewards)


def test_a_reward_function_may_have_any_name(tmp_path: Path) -> None:
    path = write_reward(tmp_path, "def mine(prompts, completions):\n    return [0.5 for _ in completions]\n")
    assert load_reward(f"{path}:mine")(prompts=["a"], completions=["b"]) == [0.5]


@pytest.mark.parametrize(
    ("text", "reference", "message"),
    [
        ("x = 1\n", "reward.py", "has no function 'reward'"),
        ("reward = 1\n", "reward.py", "has no function 'reward'"),
        ("def reward(): ...\n", "reward.py:other", "has no function 'other'"),
        ("import no_such_module_of_mine\n", "reward.py", "fails on import: ModuleNotFoundError"),
        ("def reward(:\n", "reward.py", "fails on import: SyntaxError"),
        ("", "nowhere.py", "there is no reward file here"),
    ],
)
def test_a_reward_that_does_not_load_is_refused(tmp_path: Path, text: str, reference: str, message: str) -> None:
    write_reward(tmp_path, text)
    with pytest.raises(SpecError, match=message):
        load_reward(str(tmp_path / reference))


def test_two_reward_files_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    rewards = []
    for name, value in (("one.py", 1), ("two.py", 2)):
        rewards.append(
            load_reward(write_reward(tmp_path, f"V = {value}\ndef reward(prompts, completions): return [V]\n", name))
        )
    assert [reward(prompts=["a"], completions=["b"]) for reward in rewards] == [[1.0], [2.0]]


def test_a_reward_file_may_define_dataclasses(tmp_path: Path) -> None:
    text = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Verdict:
    score: float

def reward(prompts, completions):
    return [Verdict(0.25).score for _ in completions]
"""
    assert load_reward(write_reward(tmp_path, text))(prompts=["a"], completions=["b"]) == [0.25]
