"""Write the pages of the reference that follow from the code: `python docs/generate.py`; a test compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

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


PAGES = {"hyperparameters.md": hyperparameters_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (REFERENCE / file).write_text(page(), encoding="utf-8")
