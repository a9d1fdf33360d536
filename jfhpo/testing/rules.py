"""The contract of `jfhpo_core.stopping.rules.StoppingRule`. Every rule passes it: subclass `RuleConformance`.

A subclass gives the fixtures `rule` and `firing`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jfhpo.testing.samples import evaluation, step_record
from jfhpo_core.stopping.rules import Course, StoppingRule
from jfhpo_core.study.trial import Decision, Evaluation, StepRecord

TOTAL_STEPS = 40
"""Full horizon of the suite's training runs."""

Event = StepRecord | Evaluation

_signals = st.one_of(st.floats(), st.floats(0, 1), st.just(0.0))
_records = st.fixed_dictionaries(
    {
        "reward": _signals,
        "reward_std": _signals,
        "zero_variance_share": st.floats(0, 1),
        "kl": st.none() | _signals,
        "entropy": st.none() | _signals,
        "grad_norm": st.none() | _signals,
        "truncated_share": st.floats(0, 1),
    }
)


def course(events: Sequence[Event]) -> Course:
    """The course of a run as far as these events."""
    taken = Course(TOTAL_STEPS)
    for event in events:
        taken.take(event)
    return taken


def healthy() -> list[Event]:
    """A run that learns: the reward rises from 0.1 to 0.9, and so does the score; the KL grows little and slowly."""
    events: list[Event] = [evaluation(0, 0.1)]
    for step in range(1, TOTAL_STEPS + 1):
        progress = step / TOTAL_STEPS
        events.append(step_record(step, reward=0.1 + 0.8 * progress, kl=0.02 * progress, entropy=1.0 - 0.3 * progress))
        if step % 10 == 0:
            events.append(evaluation(step, 0.1 + 0.8 * progress))
    return events


class RuleConformance:
    """Inherit, and give the fixtures `rule` and `firing`."""

    @pytest.fixture
    def rule(self) -> StoppingRule:
        """The rule, with parameters of your choice."""
        raise NotImplementedError

    @pytest.fixture
    def firing(self) -> Sequence[Event]:
        """Events of a run that the rule stops after the last one, and not before."""
        raise NotImplementedError

    def test_it_has_a_name_a_docstring_and_a_default_for_every_parameter(self, rule: StoppingRule) -> None:
        assert type(rule)().name == rule.name
        assert rule.name.isidentifier()
        assert type(rule).__doc__

    def test_its_parameters_cannot_change(self, rule: StoppingRule) -> None:
        assert hash(rule) == hash(copy.copy(rule))
        for item in fields(rule):
            with pytest.raises(FrozenInstanceError):
                setattr(rule, item.name, 1)

    def test_it_stops_at_the_last_event_and_not_before(self, rule: StoppingRule, firing: Sequence[Event]) -> None:
        for length in range(len(firing)):
            assert rule.judge(course(firing[:length])) is None, f"it stopped after {length} of {len(firing)} events"
        decision = rule.judge(course(firing))
        assert decision is not None
        assert (decision.stop, decision.rule, decision.step) == (True, rule.name, firing[-1].step)
        assert decision.signal

    def test_it_lets_a_healthy_run_go_on(self, rule: StoppingRule) -> None:
        events = healthy()
        for length in range(len(events) + 1):
            assert rule.judge(course(events[:length])) is None

    def test_it_keeps_no_state_and_leaves_the_course_alone(self, rule: StoppingRule, firing: Sequence[Event]) -> None:
        taken = course(firing)
        before = copy.deepcopy(taken)
        first = rule.judge(taken)
        rule.judge(course(healthy()))
        assert rule.judge(taken) == first
        assert taken == before

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(signals=st.lists(_records, max_size=30), scores=st.lists(st.floats(), max_size=3))
    def test_whatever_a_trainer_may_send_it_answers(
        self, rule: StoppingRule, signals: list[dict[str, float | None]], scores: list[float]
    ) -> None:
        """Signals may be missing, infinite or NaN; a decision still names finite numbers or the signal that is none."""
        events: list[Event] = [step_record(step, **values) for step, values in enumerate(signals, start=1)]
        events += [evaluation(len(signals), score) for score in scores if signals]
        decision = rule.judge(course(events))
        if decision is not None:
            assert isinstance(decision, Decision)
            assert decision.step == len(signals)
            assert not math.isnan(decision.threshold)
