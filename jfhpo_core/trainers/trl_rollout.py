"""Sampling completions and scoring them, for rollouts and for evaluation, without leaving a trace in random states."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig

from jfhpo_core.errors import SpecError
from jfhpo_core.study.data import Prompt, Row, columns_of, text_of
from jfhpo_core.study.prompting import Prompting, Tokens, encode
from jfhpo_core.study.tasks import Task
from jfhpo_core.study.trial import Evaluation, Example, PassAtN

T = TypeVar("T")

EVALUATION_SEED = 20240213
"""Every evaluation of every trial samples with these random numbers: configurations are compared on equal terms."""


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Run with random states of one's own (Python, numpy, torch); the caller's are restored afterwards.

    Args:
        seed: Where to start from; None goes on from the caller's states.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the global state is meant
    with torch.random.fork_rng(devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, one per device; by default there is but one.

    Attributes:
        index: Of this process, from 0.
        count: Of all of them.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that reports."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all of them have, in their order."""
        ends = [len(items) * number // self.count for number in (self.index, self.index + 1)]
        return items[ends[0] : ends[1]]


ONE = Ranks()
"""A run in one process."""

PLAIN = Prompting()
"""Prompts as the tokenizer takes them."""


@dataclass(frozen=True)
class Sampler:
    """How completions are sampled.

    Attributes:
        tokenizer: The model's tokenizer.
        stop_tokens: Ids that end a completion.
        max_tokens: Length limit of a completion.
        batch: At most this many completions are sampled at once.
        prompting: How prompts become tokens.
    """

    tokenizer: Any
    stop_tokens: tuple[int, ...]
    max_tokens: int
    batch: int
    prompting: Prompting = PLAIN

    def encode(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        """Token ids of each prompt."""
        return encode(self.tokenizer, prompts, self.prompting)

    def decode(self, completions: Sequence[Tokens]) -> list[str]:
        """Text of each completion, special tokens left out."""
        texts: list[str] = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return texts

    def truncated(self, completion: Tokens) -> bool:
        """Whether a completion was cut off at the length limit."""
        return completion[-1] not in self.stop_tokens

    @torch.no_grad()
    def sample(self, model: Any, prompts: Sequence[Tokens], temperature: float) -> list[Tokens]:
        """One completion per prompt, up to and including its first stop token, at least one token long.

        A model whose logits are not finite yields arbitrary tokens rather than an error: the gradient or the KL of the
        step tells the stopping rules.
        """
        # What the checkpoint's own generation_config says (top_p, top_k, ...) must not leak into RL sampling, and
        # `generate` fills whatever looks unset from it: hence the exchange.
        module = model.get_base_model() if hasattr(model, "get_base_model") else model
        own_config, training = module.generation_config, module.training
        module.generation_config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=self.max_tokens,
            remove_invalid_values=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=list(self.stop_tokens),
        )
        module.eval()
        try:
            completions: list[Tokens] = []
            for first in range(0, len(prompts), self.batch):
                completions += self._sample_batch(module, prompts[first : first + self.batch])
        finally:
            module.generation_config = own_config
            module.train(training)
        return completions

    def _sample_batch(self, module: Any, prompts: Sequence[Tokens]) -> list[Tokens]:
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=module.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=module.device
        )
        rows = module.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
        return [self._until_stop(row) for row in rows]

    def _until_stop(self, row: Tokens) -> Tokens:
        end = next((position for position, token in enumerate(row) if token in self.stop_tokens), len(row) - 1)
        return row[: end + 1]


def build_sampler(model: Any, tokenizer: Any, max_tokens: int, batch: int, prompting: Prompting) -> Sampler:
    """The sampler of a model; its tokenizer gets a token for padding if it has none.

    Raises:
        SpecError: There is no token for that.
    """
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    # Every token that the model or its tokenizer declares to be an end of text.
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stop_tokens = tuple(dict.fromkeys([*own, *declared]))
    if tokenizer.pad_token is None:
        if not stop_tokens:
            raise SpecError(
                f"{tokenizer.name_or_path}: its tokenizer has neither a padding nor an end token; add one to it"
            )
        tokenizer.pad_token_id = stop_tokens[0]
    return Sampler(tokenizer, stop_tokens, max_tokens, batch, prompting)


def evaluate(
    model: Any,
    sampler: Sampler,
    task: Task,
    rows: Sequence[Row],
    samples: int,
    temperature: float,
    step: int,
    prompts: int,
    *,
    examples: bool = True,
    by_prompt: bool = False,
) -> Evaluation:
    """Score sampled completions of held-out prompts.

    Args:
        model: The policy.
        sampler: How to sample.
        task: Whose reward is the score.
        rows: Held-out rows.
        samples: Completions per row.
        temperature: Of the sampling.
        step: Training steps done, for the record.
        prompts: Training prompts consumed, for the record.
        examples: Keep the first completions.
        by_prompt: Keep the mean reward of each prompt.
    """
    began = time.perf_counter()
    completions = complete(model, sampler, rows, samples, temperature)
    return judge(task, rows, completions, step, prompts, began, examples=examples, by_prompt=by_prompt)


def complete(
    model: Any, sampler: Sampler, rows: Sequence[Row], samples: int, temperature: float, ranks: Ranks = ONE
) -> list[str]:
    """Sampled completions of held-out prompts, `samples` of each one after the other; each process samples its share.

    See `evaluate` for the arguments.
    """
    asked = ranks.share([row["prompt"] for row in rows for _ in range(samples)])
    with own_randomness(EVALUATION_SEED):
        completions = sampler.decode(sampler.sample(model, sampler.encode(asked), temperature)) if asked else []
    # Who samples alone may have nothing to do with accelerate, which would choose a device for the whole process.
    return completions if ranks.count == 1 else list(gather_object(completions))


def judge(
    task: Task,
    rows: Sequence[Row],
    completions: Sequence[str],
    step: int,
    prompts: int,
    began: float,
    *,
    examples: bool,
    by_prompt: bool,
) -> Evaluation:
    """The score of completions.

    `completions` are those of `complete`, `began` is when sampling them began, by the performance counter; for the rest
    see `evaluate`.
    """
    samples = len(completions) // len(rows)
    repeated = [row for row in rows for _ in range(samples)]
    scores = task.reward([row["prompt"] for row in repeated], completions, **columns_of(repeated))
    rewards = scores.rewards
    groups = np.array(rewards).reshape(len(rows), samples)
    means = groups.mean(axis=1)
    shown = [text_of(row["prompt"]) for row in rows]
    # All prompts scoring alike does not prove a noiseless score; half a completion's weight is the least to claim.
    floor = 0.5 / len(rewards)
    return Evaluation(
        step=step,
        prompts=prompts,
        score=float(means.mean()),
        standard_error=max(float(means.std(ddof=1)) / math.sqrt(len(rows)), floor),
        samples=len(rewards),
        seconds=time.perf_counter() - began,
        pass_at_n=PassAtN.of(groups.tolist()),
        reward_timeouts=len(scores.timed_out),
        examples=Example.first(shown, completions[::samples], rewards[::samples]) if examples else (),
        by_prompt=tuple(map(float, means)) if by_prompt else (),
    )
