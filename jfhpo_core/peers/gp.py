"""The strategy `gp`: single-fidelity Bayesian optimization as BoTorch recommends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from botorch.acquisition import qLogNoisyExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from jfhpo_core.optimizer.strategy import Count, Positive, fresh_configurations
from jfhpo_core.peers.base import Choice, Peer
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Space
from jfhpo_core.study.trial import Configuration, Trial, TrialState, configuration_key

SAMPLES = 64
"""Posterior samples of the acquisition."""

FIT_STEPS = 60
"""Iterations of the hyperparameter fit at most; more change the likelihood in the third digit."""

VARIANCE_FLOOR = 1e-6
"""Minimum variance of an observation, so that scores measured without error leave the covariance well conditioned."""


@dataclass(frozen=True)
class Gp(Peer):
    """A Gaussian process over the unit cube and noisy expected improvement (qLogNEI), every trial at full length.

    The candidates are explicit, because the space is mixed: new Sobol configurations and perturbations of the best. The
    evaluations' standard errors are the noise. A stopped trial counts with the score at its stop, an infeasible one
    with the worst score seen; lost ones are left out. Running trials are pending points of the acquisition.

    Attributes:
        initial_trials: Sobol configurations before the model is asked; None: one more than the space has coordinates.
        fresh: New Sobol configurations among the candidates.
        local: Perturbations of the best configurations among the candidates.
    """

    name: ClassVar[str] = "gp"
    initial_trials: Positive | None = None
    fresh: Positive = 256
    local: Count = 256

    def choose(self, study: Study, mine: Sequence[Trial], seed: int) -> Choice | None:
        """See `Peer.choose`."""
        horizon = study.spec.fidelity.horizon_prompts
        wanted = self.initial_trials if self.initial_trials is not None else study.space.dimension + 1
        scored = observed(mine)
        if len(mine) < wanted or not scored:
            first = fresh_configurations(study, mine, study.spec.seeds.search, 1)
            return Choice(first[0], horizon, "initial design: Sobol configuration") if first else None
        running = [trial.configuration for trial in mine if trial.state is TrialState.RUNNING]
        chosen = propose(study, scored, running, [trial.configuration for trial in mine], self.fresh, self.local, seed)
        return Choice(chosen, horizon, "largest noisy expected improvement") if chosen else None


@dataclass(frozen=True)
class Scored:
    """A configuration with a score and its variance."""

    configuration: Configuration
    score: float
    variance: float


def observed(mine: Sequence[Trial]) -> list[Scored]:
    """What the model is fitted to: see `Gp`; empty as long as no trial has a score."""
    measured = []
    failed = []
    for trial in mine:
        trained = [evaluation for evaluation in trial.evaluations if evaluation.step > 0]
        if trial.state is TrialState.INFEASIBLE:
            failed.append(trial.configuration)
        elif trained and trial.state in (TrialState.COMPLETED, TrialState.STOPPED):
            measured.append(Scored(trial.configuration, trained[-1].score, trained[-1].standard_error ** 2))
    return with_failed(measured, failed)


def with_failed(measured: Sequence[Scored], failed: Sequence[Configuration]) -> list[Scored]:
    """Observations with failed configurations added at the worst score seen; empty if there is none."""
    if not measured:
        return []
    worst = min(measured, key=lambda item: item.score)
    return [*measured, *(Scored(configuration, worst.score, worst.variance) for configuration in failed)]


def propose(
    study: Study,
    scored: Sequence[Scored],
    running: Sequence[Configuration],
    known: Sequence[Configuration],
    fresh: int,
    local: int,
    seed: int,
) -> Configuration | None:
    """The candidate with the largest noisy expected improvement; None when the space has run out.

    Args:
        study: The study.
        scored: What has been observed, not empty.
        running: Configurations whose score is to come.
        known: Configurations that are no candidates.
        fresh: Sobol candidates.
        local: Candidates near the best.
        seed: Of candidates and posterior samples.
    """
    space = study.space
    candidates = _candidates(study, scored, known, fresh, local, np.random.default_rng(seed))
    if not candidates:
        return None
    with manual_seed(seed):  # BoTorch draws from the global generator when it prunes the baseline
        model = fit(space, scored)
        acquisition = qLogNoisyExpectedImprovement(
            model,
            model.train_inputs[0],
            sampler=SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed),
            X_pending=_points(space, running) if running else None,
        )
        with torch.no_grad():
            values = acquisition(_points(space, candidates).unsqueeze(-2))
    return candidates[int(values.argmax())]


def fit(space: Space, scored: Sequence[Scored]) -> SingleTaskGP:
    """BoTorch's default model with the known noise, fitted to the posterior mode."""
    model = SingleTaskGP(
        _points(space, [item.configuration for item in scored]),
        torch.tensor([[item.score] for item in scored], dtype=torch.double),
        torch.tensor([[max(item.variance, VARIANCE_FLOOR)] for item in scored], dtype=torch.double),
    )
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": FIT_STEPS}})
    return model


LOCAL_BEST = 5
"""The best configurations that local candidates are drawn around."""

LOCAL_WIDTHS = (0.03, 0.1, 0.3)
"""Standard deviations of a perturbation, in coordinates of the unit cube."""

LOCAL_SHARE = 0.5
"""Probability that a coordinate is perturbed."""


def _candidates(
    study: Study,
    scored: Sequence[Scored],
    known: Sequence[Configuration],
    fresh: int,
    local: int,
    random: np.random.Generator,
) -> list[Configuration]:
    space = study.space
    seen = {configuration_key(configuration) for configuration in known}
    trials = [study.new_trial(0, configuration, study.ladder.target.name, 0) for configuration in known]
    candidates = fresh_configurations(study, trials, int(random.integers(2**31)), fresh)
    best = sorted(scored, key=lambda item: -item.score)[:LOCAL_BEST]
    centres = np.array([space.encode(item.configuration) for item in best])
    around = centres[random.integers(len(centres), size=local)]
    steps = random.normal(size=around.shape) * random.choice(LOCAL_WIDTHS, size=(local, 1))
    moved = np.clip(around + steps * (random.random(around.shape) < LOCAL_SHARE), 0, 1)
    candidates += [space.decode(row) for row in moved]
    unique = {configuration_key(configuration): configuration for configuration in candidates}
    return [configuration for key, configuration in unique.items() if key not in seen]


def _points(space: Space, configurations: Sequence[Configuration]) -> Tensor:
    """Shape (n, d)."""
    return torch.tensor(np.array([space.encode(configuration) for configuration in configurations]), dtype=torch.double)
