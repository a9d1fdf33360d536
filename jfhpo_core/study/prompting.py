"""How a trainer gives prompts to a model, and which prompts are too long for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jfhpo_core.errors import SpecError
from jfhpo_core.study.data import Message, Prompt, Row, messages_of, text_of
from jfhpo_core.study.models import Model
from jfhpo_core.study.spec import TaskSpec
from jfhpo_core.study.tasks import Task

Tokens = list[int]

Bos = Literal["tokenizer", "always", "never"]
"""Whether a text prompt begins with the token of that name: as the tokenizer has it by itself, or in any case."""

SHOWN = 80
"""Characters of a prompt in a message."""


@dataclass(frozen=True)
class Prompting:
    """What a trainer makes of prompts.

    Attributes:
        chat_template: Whether text prompts are wrapped as a user's message; lists of messages always are a chat.
        bos: Of text prompts that are not wrapped.
        max_tokens: Longest prompt that the trainer takes; None: no limit of its own.
    """

    chat_template: bool = False
    bos: Bos = "tokenizer"
    max_tokens: int | None = None


def encode(tokenizer: Any, prompts: Sequence[Prompt], prompting: Prompting) -> list[Tokens]:
    """Token ids of each prompt."""
    if prompting.chat_template or not isinstance(prompts[0], str):
        return [_chat(tokenizer, messages_of(prompt)) for prompt in prompts]
    ids: list[Tokens] = tokenizer(list(prompts))["input_ids"]
    if prompting.bos == "tokenizer" or tokenizer.bos_token_id is None:
        return ids
    first = [tokenizer.bos_token_id] if prompting.bos == "always" else []
    return [first + (one[1:] if one[:1] == [tokenizer.bos_token_id] else one) for one in ids]


def _chat(tokenizer: Any, messages: list[Message]) -> Tokens:
    """A chat in the model's template. One that ends with the assistant is continued, any other one is answered."""
    begun = messages[-1]["role"] == "assistant"
    ids: Tokens = tokenizer.apply_chat_template(
        messages, add_generation_prompt=not begun, continue_final_message=begun, tokenize=True, return_dict=True
    )["input_ids"]
    return ids


def prompt_limit(task: TaskSpec, models: Sequence[Model], prompting: Prompting) -> int | None:
    """Longest prompt, in tokens, that every model of a study can take; None if nothing limits it.

    Raises:
        SpecError: Completions alone fill the context of a model.
    """
    contexts = []
    for model in models:
        tokens = context_tokens(model.path)
        if tokens is not None:
            contexts.append(tokens - task.max_completion_tokens)
            if contexts[-1] < 1:
                raise SpecError(
                    f"task.max_completion_tokens: {task.max_completion_tokens} leave no room for a prompt, as model "
                    f"{model.name!r} has a context of {tokens} tokens for both; lower it"
                )
    limits = [limit for limit in (task.max_prompt_tokens, prompting.max_tokens, *contexts) if limit is not None]
    return min(limits, default=None)


def context_tokens(path: str) -> int | None:
    """Context length of a model in a folder; None if its configuration does not tell or is not at hand."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def without_overlong(
    task: Task, spec: TaskSpec, limit: int | None, encoder: Callable[[Sequence[Prompt]], list[Tokens]]
) -> Task:
    """The task without prompts that are too long.

    Args:
        task: As it was loaded.
        spec: Says whether they are dropped or refused.
        limit: In tokens; None: nothing is too long.
        encoder: Token ids of prompts.

    Raises:
        SpecError: There are some and they are to be refused, or too few are left.
    """
    if limit is None:
        return task
    parts = {}
    for name, rows in (("prompts", task.train), ("heldout", task.heldout)):
        long = _overlong(rows, limit, encoder)
        if long and spec.overlong_prompts == "refuse":
            worst = max(long, key=lambda row: long[row])
            raise SpecError(
                f"task.{name}: {len(long)} of {len(rows)} prompts are longer than {limit} tokens (the longest has "
                f"{long[worst]}: {text_of(rows[worst]['prompt'])[:SHOWN]!r}); shorten them, raise the limit "
                "(task.max_prompt_tokens, the trainer's, and the models' context less task.max_completion_tokens), or "
                "do without them (task.overlong_prompts: drop)"
            )
        parts[name] = tuple(row for number, row in enumerate(rows) if number not in long)
    if not parts["prompts"] or len(parts["heldout"]) < min(2, len(task.heldout)):
        raise SpecError(
            f"task.overlong_prompts: dropping prompts of more than {limit} tokens leaves too few; shorten them"
        )
    return replace(task, train=parts["prompts"], heldout=parts["heldout"])


def _overlong(rows: Sequence[Row], limit: int, encoder: Callable[[Sequence[Prompt]], list[Tokens]]) -> dict[int, int]:
    """Rows whose prompts have more tokens than the limit, with their number."""
    chat = not isinstance(rows[0]["prompt"], str)
    around = len(encoder([[{"role": "user", "content": ""}] if chat else ""])[0])
    # A token stands for a byte at least, so most prompts need not be looked at.
    asked = [
        number
        for number, row in enumerate(rows)
        if len(text_of(row["prompt"]).encode(errors="replace")) + around * len(messages_of(row["prompt"])) > limit
    ]
    lengths = map(len, encoder([rows[number]["prompt"] for number in asked])) if asked else ()
    return {number: length for number, length in zip(asked, lengths, strict=True) if length > limit}
