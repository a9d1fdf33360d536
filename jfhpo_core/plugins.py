"""What other packages may add to: trainers, strategies, acquisitions and stopping rules, by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from jfhpo_core.errors import SpecError

TRAINERS = "jfhpo.trainers"
"""Entry-point group of trainers."""

EXTRAS = {
    "ConfigSpace": "peers",
    "accelerate": "trl",
    "datasets": "trl",
    "dehb": "peers",
    "mcp": "mcp",
    "mcp_types": "mcp",
    "mlflow": "mlflow",
    "optuna": "peers",
    "peft": "trl",
    "prefect": "prefect",
    "pyarrow": "replay",
    "ray": "ray",
    "safetensors": "trl",
    "sklearn": "replay",
    "smac": "peers",
    "transformers": "trl",
    "trl": "trl",
}
"""The extra of this package that installs a module."""


@cache  # reading the metadata of all installed packages takes a tenth of a second
def registered(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def load_plugin(group: str, name: str, field: str, own: Mapping[str, str] | None = None) -> Any:
    """What an entry point names.

    Args:
        group: The entry-point group, "jfhpo." and the plural of what it holds.
        name: Of the entry point.
        field: The field of the study file that holds the name, for messages.
        own: What this package has without registering it, "module:attribute" by name; nobody may replace it.

    Raises:
        SpecError: There is none of that name, or it does not import.
    """
    points = {**registered(group), **{one: EntryPoint(one, place, group) for one, place in (own or {}).items()}}
    if name not in points:
        raise SpecError(f"{field}: no {_noun(group)} {name!r}; there are {', '.join(sorted(points))}")
    try:
        return points[name].load()
    except ImportError as error:
        raise SpecError(f"{field}: {_noun(group)} {name!r} cannot be imported: {error}; {remedy(error)}") from error


def missing_extra(error: ImportError) -> str | None:
    """The extra that would install what does not import; None if it belongs to none."""
    return EXTRAS.get((error.name or "").partition(".")[0])


def remedy(error: ImportError) -> str:
    """What to do about a module that does not import."""
    extra = missing_extra(error)
    return f"run `pip install 'jfhpo[{extra}]'`" if extra else "mend or remove its package"


def _noun(group: str) -> str:
    """What a group holds.

    >>> [_noun(f"jfhpo.{plural}") for plural in ("trainers", "strategies")]
    ['trainer', 'strategy']
    """
    plural = group.rpartition(".")[2]
    return f"{plural.removesuffix('ies')}y" if plural.endswith("ies") else plural.removesuffix("s")
