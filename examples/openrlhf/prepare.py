"""Turns public data sets into the task files of the presets beside this file: `python prepare.py gsm8k`.

Every task becomes `data/TASK/train.jsonl` and `data/TASK/heldout.jsonl` with the columns `prompt`, `answer` and
`source`. Data sets are read with Hugging Face `datasets`, by their names on the hub or from folders of your own
(`--train FOLDER --heldout FOLDER`, holding files in the same schema). Training rows that also stand in the held-out
data are left out, and so are rows without an answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jfhpo_core.study.data import normalize_prompt

HERE = Path(__file__).parent
LETTERS = "ABCDEFGHIJ"

MATH_INSTRUCTION = "Think step by step, and give your final answer within \\boxed{}."
CHOICE_INSTRUCTION = "Think step by step, and end with: The answer is (LETTER)."

Row = dict[str, str]
Convert = Callable[[dict[str, Any]], Row | None]


@dataclass(frozen=True)
class Part:
    """A part of a public data set.

    Attributes:
        path: Name on the hub.
        name: Its configuration there; None: the only one.
        split: Its split.
        convert: From a row of it to one of ours; None if the row cannot be used.
    """

    path: str
    name: str | None
    split: str
    convert: Convert


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} of a solution, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 1, start + len("\\boxed{")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place].strip() or None
    return None


def mathematics(problem: str, answer: str | None, source: str) -> Row | None:
    """A row of a mathematical task."""
    if not answer:
        return None
    return {"prompt": f"{problem.strip()}\n\n{MATH_INSTRUCTION}", "answer": str(answer).strip(), "source": source}


def multiple_choice(question: str, choices: list[str], right: int, source: str) -> Row:
    """A row of a multiple-choice task; the answer is a letter."""
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False))
    prompt = f"{question.strip()}\n{options}\n\n{CHOICE_INSTRUCTION}"
    return {"prompt": prompt, "answer": LETTERS[right], "source": source}


def gsm8k(row: dict[str, Any]) -> Row | None:
    """The answer stands after ####, with commas in its thousands."""
    return mathematics(row["question"], row["answer"].rpartition("####")[2].strip().replace(",", ""), "gsm8k")


def openbookqa(row: dict[str, Any]) -> Row | None:
    """The key is the label of a choice."""
    labels = row["choices"]["label"]
    return multiple_choice(row["question_stem"], row["choices"]["text"], labels.index(row["answerKey"]), "openbookqa")


def mmlu(row: dict[str, Any]) -> Row | None:
    """The answer is the position of a choice."""
    return multiple_choice(row["question"], row["choices"], int(row["answer"]), row.get("subject") or "mmlu")


def solved(source: str) -> Convert:
    """Problems whose solution boxes the answer."""
    return lambda row: mathematics(row["problem"], boxed(row["solution"]), row.get("source") or source)


def answered(source: str) -> Convert:
    """Problems with an answer of their own."""
    return lambda row: mathematics(row["problem"], row["answer"], source)


TASKS: dict[str, tuple[list[Part], list[Part]]] = {
    "gsm8k": (
        [Part("openai/gsm8k", "main", "train", gsm8k)],
        [Part("openai/gsm8k", "main", "test", gsm8k)],
    ),
    "math": (
        [Part("DigitalLearningGmbH/MATH-lighteval", None, "train", solved("math"))],
        [Part("HuggingFaceH4/MATH-500", None, "test", answered("math-500"))],
    ),
    "openbookqa": (
        [Part("allenai/openbookqa", "main", "train", openbookqa)],
        [Part("allenai/openbookqa", "main", "test", openbookqa)],
    ),
    "mmlu": (
        [Part("cais/mmlu", "all", "auxiliary_train", mmlu)],
        [Part("cais/mmlu", "all", "validation", mmlu)],
    ),
    # Trained on one kind of problem, judged on others: competitions that the training data does not hold.
    "numinamath": (
        [Part("AI-MO/NuminaMath-CoT", None, "train", solved("numinamath"))],
        [
            Part("AI-MO/aimo-validation-aime", None, "train", answered("aime")),
            Part("AI-MO/aimo-validation-amc", None, "train", answered("amc")),
        ],
    ),
}
"""Training and held-out parts of every task."""


def read(part: Part, folder: str | None) -> Iterator[Row]:
    """Rows of a part, from the hub or from a folder with files of the same schema."""
    from datasets import load_dataset

    rows = load_dataset(folder, split=part.split) if folder else load_dataset(part.path, part.name, split=part.split)
    for row in rows:
        converted = part.convert(row)
        if converted is not None:
            yield converted


def prepare(task: str, out: Path, train: str | None = None, heldout: list[str] | None = None) -> tuple[int, int]:
    """Write a task's files.

    Args:
        task: A key of `TASKS`.
        out: Folder that takes them.
        train: Folder to read the training part from, instead of the hub.
        heldout: The same for every held-out part.

    Returns:
        Number of training and of held-out rows.
    """
    train_parts, heldout_parts = TASKS[task]
    judged = unique(
        row
        for part, folder in zip(heldout_parts, heldout or [None] * len(heldout_parts), strict=True)
        for row in read(part, folder)
    )
    trained = unique(row for part in train_parts for row in read(part, train))
    kept = [row for key, row in trained.items() if key not in judged]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", kept), ("heldout", list(judged.values()))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return len(kept), len(judged)


def unique(rows: Iterator[Row]) -> dict[str, Row]:
    """Rows by prompt, up to case and white space; of equal ones the first."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(normalize_prompt(row["prompt"]), row)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, help="folder to write to (default: data/TASK beside this file)")
    parser.add_argument("--train", help="folder with the training data, instead of the hub")
    parser.add_argument("--heldout", nargs="+", help="folders with the held-out data, in the order of its parts")
    chosen = parser.parse_args()
    out = chosen.out or HERE / "data" / chosen.task
    trained, judged = prepare(chosen.task, out, chosen.train, chosen.heldout)
    print(f"{trained} training rows and {judged} held-out rows in {out}")


if __name__ == "__main__":
    main()
