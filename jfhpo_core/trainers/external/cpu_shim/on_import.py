"""Lets stock trainers run on a machine without a GPU, for tests and trials. No file of any package is edited.

A few places of a trainer, and of what it stands on, name CUDA where any device would do. Each is replaced at the moment
its module is imported. A place that is gone ends the process with `MovedError`: a silent miss would fail later and
elsewhere. The `sitecustomize.py` of a trainer's own shim registers the places and calls `install`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

Patch = Callable[[types.ModuleType], None]

BEFORE: dict[str, Callable[[], None]] = {}
"""By module: what runs just before its code."""

AFTER: dict[str, Patch] = {}
"""By module: what runs just after its code."""

APPLIED: list[str] = []
"""What has been replaced in this process, as module.attribute."""


class MovedError(ImportError):
    """A place that a shim replaces is not where it was: another version is installed."""


def replace(owner: Any, name: str, value: Any) -> Any:
    """Replace an attribute that must exist, and return what it was."""
    place = owner.__name__ if isinstance(owner, types.ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
    where = f"{place}.{name}"
    if not hasattr(owner, name):
        raise MovedError(f"{where} is gone; the CPU shim is for the versions in its requirements.txt")
    before = getattr(owner, name)
    setattr(owner, name, value)
    APPLIED.append(where)
    return before


def before(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Run a function just before a module's code."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        BEFORE[name] = function
        return function

    return register


def after(name: str) -> Callable[[Patch], Patch]:
    """Run a function on a module just after its code."""

    def register(function: Patch) -> Patch:
        AFTER[name] = function
        return function

    return register


@after("vllm.model_executor.layers.utils")
def _keep_weights_plain(module: types.ModuleType) -> None:
    """VLLM's CPU backend repacks weights after loading and drops the plain ones, which updates are written to."""
    import torch

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    replace(module, "dispatch_cpu_unquantized_gemm", plain)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in BEFORE and name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            if name in BEFORE:
                BEFORE[name]()
            execute(module)
            if name in AFTER:
                AFTER[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Watch imports of this process; nothing is imported yet."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


if __name__ == "__main__":
    # In a process whose sitecustomize has registered a trainer's places: try them all.
    registered = importlib.import_module("on_import")
    for patched in sorted(registered.BEFORE | registered.AFTER):
        importlib.import_module(patched)
    sys.stdout.write("\n".join(registered.APPLIED) + "\n")
