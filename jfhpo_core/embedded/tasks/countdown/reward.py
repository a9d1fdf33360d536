"""Reward of the task `countdown`: a number as a sum or difference of digits, none of them barred.

A prompt is `17!358=`: the number is 17; the digits 3, 5 and 8 are barred.
"""

# ruff: noqa: ARG001, INP001  (TRL passes every column by name; a task folder is no package)

from __future__ import annotations

import re
from typing import Any

EXPRESSION = re.compile(r"[1-9](?:[+-][1-9]){1,3}")

WELL_FORMED = 0.1
"""Reward of any expression of two to four digits."""

NEAR = 0.3
"""Further reward of one without barred digits; it falls to zero where the value is `TOLERANCE` off."""

TOLERANCE = 5


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """One for an expression with the right value and no barred digit, something for a near one, else zero."""
    return [score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def score(prompt: str, completion: str) -> float:
    """Reward of one completion, 0 to 1."""
    if not EXPRESSION.fullmatch(completion):
        return 0.0
    number, barred = prompt.removesuffix("=").split("!")
    if set(barred) & set(completion):
        return WELL_FORMED
    error = abs(sum(map(int, re.findall(r"[+-]?\d", completion))) - int(number))
    return 1.0 if error == 0 else WELL_FORMED + NEAR * max(0.0, 1 - error / TOLERANCE)
