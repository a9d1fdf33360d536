from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from jfhpo_core.study.hyperparameters import Hyperparameters, default_spaces
from jfhpo_core.trainers.openrlhf.hyperparameters import RECIPES, Algorithm, OpenRlhfHyperparameters


def test_every_algorithm_has_a_recipe() -> None:
    assert set(RECIPES) == set(get_args(Algorithm))


def test_names_that_trainers_share_have_the_same_defaults() -> None:
    shared, own = Hyperparameters().model_dump(), OpenRlhfHyperparameters().model_dump()
    assert {name: own[name] for name in shared} == shared
    assert set(default_spaces()["llm"]) <= set(own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1e-6}, "learning_rat"),
        ({"n_samples": 1}, "would train nothing"),
        ({"kl_estimator": "k1"}, "k1 has no gradient"),
        ({"mini_batches": 3}, "cannot be parted into mini_batches=3"),
        ({"dual_clip": 0.5}, "neither 0"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"actor.adam.lr": 1e-6}, "no option that a study may set"),
        ({"algo.kl.horizon": 0.5}, "type int"),
    ],
)
def test_what_is_unknown_or_contradictory_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OpenRlhfHyperparameters.model_validate(changes)


def test_one_completion_per_prompt_suits_algorithms_without_groups() -> None:
    for loss_type in ("ppo", "reinforce"):
        assert OpenRlhfHyperparameters(n_samples=1, loss_type=loss_type).completions == 16


def test_the_clip_range_has_no_effect_with_one_update_per_step() -> None:
    assert {"clip_low", "clip_high"} <= set(OpenRlhfHyperparameters().ineffective())
    for changes in ({"mini_batches": 2}, {"epochs": 2}):
        assert "clip_low" not in OpenRlhfHyperparameters.model_validate(changes).ineffective()


def test_other_hyperparameters_without_effect_are_named() -> None:
    assert "kl_estimator" in OpenRlhfHyperparameters(kl_coefficient=0).ineffective()
    assert "value_clip" in OpenRlhfHyperparameters().ineffective()
    assert "value_clip" not in OpenRlhfHyperparameters(loss_type="ppo").ineffective()
    assert "min_lr_ratio" not in OpenRlhfHyperparameters(scheduler="cosine_with_min_lr").ineffective()
