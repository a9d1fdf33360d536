"""The places that stock OpenRLHF 0.11.2 needs replaced on a machine without a GPU; see `on_import`.

With a GPU in sight nothing is replaced and importing OpenRLHF fails.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

from on_import import MovedError, after, before, replace

FLASH_ATTENTION = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}
"""What OpenRLHF imports of a package that does not build without CUDA; only packing and ring attention call it."""


@before("openrlhf")
def _no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        raise MovedError("the CPU shim is on PYTHONPATH but this process sees a GPU; set trainer.settings.device: cuda")
    # Only ever used as `tensor.to(device)`, `device=device`, and to wait for kernels.
    replace(torch.cuda, "current_device", lambda: "cpu")
    for name in ("set_device", "synchronize", "current_stream", "empty_cache"):
        replace(torch.cuda, name, lambda *_: None)


@before("openrlhf.models.ring_attn_utils")
def _flash_attention_stands_in() -> None:
    def unavailable(*_: Any, **__: Any) -> Any:
        raise RuntimeError("flash_attn has no CPU version: leave packing and ring attention off")

    for name, attributes in FLASH_ATTENTION.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(dict.fromkeys(attributes, unavailable))
        sys.modules.setdefault(name, module)


@after("openrlhf.models.ring_attn_utils")
def _flash_attention_leaves(module: types.ModuleType) -> None:
    # Other libraries look for flash_attn and would use it.
    for name in FLASH_ATTENTION:
        del sys.modules[name]


@after("openrlhf.utils.deepspeed.deepspeed")
def _mesh_on_cpu(module: types.ModuleType) -> None:
    original = module.init_device_mesh
    replace(module, "init_device_mesh", lambda _device, *args, **kwargs: original("cpu", *args, **kwargs))


@after("openrlhf.utils.deepspeed.deepspeed_utils")
def _adam_of_torch(module: types.ModuleType) -> None:
    """DeepSpeed's own Adam is compiled on first use; torch's AdamW computes the same."""

    def get_train_ds_config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config: dict[str, Any] = original(*args, **kwargs)
        optimizer = config.get("optimizer", {})
        if optimizer.get("type") in ("Adam", "AdamW"):
            optimizer["params"]["torch_adam"] = True
        return config

    original = replace(module, "get_train_ds_config", get_train_ds_config)


@after("deepspeed.comm.torch")
def _gloo_without_shared_memory(module: types.ModuleType) -> None:
    """DeepSpeed would compile a shared-memory all-reduce."""
    replace(module, "build_shm_op", lambda: None)


@after("openrlhf.trainer.ppo_utils.replay_buffer")
def _replay_buffer_on_cpu(module: types.ModuleType) -> None:
    import torch

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        current = torch.cuda.current_device
        torch.cuda.current_device = lambda: 0  # it builds the name 'cuda:0', which needs a number
        try:
            original(self, *args, **kwargs)
        finally:
            torch.cuda.current_device = current
        self.target_device = torch.device("cpu")

    original = replace(module.NaiveReplayBuffer, "__init__", init)


class GlooBroadcast:
    """Weights from trainer to engine: what vLLM's NCCL communicator does, over gloo."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group

        self._group = stateless_init_torch_distributed_process_group(host, port, rank, world_size, backend="gloo")

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        import torch

        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        values = tensor.detach().contiguous()
        # gloo knows no bfloat16; bytes it knows.
        self._group.broadcast([values.view(torch.uint8) if values.dim() else values], options).wait()


@after("openrlhf.utils.distributed_util")
def _weights_over_gloo(module: types.ModuleType) -> None:
    replace(
        module,
        "stateless_init_process_group",
        lambda host, port, rank, world_size, _device: GlooBroadcast(host, port, rank, world_size),
    )


@after("openrlhf.trainer.ray.vllm_worker_wrap")
def _receive_on_cpu(module: types.ModuleType) -> None:
    import torch

    def update_weight(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
        assert dtype == self.model_config.dtype, f"trainer sends {dtype}, engine has {self.model_config.dtype}"
        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])

    replace(module.WorkerWrap, "update_weight", update_weight)
