"""A task: training prompts, a held-out set that shares none of them, and a reward in a plain Python file.

The reward function has one signature for every trainer, TRL's:

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]

`columns` holds the further columns of the prompt file, one entry per completion. A TRL reward function works as it
is. OpenRLHF's `reward_func(queries, prompts, labels)` differs: queries there are prompt and completion in one string,
and labels are a single column.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.study.spec import TaskSpec
from jfhpo_core.study.trial import FailureKind

Row = dict[str, Any]
RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class Task:
    """A task, read and checked.

    Attributes:
        train: Training rows, each with 'prompt' and the same further columns.
        heldout: Held-out rows with the same columns.
        reward: Checked reward function, see `load_reward`.
        max_completion_tokens: Length limit of a completion.
    """

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    reward: RewardFunction
    max_completion_tokens: int


def load_task(spec: TaskSpec) -> Task:
    """Read a task's files.

    Raises:
        SpecError: A file is missing or malformed, columns differ, the reward does not load, or a training prompt
            stands in the held-out set.
    """
    if spec.embedded is not None:
        from jfhpo_core import embedded

        embedded.verify(spec.embedded)
        folder = embedded.task_folder(spec.embedded)
        prompts, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    else:
        assert spec.prompts is not None
        assert spec.heldout is not None
        prompts, heldout = Path(spec.prompts), Path(spec.heldout)
    train_rows, heldout_rows = read_rows(prompts), read_rows(heldout)
    if set(train_rows[0]) != set(heldout_rows[0]):
        raise SpecError(
            f"{heldout}: its columns {sorted(heldout_rows[0])} differ from those of {prompts} {sorted(train_rows[0])}; "
            "give both files the same columns"
        )
    refuse_leak(train_rows, heldout_rows, str(heldout))
    reward = load_reward(reward_reference(spec))
    return Task(tuple(train_rows), tuple(heldout_rows), reward, spec.max_completion_tokens)


def reward_reference(spec: TaskSpec) -> str:
    """Where a task's reward function is: 'file.py' or 'file.py:function'."""
    if spec.embedded is not None:
        from jfhpo_core import embedded

        return str(embedded.task_folder(spec.embedded) / "reward.py")
    assert spec.reward is not None
    return spec.reward


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file; every row has a non-empty text 'prompt' and the same columns.

    Raises:
        SpecError: With file, line and remedy.
    """
    try:
        # Not splitlines(): that would also cut at separators that JSON allows inside a text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: the prompt file cannot be read: {error}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SpecError(f"{path}, line {number}: not valid JSON: {error}; write one object per line") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise SpecError(f"{path}, line {number}: a row needs a non-empty text 'prompt', got {line[:80]!r}")
        if "completions" in row or "prompts" in row:
            raise SpecError(f"{path}, line {number}: 'prompts' and 'completions' are reserved; rename the column")
        if rows and set(row) != set(rows[0]):
            raise SpecError(f"{path}, line {number}: columns {sorted(row)} differ from line 1's {sorted(rows[0])}")
        rows.append(row)
    if not rows:
        raise SpecError(f"{path}: the prompt file is empty")
    return rows


def normalize_prompt(prompt: str) -> str:
    """Prompt text without case and white space, so that trivial variants count as the same prompt."""
    return "".join(prompt.split()).casefold()


def refuse_leak(train: Sequence[Row], heldout: Sequence[Row], source: str) -> None:
    """Raise if a held-out prompt occurs in the training set, up to case and white space.

    Raises:
        SpecError: With the number of leaking prompts and the first one.
    """
    trained = {normalize_prompt(row["prompt"]) for row in train}
    leaks = [row["prompt"] for row in heldout if normalize_prompt(row["prompt"]) in trained]
    if leaks:
        raise SpecError(
            f"{source}: {len(leaks)} held-out prompts also stand in the training file, first {leaks[0]!r}; "
            "remove them from one of the two, or scores will flatter"
        )


def load_reward(reference: str) -> RewardFunction:
    """Load 'file.py' or 'file.py:function' and wrap it so that its answers are checked.

    The wrapper raises `TrialFailure` of kind 'reward' if the function raises, or returns anything but one finite
    number per completion.

    Raises:
        SpecError: The file or the function does not load.
    """
    file, _, name = reference.partition(":")
    name = name or "reward"
    path = Path(file)
    if not path.is_file():
        raise SpecError(f"{path}: there is no reward file here; `task.reward` is 'file.py' or 'file.py:function'")
    module_name = f"jfhpo_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise SpecError(f"{path}: this is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickling look a class's module up by its name.
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise SpecError(f"{path}: the reward file fails on import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError(f"{path}: it has no function {name!r}; name it in the study as 'file.py:function'")

    def checked(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        try:
            rewards = list(function(prompts=prompts, completions=completions, **columns))
        except Exception as error:
            raise TrialFailure(
                FailureKind.REWARD, f"the reward function {reference} raised {type(error).__name__}: {error}"
            ) from error
        if len(rewards) != len(completions):
            raise TrialFailure(
                FailureKind.REWARD,
                f"the reward function {reference} returned {len(rewards)} rewards for {len(completions)} completions",
            )
        for value in rewards:
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise TrialFailure(
                    FailureKind.REWARD, f"the reward function {reference} returned {value!r}, not a finite number"
                )
        return [float(value) for value in rewards]

    return checked


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows to columns, the prompt left out."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
