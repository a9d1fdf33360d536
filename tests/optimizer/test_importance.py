from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.candidates import ranked_configurations
from jfhpo_core.optimizer.importance import Importance, importances
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.studies import simulated_study, trained

RATE_RULES = {"width": 0.45, "boundary": 0.6}
"""The score depends on the learning rate, and on nothing else to speak of."""

CLIP_RULES = {"weak_effect": 0.9, "width": 3.0, "boundary": 4.0, "best_clip_high": 0.15}
"""Clip range and scheduler carry most of the variance; the learning rate a seventh."""


def landscape_study(tmp_path: Path, seed: int, landscape: dict[str, float]) -> Study:
    trainer = {"name": "simulated", "settings": landscape}
    return simulated_study(tmp_path, trainer=trainer, seeds={"search": seed})


def found(study: Study, seed: int, count: int, sizes: int = 3) -> list[Importance]:
    """Importances after `count` full runs of Sobol configurations, over the largest sizes in turn."""
    surface, random = study_surface(study.spec), np.random.default_rng(seed)
    trials = []
    for number, configuration in enumerate(fresh_configurations(study, [], seed, count)):
        model = study.ladder.models[-1 - number % sizes]
        ratio = model.parameters / study.ladder.target.parameters
        scores = [
            true_score(surface, study.complete(configuration), ratio, share) + random.normal(0, 0.02)
            for share in (0, 1 / 3, 2 / 3, 1)
        ]
        trials.append(trained(study, configuration, model.name, scores, number))
    beliefs = Beliefs.form(History.of(study, trials))
    assert beliefs is not None
    return importances(beliefs, ranked_configurations(beliefs)[0].configuration)


@pytest.mark.slow
def test_the_only_hyperparameter_that_matters_comes_first_and_alone_is_narrow(tmp_path: Path) -> None:
    study = landscape_study(tmp_path, 0, RATE_RULES)
    first, *others = found(study, 0, 20, sizes=1)
    assert first.name == "learning_rate"
    assert first.total.low > 0.6
    assert all(other.total.value < 0.1 for other in others)
    assert {item.name for item in (first, *others)} == set(study.space)
    for item in (first, *others):
        assert 0 <= item.total.low <= item.total.value <= item.total.high <= 1
        assert item.first.value <= item.total.value
    assert first.leading == 1.0
    assert sum(item.leading for item in (first, *others)) == pytest.approx(3)
    assert first.harmless is not None
    low, high = (float(value) for value in first.harmless)
    assert low <= float(first.best or 0) <= high < 10 * low
    widths = {}
    for item in (first, *others):
        if item.name in ("learning_rate", "max_grad_norm") and item.harmless is not None:
            ends = [study.space[item.name].encode(value)[0] for value in item.harmless]
            widths[item.name] = ends[1] - ends[0]
    # On max_grad_norm nothing depends, but 20 runs tell so little that not all of its range is called harmless.
    assert widths["max_grad_norm"] > 5 * widths["learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_two_that_matter_most_come_first_on_other_landscapes(tmp_path: Path, seed: int) -> None:
    items = found(landscape_study(tmp_path, seed, CLIP_RULES), seed, 30)
    assert {item.name for item in items[:2]} == {"clip_high", "scheduler"}
    assert found(landscape_study(tmp_path, seed, RATE_RULES), seed, 24)[0].name == "learning_rate"


@pytest.mark.slow
def test_a_conditional_hyperparameter_and_an_unordered_choice_count_as_one_each(tmp_path: Path) -> None:
    space = {
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
        "scheduler": {"type": "choice", "values": ["constant", "linear", "cosine"]},
        "warmup_ratio": {"type": "float", "low": 0.0, "high": 0.2, "when": {"scheduler": ["linear"]}},
    }
    study = simulated_study(tmp_path, space=space, baselines=[])
    trials = [
        trained(
            study, configuration, "large", [0.1, 0.2, 0.3, 0.7 if configuration["scheduler"] == "cosine" else 0.4], n
        )
        for n, configuration in enumerate(fresh_configurations(study, [], 0, 12))
    ]
    beliefs = Beliefs.form(History.of(study, trials))
    assert beliefs is not None
    best = next(t.configuration for t in trials if t.configuration["scheduler"] == "cosine")
    first, *others = importances(beliefs, best)
    assert (first.name, first.harmless) == ("scheduler", ("cosine",))
    unset = next(item for item in others if item.name == "warmup_ratio")
    assert unset.best is None
    assert unset.harmless is None
