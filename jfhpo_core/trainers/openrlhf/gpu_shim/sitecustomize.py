"""Lets OpenRLHF 0.11.2 start without flash-attn, which has no wheel and takes an hour to compile.

OpenRLHF imports it in one module, and only packing and ring attention call it. Python runs this file at its start if
the folder is on PYTHONPATH. While that module is imported, and only if there is no real flash-attn, empty modules stand
in; afterwards they are gone, for other libraries look for flash-attn and would use it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

IMPORTER = "openrlhf.models.ring_attn_utils"

NAMES = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}
"""What OpenRLHF imports."""


def _unavailable(*_: Any, **__: Any) -> Any:
    raise RuntimeError("flash-attn is not installed: leave packing and ring attention off, or install it")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != IMPORTER or importlib.util.find_spec("flash_attn") is not None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            for stand_in, attributes in NAMES.items():
                sys.modules[stand_in] = types.ModuleType(stand_in)
                sys.modules[stand_in].__path__ = []
                sys.modules[stand_in].__dict__.update(dict.fromkeys(attributes, _unavailable))
            try:
                execute(module)
            finally:
                for stand_in in NAMES:
                    del sys.modules[stand_in]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
