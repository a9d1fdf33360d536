"""What `jfhpo why` says, in figures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jfhpo_core.optimizer.importance import Estimate, Importance, Interaction
from jfhpo_core.optimizer.predicted_front import Predicted
from jfhpo_core.study.trial import Configuration, Record, Value

Topic = Literal["tradeoffs", "matters", "collapse", "proxies", "choice", "next"]
"""What a sentence is about: constraints and the second objective, hyperparameters, collapsed runs, proxies, why this
choice, what to do next."""


class Boundary(Record):
    """A value of a hyperparameter beyond which most runs collapsed."""

    name: str
    side: Literal["above", "below"]
    between: tuple[float, float] = Field(description="Neighbouring values that were run, between which it lies.")
    model: str | None = Field(description="The model on which it was seen; null: over all models.")
    collapsed: int = Field(description="Collapsed runs beyond it.")
    runs: int = Field(description="Runs beyond it.")
    other_collapsed: int = Field(description="Collapsed runs on the other side.")
    other_runs: int = Field(description="Runs on the other side.")


class Proxy(Record):
    """What a smaller model could tell about the target."""

    name: str
    shared: float | None = Field(description="Share of its variance that the model believes it has in common, [0, 1].")
    spearman: float | None = Field(description="Measured rank agreement with the target, [-1, 1].")
    interval: tuple[float, float] | None = Field(description="Its 95 % bootstrap interval.")
    pairs: int = Field(description="Configurations measured on both.")
    horizon_share: float | None = Field(description="Share of the horizon at which they were measured.")


class Change(Record):
    """What one more full run of the target would have to score to change the recommendation."""

    second_at_least: float | None = Field(description="A run of the second best; null if none would do.")
    second_probability: float = Field(description="That it scores so much, in [0, 1].")
    first_at_most: float | None = Field(description="A run of the recommended configuration; null if none would do.")
    first_probability: float = Field(description="That it scores so little, in [0, 1].")


class Constraint(Record):
    """A constraint of the study, and what it costs."""

    limit: str = Field(description="As 'kl <= 0.2'.")
    configurations: int = Field(description="Configurations with a full run on the target.")
    broken_by: int = Field(description="Those of them that do not respect it, as measured.")
    best: float | None = Field(description="Score of the best configuration that respects all constraints.")
    without: float | None = Field(
        description="Score of the best one that breaks this constraint alone, if it is better; null otherwise."
    )
    without_trial: int | None = Field(description="First trial of that one.")
    without_value: float | None = Field(description="Its value of the metric; null: not recorded.")


class Front(Record):
    """The ends of the Pareto front of score and second objective, as measured."""

    metric: str
    direction: Literal["minimize", "maximize"]
    configurations: int = Field(description="Configurations on it; `jfhpo show` lists them.")
    best_score: tuple[float, float] = Field(description="Score and metric of the one with the best score.")
    best_metric: tuple[float, float] = Field(description="Score and metric of the one with the best metric.")


class Promise(Record):
    """The configuration without a full run that is expected to lie farthest above the measured front."""

    predicted: Predicted
    measured: float = Field(
        description="Best score that was measured with a metric as good as the far end of its interval, constraints "
        "respected."
    )


class Choice(Record):
    """The recommended configuration against the second best."""

    second: Configuration
    trial: int = Field(description="First trial of the second best.")
    difference: Estimate = Field(description="Expected score of the recommended one minus that of the second.")
    probability: float = Field(description="That the recommended one is better, in [0, 1].")
    differs: dict[str, tuple[Value | None, Value | None]] = Field(
        description="Values of the recommended and the second one where they differ, by importance."
    )
    change: Change | None = Field(default=None, description="What would change the choice; null if it is not told.")


class More(Record):
    """What a budget twice as large should bring."""

    seconds: float = Field(description="Device-seconds added.")
    now: float = Field(description="Expected final score of the best configuration now.")
    score: float = Field(description="Median of the forecast score.")
    low: float = Field(description="Lower end of its 80 % interval.")
    high: float = Field(description="Upper end.")


class Why(Record):
    """Everything that `jfhpo why` says, in figures and sentences."""

    study: str
    configurations: int = Field(description="Configurations that have been evaluated.")
    standard_error: float | None = Field(description="Of one evaluation's score; null without a model.")
    constraints: tuple[Constraint, ...] = Field(default=(), description="Of the study; empty before any full run.")
    front: Front | None = Field(default=None, description="With a second objective, once it has two configurations.")
    predicted_front: tuple[Predicted, ...] = Field(
        default=(),
        description="The front that the model expects, at even distances of the metric, best score first; empty "
        "without a second objective or a model.",
    )
    promise: Promise | None = Field(default=None, description="Of the predicted front; null without one.")
    importance: tuple[Importance, ...] = Field(default=(), description="Most important first; empty if unknown.")
    interactions: tuple[Interaction, ...] = Field(
        default=(), description="Of the most important ones, strongest first."
    )
    boundaries: tuple[Boundary, ...] = ()
    proxies: tuple[Proxy, ...] = ()
    choice: Choice | None = None
    more: More | None = None
    edges: tuple[str, ...] = Field(default=(), description="Hyperparameters recommended at the edge of their range.")
    topics: dict[Topic, tuple[str, ...]] = Field(default={}, description="The sentences by topic.")
    sentences: tuple[str, ...] = Field(default=(), description="All of them, in the order of a reader's questions.")

    def metrics(self) -> dict[str, float]:
        """Figures for a tracker: each hyperparameter's share of the variance, its interval, and the share alone."""
        return {
            name: value
            for item in self.importance
            for name, value in {
                f"importance/{item.name}": item.total.value,
                f"importance_low/{item.name}": item.total.low,
                f"importance_high/{item.name}": item.total.high,
                f"importance_alone/{item.name}": item.first.value,
            }.items()
        }
