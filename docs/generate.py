"""Write the pages of the reference that follow from the code: `python docs/generate.py`; a test compares them."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from jfhpo.answers import ANSWERS
from jfhpo_core.study.hyperparameters import default_spaces
from jfhpo_core.study.space import Space
from jfhpo_core.trainers import load_trainer

REFERENCE = Path(__file__).parent / "reference"

TRAINERS = ("trl", "openrlhf", "verl", "simulated", "replay")

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def hyperparameters_page() -> str:
    """The default spaces, and every trainer's hyperparameters."""
    spaces = [f"### `{name}`\n\n{_space(Space.model_validate(space))}" for name, space in default_spaces().items()]
    trainers = [f"### `{name}`\n\n{_trainer(load_trainer(name).hyperparameters)}" for name in TRAINERS]
    return f"""# Hyperparameters

Made from the code by `python docs/generate.py`.

## Default spaces

`space: llm` is for models of 0.5B parameters and more, `space: tiny` for the embedded families of 0.1M to 2M, whose
learning rates lie three orders of magnitude higher. What moves with size may have another best value on another model.

{chr(10).join(spaces)}
## Trainers

What a space does not search and `trainer.fixed` does not set keeps its default. `mlproject` takes the parameters of the
MLflow project.

{chr(10).join(trainers)}"""


def _space(space: Space) -> str:
    rows = []
    for name in space:
        parameter = space[name].model_dump(mode="json", exclude={"when", "expected", "spread"})
        values = parameter.get("values")
        extent = ", ".join(map(str, values)) if values else f"{parameter['low']:g} to {parameter['high']:g}"
        extent += ", or 0" if parameter.get("zero") else ""
        scale = "logarithmic" if parameter.get("log") else "" if values else "linear"
        rows.append(f"| `{name}` | {extent} | {scale} | {'yes' if parameter['shifts_with_size'] else ''} |")
    head = "| Hyperparameter | Searched | Scale | Moves with size |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _trainer(kind: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | `{field.default}` | {_extent(field.annotation, field.metadata)} | {field.description or ''} |"
        for name, field in kind.model_fields.items()
    ]
    return "| Hyperparameter | Default | Allowed | Meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _extent(annotation: Any, metadata: list[Any]) -> str:
    options = [str(option) for option in get_args(annotation) if isinstance(option, str | int)]
    if options:
        return ", ".join(f"`{option}`" for option in options)
    found = [(bound, getattr(limit, bound)) for limit in metadata for bound in BOUNDS if hasattr(limit, bound)]
    limits = [f"{BOUNDS[bound]} {value:g}" for bound, value in found]
    kind = {int: "whole number", float: "number", bool: "true or false"}.get(annotation, "")
    return ", ".join([kind, *limits]).lstrip(", ")


def json_page() -> str:
    """Fields of what every command prints with `--json`."""
    known: dict[str, type[BaseModel]] = {}
    answers = [f"## `jfhpo {name}`\n\n{_fields(kind, known)}" for name, kind in ANSWERS.items()]
    done: list[str] = []
    while len(done) < len(known):
        name, kind = list(known.items())[len(done)]
        done.append(f"### `{name}`\n\n{_summary(kind)}\n\n{_fields(kind, known)}")
    return f"""# Answers as JSON

Made from the code by `python docs/generate.py`.

Every command takes `--json` and prints one JSON object to standard output; progress and messages go to standard
error, and [exit codes](exit-codes.md) stay the same. A command that is refused prints no object. Tools of `jfhpo mcp`
return the same objects. `jfhpo schema` prints the JSON schema of study files; those of the answers come from
`jfhpo.answers.ANSWERS["plan"].model_json_schema()` and so on.

Seconds are device-seconds (wall-clock seconds times devices) unless the field says otherwise. null is what is not
known.

{chr(10).join(answers)}
## Parts

{chr(10).join(done)}"""


def _summary(kind: type[BaseModel]) -> str:
    return (getdoc(kind) or "").splitlines()[0]


def _fields(kind: type[BaseModel], known: dict[str, type[BaseModel]]) -> str:
    rows = [
        f"| `{name}` | {_type(field.annotation, known)} | {field.description or ''} |"
        for name, field in kind.model_fields.items()
    ]
    return "| Field | Type | Meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


VALUES = "values"
"""A number, a text, true, false or null, as the hyperparameter has it."""

PLAIN_TYPES = {
    int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "any",
}  # fmt: skip


def _type(annotation: Any, known: dict[str, type[BaseModel]]) -> str:
    """A type in words; models among its parts are noted in `known`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(_type(part, known) for part in parts)
    if origin is tuple and Ellipsis not in parts:
        return f"[{', '.join(_type(part, known) for part in parts)}]"
    if origin in (list, tuple):
        return f"list of {_type(parts[0], known)}"
    if origin is dict:
        return f"mapping of names to {VALUES if get_args(parts[1]) else _type(parts[1], known)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        known.setdefault(annotation.__name__, annotation)
        return f"[`{annotation.__name__}`](#{annotation.__name__.lower()})"
    return PLAIN_TYPES[annotation]


PAGES = {"hyperparameters.md": hyperparameters_page, "json.md": json_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (REFERENCE / file).write_text(page(), encoding="utf-8")
