from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfhpo_core.errors import SpecError
from jfhpo_core.study.metrics import METRICS, Limit, broken, mean_of, training_means
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from tests.studies import step_record, study_data

FILE = """study: limits
family: instruct
target: m
task: instruct
space: tiny
budget: {trial_seconds: 100}
"""


def test_means_of_steps_and_what_is_left_out() -> None:
    steps = [step_record(1, kl=0.1, entropy=None), step_record(2, kl=0.3, entropy=0.5)]
    means = training_means(steps, devices=4, total_steps=30)
    assert means["kl"] == pytest.approx(0.2)
    assert means["device_seconds"] == pytest.approx(1.0 * 4 * 30)
    assert "entropy" not in means
    assert "kl" not in training_means([*steps, step_record(3, kl=math.nan)], 1, 30)
    assert training_means([], 1, 30) == {}
    assert mean_of([{"kl": 0.1, "entropy": 1.0}, {"kl": 0.3}]) == pytest.approx({"kl": 0.2})
    assert mean_of([]) == {}


def test_what_was_not_recorded_is_not_taken_to_respect_a_limit() -> None:
    limits = (Limit.parse("kl", "<= 0.2"), Limit.parse("entropy", ">= 0.1"))
    assert broken(limits, {"kl": 0.2, "entropy": 0.1}) == ()
    assert [str(limit) for limit in broken(limits, {"kl": 0.21})] == ["kl <= 0.2", "entropy >= 0.1"]


@given(st.sampled_from(sorted(METRICS)), st.floats(1e-6, 0.99), st.floats(1e-6, 1e6))
def test_a_limit_is_read_as_it_is_written(metric: str, bound: float, value: float) -> None:
    limit = Limit.parse(metric, f"<={bound!r}")
    assert (limit.metric, limit.at_most, limit.bound) == (metric, True, bound)
    assert limit.holds(value) == (value <= bound)
    assert (limit.excess(value) > 0) <= (not limit.holds(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kl: 0.2}", "line 7: constraints.kl = 0.2: say which side of 0.2 is allowed, in quotes: '<= 0.2'"),
        ("{kl: '>= 0.2'}", "less of kl is always welcome, so '>= 0.2' asks for the wrong side"),
        ("{kl: little}", "'little' is no limit; write '<= NUMBER', in quotes"),
        ("{kl: '<= -1'}", "'<= -1' can hardly be met"),
        ("{entropy: '>= 0'}", "'>= 0' is always met"),
        ("{truncated_share: '<= 1'}", "always met by a share"),
        ("{length: '<= 9'}", "there is no metric 'length'; name one of: kl (KL divergence"),
        ("{completion_tokens: '<= 8'}", "always met, as completions end at task.max_completion_tokens = 8"),
        ("{completion_tokens: '>= 8'}", "hardly ever met, as completions end at task.max_completion_tokens = 8"),
        ("[kl]", "constraints"),
    ],
)
def test_limits_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_study(f"{FILE}constraints: {text}\n", "study.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["{metric: length}", "{metric: kl, direction: down}", "length"])
def test_a_second_objective_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="second_objective"):
        parse_study(f"{FILE}second_objective: {text}\n", "study.yaml")


def test_limits_survive_writing_and_may_change(tmp_path: Path) -> None:
    limited = StudySpec.model_validate(
        study_data(
            tmp_path, constraints={"kl": "<= 0.2", "completion_tokens": "<= 6"}, second_objective="completion_tokens"
        )
    )
    assert parse_study(limited.to_yaml(), "study.yaml") == limited
    assert [str(limit) for limit in limited.limits] == ["kl <= 0.2", "completion_tokens <= 6"]
    assert limited.second_objective is not None
    assert limited.second_objective.direction == "minimize"
    assert limited.identity() == StudySpec.model_validate(study_data(tmp_path)).identity()
