"""Changes to a study from the command line: `--set budget.trial_seconds=900`, validated like the file itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jfhpo_core.errors import SpecError
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import load_study, resolve_paths, validate_study
from jfhpo_core.study.yaml_text import Document, read_yaml


def read_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file and apply overrides to it.

    Args:
        path: The study file, which must be valid by itself.
        overrides: Texts 'dotted.key=YAML value'; a list is indexed by position (`baselines.0.name=...`). Paths in
            them are relative to the current folder, as everywhere on a command line.

    Raises:
        SpecError: The file or an override is refused.
    """
    spec = load_study(path)
    if not overrides:
        return spec
    data = spec.to_data()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {text}: write it as key=value, e.g. --set budget.trial_seconds=900")
        try:
            _put(data, key.strip().split("."), read_yaml(value, f"--set {text}").data)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise SpecError(f"--set {text}: {error.args[0]}; `jfhpo schema` lists the fields") from None
    changes = " ".join(f"--set {text}" for text in overrides)
    return resolve_paths(validate_study(Document(data), f"{path} with {changes}"), Path.cwd())


def _put(node: Any, keys: Sequence[str], value: Any) -> None:
    """Set a value deep in nested mappings and lists.

    Mappings grow a missing last key (validation then judges its name); anything else missing is refused.
    """
    key, *rest = keys
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise IndexError(f"{key!r} is not a position in a list of {len(node)}")
        if rest:
            _put(node[int(key)], rest, value)
        else:
            node[int(key)] = value
    elif isinstance(node, dict):
        if not rest:
            node[key] = value
        elif key not in node:
            raise KeyError(f"there is no field {key!r}")
        else:
            _put(node[key], rest, value)
    else:
        raise TypeError(f"{key!r} lies below a plain value")
