"""Every rule of the package passes the suite that is shipped for the rules of others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from jfhpo.testing import RuleConformance
from jfhpo.testing.rules import Event
from jfhpo.testing.samples import evaluation, step_record
from jfhpo_core.stopping.rules import KlGrowth, NonFinite, StoppingRule, ZeroReward

CASES: dict[str, tuple[StoppingRule, list[Event]]] = {
    "non_finite": (NonFinite(), [step_record(1), step_record(2, kl=math.nan)]),
    "zero_reward": (
        ZeroReward(patience=3),
        [evaluation(0, 0.0), *(step_record(step, reward=0.0, reward_std=0.0) for step in (1, 2, 3))],
    ),
    "kl_growth": (
        KlGrowth(window=1, warmup=0, patience=2),
        [step_record(step, kl=2.0**step) for step in (1, 2, 3)],
    ),
}


@pytest.mark.parametrize("case", CASES)
class TestRules(RuleConformance):
    @pytest.fixture
    def rule(self, case: str) -> StoppingRule:
        return CASES[case][0]

    @pytest.fixture
    def firing(self, case: str) -> Sequence[Event]:
        return CASES[case][1]
