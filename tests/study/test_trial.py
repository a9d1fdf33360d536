from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from jfhpo_core.study.trial import (
    Checkpoint,
    Decision,
    Evaluation,
    FailureKind,
    Outcome,
    PassAtN,
    SegmentResult,
    StepRecord,
    Trial,
    TrialState,
    canonical_json,
    configuration_key,
    trial_key,
)
from tests.studies import evaluation, result, segment, step_record

CONFIGURATION = {"learning_rate": 1e-4, "scheduler": "cosine", "n_samples": 8}


def trial(*segments: SegmentResult, **changes: object) -> Trial:
    return Trial.model_validate(
        {
            "key": "0" * 16,
            "number": 0,
            "configuration": CONFIGURATION,
            "model": "large",
            "seed": 0,
            "total_steps": 30,
            "prompts_per_step": 16,
            "segments": segments,
            **changes,
        }
    )


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, prompts=16 * step, path=f"{'0' * 16}/step-{step:08d}", digest="d", size_bytes=1)


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (trial(), TrialState.PENDING),
        (trial(open_segment=segment(0, 0, 10)), TrialState.RUNNING),
        (trial(result(0, 0, 10)), TrialState.PAUSED),
        (trial(result(0, 0, 10), open_segment=segment(1, 10, 30)), TrialState.RUNNING),
        (trial(result(0, 0, 10), result(1, 10, 30)), TrialState.COMPLETED),
        (trial(result(0, 0, 10), result(1, 10, 14, outcome=Outcome.STOPPED)), TrialState.STOPPED),
        (
            trial(result(0, 0, 3, outcome=Outcome.INFEASIBLE, failure=FailureKind.OUT_OF_MEMORY)),
            TrialState.INFEASIBLE,
        ),
        (trial(result(0, 0, 10), result(1, 10, 10, outcome=Outcome.LOST)), TrialState.LOST),
        (trial(result(0, 0, 30, outcome=Outcome.STOPPED)), TrialState.STOPPED),
    ],
)
def test_state_follows_from_the_segments(value: Trial, state: TrialState) -> None:
    assert value.state is state


def test_step_checkpoint_and_charge_add_up_over_segments() -> None:
    value = trial(
        result(0, 0, 10, checkpoint=checkpoint(10), devices=2),
        result(1, 10, 20, checkpoint=checkpoint(20), devices=2),
        result(2, 20, 25, outcome=Outcome.STOPPED, seconds=3.0, devices=2),
    )
    assert value.step == 25
    assert value.checkpoint == checkpoint(20)
    assert value.charge_seconds == (10 + 10 + 3) * 2


def test_an_untouched_trial_has_neither_step_nor_score() -> None:
    value = trial()
    assert (value.step, value.checkpoint, value.final, value.decision, value.charge_seconds) == (0, None, None, None, 0)


def test_evaluations_are_sorted_and_the_newest_of_a_step_counts() -> None:
    value = trial(
        result(0, 0, 10, evaluations=(evaluation(0, 0.1), evaluation(10, 0.2))),
        result(1, 10, 30, evaluations=(evaluation(10, 0.3), evaluation(30, 0.4))),
    )
    assert [(item.step, item.score) for item in value.evaluations] == [(0, 0.1), (10, 0.3), (30, 0.4)]


def test_final_is_the_score_at_the_full_horizon_only() -> None:
    paused = trial(result(0, 0, 20, evaluations=(evaluation(20, 0.7),)))
    assert paused.final is None
    finished = trial(*paused.segments, result(1, 20, 30, evaluations=(evaluation(30, 0.8),)))
    assert finished.final is not None
    assert finished.final.score == 0.8


def test_decision_is_that_of_the_last_segment() -> None:
    decision = Decision(stop=True, rule="kl_growth", signal="KL", value=0.31234, threshold=0.15, step=14)
    value = trial(result(0, 0, 10), result(1, 10, 14, outcome=Outcome.STOPPED, decision=decision))
    assert value.decision == decision
    assert decision.explain() == "kl_growth: KL = 0.3123 against 0.15 at step 14"


def test_a_trial_survives_json() -> None:
    value = trial(result(0, 0, 10, evaluations=(evaluation(10),), checkpoint=checkpoint(10)), label="recipe")
    assert Trial.model_validate_json(value.model_dump_json()) == value


@pytest.mark.parametrize("number", [math.inf, -math.inf])
def test_non_finite_signals_survive_json(number: float) -> None:
    value = step_record(1, kl=number, grad_norm=math.nan)
    back = StepRecord.model_validate_json(value.model_dump_json())
    assert back.kl == number
    assert back.grad_norm is not None
    assert math.isnan(back.grad_norm)


@pytest.mark.parametrize("configuration", [{"x": True}, {"x": 1}, {"x": 1.5}, {"x": "1"}])
def test_values_keep_their_type_through_json(configuration: dict[str, object]) -> None:
    value = trial(configuration=configuration)
    back = Trial.model_validate_json(value.model_dump_json())
    assert type(back.configuration["x"]) is type(configuration["x"])


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        trial().number = 3
    with pytest.raises(ValidationError):
        step_record(1, surprise=1)


def test_configuration_key_ignores_order_and_nothing_else() -> None:
    turned = dict(reversed(CONFIGURATION.items()))
    assert list(turned) != list(CONFIGURATION)
    assert configuration_key(turned) == configuration_key(CONFIGURATION)
    assert configuration_key({**CONFIGURATION, "n_samples": 4}) != configuration_key(CONFIGURATION)


def test_trial_key_depends_on_every_part() -> None:
    keys = {
        trial_key("a", CONFIGURATION, "m", 0),
        trial_key("b", CONFIGURATION, "m", 0),
        trial_key("a", {**CONFIGURATION, "n_samples": 4}, "m", 0),
        trial_key("a", CONFIGURATION, "n", 0),
        trial_key("a", CONFIGURATION, "m", 1),
        trial_key("a", CONFIGURATION, "m", 0, "random-search"),
    }
    assert len(keys) == 6
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)


def test_keys_do_not_change_between_releases() -> None:
    """Ledgers written by earlier releases hold these keys."""
    assert trial_key("study", {"learning_rate": 1e-4}, "large", 0) == "66079205edb28e02"
    assert configuration_key({"learning_rate": 1e-4}) == "b7f1bba0c3d5"


def test_canonical_json_is_sorted_and_compact() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'


def test_pass_at_n_counts_each_prompt_with_its_best_completion() -> None:
    # Solved by one of three, all, none and two: three prompts of four.
    found = PassAtN.of([(0, 1, 0), (1, 1, 1), (0, 0, 0), (1, 0, 1)])
    assert found is not None
    assert (found.n, found.score) == (3, 0.75)
    assert found.standard_error == pytest.approx(math.sqrt(0.25 / 4))
    graded = PassAtN.of([(0.2, 0.5), (-1.0, -2.0)])
    assert graded is not None
    assert (graded.n, graded.score) == (2, pytest.approx(-0.25))
    assert graded.standard_error == pytest.approx(0.75)


def test_pass_at_n_of_prompts_that_are_all_solved_has_a_standard_error() -> None:
    assert PassAtN.of([(0, 1)] * 5) == PassAtN(n=2, score=1.0, standard_error=0.1)


def test_no_pass_at_n_is_claimed_from_single_or_unequally_many_completions() -> None:
    assert PassAtN.of([(1,), (0,)]) is None
    assert PassAtN.of([(1, 0), (0,)]) is None


def test_evaluations_of_before_pass_at_n_are_read() -> None:
    old = '{"step":4,"prompts":64,"score":0.5,"standard_error":0.02,"samples":512,"seconds":0.3}'
    assert Evaluation.model_validate_json(old).pass_at_n is None
