"""How much GPU memory the parts of a run take, by the phase that it is in.

Bytes per parameter: 16-bit weights 2, gradients 2, Adam in 32 bits (weights and two moments) 12, reference 2. ZeRO
stage 2 (arXiv:1910.02054) shares gradients and optimizer among the GPUs, stage 3 and FSDP the weights as well.
Activations per token follow Korthikanti et al. (2022, arXiv:2205.05198); logits are a term of their own, because their
size depends on the vocabulary and not on the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

GIB = 2**30

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 2, 12

LOGIT_BYTES = 12
"""Per token and entry of the vocabulary in an update: logits in 32 bits, their gradient, and a part of it that is
being added. OpenRLHF computes logits in 32 bits; verl's take less."""

LAYER_BYTES = 34
"""Per token and unit of width, of one layer's activations; of every layer without gradient checkpointing."""

KEPT_BYTES = 2
"""Per token, layer and unit of width, with gradient checkpointing: the input of every layer."""

LARGE_VOCABULARY = 152_064
"""Assumed where a model's configuration is not at hand: Qwen's, among the largest that are common."""

REFERENCE_MODEL = (8e9, 4096, 32)
"""Parameters, width and layers of Llama 3.1 8B, from which those of unknown models are estimated."""

WIDTH_EXPONENT, SIZE_EXPONENT = 0.4, 0.65
"""How width, and width times layers, grow with the parameter count in the families Qwen2.5, Qwen3 and Llama 3."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides about memory.

    Attributes:
        parameters: Its parameter count.
        vocabulary: Entries of its vocabulary.
        width: Of its hidden states.
        layers: Number of its layers.
    """

    parameters: int
    vocabulary: int
    width: int
    layers: int

    @classmethod
    def of(cls, path: str, parameters: int) -> Self:
        """The shape of a model in a folder or in the hub's cache; where neither has it, one typical of its size."""
        config = _configuration(path)
        names = ("vocab_size", "hidden_size", "num_hidden_layers")
        if not config.keys() >= set(names):
            return cls.typical(parameters)
        return cls(parameters, *(config[name] for name in names))

    @classmethod
    def typical(cls, parameters: int) -> Self:
        """A shape that is common among models of a size, with a large vocabulary."""
        size, width, layers = REFERENCE_MODEL
        wide = width * math.pow(parameters / size, WIDTH_EXPONENT)
        whole = width * layers * math.pow(parameters / size, SIZE_EXPONENT)
        return cls(parameters, LARGE_VOCABULARY, math.ceil(wide), math.ceil(whole / wide))

    def token_bytes(self, *, checkpointing: bool) -> int:
        """Memory of an update per token that goes through the model at once."""
        layers = KEPT_BYTES * self.layers + LAYER_BYTES if checkpointing else LAYER_BYTES * self.layers
        return LOGIT_BYTES * self.vocabulary + layers * self.width


def _configuration(path: str) -> Mapping[str, Any]:
    """A model's `config.json` (of its language model, if it has others); empty if it is not at hand."""
    file: Path | None = Path(path) / "config.json"
    if not Path(path).is_dir():
        with suppress(ImportError, ValueError):  # ValueError: no name of the hub
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(path, "config.json")
            file = Path(found) if isinstance(found, str) else None
    if file is None or not file.is_file():
        return {}
    whole: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    language: dict[str, Any] = whole.get("text_config", whole)
    return language


def training_bytes(
    parameters: int, gpus: int, zero_stage: int, *, offload: bool, reference: bool, critic: bool
) -> float:
    """What weights, gradients, optimizer and reference take on each of `gpus` GPUs in an update, without activations.

    Args:
        parameters: Of the model.
        gpus: That train it.
        zero_stage: 2 or 3; FSDP is 3.
        offload: Whether the optimizer stays in host memory even then.
        reference: Whether a reference model lies beside it.
        critic: Whether a value model of the same size is trained, too.
    """
    shared = (GRADIENT_BYTES + (0 if offload else OPTIMIZER_BYTES)) * parameters / gpus
    weights = _weights(parameters, gpus, zero_stage)
    return (weights + shared) * (2 if critic else 1) + (weights if reference else 0.0)


def resting_bytes(parameters: int, gpus: int, zero_stage: int, *, sleeps: bool, reference: bool, critic: bool) -> float:
    """What stays on each of `gpus` GPUs while vLLM samples on them.

    Args:
        parameters: Of the model.
        gpus: That train it.
        zero_stage: 2 or 3; FSDP is 3.
        sleeps: Whether the optimizer is moved to host memory meanwhile.
        reference: Whether a reference model lies beside it.
        critic: Whether a value model of the same size is trained, too.
    """
    weights = _weights(parameters, gpus, zero_stage)
    optimizer = 0.0 if sleeps else OPTIMIZER_BYTES * parameters / gpus
    return (weights + optimizer) * (2 if critic else 1) + (weights if reference else 0.0)


def _weights(parameters: int, gpus: int, zero_stage: int) -> float:
    """Bytes of a model's weights on each GPU: only stage 3 divides them."""
    return WEIGHT_BYTES * parameters / (gpus if zero_stage == 3 else 1)
