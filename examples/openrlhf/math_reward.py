"""Reward of the mathematical tasks: 1 if math-verify finds the answer right, else 0."""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify


def reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: Any) -> list[float]:
    """Score completions. Rewards run in threads, where math-verify's own time limits cannot work."""
    return [float(right(completion, wanted)) for completion, wanted in zip(completions, answer, strict=True)]


def right(completion: str, wanted: str) -> bool:
    """Whether a completion's final answer equals the wanted one."""
    gold = parse(f"\\boxed{{{wanted}}}", parsing_timeout=None)
    return verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None)
