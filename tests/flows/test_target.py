from __future__ import annotations

from pathlib import Path

import pytest

from flows.target import target_study
from jfhpo_core.errors import SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import resolve
from tests.studies import simulated_study


def test_one_configuration_is_trained_over_all_seeds_and_nothing_else(tmp_path: Path) -> None:
    base = simulated_study(tmp_path, seeds={"training": [0, 1, 2]}, random_search=True)
    given = {"learning_rate": 5e-4, "n_samples": 16}
    spec = target_study(base, given, [])
    assert spec.study.startswith("test-target-")
    assert (spec.tracking.experiment, spec.tracking.registered_model) == ("jfhpo/test", "test")
    result = run_search(resolve(spec), MemoryLedger(), InlineDispatcher(2))
    assert result.complete
    assert {(trial.model, trial.step, trial.seed) for trial in result.trials} == {
        ("large", 30, seed) for seed in (0, 1, 2)
    }
    assert all(trial.configuration == given for trial in result.trials)
    assert result.target_trial is not None
    assert result.rows[0].seeds == 3


def test_a_configuration_that_the_trainer_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="lerning_rate"):
        target_study(simulated_study(tmp_path), {"lerning_rate": 1e-4}, [])


def test_a_configuration_whose_steps_miss_the_rungs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"prompts_per_step=24 does not divide the study's rung at 160 prompts"):
        target_study(simulated_study(tmp_path), {"prompts_per_step": 24}, [])


def test_completions_that_cannot_be_parted_equally_are_refused(tmp_path: Path) -> None:
    small = {"family": "instruct", "task": "instruct", "target": "m", "trainer": "trl", "space": "tiny"}
    base = simulated_study(tmp_path, **small)
    for parts in (3, 5):
        with pytest.raises(SpecError, match=f"64 completions cannot be parted into mini_batches={parts} equal"):
            target_study(base, {"n_samples": 4, "mini_batches": parts}, [])
