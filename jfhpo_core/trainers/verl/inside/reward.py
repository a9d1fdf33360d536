"""Calls a task's reward as every trainer of jfhpo does. Copied beside its plan (`plan.json`), it runs inside verl.

verl gives it one completion at a time; the row travels as the ground truth, in JSON.
"""

from __future__ import annotations

import importlib.util
import json
import math
import numbers
from functools import cache
from pathlib import Path
from typing import Any

REWARD_FAILED = "jfhpo: the reward failed:"
"""Begins the message of a training that its reward function ended. The driver looks for it in the log."""


@cache
def _load() -> Any:
    plan = json.loads((Path(__file__).resolve().parent / "plan.json").read_text(encoding="utf-8"))
    file, _, name = plan["reward"].partition(":")
    spec = importlib.util.spec_from_file_location("jfhpo_reward", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name or "reward")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """Reward of one completion, with verl's signature."""
    row = json.loads(ground_truth)
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    try:
        rewards = list(_load()(prompts=[row["prompt"]], completions=[solution_str], **columns))
    except Exception as error:
        _tell(f"it raised {type(error).__name__}: {error}")
        raise
    if len(rewards) != 1 or not isinstance(rewards[0], numbers.Real) or not math.isfinite(rewards[0]):
        _tell(f"it returned {rewards!r}, not one finite number for one completion")
        raise ValueError(rewards)
    return float(rewards[0])


def _tell(reason: str) -> None:
    # Into the log at once: verl may count a failed completion out and go on.
    print(f"{REWARD_FAILED} {reason}", flush=True)  # noqa: T201
