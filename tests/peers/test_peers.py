"""What every peer must do, whatever library it stands on. A new one is added to `PEERS`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jfhpo.testing.strategies import SECONDS, StrategyConformance, search, small_study
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.peers.replay import forget
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import VALIDATION, Trial, TrialState, configuration_key
from tests.studies import evaluation, result

FULL_LENGTH = ["tpe", "gp"]
MULTI_FIDELITY = ["asha", "bohb", "successive-halving", "hyperband", "smac3", "dehb", "fastbo"]
PEERS = [*FULL_LENGTH, *MULTI_FIDELITY]
SLOW = {"bohb", "fastbo", "smac3"}
"""Their searches take seconds."""


def each(*names: str) -> list[Any]:
    """Parameters."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


class TestPeers(StrategyConformance):
    @pytest.fixture(params=each(*PEERS))
    def strategy(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def forget(self) -> None:
        forget()


def peer_study(workspace: Path, name: str, seconds: float = SECONDS, slots: int = 1, **changes: Any) -> Study:
    budget = {"trial_seconds": seconds, "max_parallel": slots}
    return small_study(workspace, changes.pop("strategy", name), budget=budget, **changes)


def searched(outcome: SearchResult) -> list[Trial]:
    """Trials that the strategy itself asked for."""
    return [trial for trial in outcome.trials if trial.segments[0].segment.suggestion.source != VALIDATION]


@pytest.mark.parametrize("name", each(*FULL_LENGTH))
def test_single_fidelity_peers_train_at_full_length(tmp_path: Path, name: str) -> None:
    _, recorded = search(peer_study(tmp_path, name))
    assert {proposal.stop_prompts for _, _, _, proposal in recorded.calls if proposal} == {480}


@pytest.mark.parametrize("name", each(*MULTI_FIDELITY))
def test_promoted_trials_continue_from_their_checkpoints(tmp_path: Path, name: str) -> None:
    outcome, _ = search(peer_study(tmp_path, name, seconds=400))
    trials = searched(outcome)
    promoted = [trial for trial in trials if len(trial.segments) > 1]
    assert promoted
    for trial in promoted:
        assert all(after.segment.start_step == before.end_step for before, after in pairwise(trial.segments))
    assert sum(trial.step < trial.total_steps for trial in trials) > len(trials) / 3
    keys = [configuration_key(trial.configuration) for trial in trials]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", each(*PEERS))
def test_a_proposal_that_does_not_fit_into_the_budget_is_withheld(tmp_path: Path, name: str) -> None:
    study = peer_study(tmp_path, name)
    _, recorded = search(study)
    for trials, remaining, seed, proposal in recorded.calls[::4]:
        if proposal is None:
            continue
        cost = proposal.suggestion.expected_cost_seconds
        assert cost is not None
        assert 0 < cost <= remaining
        assert (proposal.model, proposal.suggestion.source) == ("large", name)
        assert load_strategy(study).suggest(study, trials, 0.9 * cost, seed) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", each(*PEERS))
def test_a_search_with_infeasible_regions_goes_on(tmp_path: Path, name: str) -> None:
    trainer = {"name": "simulated", "settings": {"memory_limit": 200.0}}  # 16 samples of 16 prompts do not fit
    outcome, _ = search(peer_study(tmp_path, name, trainer=trainer))
    states = {trial.state for trial in outcome.trials}
    assert TrialState.INFEASIBLE in states
    assert outcome.recommended is not None
    assert outcome.recommended.configuration["n_samples"] in (4, 8)


@pytest.mark.parametrize("name", each(*(name for name in PEERS if name != "dehb")))
def test_a_study_with_one_rung(tmp_path: Path, name: str) -> None:
    outcome, _ = search(peer_study(tmp_path, name, fidelity={"horizon_prompts": 480, "rungs": 1}))
    assert outcome.recommended is not None


@pytest.mark.parametrize("name", each(*PEERS))
def test_a_peer_can_search_on_a_proxy(tmp_path: Path, name: str) -> None:
    strategy = {"name": name, "settings": {"model": "small"}}
    outcome, recorded = search(peer_study(tmp_path, name, seconds=100, strategy=strategy))
    assert {proposal.model for _, _, _, proposal in recorded.calls if proposal} == {"small"}
    assert {trial.model for trial in searched(outcome)} == {"small"}
    assert "large" in {trial.model for trial in outcome.trials}, "the best is validated on the target"


@pytest.mark.parametrize("name", each(*PEERS))
def test_a_model_that_is_not_in_the_study_is_refused(tmp_path: Path, name: str) -> None:
    study = peer_study(tmp_path, name, strategy={"name": name, "settings": {"model": "huge"}})
    with pytest.raises(SpecError, match=r"strategy\.settings\.model: 'huge' .*small, medium, large"):
        load_strategy(study)


@pytest.mark.parametrize("name", each(*(name for name in PEERS if name != "fastbo")))
def test_the_highest_rung_ranks_first_then_the_score(tmp_path: Path, name: str) -> None:
    study = peer_study(tmp_path, name)

    def trial(number: int, model: str, end: int, score: float, **changes: Any) -> Trial:
        done = result(0, 0, end, evaluations=(evaluation(0, 0.9), evaluation(end, score)), **changes)
        new = study.new_trial(number, {"learning_rate": 1e-4 * (number + 1)}, model, 0)
        return new.model_copy(update={"segments": (done,)})

    trials = [
        trial(0, "large", 10, 0.6),
        trial(1, "large", 30, 0.4),
        trial(2, "large", 30, 0.5),
        trial(3, "small", 30, 0.9),
        trial(4, "large", 12, 0.8, outcome="stopped"),
        trial(5, "large", 3, 0.7),
        trial(6, "large", 3, 0.8, outcome="infeasible", failure="hung"),
    ]
    ranked = load_strategy(study).rank(study, trials)
    rates = [round(float(item.configuration["learning_rate"]) * 1e4) - 1 for item in ranked]
    assert rates == [2, 1, 0, 5, 3]
    assert (ranked[0].mean, ranked[0].standard_deviation) == (0.5, 0.02)
    assert load_strategy(study).rank(study, []) == []
