"""The strategy `jfhpo` on data and spaces that break optimizers: it must answer, and answer with numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.joint_fidelity import JointFidelity
from jfhpo_core.optimizer.observations import MAX_OBSERVATIONS
from jfhpo_core.study.history import History
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import FailureKind, Outcome, Trial
from jfhpo_core.trainers.simulated import SimulatedTrainer
from tests.studies import study_data, trained

MODELS = ("small", "medium", "large")

FLOAT = {"type": "float", "low": 0.0, "high": 1.0}
CHOICE = {"type": "choice", "values": ["a", "b", "c"]}

SPACES: dict[str, dict[str, Any]] = {
    "one dimension": {"x": FLOAT},
    "twenty dimensions": {f"x{index}": FLOAT for index in range(20)},
    "categorical only": {f"c{index}": CHOICE for index in range(3)},
    "mixed": {"x": FLOAT, "c": CHOICE, "n": {"type": "int", "low": 1, "high": 5}, "y": {**FLOAT, "when": {"c": ["a"]}}},
}


class AnyName(SimulatedTrainer):
    """Accepts hyperparameters of any name; the tests make the trials by hand."""

    class hyperparameters(SimulatedTrainer.hyperparameters):  # type: ignore[misc, name-defined]  # noqa: N801
        model_config = ConfigDict(extra="allow")


def study_over(space: dict[str, Any], workspace: Path) -> Study:
    spec = StudySpec.model_validate(study_data(workspace, space=space, baselines=[], strategy="jfhpo"))
    return Study(spec, build_ladder(spec), AnyName())


def some_trials(study: Study, count: int, seed: int, kind: str) -> list[Trial]:
    random = np.random.default_rng(seed)
    trials: dict[str, Trial] = {}
    centre = random.random(study.space.dimension)
    for number in range(count):
        point = centre if kind == "duplicates" else random.random(study.space.dimension)
        configuration = study.space.decode(point)
        model = MODELS[int(random.integers(3))]
        length = int(random.integers(1, 4))
        level = 0.3 if kind == "constant" else float(random.random())
        scores = [0.1, *(level for _ in range(length))]
        change: dict[str, Any] = {}
        if kind == "all failed":
            scores = [] if number % 2 else scores
            change = (
                {"outcome": Outcome.INFEASIBLE, "failure": FailureKind.NON_FINITE}
                if number % 2
                else {"outcome": Outcome.STOPPED}
            )
        trial = trained(study, configuration, model, scores, number, **change)
        trials[trial.key] = trial
    return list(trials.values())


def check(study: Study, trials: list[Trial]) -> None:
    strategy = JointFidelity(initial_trials=0, anchors=0)
    proposal = strategy.suggest(study, trials, 1e6, 3)
    if proposal is not None:
        study.space.encode(proposal.configuration)
        assert proposal.model in MODELS
        assert proposal.stop_prompts in study.spec.fidelity.levels
        assert proposal.suggestion.expected_cost_seconds is not None
        assert proposal.suggestion.expected_cost_seconds > 0
        gain = proposal.suggestion.expected_gain
        assert gain is None or (math.isfinite(gain) and gain >= 0)
    for item in strategy.rank(study, trials):
        assert math.isfinite(item.mean)
        assert item.standard_deviation > 0


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), count=st.integers(1, 20))
@pytest.mark.parametrize("kind", ["any", "constant", "duplicates", "all failed"])
@pytest.mark.parametrize("space", SPACES)
def test_it_answers_with_numbers(tmp_path: Path, space: str, kind: str, seed: int, count: int) -> None:
    study = study_over(SPACES[space], tmp_path)
    check(study, some_trials(study, count, seed, kind))


@pytest.mark.parametrize("space", SPACES)
def test_a_single_point_is_enough(tmp_path: Path, space: str) -> None:
    study = study_over(SPACES[space], tmp_path)
    check(study, some_trials(study, 1, 0, "any"))


@pytest.mark.slow
def test_two_thousand_observations_are_thinned(tmp_path: Path) -> None:
    study = study_over(SPACES["mixed"], tmp_path)
    trials = some_trials(study, 1000, 0, "any")
    assert sum(len(trial.evaluations) - 1 for trial in trials) > 1900
    check(study, trials)
    beliefs = Beliefs.form(History.of(study, trials))
    assert beliefs is not None
    assert len(beliefs.surrogate.observations) == MAX_OBSERVATIONS
