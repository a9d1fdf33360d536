"""Calls a task's reward as every trainer of jfhpo does. It runs inside verl, beside its plan (`plan.json`).

verl gives it one completion at a time, from several threads; the row travels as the ground truth, in JSON. The reward
itself runs in processes of its own with a time limit: see `scoring.py`, which is copied beside this file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent

REWARD_FAILED = "jfhpo: the reward failed:"
"""Begins the message of a run that its reward function ended. The driver looks for it in the log."""

TIMEOUTS = "reward-timeouts.txt"
"""File beside this one with a line per completion whose scoring took too long."""


@cache
def _pool() -> tuple[Any, type[Exception]]:
    """Who scores, and what it raises if the reward fails."""
    spec = importlib.util.spec_from_file_location("jfhpo_scoring", FOLDER / "scoring.py")
    assert spec is not None
    assert spec.loader is not None
    scoring = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = scoring  # its dataclasses look themselves up
    spec.loader.exec_module(scoring)
    plan = json.loads((FOLDER / "plan.json").read_text(encoding="utf-8"))
    seconds, score = plan["reward_timeout_seconds"], plan["reward_timeout_score"]
    return scoring.Pool(plan["reward"], seconds, score, FOLDER / "reward.log"), scoring.RewardError


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """Reward of one completion, with verl's signature."""
    row = json.loads(ground_truth)
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    pool, failure = _pool()
    try:
        scores = pool.score([row["prompt"]], [solution_str], columns)
    except failure as error:
        # Into the log at once: verl may count a failed completion out and go on.
        print(f"{REWARD_FAILED} {error}", flush=True)  # noqa: T201
        raise
    if scores.timed_out:
        with (FOLDER / TIMEOUTS).open("a", encoding="utf-8") as file:
            file.write(f"{row['prompt']!r:.200}\n")
    reward: float = scores.rewards[0]
    return reward
