"""Where the parts of a run go: the smallest measures that make it fit, in updates and in rollouts.

In updates a GPU holds weights, gradients, optimizer, reference, and activations and logits of the tokens that go
through the model at once; vLLM sleeps. In rollouts it holds vLLM's share beside what of the run stays
(`memory.resting_bytes`). Both have to fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jfhpo_core.errors import SpecError
from jfhpo_core.trainers.external.memory import GIB, WEIGHT_BYTES, Shape, resting_bytes, training_bytes
from jfhpo_core.trainers.external.settings import ExternalSettings

USABLE, USABLE_IN_ROLLOUTS = 0.85, 0.93
"""Shares of a GPU's memory that a plan may fill. The rest goes to CUDA, NCCL and fragments; in rollouts, which allocate
nothing but vLLM's share, to the contexts of three processes and to CUDA graphs."""

COLOCATED_SHARE, APART_SHARE = 0.55, 0.9
"""Share of a GPU's memory for vLLM: at most, where it takes turns with the run, and where it is alone."""

KV_CACHE_SHARE = 0.3
"""Share of vLLM's memory that shall at least be left for its cache."""

TOKENS_PER_GPU = 16_384
"""Tokens that go through the model at once, if they fit and `micro_batch` is not set."""

FEW_TOKENS = 4_096
"""With fewer at once a GPU is badly used, so that sharing more of the model among GPUs is the better measure."""

SAFER = 0.85
"""Each level of safety plans with this share of the memory of the one before."""

MOST_GPUS = 2**11
"""Numbers of GPUs up to this are tried to tell how many a model needs."""


@dataclass(frozen=True)
class Demand:
    """What is to be placed.

    Attributes:
        shape: Of the model.
        gpus: GPUs that the trial holds.
        tokens: Longest prompt and completion together.
        reference: Whether a reference model is kept.
        critic: Whether a value model is trained.
        share: Share of each GPU that is the trial's; below 1 several small trials share a GPU.
    """

    shape: Shape
    gpus: int
    tokens: int
    reference: bool
    critic: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Placement:
    """How a run is laid out.

    Attributes:
        nodes, gpus_per_node: Shape of the GPUs that train.
        engines: vLLM engines.
        tensor_parallel: GPUs per engine.
        colocated: Whether engines share the run's GPUs, by turns.
        zero_stage: DeepSpeed's.
        offload_optimizer: Whether the optimizer lies in host memory.
        vllm_memory_share: Share of a GPU's memory that vLLM takes.
        tokens: That go through the model at once, per GPU, at most.
        training_bytes: Estimated per GPU in updates, without activations.
        rollout_bytes: Estimated per GPU in rollouts.
    """

    nodes: int
    gpus_per_node: int
    engines: int
    tensor_parallel: int
    colocated: bool
    zero_stage: int
    offload_optimizer: bool
    vllm_memory_share: float
    tokens: int
    training_bytes: float
    rollout_bytes: float

    @property
    def training_gpus(self) -> int:
        """GPUs that train."""
        return self.nodes * self.gpus_per_node


class _TooLarge(Exception):  # noqa: N818  not an error yet: another layout may fit
    """A layout does not fit; says why."""


def whole_gpus(devices: int, gpus_per_device: float) -> tuple[int, float]:
    """GPUs that a trial uses, and its share of each.

    Args:
        devices: That the trial holds.
        gpus_per_device: The study's; 0 if its trials hold no GPUs themselves, and a device stands for one.

    Raises:
        SpecError: They are more than one GPU, and no whole number of them.

    Examples:
        >>> whole_gpus(1, 0.5), whole_gpus(16, 0.5), whole_gpus(4, 0)
        ((1, 0.5), (8, 1.0), (4, 1.0))
    """
    gpus = devices * (gpus_per_device or 1.0)
    if gpus <= 1:
        return 1, gpus
    if not math.isclose(gpus, round(gpus), rel_tol=1e-6):
        raise SpecError(
            f"devices: {devices} of {gpus_per_device:g} GPU each (cluster.gpus_per_device) are {gpus:g} GPUs; only a "
            "trial within one GPU can share it, so make it a whole number"
        )
    return round(gpus), 1.0


def place(settings: ExternalSettings, demand: Demand, safety: int = 0) -> Placement:
    """Lay out a run.

    Args:
        settings: The study's, as they apply to the model.
        demand: What is to be placed.
        safety: Out of memory this often with less: plan with less memory than there is.

    Raises:
        SpecError: The model does not fit, or the GPUs cannot be laid out.
    """
    if settings.apart and demand.gpus < 2:
        raise SpecError(
            f"devices: asynchronous training needs GPUs for rollouts beside those for training, and a trial has "
            f"{demand.gpus}; give the model `devices: 2` or more"
        )
    reasons: list[str] = []
    for stage, offload in settings.layouts:
        try:
            return _lay_out(settings, demand, stage, offload=offload, safety=safety)
        except _TooLarge as reason:
            reasons.append(str(reason))
    enough = next(_enough(settings, demand), None)
    raise SpecError(
        f"family: a model of {demand.shape.parameters:,} parameters does not fit on {demand.gpus} GPUs "
        f"(gpu_memory_gib {settings.gpu_memory_gib:g}, share {demand.share:g}): {reasons[-1]}; "
        + (f"{enough} GPUs are enough (`devices`)" if enough else "no number of GPUs of this size is enough")
    )


def safer(settings: ExternalSettings, demand: Demand, safety: int) -> bool:
    """Whether the next level of safety gives another placement."""
    try:
        return place(settings, demand, safety + 1) != place(settings, demand, safety)
    except SpecError:
        return False


def _enough(settings: ExternalSettings, demand: Demand) -> Iterator[int]:
    """Numbers of GPUs on which the model fits."""
    gpus = 2 if settings.apart else 1
    while gpus <= MOST_GPUS:
        for stage, offload in settings.layouts:
            try:
                _lay_out(settings, replace(demand, gpus=gpus, share=1.0), stage, offload=offload, safety=0)
            except (_TooLarge, SpecError):
                continue
            yield gpus
        gpus *= 2


def _lay_out(settings: ExternalSettings, demand: Demand, stage: int, *, offload: bool, safety: int) -> Placement:
    """One way to place it.

    Raises:
        _TooLarge: It does not fit in this way.
        SpecError: The GPUs cannot be parted so.
    """
    sampling = demand.gpus // 2 if settings.apart else demand.gpus
    training = demand.gpus - sampling if settings.apart else demand.gpus
    nodes = math.ceil(training / settings.gpus_per_node)
    if training % nodes:
        raise SpecError(
            f"devices: {training} training GPUs cannot be spread evenly over nodes of {settings.gpus_per_node}; use a "
            "multiple of it (trainer.settings.gpus_per_node)"
        )
    memory = settings.gpu_memory_gib * GIB * demand.share
    margin = math.pow(SAFER, safety)
    taken = training_bytes(
        demand.shape.parameters, training, stage,
        offload=offload and settings.optimizer_on_host, reference=demand.reference, critic=demand.critic,
    )  # fmt: skip
    tokens = _tokens(settings, demand, memory * USABLE * margin, taken)
    resting = 0.0
    if not settings.apart:
        resting = resting_bytes(
            demand.shape.parameters, training, stage,
            sleeps=offload or settings.optimizer_sleeps, reference=demand.reference, critic=demand.critic,
        )  # fmt: skip
    share, tensor_parallel = _engine(settings, demand, sampling, memory, memory * USABLE_IN_ROLLOUTS * margin - resting)
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
        colocated=not settings.apart,
        zero_stage=stage,
        offload_optimizer=offload,
        vllm_memory_share=round(share * demand.share, 3),
        tokens=tokens,
        training_bytes=taken,
        rollout_bytes=resting + share * memory,
    )


def _tokens(settings: ExternalSettings, demand: Demand, usable: float, taken: float) -> int:
    """Tokens that go through the model at once: as many as fit, up to what is wanted.

    Raises:
        _TooLarge: Not even those fit that are needed.
    """
    wanted = max(TOKENS_PER_GPU, demand.tokens)
    needed = min(wanted, max(FEW_TOKENS, demand.tokens))
    if settings.micro_batch is not None:
        wanted = needed = settings.micro_batch * demand.tokens
    each = demand.shape.token_bytes(checkpointing=settings.gradient_checkpointing)
    fitting = max(0, math.floor((usable - taken) / each))
    if settings.device == "cuda" and fitting < needed:
        raise _TooLarge(
            f"an update takes {taken / GIB:.1f} GiB for weights, gradients, optimizer and reference, and "
            f"{needed * each / GIB:.1f} GiB for activations and logits of {needed} tokens at once (vocabulary "
            f"{demand.shape.vocabulary}), of {usable / GIB:.1f} GiB"
        )
    return min(wanted, fitting) if settings.device == "cuda" else wanted


def _engine(settings: ExternalSettings, demand: Demand, gpus: int, memory: float, room: float) -> tuple[float, int]:
    """VLLM's share of a GPU's memory, and GPUs per engine.

    As few GPUs as hold the weights and leave room for the cache; more GPUs cost more communication.

    Raises:
        _TooLarge: Its share is not free, or too little to hold the model.
    """
    most = APART_SHARE if settings.apart else COLOCATED_SHARE
    share = settings.vllm_memory_share or min(most, room / memory)
    weights = WEIGHT_BYTES * demand.shape.parameters
    divisors = [count for count in range(1, gpus + 1) if gpus % count == 0]
    counts = [settings.tensor_parallel] if settings.tensor_parallel else divisors
    if settings.device == "cpu":
        return share if share > 0 else most, counts[0]
    room = max(room, 0.0)
    if share * memory > room + 1 and not settings.apart:
        raise _TooLarge(
            f"in rollouts vLLM takes {share * memory / GIB:.1f} GiB (vllm_memory_share), and {room / GIB:.1f} GiB are "
            "left beside policy and reference"
        )
    fitting = next((n for n in counts if weights / n <= share * memory * (1 - KV_CACHE_SHARE)), None)
    if fitting is None:
        raise _TooLarge(
            f"in rollouts {max(share, 0.0) * memory / GIB:.1f} GiB are left to vLLM on each GPU, too little for the "
            f"weights on {counts[-1]} of them and a cache"
        )
    return share, fitting


def micro_batch(placement: Placement, per_gpu: int, tokens: int) -> int:
    """Completions that go through the model at once: a divisor of `per_gpu`, as large as the placement allows.

    Args:
        placement: Of the run.
        per_gpu: Completions of an update on one GPU.
        tokens: Longest prompt and completion together.
    """
    limit = max(1, placement.tokens // tokens)
    return next(size for size in range(min(limit, per_gpu), 0, -1) if per_gpu % size == 0)
