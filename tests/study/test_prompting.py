"""How prompts become tokens, and which are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.embedded import family_members, task_folder
from jfhpo_core.errors import SpecError
from jfhpo_core.study.data import Prompt
from jfhpo_core.study.models import Model
from jfhpo_core.study.prompting import Prompting, context_tokens, encode, prompt_limit, without_overlong
from jfhpo_core.study.spec import RewardSpec, TaskSpec
from jfhpo_core.study.tasks import Reward, Task

BEGIN = 7


class Tokenizer:
    """One token per character; a beginning-of-text token if it is asked to add one by itself."""

    def __init__(self, *, adds: bool) -> None:
        self.bos_token_id = BEGIN
        self.adds = adds

    def __call__(self, prompts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[BEGIN] * self.adds + [ord(letter) for letter in prompt] for prompt in prompts]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> dict[str, list[int]]:
        assert options["add_generation_prompt"] is not options["continue_final_message"]
        text = "".join(message["content"] for message in messages)
        return {"input_ids": [BEGIN, *map(ord, text), *([1] if options["add_generation_prompt"] else [])]}


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("bos", "begins"), [("tokenizer", None), ("always", True), ("never", False)])
def test_the_beginning_of_text_token(adds: bool, bos: Any, begins: bool | None) -> None:
    (ids,) = encode(Tokenizer(adds=adds), ["ab"], Prompting(bos=bos))
    wanted = adds if begins is None else begins
    assert ids == [BEGIN] * wanted + [ord("a"), ord("b")]


def test_chats_are_answered_or_continued() -> None:
    tokenizer = Tokenizer(adds=False)
    ask: Prompt = [{"role": "user", "content": "a"}]
    begun: Prompt = [*ask, {"role": "assistant", "content": "b"}]
    assert encode(tokenizer, [ask], Prompting()) == [[BEGIN, ord("a"), 1]]
    assert encode(tokenizer, [begun], Prompting()) == [[BEGIN, ord("a"), ord("b")]]
    assert encode(tokenizer, ["a"], Prompting(chat_template=True)) == [[BEGIN, ord("a"), 1]]


def task_of(train: list[str], heldout: list[str]) -> Task:
    reward = Reward([RewardSpec(function=str(task_folder("instruct") / "reward.py"))])
    return Task(
        tuple({"prompt": prompt} for prompt in train), tuple({"prompt": prompt} for prompt in heldout), reward, 8
    )


def letters(prompts: Any) -> list[list[int]]:
    return encode(Tokenizer(adds=True), prompts, Prompting())


def test_long_prompts_are_refused_or_dropped() -> None:
    task = task_of(["a", "a" * 20, "a" * 9], ["b", "b" * 11, "bb"])
    spec = TaskSpec(embedded="instruct")
    with pytest.raises(SpecError, match=r"task.prompts: 1 of 3 prompts are longer than 10 tokens \(the longest has 21"):
        without_overlong(task, spec, 10, letters)
    dropping = spec.model_copy(update={"overlong_prompts": "drop"})
    left = without_overlong(task, dropping, 10, letters)
    assert [[row["prompt"] for row in rows] for rows in (left.train, left.heldout)] == [["a", "a" * 9], ["b", "bb"]]
    assert without_overlong(task, spec, None, letters) is task
    with pytest.raises(SpecError, match="dropping prompts of more than 2 tokens leaves too few"):
        without_overlong(task, dropping, 2, letters)


def test_the_limit_is_the_least_that_any_model_or_the_study_sets(tmp_path: Path) -> None:
    path = str(family_members("instruct")["s"])
    context = context_tokens(path)
    assert context is not None
    models = [Model("s", path, 1), Model("hub", "some/name", 2)]
    spec = TaskSpec(embedded="instruct", max_completion_tokens=8)
    assert prompt_limit(spec, models, Prompting()) == context - 8
    assert prompt_limit(spec, models, Prompting(max_tokens=5)) == 5
    assert prompt_limit(spec.model_copy(update={"max_prompt_tokens": 4}), models, Prompting(max_tokens=5)) == 4
    assert prompt_limit(spec, models[1:], Prompting()) is None
    filled = spec.model_copy(update={"max_completion_tokens": context})
    with pytest.raises(SpecError, match=rf"^task.max_completion_tokens: {context} leave no room .* {context} tokens"):
        prompt_limit(filled, models, Prompting())
