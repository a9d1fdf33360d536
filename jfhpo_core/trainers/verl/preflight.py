"""What verl needs besides a valid study: its environment, options that its configuration knows, CPUs for its actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers.base import Finding, Level
from jfhpo_core.trainers.external.ask import VERSIONS, ask
from jfhpo_core.trainers.external.memory import GIB
from jfhpo_core.trainers.external.placement import whole_gpus
from jfhpo_core.trainers.verl.settings import VerlSettings
from jfhpo_core.trainers.verl.training import ray_cpus

COMMON = {"verl": "0.9.1", "ray": "2.55.0", "transferqueue": "0.1.10"}
LOCKED = {
    "cuda": {**COMMON, "vllm": "0.24.0", "transformers": "5.9.0"},
    "cpu": {**COMMON, "vllm": "0.29.0", "transformers": "5.15.0"},
}
"""Versions of the locks, by device; another verl may have other options."""

COMPOSE = """
import importlib.util, json
from pathlib import Path
from hydra import compose, initialize_config_dir
root = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
answer = None
with initialize_config_dir(config_dir=str(root / "trainer" / "config"), version_base=None):
    try:
        compose(config_name="ppo_trainer", overrides=json.loads(input()))
    except Exception as error:
        answer = str(error.__cause__ or error).splitlines()[0] + "; " + str(error).splitlines()[0]
print("ANSWER" + json.dumps(answer))
"""


@cache
def refusal(python: str, overrides: tuple[str, ...]) -> str | None:
    """What verl's own configuration has against these overrides (Hydra's notation); None: nothing.

    Raises:
        InfrastructureError: It cannot be asked.
    """
    answer: str | None = ask(python, COMPOSE, overrides, dict(os.environ) | {"PYTHONPATH": ""})
    return answer


def preflight(study: Study, settings: VerlSettings) -> Iterator[Finding]:
    """See `jfhpo_core.run.preflight`."""
    assert settings.interpreter is not None
    try:
        probe = ask(
            settings.interpreter, VERSIONS, [*LOCKED["cpu"], "flash-attn"], dict(os.environ) | {"PYTHONPATH": ""}
        )
    except InfrastructureError as error:
        yield Finding(Level.FAILURE, "trainer", str(error))
        return
    yield from _versions(probe["versions"], settings)
    needed = max(whole_gpus(model.devices, study.spec.cluster.gpus_per_device)[0] for model in study.ladder.models)
    if settings.device == "cuda":
        yield _gpus(needed, settings, probe["gpus"])
        yield _cpus(ray_cpus(settings, needed))


def _versions(versions: dict[str, str | None], settings: VerlSettings) -> Iterator[Finding]:
    locked = LOCKED[settings.device]
    missing = [name for name in locked if versions[name] is None]
    if settings.attention.startswith("flash_attention") and not versions["flash-attn"]:
        missing.append("flash-attn")
    if missing:
        yield Finding(
            Level.FAILURE, "trainer",
            f"{', '.join(missing)} not installed for {settings.interpreter}; see the how-to on verl",
        )  # fmt: skip
    other = {name: own for name, own in versions.items() if name in locked and own not in (None, locked[name])}
    for name, own in other.items():
        yield Finding(Level.WARNING, "trainer", f"{name} is {own}; the lock of `make verl-env` has {locked[name]}")
    if not missing and not other:
        yield Finding(Level.OK, "trainer", ", ".join(f"{name} {versions[name]}" for name in locked))


def _gpus(needed: int, settings: VerlSettings, found: list[int]) -> Finding:
    if not found:
        return Finding(Level.WARNING, "gpus", "none on this machine: the trials need nodes that have some")
    here = f"{len(found)} GPUs here of {min(found) / GIB:.0f} GiB"
    if len(found) < needed or min(found) / GIB < settings.gpu_memory_gib * 0.95:
        wanted = f"{needed} of {settings.gpu_memory_gib:g} GiB (trainer.settings.gpu_memory_gib)"
        return Finding(Level.WARNING, "gpus", f"{here}; the study asks for {wanted}")
    return Finding(Level.OK, "gpus", here)


def _cpus(needed: int) -> Finding:
    here = os.cpu_count() or 1
    if here < needed:
        return Finding(
            Level.WARNING, "cpus",
            f"{here} here, and verl waits for ever on a node with fewer than {needed}; lower trainer.settings.workers",
        )  # fmt: skip
    return Finding(Level.OK, "cpus", f"{here} here, verl needs {needed}")
