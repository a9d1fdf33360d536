"""What a training run costs before anything of it is timed: from parameters, tokens and hardware.

A step is generation, forward passes for log-probabilities, forward and backward passes for the update, and the
transfer of weights between trainer and engine. Operations per token and parameter are the usual ones (2 forward, 6
forward and backward: Kaplan et al. 2020, arXiv:2001.08361); decoding is bound by the memory that every new token reads
(weights and KV cache: Pope et al. 2022, arXiv:2211.05102). What share of the hardware's peak is reached is calibrated
on published step times: docs/evidence/prices.md, which also says how far off the result is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jfhpo_core.study.hardware import ASSUMED_GPU, CPU_CORE, Device, gpus
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration

TRAINING_SHARE = 0.18
"""Share of peak throughput in forward and backward passes, recomputed activations included."""

FORWARD_SHARE = 0.2
"""Share of peak throughput in forward passes for log-probabilities."""

DECODING_SHARE = 0.4
"""Share of peak throughput while decoding large batches, and in prefill."""

BANDWIDTH_SHARE = 0.6
"""Share of peak memory bandwidth while decoding."""

CONCURRENCY = 256
"""Sequences that a vLLM engine decodes together (its default `max_num_seqs`)."""

WEIGHT_BYTES = 2
"""Per parameter, in 16-bit precision."""

CHECKPOINT_BYTES = 16
"""Per parameter: weights for resuming and for use, and Adam's moments."""

KV_BYTES, KV_EXPONENT = 1.3e5, 0.6
"""KV cache per token of an 8B model, and how it grows with the parameter count; models with grouped queries."""

MEAN_SHARE = 0.5
"""Mean length of a completion as a share of the limit, unless told."""

LONGEST_PROMPT = 256
"""Prompt tokens assumed: twice the limit of a completion, at most this."""

EVALUATED_PROMPTS = 512
"""Held-out prompts assumed where all of them are scored."""

TRANSFER_BYTES_PER_SECOND = 2e10
"""Between GPU and host memory, or from trainer to engine."""

DISK_BYTES_PER_SECOND = 1e9
"""Of a file system that nodes share."""

LOCAL_BYTES_PER_SECOND = 2e9
"""Of a node's own disk: what one NVMe drive writes for long."""

TRANSFERS_PER_STEP = 3
"""Sleep, wake and weight update of an engine that shares its GPUs with the trainer."""


@dataclass(frozen=True)
class Engine:
    """What generates completions.

    Attributes:
        iteration_seconds: Overhead of one decoding iteration.
        concurrency: Sequences decoded together; None: all of a device's at once, until the last one ends.
        startup_seconds: From start to first step, without reading weights.
        update_seconds: Overhead of one optimizer update.
    """

    iteration_seconds: float
    concurrency: int | None
    startup_seconds: float
    update_seconds: float


EngineName = Literal["vllm", "transformers"]

ENGINES: dict[EngineName, Engine] = {
    "vllm": Engine(iteration_seconds=0.008, concurrency=CONCURRENCY, startup_seconds=90.0, update_seconds=0.5),
    "transformers": Engine(iteration_seconds=0.025, concurrency=None, startup_seconds=20.0, update_seconds=0.3),
}

ON_CPU = Engine(iteration_seconds=0.004, concurrency=None, startup_seconds=0.5, update_seconds=0.01)
"""Tiny models in a warm worker process."""


@dataclass(frozen=True)
class Work:
    """A batch of completions.

    Attributes:
        completions: Number of them.
        prompt_tokens, mean_tokens, longest_tokens: Mean length of prompts, mean and largest length of completions.
        updates: Optimizer updates made on them; 0 if they are only sampled.
        forward_passes: Forward passes for log-probabilities (old policy, reference).
    """

    completions: float
    prompt_tokens: float
    mean_tokens: float
    longest_tokens: float
    updates: int = 0
    forward_passes: int = 0


@dataclass(frozen=True)
class Setup:
    """Who does the work.

    Attributes:
        parameters: Of the model.
        device: Kind of device.
        count: How many of them; fractions are shares of one.
    """

    parameters: float
    device: Device
    count: float
    engine: Engine

    @property
    def _parallel(self) -> float:
        """Devices that one copy of the weights is spread over, for half of their memory to be left to the cache."""
        needed = WEIGHT_BYTES * self.parameters / (self.device.memory_bytes / 2)
        return min(self.count, math.exp2(math.ceil(math.log2(needed)))) if needed > 1 else min(1.0, self.count)

    def generation_seconds(self, work: Work) -> float:
        """Prefill and decoding."""
        device, parallel = self.device, self._parallel
        share = work.completions / (self.count / parallel)  # of one engine
        batch = max(1.0, share if self.engine.concurrency is None else min(share, self.engine.concurrency))
        waves = share / batch
        iterations = waves * work.mean_tokens + work.longest_tokens - work.mean_tokens  # the last ones run on alone
        compute = 2 * self.parameters * batch / (parallel * device.flops * DECODING_SHARE)
        weights = WEIGHT_BYTES * self.parameters / (parallel * device.bandwidth * BANDWIDTH_SHARE)
        tokens = batch * (work.prompt_tokens + work.mean_tokens / 2)
        cached_bytes = tokens * KV_BYTES * math.pow(self.parameters / 8e9, KV_EXPONENT)
        cache = cached_bytes / (parallel * device.bandwidth * BANDWIDTH_SHARE)
        operations = 2 * self.parameters * work.completions * work.prompt_tokens
        prefill = operations / (self.count * device.flops * DECODING_SHARE)
        return prefill + iterations * (self.engine.iteration_seconds + max(compute, weights) + cache)

    def update_seconds(self, work: Work) -> float:
        """Log-probabilities, update, and the transfer of the new weights."""
        tokens = work.completions * (work.prompt_tokens + work.mean_tokens)
        operations = self.parameters * tokens * (6 / TRAINING_SHARE + 2 * work.forward_passes / FORWARD_SHARE)
        transfer = TRANSFERS_PER_STEP * WEIGHT_BYTES * self.parameters / TRANSFER_BYTES_PER_SECOND
        return operations / (self.count * self.device.flops) + work.updates * self.engine.update_seconds + transfer

    def step_seconds(self, work: Work) -> float:
        """One training step."""
        return self.generation_seconds(work) + self.update_seconds(work)

    def startup_seconds(self) -> float:
        """From start to first step: processes, and the weights for trainer and engine."""
        return self.engine.startup_seconds + 2 * WEIGHT_BYTES * self.parameters / DISK_BYTES_PER_SECOND

    def checkpoint_seconds(self, bytes_per_second: float = DISK_BYTES_PER_SECOND) -> float:
        """Writing one."""
        return CHECKPOINT_BYTES * self.parameters / bytes_per_second


@dataclass(frozen=True)
class Prices:
    """Prices of a study's segments, in wall-clock seconds."""

    study: Study
    engine: EngineName

    @property
    def device(self) -> Device:
        """The kind of device that trials run on."""
        cluster = self.study.spec.cluster
        return gpus()[cluster.gpu or ASSUMED_GPU] if cluster.gpus_per_device else CPU_CORE

    def step(self, full: Configuration, model: str) -> float:
        """One training step of a complete configuration."""
        completions = float(full["prompts_per_step"]) * float(full.get("n_samples", 1))
        passes = 1 + (float(full.get("kl_coefficient", 0.0)) > 0)
        return self._setup(model).step_seconds(self._work(completions, int(full.get("mini_batches", 1)), passes))

    def rung(self, model: str) -> float:
        """What is done at a rung: an evaluation and a checkpoint."""
        evaluation, setup = self.study.spec.evaluation, self._setup(model)
        completions = float(evaluation.prompts or EVALUATED_PROMPTS) * evaluation.samples_per_prompt
        return setup.generation_seconds(self._work(completions)) + self.checkpoint(model)

    def checkpoint(self, model: str) -> float:
        """Writing a checkpoint from which a run can go on, while its devices wait."""
        rate = LOCAL_BYTES_PER_SECOND if self._locally else DISK_BYTES_PER_SECOND
        return self._setup(model).checkpoint_seconds(rate)

    def copy(self, model: str) -> float:
        """Copying it to the workspace once the devices were given back; 0 if it is written there at once."""
        return self._setup(model).checkpoint_seconds() if self._locally else 0.0

    def startup(self, model: str) -> float:
        """Start of a segment."""
        return self._setup(model).startup_seconds()

    @property
    def _locally(self) -> bool:
        return self.study.spec.cluster.local_folder is not None

    def _work(self, completions: float, updates: int = 0, passes: int = 0) -> Work:
        limit = self.study.spec.task.max_completion_tokens
        return Work(completions, min(2 * limit, LONGEST_PROMPT), MEAN_SHARE * limit, limit, updates, passes)

    def _setup(self, model: str) -> Setup:
        item, cluster = self.study.ladder[model], self.study.spec.cluster
        on_gpu = cluster.gpus_per_device > 0
        count = item.devices * (cluster.gpus_per_device if on_gpu else cluster.cpus_per_device)
        return Setup(item.parameters, self.device, count, ENGINES[self.engine] if on_gpu else ON_CPU)


def prices(study: Study) -> Prices | None:
    """Prices for trainers that say what generates their completions (`engine`); None for others."""
    engine: EngineName | None = getattr(study.trainer, "engine", None)
    return None if engine is None else Prices(study, engine)
