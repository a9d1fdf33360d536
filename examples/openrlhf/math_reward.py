"""Reward of the mathematical tasks: 1 if math-verify finds the answer right, else 0."""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify


def reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: Any) -> list[float]:
    """Score completions."""
    return [float(right(completion, wanted)) for completion, wanted in zip(completions, answer, strict=True)]


def right(completion: str, wanted: str) -> bool:
    """Whether a completion's final answer equals the wanted one.

    math-verify's own time limits end most of what takes long, with a verdict. What they cannot end, such as 9^{9^{9}}
    as a number, is left to `task.reward_timeout_seconds`.
    """
    return verify(parse(f"\\boxed{{{wanted}}}"), parse(completion))
