from __future__ import annotations

from pathlib import Path

import pytest

from flows.forecast import forecast
from jfhpo_core.dispatch import InlineDispatcher
from jfhpo_core.ledger import MemoryLedger
from jfhpo_core.search import run_search
from jfhpo_core.study import Study
from jfhpo_core.trial import Trial
from tests.studies import simulated_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path, seeds={"training": [0, 1, 2]}, random_search=True)


@pytest.fixture
def trials(study: Study) -> list[Trial]:
    ledger = MemoryLedger()
    run_search(study, ledger, InlineDispatcher(2))
    return ledger.trials()


def test_before_a_study_the_bill_has_every_phase_and_is_a_guess(study: Study) -> None:
    bills = forecast(study, [])
    assert [item.name for item in bills.items] == ["baselines", "search", "confirmation", "random search"]
    assert not bills.measured
    costs = {item.name: item.cost for item in bills.items}
    assert costs["search"].seconds == study.spec.budget.device_seconds
    assert costs["baselines"].low < costs["baselines"].seconds < costs["baselines"].high
    assert bills.total.seconds == pytest.approx(sum(cost.seconds for cost in costs.values()))


def test_after_a_study_nothing_is_left(study: Study, trials: list[Trial]) -> None:
    bills = forecast(study, trials)
    assert bills.measured
    assert bills.total.seconds == 0


def test_the_comparison_is_forecast_from_what_the_search_measured(study: Study, trials: list[Trial]) -> None:
    before = [trial for trial in trials if trial.purpose in ("baseline", "search")]
    spent = sum(trial.charge_seconds for trial in trials if trial.purpose == "confirmation")
    cost = next(item.cost for item in forecast(study, before).items if item.name == "confirmation")
    assert cost.low < spent < cost.high
    assert cost.high - cost.low < spent


def test_a_trial_that_is_partly_trained_is_charged_for_the_rest_only(study: Study, trials: list[Trial]) -> None:
    baseline = next(trial for trial in trials if trial.purpose == "baseline")
    part = baseline.segments[0].model_copy(
        update={"end_step": 20, "end_prompts": 320, "evaluations": baseline.evaluations[:2]}
    )
    paused = baseline.model_copy(update={"segments": (part,)})
    fresh = next(item.cost for item in forecast(study, []).items if item.name == "baselines")
    rest = next(item.cost for item in forecast(study, [paused]).items if item.name == "baselines")
    assert 0 < rest.seconds < baseline.charge_seconds
    assert fresh.high - fresh.low > rest.high - rest.low
