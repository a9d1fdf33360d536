"""Reward of the task `instruct`: the five digits arranged as the instruction letter asks."""

# ruff: noqa: ARG001, INP001  (TRL passes every column by name; a task folder is no package)

from __future__ import annotations

from typing import Any


def reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: Any) -> list[float]:
    """One for a completion equal to its answer, else zero (TRL's reward signature: a row's columns come as lists)."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]
