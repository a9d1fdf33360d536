"""Random walks through a ledger beside a model of it: a dictionary that does what the contract says, and nothing else.

`LedgerMachine` is a Hypothesis state machine. A subclass gives `connect`; it may add rules of its own, such as a store
that goes away.
"""

from __future__ import annotations

from abc import abstractmethod

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jfhpo.testing.ledgers import TOTAL_STEPS, make_records, make_result, make_segment, make_study, make_trial
from jfhpo_core.errors import LedgerError
from jfhpo_core.store.ledger import Ledger
from jfhpo_core.study.trial import FailureKind, Outcome, SegmentResult, StepRecord, Trial, TrialState


class LedgerMachine(RuleBasedStateMachine):
    """Trials begin, go on, end well or badly; calls are repeated, contradicted, and made by a new process."""

    @abstractmethod
    def connect(self) -> Ledger:
        """A ledger on the store of this walk, as a new process would get it; not yet opened."""

    @initialize()
    def open_the_study(self) -> None:
        self.model: dict[str, Trial] = {}
        self.records: dict[str, dict[int, StepRecord]] = {}
        self.facts: dict[str, str | float] = {}
        self.ledger = self.connect()
        self.ledger.open(make_study())

    @property
    def running(self) -> list[Trial]:
        """Trials with an open segment."""
        return [trial for trial in self.model.values() if trial.open_segment is not None]

    @property
    def paused(self) -> list[Trial]:
        """Trials that may go on."""
        return [trial for trial in self.model.values() if trial.state is TrialState.PAUSED]

    def _begin(self, trial: Trial, stop: int) -> None:
        segment = make_segment(len(trial.segments), trial.step, stop)
        self.ledger.begin(trial, segment)
        self.model[trial.key] = trial.model_copy(update={"open_segment": segment})

    @rule(stop=st.integers(1, TOTAL_STEPS))
    def a_trial_begins(self, stop: int) -> None:
        self._begin(make_trial(len(self.model), learning_rate=1 / (len(self.model) + 1)), stop)

    @precondition(lambda self: self.paused)
    @rule(data=st.data())
    def a_trial_goes_on(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(self.paused))
        self._begin(trial, data.draw(st.integers(trial.step + 1, TOTAL_STEPS)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def a_segment_is_committed(self, data: st.DataObject, outcome: Outcome) -> None:
        trial = data.draw(st.sampled_from(self.running))
        assert trial.open_segment is not None
        result = make_result(trial.open_segment, outcome=outcome)
        if outcome is not Outcome.REACHED:
            failure = FailureKind.HUNG if outcome is Outcome.INFEASIBLE else None
            result = result.model_copy(
                update={"end_step": trial.step, "checkpoint": None, "evaluations": (), "failure": failure}
            )
        records = make_records(trial.step, result.end_step)
        self.ledger.stream(trial.key, records)
        self.ledger.commit(trial.key, result, records)
        self.model[trial.key] = trial.model_copy(update={"open_segment": None, "segments": (*trial.segments, result)})
        self.records.setdefault(trial.key, {}).update({record.step: record for record in records})

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def the_last_call_is_repeated(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(list(self.model.values())))
        if trial.open_segment is not None:
            self.ledger.begin(trial, trial.open_segment)
        else:
            self.ledger.commit(trial.key, trial.segments[-1], [])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def a_contradiction_is_refused(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(list(self.model.values())))
        with pytest.raises(LedgerError):
            self.ledger.begin(trial, make_segment(len(trial.segments) + 1, trial.step, TOTAL_STEPS))
        with pytest.raises(LedgerError):
            self.ledger.commit(trial.key, self._contradiction(trial), [])

    @staticmethod
    def _contradiction(trial: Trial) -> SegmentResult:
        if trial.segments:
            return trial.segments[-1].model_copy(update={"seconds": 99.0})
        return make_result(make_segment(1, trial.step, TOTAL_STEPS))

    @rule(name=st.sampled_from(["best", "note"]), value=st.one_of(st.integers(0, 9).map(float), st.text("ab")))
    def a_fact_is_noted(self, name: str, value: float | str) -> None:
        self.ledger.summarize({name: value})
        self.facts[name] = value

    @rule()
    def the_process_ends_and_another_one_goes_on(self) -> None:
        self.ledger = self.connect()
        self.ledger.open(make_study())

    @invariant()
    def it_holds_what_was_acknowledged(self) -> None:
        assert self.ledger.trials() == list(self.model.values())
        assert self.ledger.facts() == self.facts
        for key in self.model:
            records = self.records.get(key, {})
            assert self.ledger.step_records(key) == [records[step] for step in sorted(records)]
