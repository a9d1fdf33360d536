from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.best_values import DRAWS, best_values, range_of, shifts
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.study.history import History
from jfhpo_core.study.space import INACTIVE, ChoiceParameter, FloatParameter, IntParameter
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.studies import simulated_study, trained

LANDSCAPE = {"width": 0.5, "size_shift": -0.4, "boundary": 2.0}
"""The best learning rate falls by 0.4 decades per factor of ten in parameters."""


def beliefs_of(tmp_path: Path, count: int) -> Beliefs:
    """After full runs of Sobol configurations, over the sizes in turn."""
    study = simulated_study(tmp_path, trainer={"name": "simulated", "settings": LANDSCAPE})
    surface, random, trials = study_surface(study.spec), np.random.default_rng(0), []
    for number, configuration in enumerate(fresh_configurations(study, [], 0, count)):
        model = study.ladder.models[number % len(study.ladder.models)]
        ratio = model.parameters / study.ladder.target.parameters
        score = true_score(surface, study.complete(configuration), ratio, 1.0) + random.normal(0, 0.02)
        trials.append(trained(study, configuration, model.name, [0.1, 0.15, 0.2, score], number))
    beliefs = Beliefs.form(History.of(study, trials), DRAWS)
    assert beliefs is not None
    return beliefs


@pytest.mark.slow
def test_intervals_hold_the_best_value_at_ten_times_the_size_and_widen_with_distance(tmp_path: Path) -> None:
    beliefs = beliefs_of(tmp_path, 36)
    space = beliefs.history.study.space
    parameter, coordinate = space["learning_rate"], space.slices()["learning_rate"]
    widths = []
    for size in (0.0, 1.0, 2.0):
        found = best_values(beliefs, size)
        assert found.points.shape == (DRAWS, space.dimension)
        assert np.allclose(space.snap(found.points), found.points)
        interval = range_of(parameter, found.points[:, coordinate])
        assert interval is not None
        low, high = (math.log10(float(value)) for value in interval.values)
        truth = math.log10(5e-4) - 0.4 * size
        assert low - 0.15 < truth < high + 0.15
        assert abs(math.log10(float(found.expected["learning_rate"])) - truth) < 0.4
        widths.append(interval.width)
    assert widths[0] < widths[1] < widths[2]
    law = shifts(beliefs)["learning_rate"]
    assert law.factor
    assert law.low <= law.value <= law.high < 1
    assert law.low < 10**-0.4 * 1.2
    assert law.high > 10**-0.4 / 1.2


def test_a_range_is_the_shortest_that_holds_nine_tenths() -> None:
    parameter = FloatParameter(low=1e-6, high=1e-2, log=True)
    places = np.r_[np.linspace(0.2, 0.3, 90), np.linspace(0.5, 1.0, 10)][:, None]
    found = range_of(parameter, places)
    assert found is not None
    assert found.values == (parameter.decode([0.2]), parameter.decode([0.3]))
    assert found.told
    uniform = range_of(parameter, np.linspace(0, 1, 101)[:, None])
    assert uniform is not None
    assert not uniform.told


def test_ranges_of_whole_numbers_and_choices_count_values() -> None:
    whole = IntParameter(low=1, high=10)
    found = range_of(whole, np.array([whole.encode(value) for value in (*[3] * 8, 4, 9)]))
    assert found is not None
    assert (found.values, found.width) == ((3, 4), 0.2)
    choice = ChoiceParameter(values=["constant", "linear", "cosine"])
    drawn = range_of(choice, np.array([choice.encode(value) for value in ["linear"] * 6 + ["cosine"] * 4]))
    assert drawn is not None
    assert (drawn.values, drawn.told) == (("linear", "cosine"), False)
    certain = range_of(choice, np.array([choice.encode("linear")] * 10))
    assert certain is not None
    assert (certain.values, certain.told) == (("linear",), True)


def test_a_hyperparameter_that_is_mostly_inactive_has_no_range() -> None:
    parameter = FloatParameter(low=0.0, high=1.0, when={"scheduler": ["linear"]})
    assert range_of(parameter, np.array([[INACTIVE]] * 6 + [[0.2]] * 4)) is None
    found = range_of(parameter, np.array([[INACTIVE]] * 4 + [[0.2]] * 6))
    assert found is not None
    assert found.values == (0.2, 0.2)
