"""Seconds per suggestion at 200 and 1,000 observations, with BoTorch's stock knowledge gradient beside ours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from botorch.acquisition import PosteriorMean
from botorch.acquisition.cost_aware import InverseCostWeightedUtility
from botorch.acquisition.fixed_feature import FixedFeatureAcquisitionFunction
from botorch.acquisition.knowledge_gradient import qMultiFidelityKnowledgeGradient
from botorch.acquisition.utils import project_to_target_fidelity
from botorch.fit import fit_gpytorch_mll
from botorch.models.cost import AffineFidelityCostModel
from botorch.models.gp_regression_fidelity import SingleTaskMultiFidelityGP
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from gpytorch.mlls import ExactMarginalLogLikelihood
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

from benchmarks import runner
from benchmarks.landscapes import LANDSCAPES, Problem
from benchmarks.runner import Timed
from jfhpo_core.optimizer.strategy import Proposal, fresh_configurations, load_strategy
from jfhpo_core.run.dispatch import Dispatcher, Finished, InlineDispatcher
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.study.hyperparameters import default_spaces
from jfhpo_core.study.resolved import Study, base_evaluations
from jfhpo_core.study.trial import Suggestion, spent_seconds

FILE = "timing.json"
OBSERVATIONS = (200, 1000)
"""How many evaluations a search begins with when it is timed."""

LEVELS = 15
HORIZON_PROMPTS = 960
EIGHTH = {"warmup_ratio": {"type": "float", "low": 0.0, "high": 0.2}}
"""One hyperparameter more than the default space has."""

FANTASIES = 16
RESTARTS = 5
RAW_SAMPLES = 128
"""Of the stock knowledge gradient: less than its tutorial's 128 fantasies, 10 restarts and 512 raw samples."""


class Timing(BaseModel):
    """CPU seconds of suggestions, one thread.

    Attributes:
        suggestions: Of ours, model fits included, for consecutive suggestions of a search.
        observations: How many there were at the first and at the last of them.
        stock: Of BoTorch's qMultiFidelityKnowledgeGradient with its model's fit, on the same observations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str
    commit: str
    suggestions: tuple[float, ...] = Field(min_length=1)
    observations: tuple[int, int]
    stock: tuple[float, ...]

    def summary(self) -> str:
        """One sentence for people."""
        stock = (
            f"; stock qMultiFidelityKnowledgeGradient ({FANTASIES} fantasies, {RESTARTS} restarts, continuous "
            f"fidelities): {np.median(self.stock):.1f} s (median of {len(self.stock)})"
            if self.stock
            else ""
        )
        return (
            f"{self.strategy}: median {np.median(self.suggestions):.2f} s, 95th percentile "
            f"{np.quantile(self.suggestions, 0.95):.2f} s, longest {max(self.suggestions):.2f} s over "
            f"{len(self.suggestions)} consecutive suggestions with {self.observations[0]} to {self.observations[1]} "
            f"observations{stock}"
        )


TIMINGS = TypeAdapter(tuple[Timing, ...])
"""What is stored."""


def measure(strategy: str, observations: int, suggestions: int, stock: int) -> Timing:
    """Time consecutive suggestions of a search on 8 hyperparameters, 3 sizes and 15 levels.

    Args:
        strategy: Name.
        observations: Evaluations before the first of them.
        suggestions: How many.
        stock: How many suggestions of the stock knowledge gradient.
    """
    torch.set_num_threads(1)
    problem = LANDSCAPES["aligned"](0)
    space = {**default_spaces()["llm"], **EIGHTH}
    fidelity = {"horizon_prompts": HORIZON_PROMPTS, "rungs": LEVELS}
    problem = Problem(
        problem.name, problem.seed, {**problem.data, "space": space, "fidelity": fidelity}, problem.trainer,
        problem.score, training_seconds=100 * problem.training_seconds,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="jfhpo-benchmark-") as workspace:
        study = problem.study(Path(workspace), strategy)
        ledger, dispatcher = MemoryLedger(), InlineDispatcher(1, trainer=problem.trainer)
        ledger.open(study.spec)
        _fill(study, ledger, dispatcher, observations)
        seconds_of_stock = [_stock(study, ledger, seed) for seed in range(stock)]
        first, seconds = _observations(ledger), []
        timed = Timed(load_strategy(study))
        for seed in range(suggestions):
            trials, before = ledger.trials(), timed.seconds
            remaining = study.spec.budget.device_seconds - spent_seconds(trials)
            timed.rank(study, trials)
            proposal = timed.suggest(study, trials, remaining, seed)
            seconds.append(round(timed.seconds - before, 4))
            if proposal is None:
                break
            last = _observations(ledger)
            _train(study, ledger, dispatcher, proposal)
    return Timing(
        strategy=strategy,
        commit=runner.commit(),
        suggestions=tuple(seconds),
        observations=(first, last),
        stock=tuple(seconds_of_stock),
    )


def _fill(study: Study, ledger: Ledger, dispatcher: Dispatcher, observations: int) -> None:
    """Train Sobol configurations, most on small models and for short, until there are enough observations."""
    random = np.random.default_rng(0)
    names = [model.name for model in study.ladder.models]
    for configuration in fresh_configurations(study, (), 0, observations):
        count = min(observations - _observations(ledger), int(random.integers(1, 8)))
        if count == 0:
            return
        level = study.spec.fidelity.levels[count - 1]
        model = str(random.choice(names, p=[0.6, 0.3, 0.1]))
        _train(
            study, ledger, dispatcher, Proposal(configuration, model, level, Suggestion(source="fill", explanation=""))
        )


def _observations(ledger: Ledger) -> int:
    return sum(evaluation.step > 0 for trial in ledger.trials() for evaluation in trial.evaluations)


def _train(study: Study, ledger: Ledger, dispatcher: Dispatcher, proposal: Proposal) -> None:
    """Train one segment and commit it."""
    trials = ledger.trials()
    new = study.new_trial(len(trials), proposal.configuration, proposal.model, study.spec.seeds.training[0])
    trial = next((known for known in trials if known.key == new.key), new)
    segment = study.next_segment(trial, proposal.stop_prompts, proposal.suggestion)
    ledger.begin(trial, segment)
    base = base_evaluations(trials).get(trial.model)
    dispatcher.submit(study.job(trial, segment, ledger.step_records(trial.key), base))
    for event in dispatcher.wait(0):
        if isinstance(event, Finished):
            committed = 1 + sum(len(known.segments) for known in trials)
            ledger.commit(event.key, event.result.model_copy(update={"committed": committed}), event.records)


def _stock(study: Study, ledger: Ledger, seed: int) -> float:
    """CPU seconds of one suggestion as in BoTorch's tutorial on multi-fidelity optimization, all inputs continuous."""
    torch.manual_seed(seed)
    rows, scores = _design(study, ledger)
    size, steps = study.space.dimension, study.space.dimension + 1
    targets = {size: 1.0, steps: 1.0}
    bounds = torch.tensor([[0.0] * (steps + 1), [1.0] * (steps + 1)], dtype=torch.double)
    began = time.process_time()
    model = SingleTaskMultiFidelityGP(rows, scores, data_fidelities=[size, steps], outcome_transform=Standardize(m=1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    at_target = FixedFeatureAcquisitionFunction(
        PosteriorMean(model), d=steps + 1, columns=[size, steps], values=[1.0, 1.0]
    )
    _, current = optimize_acqf(at_target, bounds[:, :size], q=1, num_restarts=RESTARTS, raw_samples=RAW_SAMPLES)
    acquisition = qMultiFidelityKnowledgeGradient(
        model,
        num_fantasies=FANTASIES,
        current_value=current,
        cost_aware_utility=InverseCostWeightedUtility(AffineFidelityCostModel(dict.fromkeys(targets, 1.0), 0.1)),
        project=lambda points: project_to_target_fidelity(points, targets, d=steps + 1),
    )
    optimize_acqf(acquisition, bounds, q=1, num_restarts=RESTARTS, raw_samples=RAW_SAMPLES)
    return round(time.process_time() - began, 2)


def _design(study: Study, ledger: Ledger) -> tuple[Tensor, Tensor]:
    """Inputs (unit cube, size, progress), shape (n, d + 2), all in [0, 1], and scores, shape (n, 1)."""
    smallest = study.ladder.size_coordinate(study.ladder.models[0].name)
    rows: list[Sequence[float]] = []
    scores = []
    for trial in ledger.trials():
        size = 1 - study.ladder.size_coordinate(trial.model) / smallest
        for evaluation in trial.evaluations:
            if evaluation.step:
                rows.append([*study.space.encode(trial.configuration), size, evaluation.prompts / HORIZON_PROMPTS])
                scores.append([evaluation.score])
    return torch.tensor(np.array(rows), dtype=torch.double), torch.tensor(scores, dtype=torch.double)
