"""The contract of `jfhpo_core.store.ledger.Ledger`. Every ledger passes it.

Subclass `LedgerConformance` and give `reopen`.

`reopen` is a function without arguments that returns a ledger on the same store each time it is called, as a new
process would get it; the suite calls `open` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jfhpo_core.errors import LedgerError
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import (
    Checkpoint,
    Decision,
    Evaluation,
    FailureKind,
    Outcome,
    PassAtN,
    Segment,
    SegmentResult,
    StepRecord,
    Suggestion,
    Trial,
    TrialState,
    trial_key,
)

STUDY = """
study: conformance
family:
  - {name: small, path: simulated, parameters: 100000}
  - {name: large, path: simulated, parameters: 600000}
target: large
task: instruct
trainer: simulated
space: tiny
budget: {trial_seconds: 600}
"""
TOTAL_STEPS = 12


def make_study(**changes: object) -> StudySpec:
    return parse_study(STUDY).model_copy(update=changes)


def make_trial(number: int, model: str = "small", **configuration: float | str | bool) -> Trial:
    values = configuration or {"learning_rate": 10.0 ** -(number % 5 + 2)}
    return Trial(
        key=trial_key("conformance", values, model, number),
        number=number,
        configuration=values,
        model=model,
        seed=number,
        total_steps=TOTAL_STEPS,
        prompts_per_step=16,
    )


def make_segment(index: int, start: int, stop: int, explanation: str = "because") -> Segment:
    suggestion = Suggestion(source="test", explanation=explanation, expected_gain=0.01, expected_cost_seconds=3.5)
    return Segment(index=index, start_step=start, stop_step=stop, suggestion=suggestion)


def make_record(step: int, **changes: float | None) -> StepRecord:
    values = {
        "step": step,
        "prompts": step * 16,
        "tokens": step * 1000,
        "reward": 0.1 + step / 7,
        "reward_std": 1 / 3,
        "zero_variance_share": 0.25,
        "kl": 1e-300 * step,
        "entropy": None,
        "clip_fraction": 0.0,
        "grad_norm": 0.1 + 0.2,
        "completion_tokens": 7.5,
        "truncated_share": 0.0,
        "learning_rate": 1e-4,
        "generation_seconds": 0.01,
        "training_seconds": 0.02,
    }
    return StepRecord.model_validate({**values, **changes})


def make_records(start: int, stop: int) -> list[StepRecord]:
    return [make_record(step) for step in range(start + 1, stop + 1)]


def make_result(segment: Segment, **changes: object) -> SegmentResult:
    step = segment.stop_step
    values: dict[str, object] = {
        "segment": segment,
        "outcome": Outcome.REACHED,
        "end_step": step,
        "end_prompts": step * 16,
        "evaluations": (
            Evaluation(step=step, prompts=step * 16, score=0.1 * step, standard_error=0.02, samples=512, seconds=0.3),
        ),
        "checkpoint": Checkpoint(
            step=step, prompts=step * 16, path=f"key/step-{step:08d}", digest=f"{step:064x}", size_bytes=10
        ),
        "seconds": 2.5,
        "startup_seconds": 0.5,
        "evaluation_seconds": 0.3,
    }
    return SegmentResult.model_validate({**values, **changes})


def text(trials: list[Trial]) -> list[str]:
    """JSON, for comparisons in which NaN equals NaN."""
    return [trial.model_dump_json() for trial in trials]


finite = st.floats(allow_nan=False, allow_infinity=False)
anything = st.floats(allow_nan=True, allow_infinity=True)
positive = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
steps = st.integers(1, 10_000_000)
# No surrogates: they cannot be written as UTF-8, and no terminal or log line contains them.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
names = st.from_regex(r"[a-z][a-z_0-9]{0,20}", fullmatch=True)
values = st.one_of(st.booleans(), st.integers(-(2**53), 2**53), finite, words)
results = st.builds(
    SegmentResult,
    segment=st.builds(
        Segment,
        index=st.just(0),
        start_step=st.integers(0, 100),
        stop_step=steps,
        suggestion=st.builds(
            Suggestion,
            source=words,
            explanation=words,
            expected_gain=st.none() | anything,
            expected_cost_seconds=st.none() | anything,
        ),
    ),
    outcome=st.sampled_from(Outcome),
    end_step=steps,
    end_prompts=steps,
    evaluations=st.lists(
        st.builds(
            Evaluation,
            step=steps,
            prompts=steps,
            score=anything,
            standard_error=positive,
            samples=steps,
            seconds=positive,
            pass_at_n=st.none() | st.builds(PassAtN, n=st.integers(2, 4096), score=anything, standard_error=positive),
        ),
        max_size=4,
    ).map(tuple),
    checkpoint=st.none() | st.builds(Checkpoint, step=steps, prompts=steps, path=words, digest=words, size_bytes=steps),
    seconds=positive,
    startup_seconds=positive,
    evaluation_seconds=positive,
    devices=st.integers(1, 4096),
    decision=st.none()
    | st.builds(Decision, stop=st.booleans(), rule=words, signal=words, value=anything, threshold=anything, step=steps),
    failure=st.none() | st.sampled_from(FailureKind),
    message=st.none() | words,
    attempts=st.integers(1, 9),
)
step_records = st.builds(
    make_record,
    step=st.integers(1, 50),
    reward=anything,
    reward_std=anything,
    kl=st.none() | anything,
    entropy=st.none() | anything,
    grad_norm=st.none() | anything,
    learning_rate=st.none() | anything,
)


class LedgerConformance:
    """The suite."""

    @pytest.fixture
    def reopen(self) -> Callable[[], Ledger]:
        raise NotImplementedError("give a fixture that opens the ledger under test")

    @pytest.fixture
    def ledger(self, reopen: Callable[[], Ledger]) -> Ledger:
        ledger = reopen()
        ledger.open(make_study())
        return ledger

    def again(self, reopen: Callable[[], Ledger]) -> Ledger:
        ledger = reopen()
        ledger.open(make_study())
        return ledger

    def test_a_new_study_is_empty(self, ledger: Ledger) -> None:
        assert ledger.trials() == []
        assert ledger.facts() == {}
        assert ledger.step_records("0" * 16) == []

    def test_a_trial_goes_through_its_life(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial = make_trial(0, "large", learning_rate=3e-4, scheduler="cosine", n_samples=8, shuffle=True)
        first, second = make_segment(0, 0, 4), make_segment(1, 4, TOTAL_STEPS)

        ledger.begin(trial, first)
        assert ledger.trials() == [trial.model_copy(update={"open_segment": first})]
        assert ledger.trials()[0].state is TrialState.RUNNING
        ledger.stream(trial.key, make_records(0, 2))
        assert ledger.step_records(trial.key) == []

        ledger.commit(trial.key, make_result(first), make_records(0, 4))
        assert ledger.trials()[0].state is TrialState.PAUSED
        assert ledger.step_records(trial.key) == make_records(0, 4)

        ledger.begin(ledger.trials()[0], second)
        assert ledger.trials()[0].open_segment == second
        ledger.commit(trial.key, make_result(second), make_records(4, TOTAL_STEPS))

        expected = trial.model_copy(update={"segments": (make_result(first), make_result(second))})
        for one in (ledger, self.again(reopen)):
            assert one.trials() == [expected]
            assert one.trials()[0].state is TrialState.COMPLETED
            assert one.step_records(trial.key) == make_records(0, TOTAL_STEPS)

    def test_trials_keep_the_order_of_creation(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trials = [make_trial(number, learning_rate=1 / (number + 1)) for number in range(6)]
        for trial in trials:
            ledger.begin(trial, make_segment(0, 0, 4))
        for trial in reversed(trials):
            ledger.commit(trial.key, make_result(make_segment(0, 0, 4)), make_records(0, 4))
        ledger.begin(ledger.trials()[3], make_segment(1, 4, 8))
        for one in (ledger, self.again(reopen)):
            assert [trial.key for trial in one.trials()] == [trial.key for trial in trials]
            assert [trial.state for trial in one.trials()].count(TrialState.RUNNING) == 1

    def test_an_open_segment_survives_and_can_be_committed(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 4)
        ledger.begin(trial, segment)
        ledger.stream(trial.key, make_records(0, 3))
        one = self.again(reopen)
        assert one.trials()[0].open_segment == segment
        assert one.step_records(trial.key) == []
        one.stream(trial.key, make_records(0, 4))
        one.commit(trial.key, make_result(segment), make_records(0, 4))
        assert self.again(reopen).step_records(trial.key) == make_records(0, 4)

    def test_begin_and_commit_can_be_repeated(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 4)
        ledger.begin(trial, segment)
        ledger.begin(trial, segment)
        self.again(reopen).begin(trial, segment)
        ledger.commit(trial.key, make_result(segment), make_records(0, 4))
        ledger.commit(trial.key, make_result(segment), make_records(0, 4))
        one = self.again(reopen)
        one.commit(trial.key, make_result(segment), make_records(0, 4))
        assert len(one.trials()) == 1
        assert one.trials()[0].segments == (make_result(segment),)
        assert one.trials()[0].charge_seconds == make_result(segment).seconds

    def test_contradictions_are_refused_and_change_nothing(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 4)
        other = make_segment(0, 0, 8, "another reason")
        with pytest.raises(LedgerError, match="next one is 0"):
            ledger.begin(trial, make_segment(1, 4, 8))
        assert ledger.trials() == []
        ledger.begin(trial, segment)
        with pytest.raises(LedgerError, match="open"):
            ledger.begin(trial, other)
        with pytest.raises(LedgerError, match="not begun"):
            ledger.commit(trial.key, make_result(other), [])
        ledger.commit(trial.key, make_result(segment), make_records(0, 4))
        with pytest.raises(LedgerError, match="already committed"):
            ledger.commit(trial.key, make_result(segment, seconds=99.0), make_records(0, 4))
        with pytest.raises(LedgerError, match="next one is 1"):
            ledger.begin(trial, make_segment(2, 4, 8))
        with pytest.raises(LedgerError, match="not begun"):
            ledger.commit(trial.key, make_result(make_segment(1, 4, 8)), [])
        for one in (ledger, self.again(reopen)):
            assert one.trials() == [trial.model_copy(update={"segments": (make_result(segment),)})]
            assert one.step_records(trial.key) == make_records(0, 4)

    def test_an_unknown_trial_is_refused(self, ledger: Ledger) -> None:
        with pytest.raises(LedgerError, match="unknown"):
            ledger.commit("0" * 16, make_result(make_segment(0, 0, 4)), [])

    def test_another_study_of_the_same_name_is_refused(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 4)
        ledger.begin(trial, segment)
        changed = make_study(evaluation=make_study().evaluation.model_copy(update={"temperature": 0.5}))
        with pytest.raises(LedgerError, match=r"other (values|settings)"):
            reopen().open(changed)
        one = self.again(reopen)
        assert one.trials() == [trial.model_copy(update={"open_segment": segment})]

    def test_budget_and_seeds_may_change(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        ledger.begin(make_trial(0), make_segment(0, 0, 4))
        study = make_study()
        budget = study.budget.model_copy(update={"trial_seconds": 5.0})
        seeds = study.seeds.model_copy(update={"training": [5, 6, 7]})
        one = reopen()
        one.open(make_study(budget=budget, seeds=seeds))
        assert len(one.trials()) == 1

    def test_non_finite_signals_and_a_trial_without_checkpoint_survive(
        self, ledger: Ledger, reopen: Callable[[], Ledger]
    ) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 4)
        records = [
            *make_records(0, 2),
            make_record(3, reward=math.nan, kl=math.inf, grad_norm=-math.inf),
        ]
        result = make_result(
            segment,
            outcome=Outcome.STOPPED,
            end_step=3,
            checkpoint=None,
            decision=Decision(
                stop=True, rule="non-finite", signal="reward", value=math.nan, threshold=math.inf, step=3
            ),
        )
        ledger.begin(trial, segment)
        ledger.stream(trial.key, records)
        ledger.commit(trial.key, result, records)
        one = self.again(reopen)
        one.commit(trial.key, result, records)
        assert text(one.trials()) == text(ledger.trials())
        assert one.trials()[0].state is TrialState.STOPPED
        assert one.trials()[0].checkpoint is None
        back = one.step_records(trial.key)
        assert [record.model_dump_json() for record in back] == [record.model_dump_json() for record in records]
        assert math.isnan(back[2].reward)
        assert (back[2].kl, back[2].grad_norm) == (math.inf, -math.inf)

    def test_failed_and_lost_segments_are_kept(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        ends: dict[TrialState, dict[str, Any]] = {
            TrialState.INFEASIBLE: {"failure": FailureKind.OUT_OF_MEMORY, "message": "CUDA out of memory " * 2000},
            TrialState.LOST: {"message": "worker died: " + "\u00e9\u4e2d\U0001f600\x00\n|" * 40, "attempts": 3},
        }
        for number, (state, more) in enumerate(ends.items()):
            trial, segment = make_trial(number), make_segment(0, 0, 4)
            ledger.begin(trial, segment)
            result = make_result(
                segment, outcome=Outcome(state.value), end_step=0, checkpoint=None, evaluations=(), **more
            )
            ledger.commit(trial.key, result, [])
        for one in (ledger, self.again(reopen)):
            assert [trial.state for trial in one.trials()] == list(ends)
            assert [trial.segments[0].message for trial in one.trials()] == [end["message"] for end in ends.values()]

    def test_records_of_a_retrained_stretch_replace_the_old_ones(
        self, ledger: Ledger, reopen: Callable[[], Ledger]
    ) -> None:
        # A damaged checkpoint sends the second segment back to step 2.
        trial = make_trial(0)
        first, second = make_segment(0, 0, 4), make_segment(1, 4, 6)
        ledger.begin(trial, first)
        ledger.commit(trial.key, make_result(first), make_records(0, 4))
        ledger.begin(ledger.trials()[0], second)
        again = [make_record(step, reward=0.9) for step in (3, 4, 5, 6)]
        ledger.commit(trial.key, make_result(second), again)
        for one in (ledger, self.again(reopen)):
            assert one.step_records(trial.key) == [*make_records(0, 2), *again]

    def test_a_long_result_survives(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 4, "long " * 3000)
        evaluations = tuple(
            Evaluation(step=step, prompts=step, score=1 / (step + 1), standard_error=0.1, samples=9, seconds=0.1)
            for step in range(300)
        )
        ledger.begin(trial, segment)
        assert self.again(reopen).trials()[0].open_segment == segment
        ledger.commit(trial.key, make_result(segment, evaluations=evaluations), make_records(0, 4))
        assert self.again(reopen).trials()[0].segments[0].evaluations == evaluations

    def test_many_records_survive(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        trial, segment = make_trial(0), make_segment(0, 0, 300)
        ledger.begin(trial, segment)
        ledger.stream(trial.key, make_records(0, 200))
        ledger.commit(trial.key, make_result(segment), make_records(0, 300))
        assert self.again(reopen).step_records(trial.key) == make_records(0, 300)

    def test_facts_replace_each_other(self, ledger: Ledger, reopen: Callable[[], Ledger], tmp_path: Path) -> None:
        (tmp_path / "report.html").write_text("<p>fine</p>")
        ledger.summarize({"best": 0.25, "recommended": "lr=3e-4", "count": 3, "gone/with": "wind " * 4000})
        ledger.summarize({"best": 1 / 3, "gone/with": "short"}, [tmp_path / "report.html"])
        expected = {"best": 1 / 3, "recommended": "lr=3e-4", "count": 3, "gone/with": "short"}
        assert ledger.facts() == expected
        assert self.again(reopen).facts() == expected

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(result=results, configuration=st.dictionaries(names, values, max_size=6), records=st.lists(step_records))
    def test_whatever_is_valid_comes_back_exactly(
        self,
        ledger: Ledger,
        reopen: Callable[[], Ledger],
        result: SegmentResult,
        configuration: dict[str, bool | int | float | str],
        records: list[StepRecord],
    ) -> None:
        number = len(ledger.trials())
        trial = make_trial(number).model_copy(update={"configuration": configuration})
        ledger.begin(trial, result.segment)
        ledger.commit(trial.key, result, records)
        one = self.again(reopen)
        assert text(one.trials()[-1:]) == text([trial.model_copy(update={"segments": (result,)})])
        newest = {record.step: record.model_dump_json() for record in records}
        assert [record.model_dump_json() for record in one.step_records(trial.key)] == [
            newest[step] for step in sorted(newest)
        ]
