"""What every peer must do, whatever library it stands on. A new one is added to `PEERS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.strategy import Proposal, Recommendation, Strategy, load_strategy
from jfhpo_core.peers.replay import forget
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import VALIDATION, SearchResult, run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial, TrialState, configuration_key, spent_seconds
from tests.studies import evaluation, result, simulated_study

FULL_LENGTH = ["tpe", "gp"]
MULTI_FIDELITY = ["asha", "bohb", "successive-halving", "hyperband", "smac3", "dehb", "fastbo"]
PEERS = [*FULL_LENGTH, *MULTI_FIDELITY]

SPACE: dict[str, Any] = {
    "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
    "kl_coefficient": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True, "zero": True},
    "n_samples": {"type": "choice", "values": [4, 8, 16]},
    "scheduler": {"type": "choice", "values": ["constant", "linear", "cosine"]},
    "warmup_ratio": {"type": "float", "low": 0.0, "high": 0.2, "when": {"scheduler": ["linear", "cosine"]}},
    "mini_batches": {"type": "int", "low": 1, "high": 2},
}
"""Every kind of hyperparameter, one of them conditional."""

RUNGS = {"horizon_prompts": 480, "rungs": [48, 160, 480]}


@dataclass
class Recorded:
    """A strategy that remembers how it was asked and what it answered."""

    strategy: Strategy
    calls: list[tuple[list[Trial], float, int, Proposal | None]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.strategy.name

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        proposal = self.strategy.suggest(study, trials, remaining_seconds, seed)
        self.calls.append((list(trials), remaining_seconds, seed, proposal))
        return proposal

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        return self.strategy.rank(study, trials)


def peer_study(workspace: Path, name: str, seconds: float = 300, slots: int = 1, **changes: Any) -> Study:
    settings = {
        "space": SPACE,
        "fidelity": RUNGS,
        "strategy": name,
        "budget": {"trial_seconds": seconds, "max_parallel": slots},
        "seeds": {"search": 3, "training": [0]},
        "baselines": [],
        **changes,
    }
    return simulated_study(workspace, **settings)


def search(study: Study, slots: int = 1) -> tuple[SearchResult, Recorded]:
    recorded = Recorded(load_strategy(study))
    return run_search(study, MemoryLedger(), InlineDispatcher(slots), strategy=recorded), recorded


def searched(outcome: SearchResult) -> list[Trial]:
    """Trials that the strategy itself asked for."""
    return [trial for trial in outcome.trials if trial.segments[0].segment.suggestion.source != VALIDATION]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_a_search_ends_with_a_recommendation(tmp_path: Path, name: str, slots: int) -> None:
    study = peer_study(tmp_path, name, slots=slots)
    outcome, recorded = search(study, slots)
    assert outcome.complete
    assert outcome.recommended is not None
    assert outcome.target_trial is not None
    assert outcome.target_trial.configuration == outcome.recommended.configuration
    longest = max(done.charge_seconds for trial in outcome.trials for done in trial.segments)
    assert 150 < outcome.spent_seconds <= 300 + slots * longest
    proposals = [proposal for _, _, _, proposal in recorded.calls if proposal is not None]
    assert len(proposals) >= 5
    for proposal in proposals:
        assert proposal.model == "large"
        assert proposal.stop_prompts in study.spec.fidelity.levels
        assert study.space.decode(study.space.encode(proposal.configuration)) == proposal.configuration
        assert proposal.suggestion.source == name
    for trial in outcome.trials:
        assert all(before.end_step < after.end_step for before, after in pairwise(trial.segments))


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_a_proposal_depends_on_the_trials_alone(tmp_path: Path, name: str, slots: int) -> None:
    """Asked again in any order, with trials read from their records, a peer answers as it did in the running search."""
    study = peer_study(tmp_path, name, slots=slots)
    _, recorded = search(study, slots)
    for trials, remaining, seed, proposal in reversed(recorded.calls[::4]):
        read = [Trial.model_validate_json(trial.model_dump_json()) for trial in trials]
        forget()
        assert load_strategy(study).suggest(study, read, remaining, seed) == proposal


@pytest.mark.parametrize("name", FULL_LENGTH)
def test_single_fidelity_peers_train_at_full_length(tmp_path: Path, name: str) -> None:
    _, recorded = search(peer_study(tmp_path, name))
    assert {proposal.stop_prompts for _, _, _, proposal in recorded.calls if proposal} == {480}


@pytest.mark.parametrize("name", MULTI_FIDELITY)
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


@pytest.mark.parametrize("name", PEERS)
def test_a_proposal_that_does_not_fit_into_the_budget_is_withheld(tmp_path: Path, name: str) -> None:
    study = peer_study(tmp_path, name)
    _, recorded = search(study)
    for trials, remaining, seed, proposal in recorded.calls[::4]:
        if proposal is None:
            continue
        cost = proposal.suggestion.expected_cost_seconds
        assert cost is not None
        assert 0 < cost <= remaining
        assert load_strategy(study).suggest(study, trials, 0.9 * cost, seed) is None


@pytest.mark.parametrize("name", PEERS)
def test_a_search_in_which_nothing_is_feasible_ends(tmp_path: Path, name: str) -> None:
    trainer = {"name": "simulated", "settings": {"memory_limit": 1.0}}
    outcome, _ = search(peer_study(tmp_path, name, trainer=trainer), slots=2)
    assert outcome.complete
    assert outcome.recommended is None
    assert all(trial.state is TrialState.INFEASIBLE for trial in outcome.trials)
    keys = [configuration_key(trial.configuration) for trial in outcome.trials]
    assert len(set(keys)) == len(keys) >= 20


@pytest.mark.parametrize("name", PEERS)
def test_a_search_with_infeasible_regions_goes_on(tmp_path: Path, name: str) -> None:
    trainer = {"name": "simulated", "settings": {"memory_limit": 200.0}}  # 16 samples of 16 prompts do not fit
    outcome, _ = search(peer_study(tmp_path, name, trainer=trainer))
    states = {trial.state for trial in outcome.trials}
    assert TrialState.INFEASIBLE in states
    assert outcome.recommended is not None
    assert outcome.recommended.configuration["n_samples"] in (4, 8)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("name", PEERS)
def test_a_small_space_runs_out(tmp_path: Path, name: str, slots: int) -> None:
    space = {
        "scheduler": {"type": "choice", "values": ["constant", "cosine"]},
        "n_samples": {"type": "choice", "values": [4, 8, 16]},
    }
    outcome, recorded = search(peer_study(tmp_path, name, seconds=2000, slots=slots, space=space), slots)
    assert outcome.complete
    assert outcome.recommended is not None
    assert recorded.calls[-1][3] is None
    assert spent_seconds(outcome.trials) < 1000
    assert len({configuration_key(trial.configuration) for trial in outcome.trials}) == 6


@pytest.mark.parametrize(
    "space",
    [
        {
            "scheduler": {"type": "choice", "values": ["constant", "linear", "cosine"]},
            "n_samples": {"type": "choice", "values": [16, 4, 8]},
            "loss_type": {"type": "choice", "values": ["grpo", "dr_grpo", "dapo"]},
        },
        {"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True}},
    ],
    ids=["categorical", "one-dimensional"],
)
@pytest.mark.parametrize("name", PEERS)
def test_other_spaces(tmp_path: Path, name: str, space: dict[str, Any]) -> None:
    outcome, recorded = search(peer_study(tmp_path, name, space=space))
    assert outcome.recommended is not None
    assert sum(proposal is not None for _, _, _, proposal in recorded.calls) >= 5


@pytest.mark.parametrize("name", [name for name in PEERS if name != "dehb"])
def test_a_study_with_one_rung(tmp_path: Path, name: str) -> None:
    outcome, _ = search(peer_study(tmp_path, name, fidelity={"horizon_prompts": 480, "rungs": 1}))
    assert outcome.recommended is not None


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_can_search_on_a_proxy(tmp_path: Path, name: str) -> None:
    strategy = {"name": name, "settings": {"model": "small"}}
    outcome, recorded = search(peer_study(tmp_path, name, seconds=100, strategy=strategy))
    assert {proposal.model for _, _, _, proposal in recorded.calls if proposal} == {"small"}
    assert {trial.model for trial in searched(outcome)} == {"small"}
    assert "large" in {trial.model for trial in outcome.trials}, "the best is validated on the target"


@pytest.mark.parametrize("name", PEERS)
def test_a_model_that_is_not_in_the_study_is_refused(tmp_path: Path, name: str) -> None:
    study = peer_study(tmp_path, name, strategy={"name": name, "settings": {"model": "huge"}})
    with pytest.raises(SpecError, match=r"strategy\.settings\.model: 'huge' .*small, medium, large"):
        load_strategy(study)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "fastbo"])
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
