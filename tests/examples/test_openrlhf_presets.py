"""The presets, on small files in the schemas of the public data sets: none of those can be fetched here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jfhpo.overrides import read_study
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.scoring import Scores
from jfhpo_core.study.spec import RewardSpec
from jfhpo_core.study.tasks import Reward, load_task
from jfhpo_core.trainers.openrlhf.trainer import ineffective

PRESETS = Path(__file__).parents[2] / "examples" / "openrlhf"

# Rows with the fields of each public data set, invented.
SCHEMAS: dict[str, tuple[dict[str, list[dict[str, Any]]], list[dict[str, list[dict[str, Any]]]]]] = {
    "gsm8k": (
        {"train": [
            {"question": "Two plus two?", "answer": "It is 2+2.\n#### 4"},
            {"question": "How many grams are a tonne?", "answer": "A million.\n#### 1,000,000"},
            {"question": "Three  plus three?", "answer": "#### 6"},
        ]},
        [{"test": [
            {"question": "three plus three?", "answer": "#### 6"},
            {"question": "One plus one?", "answer": "#### 2"},
        ]}],
    ),
    "math": (
        {"train": [
            {"problem": "Halve one.", "solution": "So it is $\\boxed{\\frac{1}{2}}$.", "level": "1", "type": "Algebra"},
            {"problem": "No answer.", "solution": "Left to the reader.", "level": "5", "type": "Geometry"},
            {"problem": "Two of them.", "solution": "Not \\boxed{1} but \\boxed{x^{2}}.", "level": "1", "type": "A"},
        ]},
        [{"test": [
            {"problem": "Quarter one.", "solution": "", "answer": "\\frac{1}{4}", "subject": "Algebra", "level": 1},
            {"problem": "Double one.", "solution": "", "answer": "2", "subject": "Algebra", "level": 1},
        ]}],
    ),
    "openbookqa": (
        {"train": [
            {"id": "1", "question_stem": "The sun is", "answerKey": "B",
             "choices": {"text": ["cold", "hot", "flat", "near"], "label": ["A", "B", "C", "D"]}},
        ]},
        [{"test": [
            {"id": "2", "question_stem": "Ice is", "answerKey": "D",
             "choices": {"text": ["hot", "dry", "loud", "cold"], "label": ["A", "B", "C", "D"]}},
            {"id": "3", "question_stem": "Wood", "answerKey": "A",
             "choices": {"text": ["burns", "melts", "sings", "flows"], "label": ["A", "B", "C", "D"]}},
        ]}],
    ),
    "mmlu": (
        {"auxiliary_train": [{"question": "Which?", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 2}]},
        [{"validation": [
            {"question": "What?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 0},
            {"question": "Who?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 3},
        ]}],
    ),
    "numinamath": (
        {"train": [{"source": "olympiads", "problem": "Find n.", "solution": "\\boxed{7}", "messages": []}]},
        [
            {"train": [{"id": 0, "problem": "An AIME one.", "solution": "", "answer": "204", "url": ""}]},
            {"train": [{"id": 0, "problem": "An AMC one.", "answer": 142.0, "url": ""}]},
        ],
    ),
}  # fmt: skip

TASK_OF = {
    "qwen2.5-gsm8k": "gsm8k", "qwen3-math": "math", "llama3-openbookqa": "openbookqa", "qwen2.5-mmlu": "mmlu",
    "qwen3-numinamath": "numinamath",
}  # fmt: skip


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("jfhpo_examples_prepare", PRESETS / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        # `datasets` recognizes these names as splits; MMLU's own split has a name of its own.
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def data(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

    def make(task: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        train, heldout = SCHEMAS[task]
        if task == "mmlu":
            train = {"train": train["auxiliary_train"]}
            part = prepare.TASKS["mmlu"][0][0]
            monkeypatch.setitem(
                prepare.TASKS, "mmlu", ([type(part)(part.path, None, "train", part.convert)], prepare.TASKS["mmlu"][1])
            )
        folders = [write(tmp_path / f"heldout-{number}", splits) for number, splits in enumerate(heldout)]
        out = tmp_path / "out"
        prepare.prepare(task, out, write(tmp_path / "train", train), folders)
        return tuple(  # type: ignore[return-value]
            [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "heldout")
        )

    return make


def test_gsm8k(data: Any) -> None:
    train, heldout = data("gsm8k")
    # The third training question is a held-out one.
    assert [row["answer"] for row in train] == ["4", "1000000"]
    assert [row["answer"] for row in heldout] == ["6", "2"]
    assert train[0]["prompt"].startswith("Two plus two?\n")


def test_math_takes_the_last_box_and_leaves_out_what_has_none(data: Any) -> None:
    train, heldout = data("math")
    assert [row["answer"] for row in train] == ["\\frac{1}{2}", "x^{2}"]
    assert [row["answer"] for row in heldout] == ["\\frac{1}{4}", "2"]


def test_multiple_choice(data: Any) -> None:
    train, heldout = data("openbookqa")
    assert "(B) hot" in train[0]["prompt"]
    assert [row["answer"] for row in train + heldout] == ["B", "D", "A"]


def test_mmlu(data: Any) -> None:
    train, heldout = data("mmlu")
    assert [row["answer"] for row in train + heldout] == ["C", "A", "D"]
    assert [row["source"] for row in heldout] == ["anatomy", "law"]


def test_numinamath_is_judged_on_competitions(data: Any) -> None:
    train, heldout = data("numinamath")
    assert [row["source"] for row in train + heldout] == ["olympiads", "aime", "amc"]
    assert heldout[1]["answer"] == "142.0"


def rewards(file: str, completions: list[str], answers: list[str], limit_seconds: float = 60.0) -> Scores:
    with Reward([RewardSpec(function=str(PRESETS / file))], limit_seconds) as reward:
        nothing = [""] * len(completions)
        return reward(nothing, completions, answer=answers, source=nothing)


@pytest.mark.slow
def test_the_mathematical_reward_knows_equal_answers() -> None:
    answers = ["\\frac{1}{2}", "1000000", "142.0", "7"]
    right = ["so \\boxed{0.5}", "\\boxed{1,000,000}", "it is \\boxed{142}", "The answer is $7$."]
    assert rewards("math_reward.py", right, answers).rewards == [1.0] * 4
    wrong = ["so \\boxed{2}", "", "\\boxed{143}", "I do not know"]
    assert rewards("math_reward.py", wrong, answers).rewards == [0.0] * 4


@pytest.mark.slow
def test_the_mathematical_reward_survives_towers_of_powers() -> None:
    towers = ["\\boxed{9^{9^{9}}}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{10^{10^{10}}!}"]
    found = rewards("math_reward.py", [*towers, "\\boxed{7}"], ["7"] * 4, limit_seconds=8.0)
    assert found.rewards == [0.0, 0.0, 0.0, 1.0]


def test_the_choice_reward_takes_the_last_word() -> None:
    completions = ["The answer is (A). No: the answer is B", "The answer is (C).", "Answer: B", "the answer is banana"]
    assert rewards("choice_reward.py", completions, ["B"] * 4).rewards == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_is_accepted(name: str, data: Any, tmp_path: Path) -> None:
    data(TASK_OF[name])
    files = [
        f"task.{part}={tmp_path / 'out'}/{file}.jsonl" for part, file in (("prompts", "train"), ("heldout", "heldout"))
    ]
    spec = read_study(PRESETS / f"{name}.yaml", [*files, f"trainer.settings.python={sys.executable}"])
    study = resolve(spec)
    assert study.ladder.target.name == spec.target
    assert len(study.ladder.proxies) >= 2
    assert ineffective(spec) == {}
    with load_task(spec.task).reward as reward:
        reward.start()
