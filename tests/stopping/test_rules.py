from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfhpo_core.errors import SpecError
from jfhpo_core.stopping.rules import (
    RULE_SETS,
    RULES,
    AbsoluteKl,
    BelowBase,
    Course,
    EntropyCollapse,
    EntropyExplosion,
    GradientNorm,
    KlGrowth,
    Monitor,
    NonFinite,
    NoProgress,
    PaperRewardDrop,
    RewardDrop,
    RewardHacking,
    StoppingRule,
    Truncation,
    Unpromising,
    ZeroReward,
    ZeroVariance,
    build_rules,
)
from jfhpo_core.study.spec import StoppingSpec
from jfhpo_core.study.trial import Decision, Evaluation, StepRecord
from tests.studies import evaluation, step_record

LITERAL_KL = KlGrowth(window=1, floor=0.0, warmup=0, reward_growth=math.inf)


def stream(**signals: Sequence[Any]) -> list[StepRecord]:
    """Records whose named signals take the given values, step by step."""
    length = len(next(iter(signals.values())))
    return [
        step_record(index + 1, **{name: values[index] for name, values in signals.items()}) for index in range(length)
    ]


TOTAL_STEPS = 100


def first_stop(
    rule: StoppingRule, events: Sequence[StepRecord | Evaluation], total_steps: int = TOTAL_STEPS
) -> Decision | None:
    """The first decision of a rule that is fed step by step, as a trainer feeds it."""
    monitor = Monitor([rule], Course(total_steps))
    return next((decision for event in events if (decision := monitor.update(event))), None)


def assert_stops_at(rule: StoppingRule, records: Sequence[StepRecord], step: int) -> Decision:
    decision = first_stop(rule, records)
    assert decision is not None
    assert decision.stop
    assert decision.rule == rule.name
    assert decision.step == step
    assert first_stop(rule, records[: step - 1]) is None
    return decision


# --- KL growth ----------------------------------------------------------------------------------------------------

DOUBLING = [0.005 * 1.16**step for step in range(6)]
"""From 0.005 to 0.0105 in five steps of 16 %: noise around a KL that means nothing."""


def test_the_literal_kl_rule_fires_on_noise_near_zero_and_the_hardened_one_does_not() -> None:
    decision = assert_stops_at(LITERAL_KL, stream(kl=DOUBLING), 6)
    assert decision.value == pytest.approx(0.16)
    assert decision.threshold == 0.15
    assert first_stop(KlGrowth(), stream(kl=DOUBLING)) is None
    assert first_stop(KlGrowth(), stream(kl=[0.005] * 20 + DOUBLING)) is None


def test_the_literal_kl_rule_wants_five_growths_in_a_row() -> None:
    interrupted = [0.005 * factor for factor in (1, 1.2, 1.44, 1.72, 2.07, 2.1, 2.5, 3.0, 3.6, 4.4)]
    assert first_stop(LITERAL_KL, stream(kl=interrupted)) is None
    assert_stops_at(LITERAL_KL, stream(kl=[*interrupted, 5.3]), 11)


def test_growth_at_the_threshold_is_not_above_it() -> None:
    assert (
        first_stop(KlGrowth(threshold=1.0, window=1, floor=0, warmup=0), stream(kl=[2**step for step in range(9)]))
        is None
    )
    assert_stops_at(
        KlGrowth(threshold=0.99, window=1, floor=0, warmup=0), stream(kl=[2**step for step in range(9)]), 6
    )  # fmt: skip


def test_the_hardened_kl_rule_fires_on_a_collapse_and_waits_for_its_warm_up() -> None:
    exploding = [0.4 * 1.3**step for step in range(12)]
    # Means of three need 3 + 5 records; the warm-up of 8 steps is over at the ninth.
    assert_stops_at(KlGrowth(), stream(kl=exploding), 9)
    assert_stops_at(KlGrowth(warmup=0), stream(kl=exploding), 8)
    assert_stops_at(KlGrowth(warmup=10), stream(kl=exploding), 11)


def test_kl_that_grows_while_the_reward_rises_is_learning() -> None:
    exploding = [0.4 * 1.3**step for step in range(12)]
    rising = [0.1 + 0.02 * step for step in range(12)]
    assert first_stop(KlGrowth(), stream(kl=exploding, reward=rising)) is None
    assert_stops_at(LITERAL_KL, stream(kl=exploding, reward=rising), 6)
    # Fallen to 0.0 at step 12; at step 13 the mean of three is so far below the first one that noise cannot be why.
    # Back at 0.1 it is too near to tell.
    risen_and_fallen = [*rising[:9], 0.18, 0.09, 0.0, 0.0, 0.0]
    longer = [0.4 * 1.3**step for step in range(14)]
    assert_stops_at(KlGrowth(), stream(kl=longer, reward=risen_and_fallen), 13)
    assert first_stop(KlGrowth(), stream(kl=exploding, reward=[*rising[:9], 0.1, 0.1, 0.1])) is None
    # At step 9 the mean of three, 0.24, is twice the first one; penalties, which are negative, rise towards zero.
    assert_stops_at(KlGrowth(reward_growth=1.5), stream(kl=exploding, reward=rising), 9)
    assert first_stop(KlGrowth(reward_growth=0.9), stream(kl=exploding, reward=rising)) is None
    penalties = [-1.0 + 0.05 * step for step in range(12)]
    assert first_stop(KlGrowth(), stream(kl=exploding, reward=penalties)) is None
    assert_stops_at(KlGrowth(), stream(kl=exploding, reward=[-reward for reward in rising]), 9)


def test_the_kl_floor_holds_for_the_newest_window() -> None:
    climbing = [0.01 * 1.3**step for step in range(30)]
    decision = first_stop(KlGrowth(), stream(kl=climbing))
    assert decision is not None
    means = [sum(climbing[step - 3 : step]) / 3 for step in range(3, 31)]
    assert decision.step == next(step for step, mean in enumerate(means, 3) if mean >= 0.3)


@pytest.mark.parametrize("rule", [LITERAL_KL, KlGrowth(floor=0.0, warmup=0)])
def test_no_kl_and_a_kl_of_zero_are_no_growth(rule: KlGrowth) -> None:
    assert first_stop(rule, stream(kl=[None] * 20)) is None
    assert first_stop(rule, stream(kl=[0.0] * 20)) is None
    gaps = [None if step % 4 == 0 else 2.0**step for step in range(20)]
    assert first_stop(rule, stream(kl=gaps)) is None


def test_growth_from_zero_counts() -> None:
    assert_stops_at(LITERAL_KL, stream(kl=[0.0, 0.1, 0.2, 0.4, 0.8, 1.6]), 6)


# --- reward drop --------------------------------------------------------------------------------------------------


def test_reward_drop_compares_smoothed_rewards_with_the_start() -> None:
    rewards = [0.6] * 4 + [0.5] * 6 + [0.2] * 6
    # Of four steps with 0.2 the mean is 0.2 (drop 2/3) from step 14 on, and 0.275 (drop 0.54) at step 13.
    decision = assert_stops_at(RewardDrop(), stream(reward=rewards), 14)
    assert decision.value == pytest.approx((0.6 - 0.275) / 0.6)


def test_reward_drop_needs_patience_and_warm_up() -> None:
    dip = stream(reward=[0.6] * 9 + [0.1, 0.1, 0.1, 0.6, 0.6, 0.6])
    assert_stops_at(RewardDrop(patience=2), dip, 13)
    assert first_stop(RewardDrop(patience=3), dip) is None
    falling = [0.6] * 4 + [0.0] * 12
    assert_stops_at(RewardDrop(), stream(reward=falling), 9)
    assert_stops_at(RewardDrop(warmup=11), stream(reward=falling), 12)
    assert_stops_at(RewardDrop(warmup=0), stream(reward=falling), 8)


def test_reward_drop_understands_negative_rewards() -> None:
    assert first_stop(RewardDrop(), stream(reward=[-1.0] * 8 + [-0.2] * 8)) is None
    assert_stops_at(RewardDrop(), stream(reward=[-1.0] * 8 + [-3.0] * 8), 11)


def test_reward_drop_is_not_fooled_by_rewards_that_begin_near_zero() -> None:
    rising = [0.06, -0.04, 0.05, -0.01, 0.02, -0.06, 0.04, 0.01, -0.03, 0.0, -0.04, 0.03, 0.1, 0.2, 0.3, 0.4]
    assert first_stop(RewardDrop(), stream(reward=rising)) is None
    assert first_stop(RewardDrop(deviations=0.0), stream(reward=rising)) is not None
    # A real fall is many standard errors deep.
    assert_stops_at(RewardDrop(), stream(reward=[*rising[:8], *[-0.9] * 8]), 11)


def test_reward_drop_from_zero_is_undefined_and_silent() -> None:
    assert first_stop(RewardDrop(), stream(reward=[0.0] * 4 + [-1.0] * 20)) is None


def test_the_literal_reward_rule_wants_five_drops_of_ten_percent() -> None:
    falling = [0.5 * 0.89**step for step in range(8)]
    decision = assert_stops_at(PaperRewardDrop(), stream(reward=falling), 6)
    assert decision.value == pytest.approx(0.11)
    slowly = [0.5 * 0.91**step for step in range(30)]
    assert first_stop(PaperRewardDrop(), stream(reward=slowly)) is None
    assert first_stop(PaperRewardDrop(), stream(reward=[-(1.5**step) for step in range(12)])) is None


# --- zero reward and non-finite signals ---------------------------------------------------------------------------


def test_zero_reward_fires_after_five_steps_without_any() -> None:
    assert_stops_at(ZeroReward(), stream(reward=[0.0] * 9, reward_std=[0.0] * 9), 5)
    assert_stops_at(ZeroReward(), stream(reward=[0.1] + [0.0] * 9, reward_std=[0.3] + [0.0] * 9), 6)


def test_zero_reward_ignores_a_mean_of_zero_with_spread() -> None:
    assert first_stop(ZeroReward(), stream(reward=[0.0] * 20, reward_std=[1.0] * 20)) is None
    broken = stream(reward=[0, 0, 0, 0, 0.01] * 4, reward_std=[0, 0, 0, 0, 0.1] * 4)
    assert first_stop(ZeroReward(), broken) is None


@pytest.mark.parametrize("signal", ["reward", "kl", "entropy", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_signals_fire_at_once(signal: str, value: float) -> None:
    decision = assert_stops_at(NonFinite(), stream(**{signal: [0.5, 0.5, value, 0.5]}), 3)
    assert decision.signal == signal
    assert not math.isfinite(decision.value)


def test_a_signal_that_is_not_measured_is_not_non_finite() -> None:
    missing = [None] * 5
    assert first_stop(NonFinite(), stream(kl=missing, entropy=missing, grad_norm=missing)) is None


@pytest.mark.parametrize("rule", [rule for name, rule in RULES.items() if name != NonFinite.name])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_other_rules_leave_non_finite_values_to_their_rule(rule: type[StoppingRule], value: float) -> None:
    assert first_stop(rule(), stream(kl=[0.5] * 10 + [value] * 20, reward=[0.5] * 10 + [value] * 20)) is None


# --- all rules ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.4, 0.6), st.floats(0.05, 0.25)), min_size=1, max_size=60))
def test_a_healthy_noisy_trial_is_never_stopped(values: list[tuple[float, float]]) -> None:
    monitor = Monitor(RULE_SETS["default"], Course(TOTAL_STEPS))
    for record in stream(reward=[reward for reward, _ in values], kl=[kl for _, kl in values]):
        assert monitor.update(record) is None


RAW = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(RAW, RAW, RAW), min_size=1, max_size=30), st.sampled_from(sorted(RULES)))
def test_no_stream_makes_a_rule_fail(values: list[tuple[float, float, float]], name: str) -> None:
    rule = RULES[name]()
    records = stream(
        reward=[a for a, _, _ in values], kl=[b for _, b, _ in values], grad_norm=[c for _, _, c in values]
    )
    for end in range(1, len(records) + 1):
        decision = rule.judge(Course(TOTAL_STEPS, records=records[:end]))
        assert decision is None or (decision.stop and decision.step == end)


def test_history_of_earlier_segments_counts() -> None:
    records = stream(kl=[0.4 * 1.3**step for step in range(12)])
    whole = first_stop(KlGrowth(), records)
    assert whole is not None
    for cut in range(1, whole.step):
        monitor = Monitor([KlGrowth()], Course(TOTAL_STEPS, records=list(records[:cut])))
        decisions = [monitor.update(record) for record in records[cut:]]
        assert next(decision for decision in decisions if decision) == whole
    fresh = first_stop(KlGrowth(), [record.model_copy(update={"step": 9}) for record in records[8:9]])
    assert fresh is None


def test_the_first_rule_in_order_decides() -> None:
    records = stream(reward=[0.0] * 5, reward_std=[0.0] * 5, kl=[0.1] * 4 + [math.nan])
    monitor = Monitor(RULE_SETS["default"], Course(TOTAL_STEPS))
    decisions = [monitor.update(record) for record in records]
    assert decisions[:4] == [None] * 4
    assert decisions[4] is not None
    assert decisions[4].rule == "non_finite"


# --- further dynamics ---------------------------------------------------------------------------------------------


def test_a_high_kl_stops_once_its_mean_is_above_the_threshold() -> None:
    # At step 13 the mean of four is 22.75, but its standard error is 7.25.
    decision = assert_stops_at(AbsoluteKl(), stream(kl=[1.0] * 10 + [30.0] * 5), 14)
    assert decision.value == pytest.approx(30)
    assert_stops_at(AbsoluteKl(deviations=0.0), stream(kl=[1.0] * 10 + [30.0] * 5), 13)
    assert first_stop(AbsoluteKl(), stream(kl=[None, *[90.0] * 3])) is None


def test_groups_without_variance_stop_a_training_only_where_the_reward_is_low() -> None:
    stalled = {"zero_variance_share": [0.1] * 3 + [0.9] * 10}
    assert_stops_at(ZeroVariance(), stream(**stalled, reward=[0.05] * 13), 13)
    assert first_stop(ZeroVariance(), stream(**stalled, reward=[0.95] * 13)) is None


def test_the_gradient_norm_is_compared_with_its_own_median() -> None:
    calm = [0.2, 0.4] * 6
    decision = assert_stops_at(GradientNorm(), stream(grad_norm=[*calm, 9.0, 8.0, 6.0]), 15)
    assert decision.value == pytest.approx(6.0 / 0.3)
    assert first_stop(GradientNorm(), stream(grad_norm=[*calm, 9.0, 0.3, 9.0, 9.0, 0.3])) is None
    assert first_stop(GradientNorm(), stream(grad_norm=[0.3] * 7 + [9.0] * 3)) is None


def test_entropy_may_fall_where_the_reward_rises() -> None:
    falling = [1.0] * 8 + [0.2] * 8
    decision = assert_stops_at(EntropyCollapse(), stream(entropy=falling, reward=[0.5] * 8 + [0.3] * 8), 12)
    assert decision.value == pytest.approx(0.2)
    assert first_stop(EntropyCollapse(), stream(entropy=falling, reward=[0.5] * 8 + [0.8] * 8)) is None


def test_exploding_entropy_stops() -> None:
    assert_stops_at(EntropyExplosion(), stream(entropy=[0.5] * 8 + [2.5] * 4), 12)
    assert first_stop(EntropyExplosion(), stream(entropy=[0.5] * 8 + [1.9] * 8)) is None


def test_truncated_completions_stop_after_the_warm_up() -> None:
    assert_stops_at(Truncation(), stream(truncated_share=[0.9] * 20), 13)
    assert first_stop(Truncation(), stream(truncated_share=[0.9] * 9 + [0.1] * 20)) is None


def with_evaluations(records: Sequence[StepRecord], scores: dict[int, float]) -> list[StepRecord | Evaluation]:
    """Records with evaluations (standard error 0.02) after some steps; step 0 is the untrained model."""
    events: list[StepRecord | Evaluation] = [evaluation(0, scores[0])] if 0 in scores else []
    for record in records:
        events += [record, *([evaluation(record.step, scores[record.step])] if record.step in scores else [])]
    return events


def test_an_evaluation_well_below_the_untrained_model_stops() -> None:
    records = stream(reward=[0.5] * 20)
    decision = first_stop(BelowBase(), with_evaluations(records, {0: 0.4, 8: 0.35, 16: 0.3}))
    assert decision is not None
    # Both scores have a standard error of 0.02.
    assert (decision.step, decision.value) == (16, pytest.approx(0.1 / math.hypot(0.02, 0.02)))
    assert first_stop(BelowBase(), with_evaluations(records, {8: 0.35, 16: 0.0})) is None


def test_a_rising_reward_without_a_rising_score_is_reward_hacking() -> None:
    rewards = [0.3] * 8 + [0.6] * 24
    scores = {0: 0.2, 8: 0.4, 16: 0.35, 24: 0.36}
    decision = first_stop(RewardHacking(), with_evaluations(stream(reward=rewards), scores))
    assert decision is not None
    assert (decision.step, decision.value) == (24, pytest.approx(0.3))
    assert first_stop(RewardHacking(), with_evaluations(stream(reward=[0.3] * 32), scores)) is None
    assert first_stop(RewardHacking(), with_evaluations(stream(reward=rewards), scores | {24: 0.39})) is None


def test_no_progress_waits_for_its_share_of_the_horizon() -> None:
    flat, rising = stream(reward=[0.3] * 40), stream(reward=[0.3 + 0.005 * step for step in range(40)])
    stopped = first_stop(NoProgress(), flat, total_steps=64)
    assert stopped is not None
    assert stopped.step == 24
    assert first_stop(NoProgress(), rising, total_steps=64) is None


def test_a_training_stops_below_the_floor_of_its_step() -> None:
    events = with_evaluations(stream(reward=[0.5] * 20), {8: 0.3, 16: 0.3})
    for floors, stop in (({8: 0.2, 16: 0.4}, 16), ({8: 0.31}, 8), ({9: 0.9, 16: 0.3}, None), ({}, None)):
        monitor = Monitor([Unpromising()], Course(TOTAL_STEPS, floors=floors))
        decision = next((found for event in events if (found := monitor.update(event))), None)
        assert (decision and decision.step) == stop
        assert decision is None or decision.threshold == floors[decision.step]


def test_at_the_end_of_the_horizon_only_non_finite_values_count() -> None:
    silent = stream(reward=[0.0] * 5, reward_std=[0.0] * 5)
    assert first_stop(ZeroReward(), silent, total_steps=6) is not None
    assert first_stop(ZeroReward(), silent, total_steps=5) is None
    assert first_stop(NonFinite(), stream(kl=[0.1, math.nan]), total_steps=2) is not None


# --- what a study may ask for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RULE_SETS))
def test_every_set_watches_for_non_finite_values_first(name: str) -> None:
    rules = build_rules(StoppingSpec.model_validate({"rules": name}))
    assert rules == RULE_SETS[name]
    assert rules[0] == NonFinite()


def test_the_paper_set_has_the_papers_numbers() -> None:
    rules = {rule.name: rule for rule in RULE_SETS["paper"]}
    assert rules["kl_growth"] == LITERAL_KL
    assert rules["paper_reward_drop"] == PaperRewardDrop(threshold=0.10, patience=5)
    assert rules["zero_reward"] == ZeroReward(patience=5)


def test_overrides_change_add_and_remove_rules() -> None:
    spec = StoppingSpec.model_validate(
        {
            "override": {
                "kl_growth": {"threshold": 0.3, "patience": 3},
                "zero_reward": False,
                "paper_reward_drop": {},
            }
        }
    )
    rules = {rule.name: rule for rule in build_rules(spec)}
    assert rules["kl_growth"] == KlGrowth(threshold=0.3, patience=3)
    assert rules["paper_reward_drop"] == PaperRewardDrop()
    assert "zero_reward" not in rules
    assert rules["reward_drop"] == RewardDrop()
    assert isinstance(rules["kl_growth"].patience, int)


def test_a_rule_that_is_not_there_can_be_switched_off() -> None:
    spec = StoppingSpec.model_validate({"rules": "none", "override": {"kl_growth": False}})
    assert build_rules(spec) == (NonFinite(),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"kl": False}, "stopping.override: no rule 'kl'; there are absolute_kl, below_base, "),
        ({"kl_growth": {"limit": 1}}, "stopping.override.kl_growth: no parameter limit; there are threshold, patience"),
        ({"kl_growth": {"patience": 0}}, "stopping.override.kl_growth.patience: 0 is not a whole number of at least 1"),
        ({"kl_growth": {"window": 2.5}}, "stopping.override.kl_growth.window: 2.5 is not a whole number"),
        ({"kl_growth": {"warmup": -1}}, "stopping.override.kl_growth.warmup: -1 is not a whole number of at least 0"),
        ({"reward_drop": {"threshold": -0.1}}, "stopping.override.reward_drop.threshold: -0.1 is not a number of at"),
        ({"unpromising": {"probability": 1}}, "stopping.override.unpromising.probability: 1 does not lie between"),
        ({"non_finite": {"threshold": 1}}, "stopping.override.non_finite: no parameter threshold"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(override: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        build_rules(StoppingSpec.model_validate({"override": override}))
    assert str(refusal.value).startswith(message)


def test_a_warm_up_of_zero_is_allowed() -> None:
    spec = StoppingSpec.model_validate({"override": {"kl_growth": {"warmup": 0}}})
    assert KlGrowth(warmup=0) in build_rules(spec)


# --- noise, and runs that must be measured ------------------------------------------------------------------------


def noisy_stops(rule: StoppingRule, rate: float, streams: int = 100) -> int:
    """How many of some runs a rule stops that succeed at a constant rate, in 128 completions per step, for 60 steps.

    Their KL grows by 30 % per step.
    """
    random, stops = np.random.default_rng(0), 0
    for _ in range(streams):
        rewards = random.binomial(128, rate, 60) / 128
        records = stream(
            reward=rewards, reward_std=np.sqrt(rewards * (1 - rewards)), kl=[0.4 * 1.3**step for step in range(60)]
        )
        base = Evaluation(step=0, prompts=0, score=rate, standard_error=0.005, samples=512, seconds=1)
        monitor = Monitor([rule], Course(60, base=base, groups=16, completions=128))
        stops += any(monitor.update(record) for record in records)
    return stops


@pytest.mark.parametrize("rule", [RewardDrop(), KlGrowth(), ZeroReward(), EntropyCollapse()])
@pytest.mark.parametrize("rate", [0.002, 0.02, 0.3])
def test_rules_do_not_decide_on_binomial_noise(rule: StoppingRule, rate: float) -> None:
    assert noisy_stops(rule, rate) <= 5


def test_without_their_standard_errors_the_same_rules_would() -> None:
    assert noisy_stops(RewardDrop(deviations=0.0), 0.02) > 25
    assert noisy_stops(KlGrowth(deviations=0.0), 0.3) > 50


def test_no_progress_spares_a_run_whose_small_reward_doubles() -> None:
    random = np.random.default_rng(1)
    rewards = random.binomial(128 * 16, np.linspace(0.02, 0.06, 60)) / (128 * 16)
    events = stream(reward=rewards, reward_std=np.sqrt(rewards * (1 - rewards)))
    monitor = Monitor([NoProgress()], Course(60, groups=256, completions=128 * 16))
    assert not any(monitor.update(event) for event in events)


def test_groups_without_variance_from_the_start_are_no_stall() -> None:
    assert first_stop(ZeroVariance(), stream(zero_variance_share=[0.95] * 40, reward=[0.01] * 40)) is None


def test_only_what_cannot_recover_ends_a_run_that_must_be_measured() -> None:
    for name in RULE_SETS:
        everything = StoppingSpec.model_validate({"rules": name, "override": {rule: {} for rule in RULES}})
        assert {rule.name for rule in build_rules(everything, measured=True)} == {"non_finite", "zero_reward"}


def test_a_run_that_must_be_measured_may_be_without_reward_for_half_of_its_horizon() -> None:
    (rule,) = build_rules(
        StoppingSpec.model_validate(
            {"rules": "none", "override": {"non_finite": False, "zero_reward": {"patience": 1}}}
        ),
        measured=True,
    )
    late = {"reward": [0.0] * 29 + [0.1] * 31, "reward_std": [0.0] * 29 + [0.3] * 31}
    assert first_stop(rule, stream(**late), total_steps=60) is None
    found = first_stop(rule, stream(reward=[0.0] * 40, reward_std=[0.0] * 40), total_steps=60)
    assert found is not None
    assert found.step == 30
