"""What trainers in processes of their own check alike before a search: versions and GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers.base import Finding, Level
from jfhpo_core.trainers.external.memory import GIB
from jfhpo_core.trainers.external.placement import whole_gpus
from jfhpo_core.trainers.external.settings import ExternalSettings

FLASH_ATTENTION = "flash-attn"

NOMINAL = 0.95
"""A GPU shows at least this share of the memory that it is sold with."""


def check_versions(
    found: Mapping[str, str | None], tested: Mapping[str, str], settings: ExternalSettings, guide: str
) -> Iterator[Finding]:
    """Compare a trainer's environment with what its adapter was tested with.

    Args:
        found: Versions by package, None for those that are not installed.
        tested: Versions by package.
        settings: The study's.
        guide: What to read about it.
    """
    missing = [name for name in tested if found[name] is None]
    flash = settings.device == "cuda" and settings.attention.startswith("flash_attention")
    if flash and not found[FLASH_ATTENTION]:
        missing.append(FLASH_ATTENTION)
    if missing:
        message = f"{', '.join(missing)} not installed for {settings.interpreter}; see {guide}"
        yield Finding(Level.FAILURE, "trainer", message)
    other = {name: found[name] for name in tested if found[name] not in (None, tested[name])}
    for name, own in other.items():
        yield Finding(Level.WARNING, "trainer", f"{name} is {own}; the adapter was tested with {tested[name]}")
    if not missing and not other:
        yield Finding(Level.OK, "trainer", ", ".join(f"{name} {found[name]}" for name in tested))


def needed_gpus(study: Study) -> int:
    """GPUs of the largest trial."""
    counted = study.spec.cluster.gpus_per_device
    return max(whole_gpus(model.devices, counted)[0] for model in study.ladder.models)


def check_gpus(needed: int, settings: ExternalSettings, found: list[int]) -> Finding:
    """Compare the GPUs of this machine (their memory in bytes) with what the largest trial needs."""
    if not found:
        return Finding(Level.WARNING, "gpus", "none on this machine: the trials need nodes that have some")
    here = f"{len(found)} GPUs here of {min(found) / GIB:.0f} GiB"
    if len(found) < needed or min(found) / GIB < settings.gpu_memory_gib * NOMINAL:
        wanted = f"{needed} of {settings.gpu_memory_gib:g} GiB (trainer.settings.gpu_memory_gib)"
        return Finding(Level.WARNING, "gpus", f"{here}; the study asks for {wanted}")
    return Finding(Level.OK, "gpus", here)
