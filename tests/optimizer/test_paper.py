"""The paper's strategy."""

from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo_core.optimizer.paper import PaperStrategy
from jfhpo_core.study.trial import Outcome
from tests.studies import simulated_study, trained


def test_its_rank_takes_the_proxys_prediction_for_the_targets_and_leaves_stopped_trials_out(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, strategy="paper")
    space = study.space
    low, high, stopped = (space.decode([place] * space.dimension) for place in (0.2, 0.5, 0.8))
    trials = [
        trained(study, low, "small", [0.1, 0.2, 0.25, 0.3], 0),
        trained(study, high, "small", [0.1, 0.4, 0.5, 0.6], 1),
        trained(study, stopped, "small", [0.1, 0.9], 2, outcome=Outcome.STOPPED),
        trained(study, low, "large", [0.1, 0.9, 0.9, 0.9], 3),
    ]
    ranked = PaperStrategy().rank(study, trials)
    assert [item.configuration for item in ranked] == [high, low]
    assert ranked[0].mean == pytest.approx(0.6, abs=0.05)


def test_its_first_configurations_cover_the_lengths(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, strategy="paper")
    first = PaperStrategy().suggest(study, [], 1000.0, 0)
    assert first is not None
    second = PaperStrategy().suggest(study, [trained(study, first.configuration, "small", [0.1, 0.2])], 1000.0, 0)
    assert second is not None
    assert (first.stop_prompts, second.stop_prompts) == study.spec.fidelity.levels[:2]
    assert first.configuration != second.configuration
