"""The search space: typed hyperparameters, mapped to the unit cube and back without loss.

A configuration is a plain mapping of active hyperparameters to values. The optimizer sees a point of the unit cube:
one coordinate for a numeric or ordered hyperparameter, one per value (one-hot) for an unordered choice of three or
more. Decoding a point and encoding the result gives a representative point of the same configuration, and encoding
then decoding a configuration gives the configuration itself, exactly.

A type of hyperparameter is one class here, derived from `Parameter`, and its place in the union `AnyParameter`. What
trainers, reports, ledgers and other libraries ask of a hyperparameter, they ask of that class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator

from jfhpo_core.errors import SpecError
from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.study.trial import Configuration, Value

INACTIVE = 0.5
"""Coordinate of a hyperparameter that the configuration does not have (its condition does not hold)."""

ZERO_SHARE = 0.15
"""Share of the unit interval that means 'exactly zero' for a float with `zero: true`."""

SIGNIFICANT_DIGITS = 6
"""Floats are rounded to this many digits, so that what is printed is what was run."""

SAME_CELL = 1e-9
"""Coordinates of a choice that differ by less than this stand for the same value."""

RANGE_DIGITS = 12
"""Digits of a linear range that coordinates resolve: what lies below is rounding error where the range crosses zero."""

EDGE = 0.02
"""Share of a float's range that counts as its edge: there a better value may lie beyond the bound."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Domain:
    """What a hyperparameter is to an optimizer of another library: one number (see `Parameter.to_native`).

    Attributes:
        kind: A real number, an integer whose neighbours are alike, or an index without an order.
        low: Smallest number, included; 0 for a category.
        high: Largest number, included.
        log: Whether an integer is searched on a logarithmic scale.
    """

    kind: Literal["real", "integer", "category"]
    low: int
    high: int
    log: bool = False


class Parameter(BaseModel, ABC):
    """A hyperparameter to search: its values, their coordinates, and how they read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Active only if each named choice has one of the listed values. Empty: always active.",
    )
    expected: Value | None = Field(
        default=None,
        json_schema_extra=OPERATIONAL,
        description="Where you expect the best value. The search begins there and trusts it less with every trial.",
    )
    spread: float = Field(
        default=0.2,
        gt=0,
        json_schema_extra=OPERATIONAL,
        description="Standard deviation of that expectation, as a share of the (logarithmic) range.",
    )
    shifts_with_size: bool = Field(
        default=False,
        description="Whether the best value is expected to move with model size (learning rate, clip range).",
    )

    @property
    def width(self) -> int:
        """Number of unit-cube coordinates."""
        return 1

    @property
    def logarithmic(self) -> bool:
        """Whether the values are compared by their ratio."""
        return False

    @property
    def options(self) -> Sequence[Value] | None:
        """All values; None if they cannot be listed."""
        return None

    @property
    @abstractmethod
    def extremes(self) -> Sequence[Value]:
        """The values at which a contradiction with other hyperparameters would show first."""

    @abstractmethod
    def encode(self, value: Value) -> list[float]:
        """Value to `width` coordinates in [0, 1].

        Raises:
            ValueError: The hyperparameter does not have this value.
        """

    def has(self, value: Value) -> bool:
        """Whether a value lies in the domain."""
        try:
            self.encode(value)
        except ValueError:
            return False
        return True

    @abstractmethod
    def decode(self, coordinates: Sequence[float]) -> Value:
        """Coordinates to the value that they stand for; `encode` of a value leads back to the value, exactly."""

    def grid(self, count: int, *further: Value) -> list[Value]:
        """At most `count` values at even distances from one end of the range to the other, and further ones, ascending.

        Of a choice, all its values as they stand.
        """
        return sorted({self.decode([share]) for share in np.linspace(0, 1, count)} | set(further), key=float)

    @abstractmethod
    def snap(self, coordinates: Vector) -> Vector:
        """`encode(decode(p))` for many points at once, shape (n, width): see `Space.snap`."""

    @abstractmethod
    def describe(self, form: Callable[[Value], str]) -> str:
        """The range in words, for instance "1e-06 to 0.001, log scale".

        Args:
            form: Writes a value.
        """

    @abstractmethod
    def at_edge(self, value: Value) -> bool:
        """Whether a better value may lie beyond a bound, this one being so near to it."""

    @abstractmethod
    def nearest(self, number: float) -> Value | None:
        """The value nearest to a number within the range; None beyond it, and where values are no numbers."""

    @property
    @abstractmethod
    def domain(self) -> Domain:
        """The numbers that stand for the values in an optimizer of another library."""

    @abstractmethod
    def to_native(self, value: Value) -> float:
        """The number of the domain that stands for a value."""

    @abstractmethod
    def from_native(self, number: float) -> Value:
        """The value that a number of the domain stands for."""


class FloatParameter(Parameter):
    """A real number in [low, high]."""

    type: Literal["float"] = "float"
    low: float
    high: float
    log: bool = Field(default=False, description="Search on a logarithmic scale.")
    zero: bool = Field(default=False, description="Also allow exactly 0, below `low`.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale needs low > 0, got low={self.low}; use `zero: true` to allow 0")
        if self.zero and self.low <= 0:
            raise ValueError(f"`zero: true` needs low > 0, got low={self.low}")
        return self

    def encode(self, value: Value) -> list[float]:
        """Value to coordinate in [0, 1]."""
        if isinstance(value, bool | str):
            raise ValueError(f"{value!r} is not a number")  # noqa: TRY004  like the other refusals
        number = float(value)
        if self.zero and number == 0:
            return [ZERO_SHARE / 2]
        if not self.low <= number <= self.high:
            raise ValueError(f"{number} lies outside [{self.low}, {self.high}]")
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(number) if self.log else number) - low) / (high - low)
        return [ZERO_SHARE + (1 - ZERO_SHARE) * share if self.zero else share]

    def decode(self, coordinates: Sequence[float]) -> Value:
        """Coordinate in [0, 1] to value, rounded to six significant digits."""
        share = min(1.0, max(0.0, coordinates[0]))
        if self.zero:
            if share < ZERO_SHARE:
                return 0.0
            share = (share - ZERO_SHARE) / (1 - ZERO_SHARE)
        if self.log:
            number = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            width = self.high - self.low
            number = round(self.low + share * width, RANGE_DIGITS - math.ceil(math.log10(width))) + 0.0  # no minus zero
        return min(self.high, max(self.low, float(f"{number:.{SIGNIFICANT_DIGITS}g}")))

    def snap(self, coordinates: Vector) -> Vector:
        """See `Space.snap`; shape (n, 1)."""
        if not self.zero:
            return np.clip(coordinates, 0.0, 1.0)
        snapped: Vector = np.where(coordinates < ZERO_SHARE, ZERO_SHARE / 2, np.clip(coordinates, 0.0, 1.0))
        return snapped

    @property
    def logarithmic(self) -> bool:
        """See `Parameter.logarithmic`."""
        return self.log

    @property
    def extremes(self) -> Sequence[Value]:
        """The bounds, and an exact 0 if it is allowed."""
        return [0.0, self.low, self.high] if self.zero else [self.low, self.high]

    def describe(self, form: Callable[[Value], str]) -> str:
        """See `Parameter.describe`."""
        return f"{'0 or ' if self.zero else ''}{_interval(self, form)}"

    def at_edge(self, value: Value) -> bool:
        """See `Parameter.at_edge`; there is nothing beyond an exact zero."""
        (coordinate,) = self.encode(value)
        return coordinate > 1 - EDGE or (coordinate < EDGE and not self.zero)

    def nearest(self, number: float) -> Value | None:
        """See `Parameter.nearest`."""
        return number if self.low <= number <= self.high or (self.zero and number == 0) else None

    @property
    def domain(self) -> Domain:
        """The coordinate, which holds the logarithmic scale and an exact zero."""
        return Domain("real", 0, 1)

    def to_native(self, value: Value) -> float:
        """See `Parameter.to_native`."""
        return self.encode(value)[0]

    def from_native(self, number: float) -> Value:
        """See `Parameter.from_native`."""
        return self.decode([number])


class IntParameter(Parameter):
    """An integer in [low, high], both included."""

    type: Literal["int"] = "int"
    low: int
    high: int
    log: bool = Field(default=False, description="Search on a logarithmic scale.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")
        if self.log and self.low < 1:
            raise ValueError(f"a logarithmic scale needs low >= 1, got low={self.low}")
        return self

    def _ends(self) -> tuple[float, float]:
        low, high = self.low - 0.5, self.high + 0.5
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def encode(self, value: Value) -> list[float]:
        """Value to coordinate in (0, 1)."""
        number = int(value)
        if number != value:
            raise ValueError(f"{value!r} is not a whole number")
        if not self.low <= number <= self.high:
            raise ValueError(f"{number} lies outside [{self.low}, {self.high}]")
        low, high = self._ends()
        return [((math.log(number) if self.log else number) - low) / (high - low)]

    def decode(self, coordinates: Sequence[float]) -> Value:
        """Coordinate in [0, 1] to the nearest integer."""
        low, high = self._ends()
        position = low + min(1.0, max(0.0, coordinates[0])) * (high - low)
        number = round(math.exp(position) if self.log else position)
        return min(self.high, max(self.low, number))

    def snap(self, coordinates: Vector) -> Vector:
        """See `Space.snap`; shape (n, 1)."""
        low, high = self._ends()
        positions = low + np.clip(coordinates, 0.0, 1.0) * (high - low)
        numbers = np.clip(np.round(np.exp(positions) if self.log else positions), self.low, self.high)
        snapped: Vector = ((np.log(numbers) if self.log else numbers) - low) / (high - low)
        return snapped

    @property
    def logarithmic(self) -> bool:
        """See `Parameter.logarithmic`."""
        return self.log

    @property
    def options(self) -> Sequence[Value]:
        """All integers of the range."""
        return range(self.low, self.high + 1)

    @property
    def extremes(self) -> Sequence[Value]:
        """The bounds."""
        return [self.low, self.high]

    def describe(self, form: Callable[[Value], str]) -> str:
        """See `Parameter.describe`."""
        return _interval(self, form)

    def at_edge(self, value: Value) -> bool:
        """See `Parameter.at_edge`."""
        return value in (self.low, self.high)

    def nearest(self, number: float) -> Value | None:
        """See `Parameter.nearest`."""
        return round(number) if self.low <= number <= self.high else None

    @property
    def domain(self) -> Domain:
        """The integer itself."""
        return Domain("integer", self.low, self.high, self.log)

    def to_native(self, value: Value) -> float:
        """See `Parameter.to_native`."""
        return int(value)

    def from_native(self, number: float) -> Value:
        """See `Parameter.from_native`."""
        return int(number)


def _interval(parameter: FloatParameter | IntParameter, form: Callable[[Value], str]) -> str:
    return f"{form(parameter.low)} to {form(parameter.high)}{', log scale' if parameter.log else ''}"


class ChoiceParameter(Parameter):
    """One of a list of values; numeric lists in ascending order count as ordered."""

    type: Literal["choice"] = "choice"
    values: list[Value] = Field(min_length=2)

    @field_validator("values", mode="before")
    @classmethod
    def _no_null(cls, values: Any) -> Any:
        if isinstance(values, list) and None in values:
            raise ValueError(
                "a choice has no null; write the number that switches it off (0, or one that never takes effect)"
            )
        return values

    @field_validator("values")
    @classmethod
    def _distinct(cls, values: list[Value]) -> list[Value]:
        if len({(isinstance(value, bool), value) for value in values}) < len(values):
            raise ValueError(f"the values must differ from each other, got {values}")
        return values

    @property
    def ordered(self) -> bool:
        """Whether neighbouring values are alike: numbers given in ascending order, or only two values."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        return len(self.values) == 2 or (len(numbers) == len(self.values) and numbers == sorted(numbers))

    @property
    def width(self) -> int:
        """One coordinate if ordered, else one per value."""
        return 1 if self.ordered else len(self.values)

    def encode(self, value: Value) -> list[float]:
        """Value to the middle of its cell, or one-hot."""
        index = self.index(value)
        if self.ordered:
            return [(index + 0.5) / len(self.values)]
        return [float(index == position) for position in range(len(self.values))]

    def index(self, value: Value) -> int:
        """Position of a value in the list; 8 and 8.0 are the same value."""
        for position, candidate in enumerate(self.values):
            if candidate == value and isinstance(candidate, bool) == isinstance(value, bool):
                return position
        raise ValueError(f"{value!r} is not one of {self.values}")

    def decode(self, coordinates: Sequence[float]) -> Value:
        """Cell or largest coordinate to value."""
        if self.ordered:
            return self.values[min(len(self.values) - 1, int(max(0.0, coordinates[0]) * len(self.values)))]
        return self.values[int(np.argmax(coordinates))]

    def grid(self, count: int, *further: Value) -> list[Value]:
        """See `Parameter.grid`."""
        return list(self.values)

    def snap(self, coordinates: Vector) -> Vector:
        """See `Space.snap`; shape (n, width)."""
        count = len(self.values)
        if self.ordered:
            centres: Vector = (np.clip(np.floor(coordinates * count), 0, count - 1) + 0.5) / count
            return centres
        chosen: Vector = np.eye(count)[coordinates.argmax(-1)]
        return chosen

    @property
    def options(self) -> Sequence[Value]:
        """All values."""
        return self.values

    @property
    def extremes(self) -> Sequence[Value]:
        """All values."""
        return self.values

    def describe(self, form: Callable[[Value], str]) -> str:
        """See `Parameter.describe`."""
        return ", ".join(map(form, self.values))

    def at_edge(self, value: Value) -> bool:
        """See `Parameter.at_edge`; a list names all that there is."""
        return False

    def nearest(self, number: float) -> Value | None:
        """See `Parameter.nearest`; positive numbers are compared by their ratio."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) < len(self.values) or not self.ordered or not min(numbers) <= number <= max(numbers):
            return None
        scale: Callable[[float], float] = math.log if min(numbers) > 0 else float
        return min(numbers, key=lambda value: abs(scale(value) - scale(number)))

    @property
    def domain(self) -> Domain:
        """The position in the list; of two values none is in between."""
        return Domain("integer" if self.ordered and len(self.values) > 2 else "category", 0, len(self.values) - 1)

    def to_native(self, value: Value) -> float:
        """See `Parameter.to_native`."""
        return self.index(value)

    def from_native(self, number: float) -> Value:
        """See `Parameter.from_native`."""
        return self.values[int(number)]


AnyParameter = Annotated[FloatParameter | IntParameter | ChoiceParameter, Field(discriminator="type")]
"""What may stand in a study file; `type` tells which."""

TYPE_NAMES = tuple(kind.model_fields["type"].default for kind in get_args(get_args(AnyParameter)[0]))
"""What `type` may say."""


class Space(RootModel[dict[str, AnyParameter]]):
    """Named hyperparameters, in the order of the study file."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _conditions(self) -> Self:
        if not self.root:
            raise ValueError("the space is empty: name at least one hyperparameter to search")
        seen: dict[str, Parameter] = {}
        for name, parameter in self.root.items():
            if parameter.expected is not None:
                try:
                    parameter.encode(parameter.expected)
                except ValueError as error:
                    raise ValueError(f"{name}.expected: {error}") from None
            for parent, values in parameter.when.items():
                above = seen.get(parent)
                if not isinstance(above, ChoiceParameter):
                    raise ValueError(  # noqa: TRY004  pydantic collects ValueErrors
                        f"{name} depends on {parent!r}, which must be a choice that stands above it in the space"
                    )
                for value in values:
                    above.index(value)
            seen[name] = parameter
        return self

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.root)

    def __getitem__(self, name: str) -> Parameter:
        return self.root[name]

    def __len__(self) -> int:
        return len(self.root)

    @property
    def dimension(self) -> int:
        """Number of unit-cube coordinates."""
        return sum(parameter.width for parameter in self.root.values())

    def slices(self) -> dict[str, slice]:
        """Coordinates of each hyperparameter."""
        result, start = {}, 0
        for name, parameter in self.root.items():
            result[name] = slice(start, start + parameter.width)
            start += parameter.width
        return result

    @property
    def shifting_coordinates(self) -> list[int]:
        """Coordinates whose best value is expected to move with model size."""
        slices = self.slices()
        return [slices[name].start for name, parameter in self.root.items() if parameter.shifts_with_size]

    def encode(self, configuration: Mapping[str, Value]) -> Vector:
        """Configuration to a point of the unit cube, shape (dimension,).

        Raises:
            ValueError: A name is missing, unknown or out of bounds.
        """
        unknown = set(configuration) - set(self.root)
        if unknown:
            raise ValueError(f"not in the space: {', '.join(sorted(unknown))}")
        point: list[float] = []
        for name, parameter in self.root.items():
            if not self.active(parameter, configuration):
                point += [INACTIVE] * parameter.width
            elif name not in configuration:
                raise ValueError(f"the configuration lacks {name}")
            else:
                try:
                    point += parameter.encode(configuration[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return np.array(point)

    def decode(self, point: Sequence[float] | Vector) -> Configuration:
        """Point of the unit cube to the configuration it stands for, active hyperparameters only."""
        configuration: Configuration = {}
        for name, coordinates in self.slices().items():
            parameter = self.root[name]
            if self.active(parameter, configuration):
                configuration[name] = parameter.decode([float(value) for value in point[coordinates]])
        return configuration

    def middle(self, **wanted: Value) -> Configuration:
        """The configuration in the middle of the space, but for wanted values; their conditions are made to hold."""
        point = np.full(self.dimension, 0.5)
        places = self.slices()

        def place(name: str, value: Value) -> None:
            point[places[name]] = self.root[name].encode(value)
            for parent, values in self.root[name].when.items():
                place(parent, values[0])

        for name, value in wanted.items():
            place(name, value)
        return self.decode(point)

    def snap(self, points: Vector) -> Vector:
        """Move points to the ones that stand for the same configurations: encode(decode(p)) for many p at once.

        Floats stay as they are (decoding rounds them to six digits, which no distance notices).

        Args:
            points: Shape (n, dimension), in the unit cube.
        """
        snapped = points.copy()
        active: dict[str, NDArray[np.bool_]] = {}
        for name, columns in self.slices().items():
            active[name] = self._holds(name, snapped, active)
            snapped[:, columns] = np.where(active[name][:, None], self.root[name].snap(points[:, columns]), INACTIVE)
        return snapped

    def _holds(self, name: str, snapped: Vector, above: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """At which points a hyperparameter is active, shape (n,).

        Args:
            name: Of the hyperparameter.
            snapped: Points, shape (n, dimension), snapped as far as the hyperparameters above it go.
            above: The same for these.
        """
        active = np.ones(len(snapped), dtype=bool)
        for parent, values in self.root[name].when.items():
            choice = self.root[parent]
            assert isinstance(choice, ChoiceParameter)
            cells = np.array([choice.encode(value) for value in values])
            holds = (np.abs(snapped[:, None, self.slices()[parent]] - cells).max(-1) < SAME_CELL).any(-1)
            active &= above[parent] & holds
        return active

    def log_expectation(self, points: Vector) -> Vector:
        """How far points lie from where the user expects the best, as the log of an unnormalized density, <= 0.

        Args:
            points: Snapped, shape (n, dimension).

        Returns:
            Shape (n,); 0 where no active hyperparameter has an `expected` value.
        """
        total = np.zeros(len(points))
        active: dict[str, NDArray[np.bool_]] = {}
        for name, columns in self.slices().items():
            parameter, active[name] = self.root[name], self._holds(name, points, active)
            if parameter.expected is not None:
                distance = points[:, columns] - np.array(parameter.encode(parameter.expected))
                # Any other value of an unordered choice is as far away as the other one of two: half the range.
                squared = (distance**2).sum(-1) / (8 if parameter.width > 1 else 1)
                total -= np.where(active[name], squared / (2 * parameter.spread**2), 0.0)
        return total

    def options(self, name: str) -> Sequence[Value]:
        """All values of a hyperparameter.

        Raises:
            SpecError: They cannot be listed.
        """
        options = self.root[name].options
        if options is None:
            raise SpecError(f"space.{name}: its values must be a list or whole numbers; make it a choice or an int")
        return options

    def restrict(self, configuration: Mapping[str, Value]) -> Configuration:
        """The part of a complete configuration that this space searches."""
        restricted: Configuration = {}
        for name, parameter in self.root.items():
            if self.active(parameter, restricted) and name in configuration:
                restricted[name] = configuration[name]
        return restricted

    @staticmethod
    def active(parameter: Parameter, configuration: Mapping[str, Value]) -> bool:
        """Whether a hyperparameter's condition holds, given the hyperparameters above it."""
        return all(configuration.get(parent) in values for parent, values in parameter.when.items())
