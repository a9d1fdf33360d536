"""What the laptop demo runs on: three tasks, and for each a family of tiny pretrained transformers.

The task folders have exactly the form in which users bring a task (`train.jsonl`, `heldout.jsonl`, `reward.py`); the
model folders are what `AutoModelForCausalLM.from_pretrained` loads. `python -m jfhpo_core.embedded.make` makes them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from jfhpo_core.errors import SpecError

__all__ = ["FAMILIES", "NAMES", "family_folder", "family_members", "manifest", "task_folder", "verify"]

FAMILIES: Final = {
    "instruct": ("s", "sm", "m", "l"),
    "arithmetic": ("s", "sm", "m", "l"),
    "countdown": ("s", "sm", "m"),
}
"""The model families by name, each with its sizes, small to large."""

NAMES: Final = tuple(FAMILIES)
"""The tasks. Each has a model family of the same name."""

MANIFEST: Final = "MANIFEST.json"

_ROOT = Path(__file__).parent
_REMEDY = "python -m jfhpo_core.embedded.make --task {name}"


def task_folder(name: str) -> Path:
    """Folder with `train.jsonl`, `heldout.jsonl` and `reward.py` of a task.

    Raises:
        SpecError: no such task is shipped.
    """
    return _ROOT / "tasks" / _known(name)


def family_folder(name: str) -> Path:
    """Folder with the models of a task, one folder for each size, and their manifest.

    Raises:
        SpecError: no such family is shipped.
    """
    return _ROOT / "families" / _known(name)


def family_members(name: str) -> dict[str, Path]:
    """Model folders of a family by size, small to large.

    Raises:
        SpecError: no such family is shipped.
    """
    folder = family_folder(name)
    return {size: folder / size for size in FAMILIES[name]}


def manifest(name: str) -> dict[str, Any]:
    """The family's manifest: checksums of all files of task and family, parameter counts, base accuracies, settings.

    Raises:
        SpecError: no such family is shipped, or its manifest is missing or not JSON.
    """
    return read_manifest(_ROOT, _known(name))


def verify(name: str) -> None:
    """Check every file of a task and its family against the manifest.

    Raises:
        SpecError: a file is missing or is not the one that was shipped; the message names it and the remedy.
    """
    verify_under(_ROOT, _known(name))


def read_manifest(root: Path, name: str) -> dict[str, Any]:
    """`manifest` of a task and family made under another root (`make --out`)."""
    file = root / "families" / name / MANIFEST
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{file} is missing: the family {name!r} has not been made. Make it: {_REMEDY.format(name=name)}"
        raise SpecError(message) from None
    except ValueError as error:
        message = f"{file} is not JSON ({error}). Reinstall jfhpo, or make the family anew: {_REMEDY.format(name=name)}"
        raise SpecError(message) from error
    return content


def verify_under(root: Path, name: str) -> None:
    """`verify` for a task and family made under another root (`make --out`)."""
    for relative, expected in read_manifest(root, name)["files"].items():
        file = root / relative
        if not file.is_file():
            found = "is missing"
        elif (actual := hashlib.sha256(file.read_bytes()).hexdigest()) != expected:
            found = f"has sha256 {actual}, but {MANIFEST} says {expected}: it was changed or damaged"
        else:
            continue
        raise SpecError(f"{file} {found}. Reinstall jfhpo, or make the family anew: {_REMEDY.format(name=name)}")


def _known(name: str) -> str:
    if name not in NAMES:
        raise SpecError(f"no embedded task {name!r}; there are {', '.join(NAMES)}. Bring your own as a folder path.")
    return name
