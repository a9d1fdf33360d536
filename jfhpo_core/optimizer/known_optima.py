"""What is known of the field's hyperparameters before a study has trained anything: where good values lie.

`known_optima.json` has published recipes and the best runs of recorded tables, each with its source and the size of its
model. What is expected at a size is the mean of what is known at sizes near to it, on a line where good values shift
with size; where nothing is known, nothing is expected. It becomes the `expected` value of every hyperparameter for
which the user has not said one, and is used like it: a weight on candidates that fades as trials accumulate, so that a
study overrules it.

References:
    Hvarfner et al. (2022), piBO: Augmenting acquisition functions with user beliefs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import Field

from jfhpo_core.errors import SpecError
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Parameter, Space, Vector
from jfhpo_core.study.trial import Record, Value

FILE = Path(__file__).with_name("known_optima.json")

NEAR = 1.0
"""Standard deviation, in factors of ten in parameters, of the weight of what is known at another size."""

LEAST_WEIGHT = 1.0
"""Minimum total weight of what is known of a hyperparameter at a size; with less, nothing is expected there."""

LEAST_SPREAD = 0.2
"""Minimum spread of an expectation, as a share of the range: recipes copy each other, so that their agreement says less
than it seems."""

MOST_SPREAD = 0.4
"""An expectation that is wider says next to nothing, and is left out."""

GAP = 0.15
"""What is added to the spread, as a share of the range, for each factor of ten to the nearest size that is known."""

SLOPE_PRECISION = 0.1
"""Precision of the prior that good values do not move with size."""

ParameterType = TypeVar("ParameterType", bound=Parameter)


class Optimum(Record):
    """Good values at one size."""

    source: str
    task: str | None = Field(default=None, description="Whose table was recorded; None: a published recipe.")
    parameters: float = Field(gt=0, description="Of the model.")
    weight: float = Field(default=1.0, gt=0, le=1, description="Each of several runs of one source has a part of it.")
    values: dict[str, float]

    def weight_at(self, parameters: float) -> float:
        """How much it says about another size, in (0, 1]."""
        return self.weight * math.exp(-((math.log10(self.parameters / parameters) / NEAR) ** 2) / 2)


class _Known(Record):
    """The file's content."""

    recipes: tuple[Optimum, ...] = ()
    recorded: tuple[Optimum, ...] = ()


@cache
def known_optima(file: Path = FILE) -> tuple[Optimum, ...]:
    """All that is known.

    Raises:
        SpecError: There is no such file, or it does not hold what it should.
    """
    try:
        known = _Known.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SpecError(
            f"strategy.settings.prior: {file} is no file of known optima ({str(error).splitlines()[0]}); write "
            "`shipped`, `none`, or a JSON file like jfhpo_core/optimizer/known_optima.json"
        ) from error
    return (*known.recipes, *known.recorded)


def described(expected: Space, own: Space) -> str | None:
    """What is expected beyond what the user has said, in words; None if that is nothing.

    Args:
        expected: See `with_known_optima`.
        own: The space as the user has it.
    """
    added = [name for name, item in expected.root.items() if item.expected != own[name].expected]
    near = ", ".join(f"{name} near {_short(expected[name].expected)}" for name in added)
    return f"expecting {near}, from published recipes and recorded runs" if added else None


def with_known_optima(study: Study, file: Path = FILE) -> Space:
    """A study's space with what the user expects, and with what is known of other hyperparameters.

    Nothing is added where hyperparameters do not mean what those of the recipes mean: full
    fine-tuning by reinforcement learning, which the trainer says by `reinforces = True`. What was recorded on the
    study's own task is left out: a demonstration or a benchmark would know its answer.

    Args:
        study: The study.
        file: What is known.

    Returns:
        The space, with an `expected` value and its `spread` where something is known.

    Raises:
        SpecError: The file is none of this kind.
    """
    if not getattr(study.trainer, "reinforces", False) or study.spec.trainer.settings.get("lora"):
        return study.space
    known = [item for item in known_optima(file) if item.task is None or item.task != study.spec.task.embedded]
    size = study.ladder.target.parameters
    return Space({name: _expecting(parameter, name, size, known) for name, parameter in study.space.root.items()})


def _short(value: Value | None) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _expecting(parameter: ParameterType, name: str, size: float, known: Iterable[Optimum]) -> ParameterType:
    """The hyperparameter, with what is expected of it at a model size; as it is where that is too little."""
    if parameter.expected is not None:
        return parameter
    inside: list[tuple[float, float, float]] = []
    outside = 0.0
    for item in known:
        if name in item.values:
            weight, value = item.weight_at(size), parameter.nearest(item.values[name])
            if value is None:
                outside += weight
            else:
                inside.append((math.log10(item.parameters / size), parameter.encode(value)[0], weight))
    distances, places, weights = np.array(inside).reshape(-1, 3).T
    if weights.sum() < max(LEAST_WEIGHT, outside):
        return parameter
    centre, spread = _at_origin(distances, places, weights, slopes=parameter.shifts_with_size)
    spread = math.hypot(max(LEAST_SPREAD, spread), GAP * float(np.abs(distances).min()))
    if spread > MOST_SPREAD:
        return parameter
    return parameter.model_copy(update={"expected": parameter.decode([centre]), "spread": spread})


def _at_origin(x: Vector, y: Vector, weights: Vector, *, slopes: bool) -> tuple[float, float]:
    """Weighted mean at x = 0, on a line if it slopes, and the weighted standard deviation around it."""
    design = np.stack([np.ones_like(x), x if slopes else np.zeros_like(x)], axis=1)
    precision = design.T @ (weights[:, None] * design) + np.diag([0.0, SLOPE_PRECISION])
    line = np.linalg.solve(precision, design.T @ (weights * y))
    return float(line[0]), float(np.sqrt(np.average((y - design @ line) ** 2, weights=weights)))
