from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import Hyperparameters, default_spaces
from jfhpo_core.study.space import INACTIVE, ChoiceParameter, Domain, FloatParameter, IntParameter, Parameter, Space

# --- generated spaces ---------------------------------------------------------------------------------------------

SHARES = st.floats(0, 1)


def six_digits(number: float) -> float:
    return float(f"{number:.6g}")


@st.composite
def float_parameters(draw: st.DrawFn) -> dict[str, Any]:
    log = draw(st.booleans())
    zero = draw(st.booleans())
    if log or zero:
        low = six_digits(10 ** draw(st.floats(-9, 3)))
        high = six_digits(low * 10 ** draw(st.floats(0.01, 6)))
    else:
        low = six_digits(round(draw(st.floats(-1e4, 1e4)), 4))
        high = six_digits(low + 10 ** draw(st.floats(-2, 4)))
    assume(low < high)
    return {"type": "float", "low": low, "high": high, "log": log, "zero": zero}


@st.composite
def int_parameters(draw: st.DrawFn) -> dict[str, Any]:
    log = draw(st.booleans())
    low = draw(st.integers(1 if log else -1000, 1000))
    return {"type": "int", "low": low, "high": low + draw(st.integers(1, 5000)), "log": log}


VALUES = st.one_of(st.integers(-9, 9), st.sampled_from([0.5, 0.25, 1e-6]), st.text(max_size=3), st.booleans())
CHOICES = st.lists(
    VALUES, min_size=2, max_size=5, unique_by=lambda value: (isinstance(value, bool), isinstance(value, str), value)
)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Up to six hyperparameters; some hang on choices above them, also in chains."""
    root: dict[str, dict[str, Any]] = {}
    for index in range(draw(st.integers(1, 6))):
        parameter = draw(
            st.one_of(float_parameters(), int_parameters(), CHOICES.map(lambda v: {"type": "choice", "values": v}))
        )
        parents = [name for name, above in root.items() if above["type"] == "choice"]
        if parents and draw(st.booleans()):
            parent = draw(st.sampled_from(parents))
            values = root[parent]["values"]
            parameter["when"] = {parent: draw(st.lists(st.sampled_from(values), min_size=1, max_size=len(values)))}
        root[f"p{index}"] = parameter
    return Space.model_validate(root)


@st.composite
def spaces_and_points(draw: st.DrawFn) -> tuple[Space, np.ndarray]:
    space = draw(spaces())
    return space, np.array(draw(st.lists(SHARES, min_size=space.dimension, max_size=space.dimension)))


@given(spaces_and_points())
def test_any_point_decodes_to_a_configuration_that_round_trips_exactly(case: tuple[Space, np.ndarray]) -> None:
    space, point = case
    configuration = space.decode(point)
    encoded = space.encode(configuration)
    assert encoded.shape == (space.dimension,)
    assert np.all((encoded >= 0) & (encoded <= 1))
    again = space.decode(encoded)
    assert again == configuration
    assert {name: type(value) for name, value in again.items()} == {
        name: type(value) for name, value in configuration.items()
    }


@given(spaces_and_points())
def test_decoded_values_lie_in_the_space(case: tuple[Space, np.ndarray]) -> None:
    space, point = case
    configuration = space.decode(point)
    for name in space:
        parameter = space[name]
        active = all(configuration.get(parent) in values for parent, values in parameter.when.items())
        assert (name in configuration) == active
        if not active:
            continue
        value = configuration[name]
        assert parameter.has(value)
        assert type(value) in {type(extreme) for extreme in parameter.extremes}
        if parameter.options is None:
            assert parameter.extremes[0] <= value <= parameter.extremes[-1]  # type: ignore[operator]
        else:
            assert value in parameter.options


@given(spaces())
def test_extremes_of_every_hyperparameter_are_reachable(space: Space) -> None:
    for name in space:
        parameter = space[name]
        assert [parameter.decode(parameter.encode(value)) for value in parameter.extremes] == list(parameter.extremes)
        if parameter.width == 1:
            assert [parameter.decode([0.0]), parameter.decode([1.0])] == [parameter.extremes[0], parameter.extremes[-1]]


@given(float_parameters(), SHARES)
def test_a_float_given_by_a_user_round_trips_up_to_six_digits(data: dict[str, Any], share: float) -> None:
    parameter = FloatParameter.model_validate(data)
    value = six_digits(parameter.low + share * (parameter.high - parameter.low))
    assume(parameter.low <= value <= parameter.high)
    assume(value == 0 or abs(value) >= 1e-6 * (parameter.high - parameter.low))
    assert parameter.decode(parameter.encode(value)) == value


@given(int_parameters(), st.data())
def test_every_integer_round_trips(data: dict[str, Any], draw: st.DataObject) -> None:
    parameter = IntParameter.model_validate(data)
    value = draw.draw(st.integers(parameter.low, parameter.high))
    assert parameter.decode(parameter.encode(value)) == value


@given(float_parameters() | int_parameters(), SHARES, SHARES)
def test_larger_coordinates_mean_larger_values(data: dict[str, Any], one: float, other: float) -> None:
    kind = FloatParameter if data["type"] == "float" else IntParameter
    parameter = kind.model_validate(data)
    low, high = sorted((one, other))
    assert parameter.decode([low]) <= parameter.decode([high])


@pytest.mark.parametrize("name", sorted(default_spaces()))
def test_default_spaces_are_valid_and_known_to_every_trainer(name: str) -> None:
    space = Space.model_validate(default_spaces()[name])
    assert set(space) <= set(Hyperparameters.model_fields)
    for share in (0.0, 0.5, 1.0):
        Hyperparameters.model_validate(space.decode([share] * space.dimension))


# --- values with meaning ------------------------------------------------------------------------------------------


def test_log_scale_puts_the_geometric_mean_in_the_middle() -> None:
    assert FloatParameter(low=1e-6, high=1e-2, log=True).decode([0.5]) == 1e-4
    assert FloatParameter(low=0.0, high=1.0).decode([0.5]) == 0.5


def test_zero_has_a_cell_of_its_own_below_the_range() -> None:
    parameter = FloatParameter(low=1e-4, high=1e-1, log=True, zero=True)
    assert parameter.decode([0.0]) == 0.0
    assert parameter.decode([0.149]) == 0.0
    assert parameter.decode([0.15]) == 1e-4
    assert parameter.decode(parameter.encode(0)) == 0.0


def test_each_integer_of_a_linear_range_has_an_equal_cell() -> None:
    parameter = IntParameter(low=1, high=4)
    values = [parameter.decode([(index + 0.5) / 400]) for index in range(400)]
    assert [values.count(value) for value in (1, 2, 3, 4)] == [100, 100, 100, 100]


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ([4, 8, 16], 1),
        (["constant", "cosine"], 1),
        ([True, False], 1),
        (["a", "b", "c"], 3),
        ([16, 8, 4], 3),
        ([1, 2, "all"], 3),
    ],
)
def test_ordered_choices_take_one_coordinate_and_others_one_per_value(values: list[Any], width: int) -> None:
    assert ChoiceParameter(values=values).width == width


def test_one_hot_coordinates_of_unordered_choices() -> None:
    space = Space.model_validate({"loss": {"type": "choice", "values": ["grpo", "dapo", "rloo"]}})
    assert space.encode({"loss": "dapo"}).tolist() == [0, 1, 0]
    assert space.decode([0.2, 0.3, 0.9]) == {"loss": "rloo"}


def test_numbers_and_booleans_are_told_apart() -> None:
    parameter = ChoiceParameter(values=[0, 1, False, True])
    assert [parameter.index(value) for value in (0, 1, False, True)] == [0, 1, 2, 3]
    assert ChoiceParameter(values=[4, 8]).index(8.0) == 1


CONDITIONAL = Space.model_validate(
    {
        "loss": {"type": "choice", "values": ["grpo", "dapo", "rloo"]},
        "scheduler": {"type": "choice", "values": ["constant", "cosine"], "when": {"loss": ["grpo", "dapo"]}},
        "clip_high": {"type": "float", "low": 0.1, "high": 0.4, "shifts_with_size": True, "when": {"loss": ["dapo"]}},
        "warmup_ratio": {"type": "float", "low": 0.0, "high": 0.3, "when": {"scheduler": ["cosine"]}},
    }
)


@pytest.mark.parametrize(
    ("configuration", "coordinates"),
    [
        ({"loss": "rloo"}, [0, 0, 1, INACTIVE, INACTIVE, INACTIVE]),
        ({"loss": "grpo", "scheduler": "constant"}, [1, 0, 0, 0.25, INACTIVE, INACTIVE]),
        ({"loss": "grpo", "scheduler": "cosine", "warmup_ratio": 0.3}, [1, 0, 0, 0.75, INACTIVE, 1]),
        ({"loss": "dapo", "scheduler": "constant", "clip_high": 0.1}, [0, 1, 0, 0.25, 0, INACTIVE]),
    ],
)
def test_conditions_switch_hyperparameters_on_and_off(configuration: dict[str, Any], coordinates: list[float]) -> None:
    encoded = CONDITIONAL.encode(configuration)
    assert encoded == pytest.approx(np.array(coordinates))
    assert CONDITIONAL.decode(encoded) == configuration


def test_slices_and_shifting_coordinates() -> None:
    assert CONDITIONAL.dimension == 6
    assert CONDITIONAL.slices() == {
        "loss": slice(0, 3),
        "scheduler": slice(3, 4),
        "clip_high": slice(4, 5),
        "warmup_ratio": slice(5, 6),
    }
    assert CONDITIONAL.shifting_coordinates == [4]


def test_restrict_keeps_what_the_space_searches() -> None:
    complete = {"loss": "grpo", "scheduler": "constant", "clip_high": 0.2, "warmup_ratio": 0.1, "temperature": 1.0}
    assert CONDITIONAL.restrict(complete) == {"loss": "grpo", "scheduler": "constant"}


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({}, "the space is empty"),
        ({"x": {"type": "float", "low": 1, "high": 1}}, "low must be below high"),
        ({"x": {"type": "float", "low": 2, "high": 1}}, "low must be below high"),
        ({"x": {"type": "float", "low": math.nan, "high": 1}}, "low must be below high"),
        ({"x": {"type": "float", "low": 0, "high": math.inf}}, "low must be below high"),
        ({"x": {"type": "float", "low": 0, "high": 1, "log": True}}, "use `zero: true` to allow 0"),
        ({"x": {"type": "float", "low": 0, "high": 1, "zero": True}}, "needs low > 0"),
        ({"x": {"type": "int", "low": 3, "high": 3}}, "low must be below high"),
        ({"x": {"type": "int", "low": 0, "high": 3, "log": True}}, "needs low >= 1"),
        ({"x": {"type": "int", "low": 0.5, "high": 3}}, "valid integer"),
        ({"x": {"type": "choice", "values": [1]}}, "at least 2 items"),
        ({"x": {"type": "choice", "values": [8, 8]}}, "must differ"),
        ({"x": {"type": "choice", "values": [8, 8.0]}}, "must differ"),
        ({"x": {"type": "real", "low": 0, "high": 1}}, "'float', 'int', 'choice'"),
        ({"x": {"low": 0, "high": 1}}, "Unable to extract tag"),
        ({"x": {"type": "float", "low": 0, "high": 1, "step": 0.1}}, "Extra inputs"),
        (
            {"x": {"type": "int", "low": 0, "high": 3}, "y": {"type": "int", "low": 0, "high": 3, "when": {"x": [1]}}},
            "must be a choice that stands above it",
        ),
        ({"y": {"type": "int", "low": 0, "high": 3, "when": {"gone": [1]}}}, "must be a choice that stands above it"),
        (
            {
                "y": {"type": "int", "low": 0, "high": 3, "when": {"x": ["a"]}},
                "x": {"type": "choice", "values": ["a", "b"]},
            },
            "must be a choice that stands above it",
        ),
        (
            {
                "x": {"type": "choice", "values": ["a", "b"]},
                "y": {"type": "int", "low": 0, "high": 3, "when": {"x": ["c"]}},
            },
            "'c' is not one of",
        ),
        ({"x": {"type": "choice", "values": ["a", "b"], "when": {"x": ["a"]}}}, "must be a choice that stands above"),
    ],
)
def test_bad_spaces_are_refused(root: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Space.model_validate(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 2.0}, r"rate: 2.0 lies outside \[0.1, 1.0\]"),
        ({"rate": 0.0}, "rate: 0.0 lies outside"),
        ({"rate": math.nan}, "rate: nan lies outside"),
        ({"rate": "0.5"}, "rate: '0.5' is not a number"),
        ({"rate": True}, "rate: True is not a number"),
        ({"count": 0}, r"count: 0 lies outside \[1, 9\]"),
        ({"count": 2.5}, "count: 2.5 is not a whole number"),
        ({"loss": "ppo"}, "loss: 'ppo' is not one of"),
        ({"other": 1}, "not in the space: other"),
    ],
)
def test_configurations_outside_the_space_are_refused(changes: dict[str, Any], message: str) -> None:
    space = Space.model_validate(
        {
            "rate": {"type": "float", "low": 0.1, "high": 1},
            "count": {"type": "int", "low": 1, "high": 9},
            "loss": {"type": "choice", "values": ["grpo", "dapo"]},
        }
    )
    with pytest.raises(ValueError, match=message):
        space.encode({"rate": 0.5, "count": 3, "loss": "grpo", **changes})


def test_an_incomplete_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="the configuration lacks scheduler"):
        CONDITIONAL.encode({"loss": "grpo"})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_snapping_many_points_is_decoding_and_encoding_each(data: st.DataObject, seed: int) -> None:
    space = Space.model_validate(
        {
            "method": {"type": "choice", "values": ["a", "b", "c"]},
            "updates": {"type": "choice", "values": [1, 2, 4], "when": {"method": ["b", "c"]}},
            "clip": {"type": "float", "low": 0.1, "high": 0.4, "when": {"updates": [2, 4]}},
            "rate": {"type": "float", "low": 1e-6, "high": 1e-3, "log": True, "zero": True},
            "count": {"type": "int", "low": 1, "high": 9, "log": data.draw(st.booleans())},
            "kind": {"type": "choice", "values": ["x", "y"]},
        }
    )
    points = np.random.default_rng(seed).random((20, space.dimension))
    expected = [space.encode(space.decode(point)) for point in points]
    np.testing.assert_allclose(space.snap(points), expected, atol=1e-5)


def test_expectations_fall_off_around_the_expected_values() -> None:
    space = Space.model_validate(
        {
            "rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "expected": 1e-4, "spread": 0.1},
            "kind": {"type": "choice", "values": ["x", "y"]},
        }
    )
    points = np.array([[0.5, 0.25], [0.6, 0.25], [0.5, 0.75]])
    np.testing.assert_allclose(space.log_expectation(points), [0.0, -0.5, 0.0], atol=1e-9)


def test_the_middle_has_what_is_wanted_of_it_with_the_conditions_for_it() -> None:
    space = Space.model_validate(
        {
            "loss": {"type": "choice", "values": ["grpo", "rloo", "ppo"]},
            "estimator": {"type": "choice", "values": ["k1", "k2"], "when": {"loss": ["rloo"]}},
            "rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
        }
    )
    assert space.middle() == {"loss": "grpo", "rate": 1e-4}
    assert space.middle(estimator="k1") == {"loss": "rloo", "estimator": "k1", "rate": 1e-4}
    assert space.middle(rate=1e-2, loss="ppo") == {"loss": "ppo", "rate": 1e-2}


def test_other_values_of_a_choice_are_half_a_range_away_however_many_there_are() -> None:
    two, three = (
        Space.model_validate({"scheduler": {"type": "choice", "values": values, "expected": "constant"}})
        for values in (["constant", "cosine"], ["constant", "cosine", "linear"])
    )
    found = [
        space.log_expectation(np.array([space.encode({"scheduler": value}) for value in ("constant", "cosine")]))
        for space in (two, three)
    ]
    np.testing.assert_allclose(found[1], found[0])
    assert found[0][0] == 0 > found[0][1]


def test_what_is_expected_of_a_hyperparameter_says_nothing_where_it_is_inactive() -> None:
    space = Space.model_validate(
        {
            "algorithm": {"type": "choice", "values": ["grpo", "ppo"]},
            "gae": {
                "type": "float",
                "low": 0,
                "high": 1,
                "when": {"algorithm": ["ppo"]},
                "expected": 0.9,
                "spread": 0.1,
            },
        }
    )
    points = [{"algorithm": "grpo"}, {"algorithm": "ppo", "gae": 0.9}, {"algorithm": "ppo", "gae": 0.8}]
    found = space.log_expectation(np.array([space.encode(point) for point in points]))
    np.testing.assert_allclose(found, [0.0, 0.0, -0.5], atol=1e-9)


def test_an_expectation_outside_the_range_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"rate.expected: 0.5 lies outside"):
        Space.model_validate({"rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "expected": 0.5}})


PARAMETERS = {
    "float": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
    "float or zero": {"type": "float", "low": 0.1, "high": 0.5, "zero": True},
    "int": {"type": "int", "low": 1, "high": 64, "log": True},
    "ordered choice": {"type": "choice", "values": [4, 8, 16]},
    "choice of two": {"type": "choice", "values": ["constant", "cosine"]},
    "unordered choice": {"type": "choice", "values": ["a", "b", "c"]},
}


def parameter_of(kind: str) -> Parameter:
    return Space.model_validate({"x": PARAMETERS[kind]})["x"]


@pytest.mark.parametrize("kind", PARAMETERS)
def test_native_numbers_lie_in_the_domain_and_stand_for_the_same_values(kind: str) -> None:
    parameter = parameter_of(kind)
    for value in [*parameter.extremes, *(parameter.options or [])]:
        number = parameter.to_native(value)
        assert parameter.domain.low <= number <= parameter.domain.high
        assert parameter.from_native(number) == value


@pytest.mark.parametrize(
    ("kind", "domain"),
    [
        ("float", Domain("real", 0, 1)),
        ("int", Domain("integer", 1, 64, log=True)),
        ("ordered choice", Domain("integer", 0, 2)),
        ("choice of two", Domain("category", 0, 1)),
        ("unordered choice", Domain("category", 0, 2)),
    ],
)
def test_other_libraries_are_told_about_order_and_scale(kind: str, domain: Domain) -> None:
    assert parameter_of(kind).domain == domain


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("float", "1e-06 to 0.01, log scale"),
        ("float or zero", "0 or 0.1 to 0.5"),
        ("int", "1 to 64, log scale"),
        ("unordered choice", "a, b, c"),
    ],
)
def test_ranges_are_described(kind: str, text: str) -> None:
    assert parameter_of(kind).describe(str) == text


@pytest.mark.parametrize(
    ("kind", "edges", "inside"),
    [
        ("float", [1e-6, 1.1e-6, 1e-2], [1e-5]),
        ("float or zero", [0.5], [0.0, 0.11, 0.3]),
        ("int", [1, 64], [2, 63]),
        ("ordered choice", [], [4, 16]),
    ],
)
def test_values_at_the_edge_of_a_range_are_known(kind: str, edges: list[float], inside: list[float]) -> None:
    parameter = parameter_of(kind)
    assert [parameter.at_edge(value) for value in (*edges, *inside)] == [True] * len(edges) + [False] * len(inside)


def test_values_that_cannot_be_listed_are_refused() -> None:
    space = Space.model_validate({"n": PARAMETERS["int"], "rate": PARAMETERS["float"]})
    assert list(space.options("n")) == list(range(1, 65))
    with pytest.raises(SpecError, match=r"space\.rate: its values must be a list or whole numbers"):
        space.options("rate")


def test_a_grid_spans_the_range_and_holds_what_is_asked_for() -> None:
    rate = FloatParameter(type="float", low=1e-6, high=1e-2, log=True)
    assert rate.grid(5, 3e-4) == pytest.approx([1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
    assert IntParameter(type="int", low=1, high=3).grid(9) == [1, 2, 3]
    assert ChoiceParameter(type="choice", values=["linear", "cosine"]).grid(9, "cosine") == ["linear", "cosine"]
