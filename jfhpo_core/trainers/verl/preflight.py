"""What verl needs besides a valid study: its environment, options that its configuration knows, CPUs for its actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers.base import Finding, Level, failing_as
from jfhpo_core.trainers.external.ask import VERSIONS, ask
from jfhpo_core.trainers.external.preflight import FLASH_ATTENTION, check_gpus, check_versions, needed_gpus
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
    yield from failing_as("trainer", _installed(study, settings))


def _installed(study: Study, settings: VerlSettings) -> Iterator[Finding]:
    """What the trainer's environment and this machine have."""
    assert settings.interpreter is not None
    probe = ask(
        settings.interpreter, VERSIONS, [*LOCKED["cpu"], FLASH_ATTENTION], dict(os.environ) | {"PYTHONPATH": ""}
    )
    yield from check_versions(probe["versions"], LOCKED[settings.device], settings, "the how-to on verl")
    if settings.device == "cuda":
        needed = needed_gpus(study)
        yield check_gpus(needed, settings, probe["gpus"])
        yield _cpus(ray_cpus(settings, needed))


def _cpus(needed: int) -> Finding:
    here = os.cpu_count() or 1
    if here < needed:
        return Finding(
            Level.WARNING, "cpus",
            f"{here} here, and verl waits for ever on a node with fewer than {needed}; lower trainer.settings.workers",
        )  # fmt: skip
    return Finding(Level.OK, "cpus", f"{here} here, verl needs {needed}")
