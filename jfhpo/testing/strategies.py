"""The contract of `jfhpo_core.optimizer.strategy.Strategy`. Every strategy passes it: subclass `StrategyConformance`.

A subclass gives the fixture `strategy`. Whole searches run, on simulated training runs and a simulated clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jfhpo.testing.samples import simulated_study
from jfhpo_core.optimizer.strategy import Proposal, Recommendation, Strategy, load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial, TrialState, configuration_key, spent_seconds

SECONDS = 300.0
"""Budget of a search, in simulated device-seconds: 8 to 9 full runs of the target."""

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

    name: ClassVar[str] = "recorded"
    strategy: Strategy
    calls: list[tuple[list[Trial], float, int, Proposal | None]] = field(default_factory=list)

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        proposal = self.strategy.suggest(study, trials, remaining_seconds, seed)
        self.calls.append((list(trials), remaining_seconds, seed, proposal))
        return proposal

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`."""
        return self.strategy.rank(study, trials)

    @property
    def proposals(self) -> list[Proposal]:
        """What it proposed, in order."""
        return [proposal for _, _, _, proposal in self.calls if proposal is not None]


def small_study(workspace: Path, strategy: str | dict[str, Any], slots: int = 1, **changes: Any) -> Study:
    """A simulated study with a strategy: three models, three rungs, no baselines."""
    settings = {
        "space": SPACE,
        "fidelity": RUNGS,
        "strategy": strategy,
        "budget": {"trial_seconds": SECONDS, "max_parallel": slots},
        "seeds": {"search": 3, "training": [0]},
        "baselines": [],
        **changes,
    }
    return simulated_study(workspace, **settings)


def search(study: Study, slots: int = 1) -> tuple[SearchResult, Recorded]:
    """Run a search, and remember how the strategy was asked."""
    recorded = Recorded(load_strategy(study))
    return run_search(study, MemoryLedger(), InlineDispatcher(slots), strategy=recorded), recorded


class StrategyConformance:
    """Inherit, and give the fixture `strategy`."""

    @pytest.fixture
    def strategy(self) -> str | dict[str, Any]:
        """What stands under `strategy` in the study file: a name, or a name with settings."""
        raise NotImplementedError

    def forget(self) -> None:
        """Empty the strategy's caches, if it has any: answers must not depend on them."""

    @pytest.mark.parametrize("slots", [1, 3])
    def test_a_search_ends_with_a_recommendation_and_depends_on_its_trials_alone(
        self, tmp_path: Path, strategy: str | dict[str, Any], slots: int
    ) -> None:
        study = small_study(tmp_path, strategy, slots)
        outcome, recorded = search(study, slots)
        assert outcome.complete
        assert outcome.recommended is not None
        assert outcome.target_trial is not None
        assert outcome.target_trial.configuration == outcome.recommended.configuration
        longest = max(done.charge_seconds for trial in outcome.trials for done in trial.segments)
        assert outcome.spent_seconds <= SECONDS + slots * longest
        assert len(recorded.proposals) >= 5
        for made in recorded.proposals:
            assert made.model in {model.name for model in study.ladder.models}
            assert made.stop_prompts in study.spec.fidelity.levels
            assert study.space.decode(study.space.encode(made.configuration)) == made.configuration
            assert made.suggestion.source.startswith(recorded.strategy.name)
            assert made.suggestion.explanation
        for trial in outcome.trials:
            assert all(before.end_step < after.end_step for before, after in pairwise(trial.segments))
        # Asked again in any order, with trials read from their records, it answers as it did in the search.
        for trials, remaining, seed, proposal in reversed(recorded.calls[::4]):
            read = [Trial.model_validate_json(trial.model_dump_json()) for trial in trials]
            self.forget()
            assert load_strategy(study).suggest(study, read, remaining, seed) == proposal

    def test_without_trials_it_ranks_nothing(self, tmp_path: Path, strategy: str | dict[str, Any]) -> None:
        study = small_study(tmp_path, strategy)
        assert load_strategy(study).rank(study, []) == []

    def test_a_search_in_which_nothing_is_feasible_ends(self, tmp_path: Path, strategy: str | dict[str, Any]) -> None:
        trainer = {"name": "simulated", "settings": {"memory_limit": 1.0}}
        outcome, _ = search(small_study(tmp_path, strategy, trainer=trainer), slots=2)
        assert outcome.complete
        assert outcome.recommended is None
        assert all(trial.state is TrialState.INFEASIBLE for trial in outcome.trials)

    @pytest.mark.parametrize("slots", [1, 2])
    def test_a_small_space_runs_out(self, tmp_path: Path, strategy: str | dict[str, Any], slots: int) -> None:
        space = {
            "scheduler": {"type": "choice", "values": ["constant", "cosine"]},
            "n_samples": {"type": "choice", "values": [4, 8, 16]},
        }
        budget = {"trial_seconds": 2000, "max_parallel": slots}
        outcome, _ = search(small_study(tmp_path, strategy, space=space, budget=budget), slots)
        assert outcome.complete
        assert outcome.recommended is not None
        assert spent_seconds(outcome.trials) < 2000
        assert len({configuration_key(trial.configuration) for trial in outcome.trials}) <= 6

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
    def test_other_spaces(self, tmp_path: Path, strategy: str | dict[str, Any], space: dict[str, Any]) -> None:
        outcome, recorded = search(small_study(tmp_path, strategy, space=space))
        assert outcome.recommended is not None
        assert len(recorded.proposals) >= 5
