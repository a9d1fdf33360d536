"""Where the parts of a run go: estimates of memory, and the smallest measures that make it fit.

Bytes per parameter: bfloat16 weights 2, gradients 2, Adam in float32 (weights and two moments) 12, reference 2. ZeRO
stage 2 (arXiv 1910.02054) shares gradients and optimizer among the GPUs, stage 3 the weights as well. While vLLM
samples, the optimizer sleeps, and while the policy trains, vLLM does (colocated mode).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jfhpo_core.errors import SpecError
from jfhpo_core.trainers.external.settings import ExternalSettings

GIB = 2**30

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 2, 12

USABLE = 0.85
"""Share of a GPU's memory that a plan may fill: the rest goes to CUDA, NCCL and fragments."""

ACTIVATION_SHARE = 0.2
"""Share of the usable memory kept for activations and logits."""

COLOCATED_SHARE, APART_SHARE = 0.55, 0.9
"""Of a GPU's memory for vLLM, where it takes turns with the training and where it is alone."""

KV_CACHE_SHARE = 0.3
"""Share of vLLM's memory that shall at least be left for its cache."""

TOKENS_PER_GPU = 16_384
"""Tokens that go through the model at once, unless `micro_batch` is set."""


@dataclass(frozen=True)
class Placement:
    """How a run is laid out.

    Attributes:
        nodes, gpus_per_node: Shape of the GPUs that train.
        engines: vLLM engines.
        tensor_parallel: GPUs per engine.
        colocated: Whether engines share the training's GPUs, by turns.
        zero_stage: DeepSpeed's.
        offload_optimizer: Whether the optimizer lies in host memory.
        vllm_memory_share: Share of a GPU's memory that vLLM takes.
        training_bytes: Estimated per GPU, without activations.
    """

    nodes: int
    gpus_per_node: int
    engines: int
    tensor_parallel: int
    colocated: bool
    zero_stage: int
    offload_optimizer: bool
    vllm_memory_share: float
    training_bytes: float

    @property
    def training_gpus(self) -> int:
        """GPUs that train."""
        return self.nodes * self.gpus_per_node


def training_bytes(
    parameters: int, gpus: int, zero_stage: int, *, offload: bool, reference: bool, critic: bool
) -> float:
    """Memory that weights, gradients, optimizer and reference take on each of `gpus` GPUs, without activations."""
    shared = (GRADIENT_BYTES + (0 if offload else OPTIMIZER_BYTES)) * parameters / gpus
    weights = WEIGHT_BYTES * parameters / (gpus if zero_stage == 3 else 1)
    return (weights + shared) * (2 if critic else 1) + (weights if reference else 0.0)


def place(
    settings: ExternalSettings,
    parameters: int,
    devices: int,
    *,
    reference: bool,
    critic: bool,
    share: float = 1.0,
) -> Placement:
    """Lay out the training of a model.

    Args:
        settings: The study's.
        parameters: Of the model.
        devices: GPUs that the trial holds.
        reference: Whether a reference model is kept.
        critic: Whether a value model is trained.
        share: Share of each GPU that is the trial's; below 1 several small trials share a GPU.

    Raises:
        SpecError: The model does not fit, or the devices cannot be laid out.
    """
    rollout = devices // 2 if settings.asynchronous else 0
    training = devices - rollout
    if settings.asynchronous and devices < 2:
        raise SpecError(
            f"devices: asynchronous training needs GPUs for rollouts beside those for training, and a trial has "
            f"{devices}; give the model `devices: 2` or more"
        )
    nodes = math.ceil(training / settings.gpus_per_node)
    if training % nodes:
        raise SpecError(
            f"devices: {training} training GPUs cannot be spread evenly over nodes of {settings.gpus_per_node}; use a "
            "multiple of it (trainer.settings.gpus_per_node)"
        )
    usable = settings.gpu_memory_gib * GIB * USABLE * share
    available = usable * (1 - ACTIVATION_SHARE)
    choices = [
        (stage, offload)
        for stage, offload in ((2, False), (3, False), (3, True))
        if settings.zero_stage in (None, stage) and settings.offload_optimizer in (None, offload)
    ] or [(settings.zero_stage or 2, bool(settings.offload_optimizer))]
    needs = [
        training_bytes(parameters, training, stage, offload=offload, reference=reference, critic=critic)
        for stage, offload in choices
    ]
    fitting = next((number for number, need in enumerate(needs) if need <= available), None)
    if fitting is None and settings.device == "cuda":
        enough = next(
            (
                count
                for count in (2**power for power in range(12))
                if training_bytes(
                    parameters, count, choices[-1][0], offload=choices[-1][1], reference=reference,
                    critic=critic,
                ) <= available
            ),
            None,
        )  # fmt: skip
        raise SpecError(
            f"family: a model of {parameters:,} parameters needs about {min(needs) / GIB:.0f} GiB on each of "
            f"{training} GPUs to train, and {available / GIB:.0f} GiB are left beside activations (gpu_memory_gib "
            f"{settings.gpu_memory_gib:g}, share {share:g}); "
            + (f"give it `devices: {enough}`" if enough else "no number of GPUs of this size is enough")
        )
    stage, offload = choices[fitting or 0]
    memory = settings.vllm_memory_share or (APART_SHARE if settings.asynchronous else COLOCATED_SHARE)
    sampling = rollout or training
    tensor_parallel = settings.tensor_parallel or _tensor_parallel(
        parameters, sampling, settings.gpu_memory_gib * GIB * memory * share
    )
    if sampling % tensor_parallel:
        raise SpecError(
            f"trainer.settings.tensor_parallel: {tensor_parallel} GPUs per engine do not part {sampling} GPUs; change "
            "it or the model's `devices`"
        )
    return Placement(
        nodes=nodes,
        gpus_per_node=training // nodes,
        engines=sampling // tensor_parallel,
        tensor_parallel=tensor_parallel,
        colocated=not settings.asynchronous,
        zero_stage=stage,
        offload_optimizer=offload,
        vllm_memory_share=round(memory * share, 3),
        training_bytes=needs[fitting or 0],
    )


def _tensor_parallel(parameters: int, gpus: int, memory: float) -> int:
    """As few GPUs per engine as hold the weights and leave room for the cache; more GPUs cost more communication."""
    for count in range(1, gpus + 1):
        if gpus % count == 0 and WEIGHT_BYTES * parameters / count <= memory * (1 - KV_CACHE_SHARE):
            return count
    return gpus


def micro_batch(settings: ExternalSettings, per_gpu: int, tokens: int) -> int:
    """Completions that go through the model at once: a divisor of `per_gpu`, as large as limit or length allow.

    Args:
        settings: The study's.
        per_gpu: Completions of an update on one GPU.
        tokens: Longest prompt and completion together.
    """
    limit = settings.micro_batch or max(1, TOKENS_PER_GPU // tokens)
    return next(size for size in range(min(limit, per_gpu), 0, -1) if per_gpu % size == 0)
