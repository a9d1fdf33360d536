"""Base models of the laptop demo: ladders of tiny transformers, their tokenizer, fine-tuning and evaluation.

Evaluation goes the way a user's evaluation goes: load the folder with the Auto classes, tokenize the prompts, let
`generate` sample, decode, and ask the task's reward function.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)

from jfhpo_core.embedded.corpus import Row, Task

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/=:,.<>()?! "
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
PAD, BOS, EOS = (VOCABULARY[token] for token in SPECIAL[:3])

MAX_POSITIONS = 64
"""Tokens of prompt and completion together; the shipped tasks need at most 15."""

Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Shape:
    """The shape of one model: widths in units, `layers` and `heads` as counts."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


QWEN2: Mapping[str, Shape] = {
    "s": Shape(64, 2, 4, 176),
    "sm": Shape(96, 3, 4, 240),
    "m": Shape(128, 3, 4, 352),
    "l": Shape(192, 4, 6, 512),
    "xl": Shape(384, 4, 6, 1024),
}

GPT_NEOX: Mapping[str, Shape] = {
    "s": Shape(64, 2, 4, 256),
    "sm": Shape(96, 3, 4, 384),
    "m": Shape(128, 3, 4, 512),
}

LADDERS = {"qwen2": QWEN2, "gpt_neox": GPT_NEOX}
"""Shapes by architecture and size, small to large: about 0.1, 0.3, 0.6, 1.8 and 7.1 million parameters. Not all of them
are shipped."""


@dataclass(frozen=True)
class FineTuning:
    """How a base is fine-tuned.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: peak of AdamW's learning rate, reached after `warmup` steps, then a cosine down to zero.
        skill_share: share of the steps in which every demonstration is right; careless ones come after it. Learning
            the hardest way of answering first, unmixed, takes a fraction of the steps that the mixture needs.
        batch: demonstrations per step.
        warmup: steps of linear warm-up.
        seed: of the initial weights and of the corpus.
    """

    steps: int
    learning_rate: float
    skill_share: float = 0.6
    batch: int = 128
    warmup: int = 50
    seed: int = 7


@dataclass(frozen=True)
class Accuracy:
    """How well held-out prompts are answered.

    Attributes:
        sampled: mean reward at temperature 1 without truncation of the distribution.
        sampled_se: its standard error, over prompts and samples.
        samples: completions behind `sampled`.
        greedy: mean reward of the likeliest tokens.
        greedy_se: its standard error, over prompts.
        expected: mean probability of exactly the right answer, which `sampled` estimates; no sampling noise. None for a
            task with many right answers.
    """

    sampled: float
    sampled_se: float
    samples: int
    greedy: float
    greedy_se: float
    expected: float | None


def build_tokenizer(architecture: str = "qwen2") -> PreTrainedTokenizerBase:
    """One token per character. Nothing is added to a prompt: `tokenizer(prompt)` is what fine-tuning saw.

    A character outside `CHARACTERS` vanishes without a trace: the vocabulary is byte-level, without merges, and knows
    no unknown token (`<unk>` only holds its place). `AutoTokenizer` builds the class that belongs to the type of the
    model out of the vocabulary, whatever class and pre-tokenizer the folder declares, so it has to be this class from
    the start.
    """
    kind: type[Any] = {"qwen2": Qwen2Tokenizer, "gpt_neox": GPTNeoXTokenizer}[architecture]
    # Byte-level vocabularies write the space as this letter.
    vocabulary = {token.replace(" ", "\u0120"): number for token, number in VOCABULARY.items()}
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer: PreTrainedTokenizerBase = kind(
        vocab=vocabulary,
        merges=[],
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **names,
    )
    return tokenizer


def build_model(shape: Shape, seed: int, architecture: str = "qwen2") -> PreTrainedModel:
    """A model with random weights: Qwen2 with tied embeddings, or GPT-NeoX as it comes.

    The latter has layer norms and biases, attention and feed-forward layer side by side rather than in turn, rotary
    positions in a part of each head, and embeddings of its own for the output.
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": math.ceil(len(VOCABULARY) / 8) * 8,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.05 if shape.hidden <= 128 else 0.03,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config: PreTrainedConfig
    if architecture == "qwen2":
        config = Qwen2Config(num_key_value_heads=shape.heads, tie_word_embeddings=True, **common)
    else:
        config = GPTNeoXConfig(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}, **common)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def fine_tune(model: PreTrainedModel, task: Task, settings: FineTuning, log: Callable[[str], None]) -> None:
    """Fine-tune on demonstrations of training prompts, in place; the loss is over the answer and `<eos>` only."""
    rng = random.Random(f"{task.name}:{settings.seed}")  # noqa: S311  no secret depends on it
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    skill_steps = round(settings.skill_share * settings.steps)
    model.train()
    for step in range(settings.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warmup) * decay
        right_share = 1.0 if step < skill_steps else task.right_share
        prompts = [task.draw_train(rng) for _ in range(settings.batch)]
        answers = [task.demonstration(prompt, rng, right_share) for prompt in prompts]
        tokens, answered = _demonstrations(prompts, answers)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = functional.cross_entropy(logits[answered[:, 1:]], tokens[:, 1:][answered[:, 1:]])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 in (skill_steps, settings.steps):
            log(f"step {step + 1}/{settings.steps} loss {loss.item():.3f}")
    model.train(mode=False)


def save(model: PreTrainedModel, folder: Path, architecture: str) -> None:
    """Write a folder that the Auto classes load: float16 weights to keep it small, tokenizer, generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(dtype=torch.float16).save_pretrained(folder)
    # Half precision is for the disk alone. The dtype in config.json is what from_pretrained takes when told nothing,
    # and training in float16 on a CPU diverges.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    build_tokenizer(architecture).save_pretrained(folder)
    # safetensors files come out readable by their owner alone; an installed package is read by others.
    for file in folder.iterdir():
        file.chmod(0o644)


def evaluate(
    folder: Path,
    rows: Sequence[Row],
    reward: Reward,
    *,
    samples_per_prompt: int,
    one_answer: bool = True,
    seed: int = 0,
) -> Accuracy:
    """Load a model folder and measure it on `rows`.

    Args:
        folder: Of the model.
        rows: Prompts and answers.
        reward: Scores completions.
        samples_per_prompt: Completions drawn of each prompt.
        one_answer: Whether the row's answer alone is right, so that its probability tells the accuracy.
        seed: Of the sampling.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(mode=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [row["prompt"] for row in rows]
    answers = [row["answer"] for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    new_tokens = max(map(len, answers)) + 1

    def rewards(**how: object) -> torch.Tensor:
        output = model.generate(**inputs, max_new_tokens=new_tokens, **how)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return torch.tensor(reward(prompts, texts, answer=answers), dtype=torch.float64)

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        # (samples, prompts)
        sampled = torch.stack(
            [rewards(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) for _ in range(samples_per_prompt)]
        )
        greedy = rewards(do_sample=False)
        expected = _answer_probability(model, prompts, answers).mean().item() if one_answer else None
    return Accuracy(
        sampled=sampled.mean().item(),
        # Samples of one prompt are not independent draws of the task: the error is that of the prompts' means.
        sampled_se=(sampled.mean(0).std() / math.sqrt(len(rows))).item(),
        samples=sampled.numel(),
        greedy=greedy.mean().item(),
        greedy_se=(greedy.std(correction=0) / math.sqrt(len(rows))).item(),
        expected=expected,
    )


def _ids(text: str) -> list[int]:
    """Token numbers of a text and the final `<eos>`, as the tokenizer would give them, at a fraction of the time."""
    return [*(VOCABULARY[character] for character in text), EOS]


def _demonstrations(prompts: Sequence[str], answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their answers and `<eos>`, padded on the right, and which of the tokens answer: (batch, length)."""
    rows = [_ids(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(rows), int(lengths.max())), PAD)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    positions = torch.arange(tokens.shape[1])
    return tokens, (positions >= starts[:, None]) & (positions < lengths[:, None])


def _answer_probability(model: PreTrainedModel, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
    """Probability at temperature 1 of the answer and `<eos>` after each prompt: (prompts,)."""
    tokens, answered = _demonstrations(prompts, answers)
    log_probabilities: torch.Tensor = model(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    of_tokens = log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (of_tokens * answered[:, 1:]).sum(-1).exp()
