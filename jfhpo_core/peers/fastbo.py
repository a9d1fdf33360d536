"""The strategy `fastbo`: a fidelity of its own for every configuration, after FastBO (arXiv 2409.00584).

No maintained library has it, so this is our own short version. From the paper: each configuration is trained up to a
warm-up point; its learning curve, estimated from there, gives its efficient point, the earliest length whose doubling
gains less than a threshold; it is trained up to that point, and the score there is what the Gaussian process over
configurations is fitted to; a configuration that gets worse during the warm-up is given up.

Ours: one saturating exponential instead of a mixture of three parametric curves, because a warm-up has one to three
evaluations here; efficient points are rungs; the threshold is wider than the paper's 0.001, which the noise of an
evaluation swallows; the acquisition is that of `gp`. The paper's last stage trains the best k to the points at which
their curves saturate; here the search's own validation trains them to full length, chosen by `rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jfhpo_core.optimizer.strategy import Count, Positive, Recommendation, Share, fresh_configurations
from jfhpo_core.peers.base import Choice, Peer
from jfhpo_core.peers.gp import Scored, propose, with_failed
from jfhpo_core.study.resolved import Study, base_scores
from jfhpo_core.study.trial import Evaluation, Trial, TrialState, configuration_key

RATES = np.geomspace(0.5, 50.0, 41)
"""Saturation rates that a curve may have, per horizon."""

TYPICAL_RATE, RATE_FACTOR = 3.0, 3.0
"""A curve's rate lies within this factor of this value, as one standard deviation of its logarithm."""


@dataclass(frozen=True)
class Curve:
    """score(t) = start + gain (1 - exp(-rate t)), with t the share of the horizon."""

    start: float
    gain: float
    rate: float

    @classmethod
    def fit(cls, evaluations: Sequence[Evaluation], horizon_prompts: int, start: float) -> Curve:
        """The curve of largest posterior density: a weighted fit of the gain for each rate, and a prior on the rate.

        Args:
            evaluations: At least one, after training.
            horizon_prompts: Length of a full run.
            start: Score of the untrained model.
        """
        share = np.array([item.prompts / horizon_prompts for item in evaluations])
        scores = np.array([item.score for item in evaluations]) - start
        weights = 1 / np.maximum([item.standard_error for item in evaluations], SMALLEST_ERROR) ** 2
        shapes = -np.expm1(-np.outer(RATES, share))
        gains = (shapes * weights) @ scores / (shapes**2 @ weights)
        misfit = ((gains[:, None] * shapes - scores) ** 2) @ weights
        unusual = (np.log(RATES / TYPICAL_RATE) / np.log(RATE_FACTOR)) ** 2
        best = int(np.argmin(misfit + unusual))
        return cls(start, float(gains[best]), float(RATES[best]))

    def score(self, share: float) -> float:
        """Expected score after a share of the horizon."""
        return self.start - self.gain * float(np.expm1(-self.rate * share))

    def efficient_point(self, levels: Sequence[int], threshold: float) -> int:
        """The first level whose doubling, up to the horizon, gains less than the threshold."""
        horizon = levels[-1]
        return next(
            level
            for level in levels
            if self.score(min(1.0, 2 * level / horizon)) - self.score(level / horizon) < threshold
        )


SMALLEST_ERROR = 1e-3
"""Standard error of a score at least, so that scores measured without error do not weigh infinitely."""


@dataclass(frozen=True)
class FastBo(Peer):
    """Bayesian optimization with an efficient length for every configuration; see the module.

    A stopped trial counts with its last score, an infeasible one with the worst score seen; lost ones are left out.

    Attributes:
        warmup_share: Share of the horizon after which the efficient point is estimated.
        threshold: What doubling the length must gain, in score.
        initial_trials: Sobol configurations before the model is asked; None: one more than the space has coordinates.
        fresh: See `Gp`.
        local: See `Gp`.
    """

    name: ClassVar[str] = "fastbo"
    warmup_share: Share = 0.2
    threshold: float = 0.02
    initial_trials: Positive | None = None
    fresh: Positive = 256
    local: Count = 256

    def choose(self, study: Study, mine: Sequence[Trial], seed: int) -> Choice | None:
        """See `Peer.choose`."""
        levels = study.spec.fidelity.levels
        warmup = next(level for level in levels if level >= self.warmup_share * levels[-1])
        scored, failed = [], []
        for trial in mine:
            reached = trial.step * trial.prompts_per_step
            if trial.state is TrialState.INFEASIBLE:
                failed.append(trial.configuration)
            elif trial.state in (TrialState.PAUSED, TrialState.COMPLETED):
                point = self._efficient_point(study, mine, trial, warmup)
                if reached < point:
                    why = "warm-up" if point == warmup else "efficient point by its learning curve"
                    return Choice(trial.configuration, point, f"{why}: {point} of {levels[-1]} prompts")
                scored += _scored(trial, point)
            elif trial.state is TrialState.STOPPED:
                scored += _scored(trial, reached)
        wanted = self.initial_trials if self.initial_trials is not None else study.space.dimension + 1
        if len(mine) < wanted or not scored:
            first = fresh_configurations(study, mine, study.spec.seeds.search, 1)
            return Choice(first[0], warmup, "initial design: Sobol configuration") if first else None
        running = [trial.configuration for trial in mine if trial.state is TrialState.RUNNING]
        known = [trial.configuration for trial in mine]
        chosen = propose(study, with_failed(scored, failed), running, known, self.fresh, self.local, seed)
        return Choice(chosen, warmup, "largest noisy expected improvement") if chosen else None

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`: by the final score, where it is not measured yet by the learning curve's forecast.

        Trials on a proxy stand behind all those on the target.
        """
        best: dict[str, tuple[tuple[bool, float], Recommendation]] = {}
        starts = base_scores(trials)
        horizon = study.spec.fidelity.horizon_prompts
        for trial in trials:
            trained = [item for item in trial.evaluations if item.step > 0]
            usable = trial.state in (TrialState.COMPLETED, TrialState.PAUSED, TrialState.RUNNING)
            if trial.purpose != "search" or not trained or not usable:
                continue
            curve = Curve.fit(trained, horizon, starts.get(trial.model, 0.0))
            mean = trial.final.score if trial.final is not None else curve.score(1.0)
            order = (trial.model == study.ladder.target.name, mean)
            key = configuration_key(trial.configuration)
            if key not in best or order > best[key][0]:
                best[key] = (order, Recommendation(trial.configuration, mean, trained[-1].standard_error))
        return [item for _, item in sorted(best.values(), key=lambda entry: entry[0], reverse=True)]

    def _efficient_point(self, study: Study, mine: Sequence[Trial], trial: Trial, warmup: int) -> int:
        """Where a healthy trial is trained to before it is judged: the warm-up point, then its efficient point."""
        seen = [item for item in trial.evaluations if item.step > 0 and item.prompts <= warmup]
        if not seen or seen[-1].prompts < warmup:
            return warmup
        start = base_scores(mine).get(trial.model, 0.0)
        if seen[-1].score < start:
            return warmup
        levels = study.spec.fidelity.levels
        curve = Curve.fit(seen, levels[-1], start)
        return max(warmup, curve.efficient_point(levels, self.threshold))


def _scored(trial: Trial, prompts: int) -> list[Scored]:
    """The observation of a trial at a level, or its last one before."""
    seen = [item for item in trial.evaluations if item.step > 0 and item.prompts <= prompts]
    return [Scored(trial.configuration, seen[-1].score, seen[-1].standard_error ** 2)] if seen else []
