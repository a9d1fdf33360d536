"""The floors of the stopping rule `unpromising`, against the surrogate that has seen an evaluation at the floor."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from jfhpo_core.optimizer.floors import value_floors
from jfhpo_core.optimizer.surrogate import JointSurrogate, Observations
from tests.optimizer.test_acquisition import MEASUREMENT, at_target, candidates, surrogate

X = [0.7, 0.2]
INCUMBENT = 0.4


def floors(model: JointSurrogate, probability: float, inflation: float = 1.0) -> list[float | None]:
    steps = candidates([*X, -0.8, 0.3], [*X, -0.8, 0.6], [*X, 0.0, 0.9])
    target = at_target(torch.tensor([X]).numpy())
    return value_floors(model, target, steps, INCUMBENT, probability, MEASUREMENT, inflation)


@pytest.mark.parametrize("probability", [0.05, 0.3])
def test_an_evaluation_at_the_floor_leaves_just_the_probability(probability: float) -> None:
    model = surrogate()
    steps = candidates([*X, -0.8, 0.3], [*X, -0.8, 0.6], [*X, 0.0, 0.9])
    for step, floor in zip(steps, floors(model, probability), strict=True):
        assert floor is not None
        data = model.observations
        seen = Observations(
            torch.cat([data.inputs, step.unsqueeze(0)]),
            torch.cat([data.values, torch.tensor([floor])]),
            torch.cat([data.variances, torch.tensor([MEASUREMENT])]),
        )
        later = JointSurrogate(seen, model.structure, model.parameter_draws)
        mean, deviation = later.mean_and_deviation(at_target(torch.tensor([X]).numpy()))
        assert norm.sf(INCUMBENT, float(mean), float(deviation)) == pytest.approx(probability, abs=2e-3)


def test_the_less_probability_is_asked_for_the_lower_is_the_floor() -> None:
    for model in (surrogate(), surrogate(draws=4)):
        pairs = list(zip(floors(model, 0.05), floors(model, 0.3), strict=True))
        told = [(low, high) for low, high in pairs if low is not None and high is not None]
        assert len(told) >= 2
        assert all(low < high for low, high in told)
        assert all((low is None) == (high is None) for low, high in pairs)


def test_a_model_that_is_overconfident_gives_more_time() -> None:
    usual, inflated = floors(surrogate(), 0.2), floors(surrogate(), 0.2, inflation=1.5)
    assert all(a is not None and b is not None and b < a for a, b in zip(usual, inflated, strict=True))
