"""Base models of the laptop demo: a ladder of four tiny transformers, their tokenizer, fine-tuning and evaluation.

Evaluation goes the way a user's evaluation goes: load the folder with the Auto classes, tokenize the prompts, let
`generate` sample, decode, and ask the task's reward function.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from jfhpo_core.embedded.corpus import Row, Task

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/=:,.<>()?! "
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
PAD, BOS, EOS = (VOCABULARY[token] for token in SPECIAL[:3])

MAX_POSITIONS = 64
"""Tokens of prompt and completion together; the shipped tasks need at most 13."""

Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Shape:
    """The shape of one model: widths in units, `layers` and `heads` as counts."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


LADDER = {
    "s": Shape(64, 2, 4, 176),
    "sm": Shape(96, 3, 4, 240),
    "m": Shape(128, 3, 4, 352),
    "l": Shape(192, 4, 6, 512),
    "xl": Shape(384, 4, 6, 1024),
}
"""Sizes by name, small to large: about 0.1, 0.3, 0.6, 1.8 and 7.1 million parameters. The last one is not shipped."""


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
    """Shares of held-out prompts answered right.

    Attributes:
        sampled: mean reward at temperature 1 without truncation of the distribution.
        sampled_se: its standard error, over prompts and samples.
        samples: completions behind `sampled`.
        greedy: mean reward of the likeliest tokens.
        greedy_se: its binomial standard error.
        expected: mean probability of exactly the right answer, which `sampled` estimates; no sampling noise.
    """

    sampled: float
    sampled_se: float
    samples: int
    greedy: float
    greedy_se: float
    expected: float


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per character. Nothing is added to a prompt: `tokenizer(prompt)` is what fine-tuning saw.

    A character outside `CHARACTERS` vanishes without a trace: Qwen2's tokenizer knows no unknown token (`<unk>` only
    holds its place). For a model of type qwen2 `AutoTokenizer` builds this class out of the vocabulary whatever class
    and pre-tokenizer the folder declares, so it has to be this class from the start: byte-level, without merges.
    """
    # Byte-level vocabularies write the space as this letter.
    vocabulary = {token.replace(" ", "\u0120"): number for token, number in VOCABULARY.items()}
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **names,
    )


def build_model(shape: Shape, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 model with tied embeddings and random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=math.ceil(len(VOCABULARY) / 8) * 8,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05 if shape.hidden <= 128 else 0.03,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Qwen2ForCausalLM(config)


def fine_tune(model: Qwen2ForCausalLM, task: Task, settings: FineTuning, log: Callable[[str], None]) -> None:
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
        # Within a task all prompts and all answers have one length, so nothing is padded: (batch, prompt + answer + 1).
        tokens = torch.tensor([_ids(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)])
        answer_start = len(prompts[0])
        logits = model(input_ids=tokens[:, :-1]).logits[:, answer_start - 1 :]
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, answer_start:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 in (skill_steps, settings.steps):
            log(f"step {step + 1}/{settings.steps} loss {loss.item():.3f}")
    model.train(mode=False)


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a folder that the Auto classes load: float16 weights to keep it small, tokenizer, generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(dtype=torch.float16).save_pretrained(folder)
    # Half precision is for the disk alone. The dtype in config.json is what from_pretrained takes when told nothing,
    # and training in float16 on a CPU diverges.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    build_tokenizer().save_pretrained(folder)
    # safetensors files come out readable by their owner alone; an installed package is read by others.
    for file in folder.iterdir():
        file.chmod(0o644)


def evaluate(folder: Path, rows: Sequence[Row], reward: Reward, *, samples_per_prompt: int, seed: int = 0) -> Accuracy:
    """Load a model folder and measure it on `rows`; draws `samples_per_prompt` completions of each prompt."""
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
        greedy = rewards(do_sample=False).mean().item()
        expected = _answer_probability(model, prompts, answers).mean().item()
    return Accuracy(
        sampled=sampled.mean().item(),
        # Samples of one prompt are not independent draws of the task: the error is that of the prompts' means.
        sampled_se=(sampled.mean(0).std() / math.sqrt(len(rows))).item(),
        samples=sampled.numel(),
        greedy=greedy,
        greedy_se=math.sqrt(greedy * (1 - greedy) / len(rows)),
        expected=expected,
    )


def _ids(text: str) -> list[int]:
    """Token numbers of a text and the final `<eos>`, as the tokenizer would give them, at a fraction of the time."""
    return [*(VOCABULARY[character] for character in text), EOS]


def _answer_probability(model: Qwen2ForCausalLM, prompts: list[str], answers: list[str]) -> torch.Tensor:
    """Probability at temperature 1 of the answer and `<eos>` after each prompt: (prompts,)."""
    tokens = torch.tensor([_ids(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)])
    start = len(prompts[0])
    log_probabilities: torch.Tensor = model(input_ids=tokens[:, :-1]).logits[:, start - 1 :].log_softmax(-1)
    return log_probabilities.gather(-1, tokens[:, start:, None]).squeeze(-1).sum(-1).exp()
