"""The figures of a study that go into the final table, the ledger and Prefect's artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jfhpo_core.report.findings import search_trial_ratio
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Trial, TrialState, canonical_json


@dataclass(frozen=True)
class Counts:
    """Trials of the search proper, by size and by what became of them.

    Attributes:
        proxy: On the smallest model.
        intermediate: On sizes between the smallest and the target.
        target: On the target.
        stopped_by: Stopping rule to number of trials.
        resumed: Trials that were continued from a checkpoint.
        infeasible: Failed because of their configuration.
        lost: Given up after infrastructure failures.
    """

    proxy: int
    intermediate: int
    target: int
    stopped_by: dict[str, int]
    resumed: int
    infeasible: int
    lost: int

    @property
    def stopped(self) -> int:
        """Stopped early by any rule."""
        return sum(self.stopped_by.values())

    def sentence(self) -> str:
        """One line for people."""
        rules = ", ".join(f"{count} by {rule}" for rule, count in sorted(self.stopped_by.items()))
        parts = [
            f"{self.proxy} on the smallest model, {self.intermediate} on sizes between, {self.target} on the target",
            f"{self.stopped} stopped early{f' ({rules})' if rules else ''}",
            f"{self.resumed} continued from a checkpoint",
        ]
        parts += [f"{self.infeasible} infeasible"] if self.infeasible else []
        parts += [f"{self.lost} lost to infrastructure failures"] if self.lost else []
        return "; ".join(parts)


def counts(study: Study, trials: Sequence[Trial]) -> Counts:
    """Count the trials of the search proper."""
    search = [trial for trial in trials if trial.purpose == "search"]
    target = study.ladder.target.name
    smallest = study.ladder.models[0].name
    return Counts(
        proxy=sum(trial.model == smallest != target for trial in search),
        intermediate=sum(trial.model not in (smallest, target) for trial in search),
        target=sum(trial.model == target for trial in search),
        stopped_by=dict(
            Counter(trial.decision.rule for trial in search if trial.state is TrialState.STOPPED and trial.decision)
        ),
        resumed=sum(any(result.segment.start_step > 0 for result in trial.segments) for trial in search),
        infeasible=sum(trial.state is TrialState.INFEASIBLE for trial in search),
        lost=sum(trial.state is TrialState.LOST for trial in search),
    )


def facts(result: SearchResult) -> dict[str, str | float]:
    """What the ledger keeps about the study as a whole."""
    tally = counts(result.study, result.trials)
    found: dict[str, str | float] = {
        "complete": str(result.complete).lower(),
        "spent_seconds": result.spent_seconds,
        "trials.proxy": float(tally.proxy),
        "trials.intermediate": float(tally.intermediate),
        "trials.target": float(tally.target),
        "trials.stopped": float(tally.stopped),
        "trials.resumed": float(tally.resumed),
        "trials.infeasible": float(tally.infeasible),
        "trials.lost": float(tally.lost),
    }
    ratio = search_trial_ratio(result)
    if ratio is not None:
        found["relative_trial_cost"] = ratio[0] / ratio[1]
    if result.recommended is not None:
        found["recommended"] = canonical_json(result.recommended.configuration)
        found["expected_score"] = result.recommended.mean
        found["expected_score.sd"] = result.recommended.standard_deviation
    for row in result.rows:
        if not row.seeds:
            continue
        name = row.label.replace(" ", "_")
        found[f"score.{name}"] = row.score
        found[f"score.{name}.standard_error"] = row.standard_error
    return found
