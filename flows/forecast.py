"""The bill: what a study will cost from where it stands, with an interval.

The search proper is capped by its budget, so its cost is known; what the cost law has to forecast is the comparison
around it, whose trainings run at full length on the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jfhpo_core.cost import CostEstimate, CostModel
from jfhpo_core.strategies import fresh_configurations
from jfhpo_core.study import Study
from jfhpo_core.trial import Configuration, Trial, TrialState, configuration_key, spent_seconds

TYPICAL_CONFIGURATIONS = 16
"""Configurations of the space that stand in for the recommendation while it is unknown (batch sizes move its cost)."""

ENDED = (TrialState.COMPLETED, TrialState.STOPPED, TrialState.INFEASIBLE, TrialState.LOST)


@dataclass(frozen=True)
class Item:
    """One line of the bill, in device-seconds still to be spent."""

    name: str
    detail: str
    cost: CostEstimate


@dataclass(frozen=True)
class Forecast:
    """What is left to spend.

    Attributes:
        items: Baselines, search, confirmation and, if asked for, random search.
        full_trial: A full-length training on the target of a typical configuration.
        measured: Whether any segment of this study has been timed; else the figures are a prior's.
    """

    items: tuple[Item, ...]
    full_trial: CostEstimate
    measured: bool

    @property
    def total(self) -> CostEstimate:
        """The whole bill."""
        return _sum(item.cost for item in self.items)


def forecast(study: Study, trials: Sequence[Trial]) -> Forecast:
    """Forecast the rest of a study from its trials so far (none before it begins)."""
    spec, costs = study.spec, CostModel.fit(study, trials)
    typical = fresh_configurations(study, [], spec.seeds.search, TYPICAL_CONFIGURATIONS)
    full = _mean([_left(study, costs, configuration, None) for configuration in typical])
    first, *further = spec.seeds.training

    def baselines(seed: int) -> list[CostEstimate]:
        return [
            _left(study, costs, b.configuration, _find(study, trials, b.configuration, seed)) for b in spec.baselines
        ]

    search = max(0.0, spec.budget.device_seconds - spent_seconds(trials))
    confirmations = [cost for seed in further for cost in baselines(seed)]
    confirmed = sum(trial.purpose == "confirmation" and trial.label == "recommended" for trial in trials)
    confirmations += [full] * max(0, len(further) - confirmed)
    items = [
        Item(
            "baselines", f"{len(spec.baselines)} at full length on {study.ladder.target.name}", _sum(baselines(first))
        ),
        Item(
            "search",
            f"the budget; {spec.budget.validation_share:.0%} of it held back to validate up to {spec.budget.top_k} on "
            f"{study.ladder.target.name}",
            CostEstimate(search, search, search),
        ),
        Item("confirmation", f"recommendation and baselines with {len(further)} more seed(s)", _sum(confirmations)),
    ]
    if spec.random_search:
        left = max(0.0, spec.budget.device_seconds - spent_seconds(trials, "random-search"))
        items.append(Item("random search", "for comparison, at the search's cost", CostEstimate(left, left, left)))
    return Forecast(tuple(items), full, any(trial.segments for trial in trials))


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


def _sum(costs: Iterable[CostEstimate]) -> CostEstimate:
    """Sum with the ends added up as well: the errors share one law, so they do not average out."""
    parts = list(costs)
    return CostEstimate(sum(c.seconds for c in parts), sum(c.low for c in parts), sum(c.high for c in parts))


def _mean(costs: Sequence[CostEstimate]) -> CostEstimate:
    total, count = _sum(costs), len(costs)
    return CostEstimate(total.seconds / count, total.low / count, total.high / count)
