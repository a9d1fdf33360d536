"""What a study will cost from where it stands, how long that takes, and what score it should end with.

The search proper is capped by its budget, so its cost is known; what the cost law has to forecast is the comparison
around it, whose runs reach full length on the target.

The score's forecast rests on full runs of the target: the best configuration scores as believed, and the rest of the
budget buys further ones at the rate and of the quality seen so far. What the study ends with is the better of the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student_t
from scipy.stats.distributions import rv_frozen

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.cost import CostEstimate, CostModel
from jfhpo_core.optimizer.strategy import Recommendation, fresh_configurations
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import Limit
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, StepRecord, Trial, TrialState, configuration_key, spent_seconds

TYPICAL_CONFIGURATIONS = 16
"""Configurations of the space that stand in for the recommendation while it is unknown (batch sizes move its cost)."""

FEWEST_CONFIGURATIONS = 4
"""Minimum number of full runs of the target needed to estimate how far good configurations differ."""

FEWEST_DRAWS = 0.01
"""Below this expected number of further configurations, ignore them: their quantiles are numerically undefined."""

SCORE_QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of the final score that are forecast: the ends of a central 80 % interval, and its middle."""

SMALLEST_DEVIATION = 1e-3
"""No score is known better than this share of the range of all."""

WIDER = 1.25
"""Factor on the deviations of beliefs and of further runs. Without it 24 of 34 forecasts held on the settings of the
foreign benchmark that are for tuning, with as many too high as too low."""

SMALLEST_SHARE = 1e-3
"""A share that is nearer to 0 or 1 counts as this far from it."""

SAMPLE = 4096
"""Quantiles that stand for the distribution of a further run's value where a limit binds."""

SMALLEST_PROBABILITY = 1e-12

SECONDS_PER_UNIT = {"": 3600.0, "h": 3600.0, "min": 60.0, "s": 1.0}
"""Units of an added budget; a bare number is GPU-hours, as in the study file."""

ENDED = (TrialState.COMPLETED, TrialState.STOPPED, TrialState.INFEASIBLE, TrialState.LOST)


@dataclass(frozen=True)
class Item:
    """One line of the bill.

    Attributes:
        cost: Device-seconds still to be spent.
        devices: How many of them its runs use at a time, on average.
    """

    name: str
    detail: str
    cost: CostEstimate
    devices: float


@dataclass(frozen=True)
class Forecast:
    """What is left to spend.

    Attributes:
        items: Baselines, search, confirmation and, if asked for, random search.
        full_runs: A full-length run of a typical configuration, by model, small to large.
        measured: Whether any segment of this study has been timed; else the figures are a prior's.
        basis: What the figures rest on, a sentence.
        slots: Trials that may run at the same time; None: as many as there are devices for.
        devices: Devices that the study may use at a time; None: they are not counted.
    """

    items: tuple[Item, ...]
    full_runs: dict[str, CostEstimate]
    measured: bool
    basis: str
    slots: int | None
    devices: int | None

    @property
    def full_trial(self) -> CostEstimate:
        """A full-length run on the target."""
        return list(self.full_runs.values())[-1]

    @property
    def total(self) -> CostEstimate:
        """The whole bill."""
        return _sum(item.cost for item in self.items)

    def wall(self, devices: int | None = None) -> CostEstimate:
        """Wall-clock seconds of the whole bill; start-up and suggestions not included.

        Args:
            devices: That there really are; None: `devices` of the forecast.
        """
        return _sum(scaled(item.cost, 1 / self._busy(item, devices or self.devices)) for item in self.items)

    def _busy(self, item: Item, devices: int | None) -> float:
        """Devices that are busy with an item, on average."""
        limits = [] if self.slots is None else [self.slots]
        if devices is not None:
            limits.append(max(1, int(devices / item.devices)))
        return min(limits) * item.devices


@dataclass(frozen=True)
class Quality:
    """What the configuration that the study will recommend should score on the target at full length.

    The noise of its measurement is not included.

    Attributes:
        score: Median of the forecast.
        low, high: Central 80 % interval.
        now: What the best configuration so far is believed to score.
        configurations: How many configurations, finished on the target, the forecast rests on.
        further: How many more full runs of the target the rest of the budget should buy.
    """

    score: float
    low: float
    high: float
    now: float
    configurations: int
    further: float


def forecast(study: Study, trials: Sequence[Trial], live: Mapping[str, StepRecord] | None = None) -> Forecast:
    """Forecast the rest of a study.

    Args:
        study: The study.
        trials: Its trials so far; none before it begins.
        live: The latest steps of running trials, by key.
    """
    spec, costs = study.spec, CostModel.fit(study, trials, live)
    typical = fresh_configurations(study, [], spec.seeds.search, TYPICAL_CONFIGURATIONS)
    horizon = spec.fidelity.horizon_prompts
    runs = {
        model.name: _mean([costs.estimate(configuration, model.name, 0, horizon) for configuration in typical])
        for model in study.ladder.models
    }
    full = runs[study.ladder.target.name]
    first, *further = spec.seeds.training

    def baselines(seed: int) -> list[CostEstimate]:
        return [
            _left(study, costs, b.configuration, _find(study, trials, b.configuration, seed)) for b in spec.baselines
        ]

    confirmations = [cost for seed in further for cost in baselines(seed)]
    confirmed = sum(trial.purpose == "confirmation" and trial.label == "recommended" for trial in trials)
    search = _spendable(spec.budget.device_seconds - spent_seconds(trials), full, over=confirmed > 0)
    confirmations += [full] * max(0, len(further) - confirmed)
    devices = study.ladder.target.devices
    items = [
        Item(
            "baselines",
            f"{len(spec.baselines)} at full length on {study.ladder.target.name}",
            _sum(baselines(first)),
            devices,
        ),
        Item(
            "search",
            f"the budget; {spec.budget.validation_share:.0%} of it held back to validate up to {spec.budget.top_k} on "
            f"{study.ladder.target.name}",
            CostEstimate(search, search, search),
            _search_devices(study, trials),
        ),
        Item(
            "confirmation",
            f"recommendation and baselines with {len(further)} more seed(s)",
            _sum(confirmations),
            devices,
        ),
    ]
    if spec.random_search:
        begun = any(trial.purpose == "random-search" for trial in trials)
        left = _spendable(spec.budget.device_seconds - spent_seconds(trials, "random-search"), full, over=begun)
        items.append(
            Item("random search", "for comparison, at the search's cost", CostEstimate(left, left, left), devices)
        )
    # Where only the cluster will tell how many devices there are, at least the largest model has to fit.
    counted = spec.cluster.devices or (max(m.devices for m in study.ladder.models) if spec.slots is None else None)
    timed = any(trial.segments for trial in trials)
    return Forecast(tuple(items), runs, timed, _basis(study, trials, costs), spec.slots, counted)


def _spendable(seconds: float, full: CostEstimate, *, over: bool) -> float:
    """What of a budget will be spent; the rest of one that is used up, too little for another full run, will not."""
    return 0.0 if seconds <= 0 or (over and seconds < full.high) else seconds


def _basis(study: Study, trials: Sequence[Trial], costs: CostModel) -> str:
    measured = sum(bool(trial.segments) for trial in trials)
    if measured:
        return f"The forecast rests on {measured} trial(s) of this study; what they cost is deducted."
    if any(earlier.trials for earlier in study.earlier):
        return "The forecast rests on earlier studies: nothing of this study has been timed yet."
    if costs.prices is None:
        return "A rough guess: nothing of this study has been timed yet. The first trials make it sharp."
    cluster, device = study.spec.cluster, costs.prices.device.name
    assumed = ", which is assumed (set cluster.gpu)" if cluster.gpus_per_device and cluster.gpu is None else ""
    return (
        f"Nothing of this study has been timed yet: the figures come from parameters, tokens and hardware ({device}"
        f"{assumed}), with completions of half the allowed length. The first measured step corrects them."
    )


def _search_devices(study: Study, trials: Sequence[Trial]) -> float:
    """Devices that a run of the search uses, averaged over what is charged.

    Until something is charged, as if all models were charged alike.
    """
    results = [result for trial in trials if trial.purpose == "search" for result in trial.segments]
    seconds = sum(result.seconds for result in results)
    if seconds > 0:
        return sum(result.charge_seconds for result in results) / seconds
    models = study.ladder.models
    return len(models) / sum(1 / model.devices for model in models)


def forecast_quality(study: Study, ranked: Sequence[Recommendation], trials: Sequence[Trial]) -> Quality | None:
    """Forecast the score that the study ends with.

    It rests on full runs of the target, baselines within the space among them: what proxies and short runs promise of
    it is too uncertain, and the best of many such promises is one of the most exaggerated. None as long as there are
    too few.

    With A the best finished configuration's score, normal as the strategy believes it, and B the best of K further
    runs, drawn like those that have finished, the final score is max(A, B):

        P(score <= x) = P(A <= x) P(B <= x) = Phi((x - a) / s) T((x - m) / t)^K

    m is the median of the n scores, t their upper spread (the uncertainty of the beliefs included), and T Student's
    distribution with n - 1 degrees of freedom: few runs give a wide forecast. K is how many more the rest of the budget
    buys at the price paid so far; it grows with the budget, and every quantile with it, by less and less. Where all
    scores so far are shares, their logits are forecast, so that the forecast is one, too.

    With constraints, A is the best of those that respect them, and a further run counts with the probability r(u) of
    respecting them at its score u (`_Respecting`): where high scores are those that break a limit, it binds. None as
    long as nothing respects them.

    Args:
        study: The study; its budget is what is left to spend.
        ranked: The strategy's ranking, best first.
        trials: The study's trials.
    """
    history, spent = History.of(study, trials), spent_seconds(trials)
    done = {configuration_key(trial.configuration) for trial in history.finished}
    known = [item for item in ranked if configuration_key(item.configuration) in done]
    respects = np.array([not history.breaks(item.configuration) for item in known], dtype=bool)
    bought = sum(trial.purpose == "search" for trial in history.finished)
    if len(known) < FEWEST_CONFIGURATIONS or spent <= 0 or not bought or not respects.any():
        return None
    count, further = len(known), bought * max(0.0, study.spec.budget.device_seconds - spent) / spent
    scale = _Logits() if _are_shares(trials) else _Scores()
    means, doubts = scale.to(known)
    middle = float(np.median(means))
    # The upper half only: configurations that ruin a run say nothing about how good the good ones are.
    upper = means[means >= middle] - middle
    spread = WIDER * math.sqrt((np.mean(upper**2) + np.mean(doubts**2)) * (1 + 1 / count))
    least = max(SMALLEST_DEVIATION * float(np.ptp(means)), math.ulp(float(np.abs(means).max())) * 1e3)
    best = int(np.where(respects, means, -np.inf).argmax())
    believed = norm(means[best], max(WIDER * doubts[best], least))
    another: _Draw = student_t(count - 1, middle, max(spread, least))
    if study.spec.limits:
        measured = [history.measured(item.configuration) for item in known]
        another = _Respecting(another, study.spec.limits, means, measured)
    low, score, high = (
        scale.back(_quantile_of_maximum(share, believed, another, further, least)) for share in SCORE_QUANTILES
    )
    return Quality(score, low, high, known[best].mean, count, further)


class _Scores:
    """Scores without bounds, as they are."""

    def to(self, items: Sequence[Recommendation]) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations, each of shape (n,)."""
        return np.array([item.mean for item in items]), np.array([item.standard_deviation for item in items])

    def back(self, value: float) -> float:
        """The score of a value."""
        return value


class _Logits(_Scores):
    """Shares by their logits."""

    def to(self, items: Sequence[Recommendation]) -> tuple[np.ndarray, np.ndarray]:
        """See `_Scores.to`."""
        means, deviations = super().to(items)
        means = means.clip(SMALLEST_SHARE, 1 - SMALLEST_SHARE)
        return np.log(means / (1 - means)), deviations / (means * (1 - means))

    def back(self, value: float) -> float:
        """See `_Scores.back`."""
        return 1 / (1 + math.exp(-value))


def _are_shares(trials: Sequence[Trial]) -> bool:
    """Whether all scores so far are shares, as accuracies are."""
    return all(0 <= evaluation.score <= 1 for trial in trials for evaluation in trial.evaluations)


class _Draw(Protocol):
    """A distribution as scipy has them."""

    def logcdf(self, x: float) -> float: ...

    def ppf(self, q: float) -> float: ...


class _Respecting:
    """The value of a further run, minus infinity where it breaks a constraint.

    Args:
        another: Distribution of the value.
        limits: The constraints.
        means: Values of the known runs, shape (n,).
        measured: What these come to, by metric.

    A metric (its logarithm, of a share its logit) is a line over the value, fitted by least squares, and Student's
    distribution around it tells the probability r(u) that a run with the value u respects the limit. So a further run
    is above x with the probability P(U > x, respects) = E[r(U); U > x].
    """

    def __init__(
        self, another: rv_frozen, limits: Sequence[Limit], means: np.ndarray, measured: Sequence[Mapping[str, float]]
    ) -> None:
        self._values = another.ppf((np.arange(SAMPLE) + 0.5) / SAMPLE)
        respected = np.ones(SAMPLE)
        for limit in limits:
            recorded = np.array([limit.metric in found for found in measured])
            respected *= _respected(
                limit,
                means[recorded],
                [found[limit.metric] for found in measured if limit.metric in found],
                self._values,
            )
        # Of values in ascending order the share that lies above and respects all limits.
        self._within = 1 - np.append(np.cumsum(respected[::-1])[::-1], 0.0) / SAMPLE

    def logcdf(self, x: float) -> float:
        """Logarithm of the probability that the value is at most x."""
        return math.log(max(SMALLEST_PROBABILITY, np.interp(x, self._values, self._within[1:], left=self._within[0])))

    def ppf(self, q: float) -> float:
        """Smallest value that is not exceeded with the probability q; minus infinity below what breaks a limit."""
        return -math.inf if q <= self._within[0] else float(np.interp(q, self._within[1:], self._values))


def _respected(limit: Limit, means: np.ndarray, metrics: Sequence[float], at: np.ndarray) -> np.ndarray:
    """Probability that runs with the values `at` respect a limit, shape (len(at),)."""
    from jfhpo_core.optimizer.constraints import NOISE, MetricScale  # needs torch, which a bill does not
    from jfhpo_core.optimizer.score_scale import TARGET

    scale = MetricScale.of(limit, metrics)
    places = np.array([scale.value(TARGET, metric)[0] for metric in metrics])
    count, around = len(places), means - means.mean()
    length = max(float(around @ around), SMALLEST_PROBABILITY)
    slope = float(around @ places) / length
    errors = places - places.mean() - slope * around
    variance = float(errors @ errors) / max(1, count - 2) + NOISE**2
    distance = at - means.mean()
    deviation = np.sqrt(variance * (1 + 1 / count + distance**2 / length))
    within = (scale.bound - places.mean() - slope * distance) / deviation
    probability: np.ndarray = student_t(max(1, count - 2)).cdf(within if limit.at_most else -within)
    return probability


def _quantile_of_maximum(share: float, known: rv_frozen, another: _Draw, count: float, margin: float) -> float:
    """Quantile of the larger one of a draw of `known` and the best of `count` draws of `another`, all independent.

    Args:
        share: Which quantile.
        known: A distribution.
        another: Another one.
        count: How many draws.
        margin: Of the bounds, so that rounding does not move the root out of them.
    """
    if count < FEWEST_DRAWS:
        return float(known.ppf(share))
    target = math.log(share)
    # Below the first bound one of the two alone is too improbable; at the second their product is probable enough.
    lowest = max(known.ppf(share), another.ppf(math.exp(target / count)))
    highest = max(known.ppf(math.sqrt(share)), another.ppf(math.exp(target / (2 * count))))
    bounds = lowest - margin, highest + margin
    return float(brentq(lambda x: known.logcdf(x) + count * another.logcdf(x) - target, *bounds))


def with_more(study: Study, seconds: float) -> Study:
    """The study with a larger search budget, in device-seconds."""
    budget = study.spec.budget
    larger = budget.model_copy(update={"trial_seconds": budget.device_seconds + seconds, "gpu_hours": None})
    return replace(study, spec=study.spec.model_copy(update={"budget": larger}))


def parse_more(text: str) -> float:
    """Device-seconds of an added budget such as '2.5' or '2.5h' (GPU-hours), '30min' or '600s'.

    Raises:
        SpecError: It is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(h|min|s)?", text.strip())
    seconds = float(match[1]) * SECONDS_PER_UNIT[match[2] or ""] if match else 0.0
    if not 0 < seconds < math.inf:
        raise SpecError(f"--more {text!r}: give a budget to add, in GPU-hours (2.5) or with a unit (30min, 600s)")
    return seconds


def _find(study: Study, trials: Sequence[Trial], configuration: Configuration, seed: int) -> Trial | None:
    """The baseline or confirmation trial of a configuration on the target."""
    wanted = (study.ladder.target.name, seed, configuration_key(configuration))
    return next(
        (
            trial
            for trial in trials
            if (trial.model, trial.seed, configuration_key(trial.configuration)) == wanted
            and trial.purpose in ("baseline", "confirmation")
        ),
        None,
    )


def _left(study: Study, costs: CostModel, configuration: Configuration, trial: Trial | None) -> CostEstimate:
    """Cost of what a full-length training on the target still lacks."""
    if trial is not None and trial.state in ENDED:
        return CostEstimate(0.0, 0.0, 0.0)
    done = 0 if trial is None else trial.step * trial.prompts_per_step
    return costs.estimate(configuration, study.ladder.target.name, done, study.spec.fidelity.horizon_prompts)


def scaled(cost: CostEstimate, factor: float) -> CostEstimate:
    """A multiple of a cost; its interval scales with it."""
    return CostEstimate(cost.seconds * factor, cost.low * factor, cost.high * factor)


def _sum(costs: Iterable[CostEstimate]) -> CostEstimate:
    """Sum with the ends added up as well: the errors share one law, so they do not average out."""
    parts = list(costs)
    return CostEstimate(sum(c.seconds for c in parts), sum(c.low for c in parts), sum(c.high for c in parts))


def _mean(costs: Sequence[CostEstimate]) -> CostEstimate:
    return scaled(_sum(costs), 1 / len(costs))
