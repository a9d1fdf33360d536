"""Why a run ended: the decisive line of its log, and what follows from it.

A failure that is the configuration's fault makes the trial infeasible; any other says nothing about it, and the segment
is trained again from its last checkpoint, elsewhere if the cluster has another place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jfhpo_core.errors import InfrastructureError, TrialFailure
from jfhpo_core.study.trial import FailureKind

LINE_CHARACTERS = 300
"""How much of the decisive line is quoted."""

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Cause:
    """A way to fail.

    Attributes:
        name: For people.
        pattern: Regular expression of its line in the log.
        kind: Failure kind to record; None if the failure is not the configuration's fault.
        remedy: What to do about it.
    """

    name: str
    pattern: str
    kind: FailureKind | None
    remedy: str


CAUSES = (
    Cause(
        "the reward function failed", r"jfhpo: the reward failed:", FailureKind.REWARD,
        "correct the function; `jfhpo doctor` tries it on a sample",
    ),
    Cause(
        "the driver was gone", r"jfhpo: the driver is gone:", None, "run the same command again",
    ),
    Cause(
        "disk full", r"No space left on device|OSError: \[Errno 28\]|Disk quota exceeded", None,
        "free space for checkpoints (`jfhpo doctor` estimates how much they need)",
    ),
    Cause(
        "out of GPU memory",
        r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory|"
        r"No available memory for the cache blocks|Free memory on device .* is less than desired|"
        r"larger than the maximum number of tokens that can be stored in KV cache",
        FailureKind.OUT_OF_MEMORY,
        "give the model more devices, or lower micro_batch or vllm_memory_share (trainer.settings)",
    ),
    Cause(
        "out of host memory",
        r"ray\.exceptions\.OutOfMemoryError|due to the node running low on memory|Cannot allocate memory|"
        r"can't allocate memory",
        None, "run fewer trials per node, or leave the optimizer on the GPU (offload_optimizer: false)",
    ),
    Cause(
        "the node went away",
        r"NodeDiedError|node .*(?:has been marked dead|was terminated|preempt)|because its node has died",
        None, "nothing: it is tried again",
    ),
    Cause(
        "OpenRLHF refused the command line", r"train_ppo_ray\.py: error:|^AssertionError",
        FailureKind.REJECTED, "report it: the adapter should have refused it before",
    ),
    Cause(
        "verl refused the configuration", r"^hydra\.errors\.(?:Config|Override)\w+:", FailureKind.REJECTED,
        "report it: the adapter should have refused it before",
    ),
    Cause(
        "vLLM died",
        r"EngineDeadError|EngineCore (?:failed|encountered)|Engine core initialization failed|"
        r"Invocation of \w+ method failed",
        None,
        "see the log for what it said before",
    ),
    Cause(
        "verl lost completions", r"Error in _run_prompt", None, "see the log for the exception behind it",
    ),
    Cause(
        "collective communication failed", r"ncclInternalError|ncclSystemError|NCCL (?:timeout|error)|Watchdog caught",
        None, "check the network between GPUs (NCCL_DEBUG in trainer.settings.environment)",
    ),
    Cause(
        "an actor died",
        r"ActorDiedError: (?!.*in its creation task)|ActorUnavailableError|WorkerCrashedError|worker died unexpectedly",
        None, "nothing: it is tried again",
    ),
)  # fmt: skip
"""Most telling first: an actor's death is what all others look like from afar."""

FATAL = re.compile(
    r"Exception raised in creation task|jfhpo: the reward failed:|jfhpo: the driver is gone:|"
    r"Error in _run_prompt|Invocation of \w+ method failed"
)
"""After such a line a run never recovers, though it may wait for the dead part for ever, or train on the rest."""

REMOTE = re.compile(r"RayTaskError|\bray::")
"""Marks a traceback that comes from an actor."""

ERROR_LINE = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception)\b: ?")


def explain(lines: Sequence[str], exit_code: int | None, log: str) -> TrialFailure | InfrastructureError:
    """The verdict on a run that ended by itself without reaching its goal.

    Args:
        lines: Of its log.
        exit_code: None: it did not end, but was given up.
        log: Where the whole log lies.
    """
    plain = [ANSI.sub("", line) for line in lines]
    remote = any(REMOTE.search(line) for line in plain)
    for cause in CAUSES:
        if remote and cause.kind is FailureKind.REJECTED:
            continue  # the command line is read before any actor exists
        line = next((line for line in plain if re.search(cause.pattern, line)), None)
        if line is not None:
            message = f"{cause.name}: {_quote(line)}; {cause.remedy} (log: {log})"
            return TrialFailure(cause.kind, message) if cause.kind else InfrastructureError(message)
    if exit_code is not None and exit_code > 128:
        return InfrastructureError(f"the run was killed by signal {exit_code - 128} (log: {log})")
    errors = [line for line in plain if ERROR_LINE.search(line)] or [line for line in plain if line.strip()]
    last = _quote(errors[-1]) if errors else "nothing was printed"
    return InfrastructureError(f"the run ended with exit code {exit_code}: {last} (log: {log})")


def _quote(line: str) -> str:
    text = " ".join(line.split())
    return text if len(text) <= LINE_CHARACTERS else f"{text[:LINE_CHARACTERS]} [...]"
