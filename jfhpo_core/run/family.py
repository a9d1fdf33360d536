"""Do the models of a study belong together? What folders hold, tokenizers, special tokens, chat templates, sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jfhpo_core.errors import SpecError
from jfhpo_core.study.models import Model, ask_hub, count_parameters, local_fault
from jfhpo_core.trainers.base import Finding, Level

SUBJECT = "family"

SPECIAL = ("bos_token", "eos_token", "unk_token")
"""Tokens that every model of a family must agree about. Padding is masked, so that one may differ."""

COUNT_TOLERANCE = 0.05
"""A parameter count of the study may differ from that of the files by this share."""


def examine_family(models: tuple[Model, ...], *, chat: bool) -> Iterator[Finding]:
    """Findings about models, small to large; the last is the target.

    Args:
        models: Of the study.
        chat: Whether prompts are given in the model's chat template.
    """
    tokenizers: dict[str, Any] = {}
    for model in models:
        fault = _wrong_kind(model)
        if fault is not None:
            yield Finding(Level.FAILURE, SUBJECT, f"model {model.name!r}: {fault}")
            continue
        found = load_tokenizer(model)
        if isinstance(found, Finding):
            yield found
            continue
        tokenizers[model.name] = found
        yield from _vocabulary(model, found)
        if chat and not found.chat_template:
            yield Finding(
                Level.FAILURE, SUBJECT,
                f"model {model.name!r} has no chat template, and prompts are given in one: add chat_template.jinja to "
                f"{model.path}, or give prompts as texts without trainer.settings.chat_template",
            )  # fmt: skip
        yield from _size(model)
    if models[-1].name not in tokenizers:
        return
    target = tokenizers.pop(models[-1].name)
    for name, tokenizer in tokenizers.items():
        difference = _difference(tokenizer, target)
        if difference is not None:
            yield Finding(
                Level.FAILURE, SUBJECT,
                f"model {name!r} and the target {models[-1].name!r} do not read the same text alike: {difference}; "
                "proxies tell about a target of the same family only: use models with one tokenizer",
            )  # fmt: skip
        elif chat and tokenizer.chat_template != target.chat_template:
            yield Finding(
                Level.WARNING, SUBJECT,
                f"model {name!r} and target {models[-1].name!r} have different chat templates, so their prompts differ",
            )  # fmt: skip


def _wrong_kind(model: Model) -> str | None:
    """Why a folder holds no model that can be trained; None if nothing speaks against it."""
    folder = Path(model.path)
    if not folder.is_dir():
        fault = local_fault(model.path)
        return None if fault is None else f"{model.path}: {fault}"
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return (
                f"{folder} holds an adapter (LoRA) and no model; merge it into its base first: "
                "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)"
            )
        if any(name.endswith(".gguf") for name in names):
            return f"{folder} holds a GGUF file, which is for inference; name the transformers checkpoint it is made of"
        return f"{folder} has no config.json; name the folder of a transformers checkpoint"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        return f"{folder} is quantized ({method}) and cannot be trained; name the checkpoint it is made of"
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
        return f"{folder} has no tokenizer; copy the files tokenizer* and special_tokens_map.json of its family into it"
    return None


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model, or a finding that says why there is none."""
    from transformers import AutoTokenizer

    try:
        ask_hub(model.path)
        return AutoTokenizer.from_pretrained(model.path, padding_side="left")
    except Exception as error:  # noqa: BLE001  it raises what its dozen loaders raise
        cause = str(error).strip().split("\n")[0]
        here = Path(model.path).is_dir()
        return Finding(
            Level.FAILURE if here else Level.WARNING, SUBJECT,
            f"model {model.name!r}: the tokenizer of {model.path} cannot be read{'' if here else ' from here'} "
            f"({type(error).__name__}: {cause})",
        )  # fmt: skip


def _vocabulary(model: Model, tokenizer: Any) -> Iterator[Finding]:
    """Whether the model knows every token of its tokenizer. It may have more: embeddings are padded to round sizes."""
    file = Path(model.path) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(known, int) and known < needed:
        yield Finding(
            Level.FAILURE, SUBJECT,
            f"model {model.name!r} knows {known} tokens (vocab_size in {file}), and its tokenizer has {needed}: a "
            "prompt with one of the others would fail; copy the tokenizer that belongs to the model, or resize its "
            f"embedding (resize_token_embeddings({needed})) and train that first",
        )  # fmt: skip


def _difference(one: Any, other: Any) -> str | None:
    """How two tokenizers differ; None if they do not."""
    mine, theirs = one.get_vocab(), other.get_vocab()
    wrong = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if wrong:
        first = wrong[0]
        return (
            f"{len(wrong)} tokens of the vocabulary differ, e.g. {first!r} is {_number(mine.get(first))} there and "
            f"{_number(theirs.get(first))} here"
        )
    for name in SPECIAL:
        if getattr(one, name) != getattr(other, name):
            return f"{name} is {getattr(one, name)!r} there and {getattr(other, name)!r} here"
    return None


def _number(token: int | None) -> str:
    return "missing" if token is None else f"number {token}"


def _size(model: Model) -> Iterator[Finding]:
    """Whether a parameter count that the study gives is that of the files."""
    if not Path(model.path).is_dir():
        return
    try:
        counted = count_parameters(model.path)
    except SpecError as error:
        yield Finding(Level.FAILURE, SUBJECT, f"model {model.name!r}: {error}")
        return
    if abs(counted - model.parameters) > COUNT_TOLERANCE * counted:
        yield Finding(
            Level.WARNING, SUBJECT,
            f"model {model.name!r}: the study says {model.parameters:,} parameters, its files hold {counted:,}; "
            "leave `parameters` out to take the latter",
        )  # fmt: skip
