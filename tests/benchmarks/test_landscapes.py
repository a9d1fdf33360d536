from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.functions import make, size_fidelity
from benchmarks.landscapes import FAMILY, LANDSCAPES, TARGET, TRAINING_SECONDS, maximize
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.trial import spent_seconds
from jfhpo_core.trainers.simulated import landscape


def by_landscape(*names: str) -> list[Any]:
    """Parameters; the best point of a recorded table takes seconds to find."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("table-") else []) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", LANDSCAPES)
def test_nothing_scores_more_than_the_best(tmp_path: Path, name: str) -> None:
    problem = LANDSCAPES[name](3)
    study = problem.study(tmp_path)
    scores = [problem.true_score(item) for item in fresh_configurations(study, (), 9, 200)]
    assert max(scores) < problem.best_score <= 1
    assert problem.true_score(problem.default) < problem.best_score


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aligned", "distant", "misleading", "moderate", "noisy", "shifted", "unstable"])
def test_the_best_lies_near_where_the_settings_put_it(tmp_path: Path, name: str) -> None:
    """Only the random surface, which takes at most a fifth of the gain, moves it; ends of the space may cut it off."""
    problem = LANDSCAPES[name](5)
    study = problem.study(tmp_path)
    settings = landscape(study.spec).model_dump()
    best = {key: settings[f"best_{key}"] for key in study.space}
    assert problem.true_score(best) <= problem.best_score
    assert problem.true_score(best) > problem.best_score - 0.1


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("aligned", 0.85, 1.0), ("moderate", 0.35, 0.85), ("shifted", 0.0, 0.5), ("misleading", -0.1, 0.1)],
)
def test_proxies_agree_with_the_target_as_the_landscape_says(name: str, low: float, high: float) -> None:
    means = [np.mean(list(LANDSCAPES[name](seed).agreement().values())) for seed in range(3)]
    assert low < np.mean(means) < high


def test_distant_proxies_are_many_times_cheaper_and_the_budget_is_small(tmp_path: Path) -> None:
    problem = LANDSCAPES["distant"](0)
    study = problem.study(tmp_path)
    assert study.spec.budget.device_seconds == pytest.approx(8 * TRAINING_SECONDS)
    assert [round(study.ladder.target.parameters / proxy.parameters) for proxy in study.ladder.proxies] == [69, 12]


def test_every_seed_is_a_fresh_landscape_and_the_same_again(tmp_path: Path) -> None:
    for name in ("shifted", "hartmann"):
        study = LANDSCAPES[name](0).study(tmp_path)
        configuration = fresh_configurations(study, (), 0, 1)[0]
        scores = [LANDSCAPES[name](seed).true_score(configuration) for seed in (0, 1, 2, 0)]
        assert len(set(scores)) == 3
        assert scores[0] == scores[3]


@pytest.mark.parametrize("name", by_landscape("aligned", "hartmann", "table-instruct"))
def test_a_search_sees_the_true_score_through_noise(tmp_path: Path, name: str) -> None:
    """The observed final scores on the target scatter around the true ones."""
    problem = LANDSCAPES[name](2)
    study = problem.study(tmp_path)
    result = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=problem.trainer))
    finals = [trial for trial in result.trials if trial.final is not None]
    assert len(finals) > 8
    gaps = [trial.final.score - problem.true_score(trial.configuration) for trial in finals if trial.final]
    assert abs(float(np.mean(gaps))) < 0.03
    assert 0 < float(np.std(gaps)) < 0.06
    assert spent_seconds(result.trials) == pytest.approx(study.spec.budget.device_seconds, rel=0.1)


@pytest.mark.slow
def test_functions_have_their_optimum_at_one() -> None:
    for name in ("branin", "hartmann"):
        function = make(name, 4)
        found = maximize(lambda x, f=function: f.score(_inputs(x), 1.0, 1.0), function.dimension)
        assert found == pytest.approx(1.0, abs=1e-3)
    function = make("rosenbrock", 4)
    assert function.score(_inputs(np.full(4, 0.4)), 1.0, 1.0) < 1  # the optimum, were it not for reflections
    assert max(
        function.score(_inputs(np.where(mask, 0.4, 0.6)), 1.0, 1.0) for mask in np.ndindex(2, 2, 2, 2)
    ) == pytest.approx(1.0)


def test_a_functions_fidelities_change_its_value() -> None:
    ratio = FAMILY[0]["parameters"] / next(model["parameters"] for model in FAMILY if model["name"] == TARGET)
    assert size_fidelity(1.0) == 1.0
    assert size_fidelity(ratio) == pytest.approx(0.41, abs=0.01)
    for name in ("branin", "hartmann", "rosenbrock"):
        function = make(name, 0)
        inputs = _inputs(np.linspace(0.2, 0.7, function.dimension))
        fidelities = [(1.0, 1.0), (0.4, 1.0), (1.0, 0.2)]
        assert len({function.score(inputs, size, share) for size, share in fidelities}) == 3


def _inputs(point: np.ndarray) -> dict[str, float]:
    return {f"x{index}": float(value) for index, value in enumerate(point)}
