from __future__ import annotations

from pathlib import Path

import pytest

from flows.target import target_study
from jfhpo_core.dispatch import InlineDispatcher
from jfhpo_core.errors import SpecError
from jfhpo_core.ledger import MemoryLedger
from jfhpo_core.search import run_search
from jfhpo_core.study import resolve
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
