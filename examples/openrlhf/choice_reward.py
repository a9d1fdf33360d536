"""Reward of the multiple-choice tasks: 1 for the right letter, else 0."""

from __future__ import annotations

import re
from typing import Any

ANSWER = re.compile(r"answer is:?\s*\(?([A-J])\)?(?![a-z])", re.IGNORECASE)


def reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: Any) -> list[float]:
    """Score completions by the last 'the answer is (LETTER)' of each."""
    return [float(letter(completion) == wanted) for completion, wanted in zip(completions, answer, strict=True)]


def letter(completion: str) -> str | None:
    """The letter that a completion ends up with."""
    found = ANSWER.findall(completion)
    return found[-1].upper() if found else None
