"""What a device can do: peak throughput, memory bandwidth and memory of GPUs (gpus.json) and of a CPU core."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GIB = 2**30

ASSUMED_GPU = "A100-80GB"
"""Taken where a study with GPUs does not say which (`cluster.gpu`)."""


@dataclass(frozen=True)
class Device:
    """One GPU or CPU core.

    Attributes:
        flops: Peak floating-point operations per second, dense, in the precision that models are trained in.
        bandwidth: Bytes per second from its memory.
        memory_bytes: Its memory.
        source: Where the figures come from.
    """

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    source: str


CPU_CORE = Device(
    "CPU core", flops=1.6e11, bandwidth=1e10, memory_bytes=4 * GIB, source="two AVX-512 units at 2.5 GHz, 32-bit"
)


@cache
def gpus() -> dict[str, Device]:
    """All GPUs that are known, by name."""
    table = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))["gpus"]
    return {
        name: Device(name, row["tflops"] * 1e12, row["bandwidth"] * 1e9, row["memory"] * GIB, row["source"])
        for name, row in table.items()
    }
