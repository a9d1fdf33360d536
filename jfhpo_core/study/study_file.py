"""Reading study files: YAML to a checked study, and each fault to a line, a field, a value and a remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jfhpo_core.errors import SpecError
from jfhpo_core.study.missing import missing
from jfhpo_core.study.models import HUB_NAME
from jfhpo_core.study.space import TYPE_NAMES
from jfhpo_core.study.spec import DataSource, HubData, RewardSpec, StudySpec
from jfhpo_core.study.yaml_text import Document, read_yaml

LONGEST_VALUE = 200
"""Characters of a refused value that a message repeats."""

_REMEDIES = {
    "missing": "add it",
    "extra_forbidden": "remove it or correct its spelling; `jfhpo schema` lists the fields",
    "model_type": "write its fields as `{field: value}`; `jfhpo schema` lists them",
    "union_tag_invalid": f"use type: {', '.join(TYPE_NAMES[:-1])} or {TYPE_NAMES[-1]}",
    "union_tag_not_found": f"add {' or '.join(f'`type: {name}`' for name in TYPE_NAMES)}",
}


def load_study(path: str | Path) -> StudySpec:
    """Read and check a study file; relative paths in it are relative to the file.

    Raises:
        SpecError: The file cannot be read, or its content is refused.
    """
    path = Path(path)
    return parse_study(read_text(path), source=str(path), folder=path.resolve().parent)


def read_text(path: Path) -> str:
    """The text of a study file.

    Raises:
        SpecError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        told = missing(path, "the folder you are in")
        raise SpecError(f"{path}: the study file cannot be read: {told}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: the study file cannot be read: {error}") from None


def parse_study(text: str, source: str = "study", folder: Path | None = None, *, recorded: bool = False) -> StudySpec:
    """Read a study from YAML text.

    Args:
        text: YAML.
        source: Name for messages.
        folder: Relative paths in the study are relative to it; None leaves them as they are.
        recorded: Whether a ledger has kept it: earlier versions wrote empty conditions, which a study file must not
            have.

    Raises:
        SpecError: Every fault of the text, each with line, field, value and remedy.
    """
    document = read_yaml(text, source)
    if not isinstance(document.data, dict):
        raise SpecError(
            f"{source}: a study file is a mapping that begins with `study: NAME`; `jfhpo schema` lists the fields"
        )
    spec = _validate(document, source) if recorded else validate_study(document, source)
    return resolve_paths(spec, folder) if folder is not None else spec


def validate_study(document: Document, source: str) -> StudySpec:
    """Check the content of a study file.

    Raises:
        SpecError: One line per faulty place.
    """
    _refuse_empty_conditions(document, source)
    return _validate(document, source)


def _refuse_empty_conditions(document: Document, source: str) -> None:
    """An empty condition reads as if it meant something, and means the same as none."""
    space = document.data.get("space")
    for name, parameter in space.items() if isinstance(space, dict) else ():
        if isinstance(parameter, dict) and parameter.get("when") == {}:
            line, field = document.locate(["space", name, "when"])
            place = f"{source}: {field}" if line is None else f"{source}, line {line}: {field}"
            raise SpecError(
                f"{place} = {{}}: a condition without a hyperparameter holds always; remove it, or name a choice and "
                "its values, as in {scheduler: [cosine]}"
            )


def _validate(document: Document, source: str) -> StudySpec:
    try:
        return StudySpec.model_validate(document.data)
    except ValidationError as error:
        raise SpecError(_explain(error, document, source)) from None


@contextmanager
def with_lines(path: Path) -> Iterator[None]:
    """Add the line of a study file to errors of later checks, whose messages begin with a dotted field."""
    try:
        yield
    except SpecError as error:
        field, colon, _ = str(error).partition(": ")
        parts = [int(part) if part.isdecimal() else part for part in field.split(".")]
        if not colon or parts[0] not in StudySpec.model_fields:
            raise
        line, _ = read_yaml(read_text(path), str(path)).locate(parts)
        raise SpecError(f"{path}, line {line}: {error}") from error


def resolve_paths(spec: StudySpec, folder: Path) -> StudySpec:
    """Make the study's own files absolute, so that workers in other folders find them.

    Where a name on the hub may stand, only what may be one is left alone: neither a path by its form, nor something in
    a folder that exists.
    """

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    def found(name: str) -> str:
        path = folder / Path(name).expanduser()
        beside = "/" in name and path.parent.is_dir()
        return absolute(name) if path.exists() or beside or not HUB_NAME.fullmatch(name) else name

    def data(source: DataSource | None) -> DataSource | None:
        if isinstance(source, HubData):
            return source.model_copy(update={"hub": found(source.hub)})
        return source if source is None else absolute(source)

    def reward(function: str) -> str:
        file, colon, name = function.partition(":")
        return f"{absolute(file)}{colon}{name}"

    models = [model.model_copy(update={"path": found(model.path)}) for model in spec.family.models]
    task = spec.task
    if task.reward is not None:
        rewards: str | list[RewardSpec] = (
            reward(task.reward)
            if isinstance(task.reward, str)
            else [one.model_copy(update={"function": reward(one.function)}) for one in task.reward]
        )
        task = task.model_copy(update={"prompts": data(task.prompts), "heldout": data(task.heldout), "reward": rewards})
    return spec.model_copy(update={"family": spec.family.model_copy(update={"models": models}), "task": task})


def _explain(error: ValidationError, document: Document, source: str) -> str:
    lines: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        between = fault.get("ctx", {}).get("field")
        line, field = document.locate(between.split(".") if between else fault["loc"])
        if fault["type"] == "missing":
            field = f"{field}.{fault['loc'][-1]}".lstrip(".")
        remedy = _REMEDIES.get(fault["type"])
        message = fault["msg"].removeprefix("Value error, ") + (f" -> {remedy}" if remedy else "")
        place = f"{source}: {field or 'study'}" if line is None else f"{source}, line {line}: {field or 'study'}"
        if fault["type"] != "missing" and not isinstance(fault["input"], dict | list | BaseModel):
            place += f" = {_shown(fault['input'])}"
        lines.setdefault(place, []).append(message)
    # Faults at one place are the members of a union, each saying why the value is none of it.
    return "\n".join(f"{place}: {'; or: '.join(messages)}" for place, messages in lines.items())


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."
