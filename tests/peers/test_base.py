from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.peers.base import ladder, new_configuration, rung_of, top_budget
from tests.peers.test_peers import peer_study

FIFTEEN = tuple(32 * number for number in range(1, 16))


@pytest.mark.parametrize(
    ("levels", "eta", "expected"),
    [
        (FIFTEEN, 3, (32, 64, 160, 480)),
        ((192, 384, 576, 768, 960), 3, (192, 384, 960)),
        ((192, 384, 576, 768, 960), 2, (192, 576, 960)),
        ((160, 320, 480), 3, (160, 480)),
        ((300, 480), 3, (480,)),
        ((480,), 3, (480,)),
    ],
)
def test_the_ladder_takes_the_rungs_nearest_to_a_geometric_one(
    levels: tuple[int, ...], eta: int, expected: tuple[int, ...]
) -> None:
    assert ladder(levels, eta) == expected
    assert all(after / before >= eta**0.5 for before, after in pairwise(expected))


@pytest.mark.parametrize("eta", [2, 3, 4])
@pytest.mark.parametrize("rungs", [1, 2, 3, 4, 5, 6, 7])
def test_budgets_and_rungs_belong_together(rungs: int, eta: int) -> None:
    top = top_budget(rungs, eta)
    assert [rung_of(top / eta**below, eta) for below in reversed(range(rungs))] == list(range(rungs))


def test_native_numbers_stand_for_the_same_values(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "tpe")
    for configuration in fresh_configurations(study, (), 0, 200):
        for name, value in configuration.items():
            parameter = study.space[name]
            assert parameter.from_native(parameter.to_native(value)) == value


def test_a_library_that_repeats_itself_is_helped_out(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "tpe")
    first, second = fresh_configurations(study, (), 0, 2)
    tried = [study.new_trial(0, first, "large", 0)]
    answers = iter([first, first, second])
    assert new_configuration(study, tried, lambda: next(answers), 0) == (second, "new configuration")
    drawn = new_configuration(study, tried, lambda: first, 0)
    assert drawn is not None
    assert drawn[0] != first
    assert "proposals were all known" in drawn[1]
