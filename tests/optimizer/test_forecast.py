from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import (
    FEWEST_CONFIGURATIONS,
    WIDER,
    Quality,
    forecast,
    forecast_quality,
    parse_more,
    scaled,
    with_more,
)
from jfhpo_core.optimizer.strategy import Recommendation, load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Trial
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.optimizer.test_constraints import with_metrics
from tests.studies import simulated_study, trained

TRIED: Configuration = {"learning_rate": 1e-4}

BELIEFS = [
    Recommendation({"learning_rate": 1e-4 * (1 + index)}, mean, 0.03)
    for index, mean in enumerate((0.7, 0.65, 0.6, 0.4, 0.1))
]
WIDE = (0.9, 0.8, 0.5, 0.2, 0.15)
SEARCHES = 10
MARKS = (0.4, 0.7)
"""Shares of the budget at which the end of each search is forecast."""


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


def test_wall_clock_time_is_the_bill_over_the_slots(study: Study) -> None:
    bills = forecast(study, [])
    wall = bills.wall()
    assert (bills.slots, bills.devices) == (2, None)
    assert (wall.seconds, wall.low, wall.high) == pytest.approx(
        (bills.total.seconds / 2, bills.total.low / 2, bills.total.high / 2)
    )
    assert forecast(study, []).items[1].devices == 1
    assert scaled(CostEstimate(4, 2, 8), 0.5) == CostEstimate(2, 1, 4)


def test_several_devices_at_a_time_shorten_the_wait_and_not_the_bill(tmp_path: Path) -> None:
    family = [
        {"name": "small", "path": "simulated", "parameters": 100_000},
        {"name": "large", "path": "simulated", "parameters": 1_000_000, "devices": 8},
    ]
    study = simulated_study(tmp_path, family=family, random_search=True, cluster={"address": "inline"})
    bills = forecast(study, [])
    baselines, search, *rest = bills.items
    assert (baselines.devices, search.devices) == (8, pytest.approx(2 / (1 + 1 / 8)))
    on_target = baselines.cost.seconds + sum(item.cost.seconds for item in rest)
    assert bills.wall().seconds == pytest.approx((on_target / 8 + search.cost.seconds / search.devices) / 2)
    # With 8 devices the two slots cannot both have a training of the target.
    assert bills.wall(8).seconds == pytest.approx(on_target / 8 + search.cost.seconds / search.devices / 2)
    counted = forecast(simulated_study(tmp_path, family=family, cluster={"gpus_per_device": 1}), [])
    assert (counted.slots, counted.devices) == (2, None)
    proxies = [trained(study, TRIED, "small", [0.1, 0.5], seconds=100.0)]
    assert forecast(study, proxies).items[1].devices == 1


def spent(study: Study, share: float, ends: Sequence[float] = (0.1, 0.5)) -> list[Trial]:
    """Full runs of the target, one for each of `BELIEFS`, that have spent a share of the budget."""
    scores = np.linspace(*ends, len(study.spec.fidelity.levels) + 1).tolist()
    seconds = share * study.spec.budget.device_seconds / len(BELIEFS)
    return [
        trained(study, item.configuration, "large", scores, number, seconds=seconds)
        for number, item in enumerate(BELIEFS)
    ]


def forecast_at(study: Study, share: float, beliefs: list[Recommendation] = BELIEFS) -> Quality:
    quality = forecast_quality(study, beliefs, spent(study, share))
    assert quality is not None
    return quality


def test_the_final_score_cannot_be_forecast_from_nothing(study: Study) -> None:
    strategy = load_strategy(study)
    assert forecast_quality(study, strategy.rank(study, []), []) is None
    few = BELIEFS[: FEWEST_CONFIGURATIONS - 1]
    assert forecast_quality(study, few, spent(study, 0.5)) is None
    proxies = [trained(study, item.configuration, "small", [0.1, 0.5], seconds=10.0) for item in BELIEFS]
    assert forecast_quality(study, BELIEFS, proxies) is None
    unfinished = [trained(study, item.configuration, "large", [0.1], seconds=10.0) for item in BELIEFS]
    assert forecast_quality(study, BELIEFS, unfinished) is None


def logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


def share_of(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def test_with_nothing_left_to_spend_the_forecast_is_the_belief_in_the_best(study: Study) -> None:
    quality = forecast_at(study, 1.0)
    assert quality.further == 0
    assert quality.score == pytest.approx(0.7)
    doubt = 1.2816 * WIDER * 0.03 / (0.7 * 0.3)
    ends = share_of(logit(0.7) - doubt), share_of(logit(0.7) + doubt)
    assert (quality.low, quality.high) == pytest.approx(ends, abs=1e-4)
    assert forecast_at(study, 1.2) == quality


def test_shares_are_forecast_as_shares_and_losses_in_their_own_units(study: Study) -> None:
    wide = [Recommendation(item.configuration, mean, 0.3) for item, mean in zip(BELIEFS, WIDE, strict=True)]
    quality = forecast_at(study, 0.1, wide)
    assert 0 < quality.low < quality.score < quality.high < 1
    large, small = (
        forecast_quality(
            study,
            [Recommendation(item.configuration, factor * item.mean - 4, factor * 0.3) for item in wide],
            spent(study, 0.1, (-4.0, factor - 4)),
        )
        for factor in (1.0, 1e-4)
    )
    assert large is not None
    assert small is not None
    assert large.high + 4 > large.score + 4 > 1
    for one, other in ((large.low, small.low), (large.score, small.score), (large.high, small.high)):
        assert other + 4 == pytest.approx(1e-4 * (one + 4))


def test_a_configuration_that_has_not_finished_on_the_target_promises_nothing(study: Study) -> None:
    untried = Recommendation({"learning_rate": 9e-4}, 0.95, 0.01)
    assert forecast_at(study, 0.5, [untried, *BELIEFS]) == forecast_at(study, 0.5)


def test_the_forecast_is_the_larger_of_what_is_known_and_what_is_still_bought(study: Study) -> None:
    # A third of the budget bought five runs: the rest buys ten. The same by drawing them.
    quality = forecast_at(study, 1 / 3)
    assert quality.further == pytest.approx(10)
    random = np.random.default_rng(0)
    means = np.array([item.mean for item in BELIEFS])
    values, doubts = np.log(means / (1 - means)), WIDER * 0.03 / (means * (1 - means))
    middle = np.median(values)
    upper = WIDER * (values[values >= middle] - middle)
    spread = np.sqrt((np.mean(upper**2) + np.mean(doubts**2)) * 1.2)
    further = middle + spread * random.standard_t(4, size=(200_000, 10))
    final = np.maximum(random.normal(values.max(), doubts[values.argmax()], size=200_000), further.max(axis=1))
    expected = [share_of(value) for value in np.quantile(final, [0.1, 0.5, 0.9])]
    assert (quality.low, quality.score, quality.high) == pytest.approx(expected, abs=0.002)


def limited_runs(study: Study, kls: Sequence[float]) -> list[Trial]:
    """The runs of `spent`, a third of the budget, with these KLs."""
    return [with_metrics(trial, kl=kl) for trial, kl in zip(spent(study, 1 / 3), kls, strict=True)]


def test_a_limit_that_binds_lowers_the_forecast_and_one_that_does_not_leaves_it(tmp_path: Path, study: Study) -> None:
    limited = simulated_study(tmp_path, seeds={"training": [0, 1, 2]}, constraints={"kl": "<= 0.1"})
    rising = [0.3, 0.2, 0.08, 0.02, 0.01]  # the better the score, the higher the KL: the best two break the limit
    quality = forecast_quality(limited, BELIEFS, limited_runs(limited, rising))
    assert quality is not None
    assert (quality.now, quality.further) == (0.6, pytest.approx(10))
    free, loose = forecast_at(study, 1 / 3), forecast_quality(limited, BELIEFS, limited_runs(limited, [0.001] * 5))
    assert loose is not None
    assert (loose.low, loose.score, loose.high) == pytest.approx((free.low, free.score, free.high), abs=0.005)
    assert quality.score < free.score - 0.03
    # The same scores, but the KL says nothing about them: high scores may respect the limit as well as low ones.
    mixed = forecast_quality(limited, BELIEFS, limited_runs(limited, [0.3, 0.2, 0.03, 0.25, 0.02]))
    assert mixed is not None
    assert mixed.now == 0.6
    assert quality.high < mixed.high


def test_as_long_as_nothing_respects_the_limit_there_is_no_forecast(tmp_path: Path) -> None:
    limited = simulated_study(tmp_path, seeds={"training": [0]}, constraints={"kl": "<= 0.1"})
    assert forecast_quality(limited, BELIEFS, limited_runs(limited, [0.3] * 5)) is None
    assert forecast_quality(limited, BELIEFS, spent(limited, 1 / 3)) is None  # nor as long as no run recorded it


def test_more_budget_promises_more_but_by_less_and_less(study: Study) -> None:
    trials = spent(study, 0.9)
    found = [
        forecast_quality(with_more(study, seconds), BELIEFS, trials) for seconds in (0.001, 300, 600, 900, 1200, 30_000)
    ]
    qualities = [quality for quality in found if quality is not None]
    assert len(qualities) == len(found)
    for less, more in pairwise(qualities):
        assert less.low < more.low
        assert less.score < more.score
        assert less.high < more.high
    gains = np.diff([quality.score for quality in qualities[1:5]])
    assert (np.diff(gains) < 0).all()


def test_the_last_bit_of_a_budget_buys_nothing(study: Study) -> None:
    for left in (1e-3, 1e-4, 1e-5, 1e-7, 1e-12):
        quality = forecast_at(study, 1 - left)
        assert quality.score == pytest.approx(0.7, abs=2e-3)


def test_one_sure_belief_is_no_certainty_about_the_end(study: Study) -> None:
    sure = [Recommendation(item.configuration, item.mean, 0.0) for item in BELIEFS]
    quality = forecast_at(study, 0.5, sure)
    assert quality.low >= 0.699
    assert quality.high > quality.score > 0.7
    alike = [Recommendation(item.configuration, 0.5, 0.0) for item in BELIEFS]
    assert forecast_at(study, 0.5, alike).score == pytest.approx(0.5, abs=0.01)


def test_a_larger_budget_is_the_same_study(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, budget={"gpu_hours": 2, "top_k": 3})
    larger = with_more(study, 1800)
    assert larger.spec.budget.device_seconds == 9000
    assert larger.spec.budget.top_k == 3
    assert larger.spec.identity() == study.spec.identity()
    assert forecast(larger, []).total.seconds - forecast(study, []).total.seconds == pytest.approx(1800)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2.5", 9000), ("2.5h", 9000), (".5 h", 1800), ("30min", 1800), ("600s", 600), (" 1. ", 3600)]
)
def test_an_added_budget_is_in_gpu_hours_or_has_a_unit(text: str, seconds: float) -> None:
    assert parse_more(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "much", "3d", "1e400", "nan", "1 2"])
def test_an_added_budget_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"--more {text!r}")):
        parse_more(text)


def forecasts_and_end(study: Study) -> tuple[list[Quality], float]:
    """What is forecast at each of the marks of a search, and the true score of what it recommends."""
    strategy, marks, found = load_strategy(study), list(MARKS), []

    def look(progress: Progress) -> None:
        if marks and progress.spent_seconds >= marks[0] * study.spec.budget.device_seconds:
            marks.pop(0)
            found.append(forecast_quality(study, strategy.rank(study, progress.trials), progress.trials))

    result = run_search(study, MemoryLedger(), InlineDispatcher(2), look, strategy)
    assert result.recommended is not None
    complete = study.complete(result.recommended.configuration)
    truth = true_score(study_surface(study.spec), complete, size_ratio=1.0, share=1.0)
    return [quality for quality in found if quality is not None], truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "budget"),
    [("random", 300), ({"name": "jfhpo", "settings": {"initial_trials": 5, "pool": 64, "fresh": 6, "local": 6}}, 400)],
)
def test_forecasts_hold_what_simulated_searches_end_with(strategy: object, budget: float, tmp_path: Path) -> None:
    space = {
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True, "shifts_with_size": True},
        "temperature": {"type": "float", "low": 0.6, "high": 1.4},
    }
    inside, errors = [], []
    for seed in range(SEARCHES):
        study = simulated_study(
            tmp_path, study=f"s{seed}", strategy=strategy, space=space, baselines=[],
            seeds={"search": seed, "training": [0]}, budget={"trial_seconds": budget},
        )  # fmt: skip
        qualities, truth = forecasts_and_end(study)
        inside += [quality.low <= truth <= quality.high for quality in qualities]
        errors += [abs(quality.score - truth) for quality in qualities]
    assert len(inside) >= SEARCHES
    # Of an 80 % interval, with the luck that so few searches leave; scores reach from 0.1 to 0.8.
    assert np.mean(inside) >= 0.6
    assert np.mean(errors) < 0.12
