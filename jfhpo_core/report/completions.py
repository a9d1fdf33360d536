"""What the models wrote: completions of the same held-out prompts as training went on, so that a stop can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.trial import Example, Trial, TrialState

MOST_STOPPED = 6
"""Stopped trials that the report shows, those on the largest models first and of these the newest."""


@dataclass(frozen=True)
class Reading:
    """The completions of a trial.

    Attributes:
        title: Which trial it is, and why it is shown.
        ending: What the stopping rule said; empty for a trial that none stopped.
        prompts: Each held-out prompt with what was written at each evaluation: (step, example).
    """

    trial: Trial
    title: str
    ending: str
    prompts: Sequence[tuple[str, Sequence[tuple[int, Example]]]]


def completions(trial: Trial) -> list[tuple[int, Example]]:
    """All kept completions of a trial, by step: (step, example)."""
    return [(evaluation.step, example) for evaluation in trial.evaluations for example in evaluation.examples]


def readings(result: SearchResult) -> list[Reading]:
    """The recommended run, recipes and stopped trials, as far as their completions were kept."""
    sizes = {model.name: model.parameters for model in result.study.ladder.models}
    kept = [trial for trial in result.trials if any(step > 0 for step, _ in completions(trial))]
    chosen: list[tuple[Trial, str]] = []
    if result.target_trial is not None:
        chosen += [(trial, "recommended") for trial in kept if trial.key == result.target_trial.key]
    chosen += [(trial, f"recipe {trial.label}") for trial in kept if trial.purpose == "baseline"]
    stopped = [trial for trial in kept if trial.state is TrialState.STOPPED]
    stopped.sort(key=lambda trial: (-sizes[trial.model], -trial.number))
    chosen += [(trial, "stopped") for trial in stopped[:MOST_STOPPED]]
    shown = {trial.key: (trial, why) for trial, why in reversed(chosen)}
    return [_reading(*shown[key]) for key in reversed(shown)]


def _reading(trial: Trial, why: str) -> Reading:
    by_prompt: dict[str, list[tuple[int, Example]]] = {}
    for step, example in completions(trial):
        by_prompt.setdefault(example.prompt, []).append((step, example))
    ending = trial.decision.explain() if trial.decision is not None else ""
    return Reading(trial, f"#{trial.number} on {trial.model}, {why}", ending, list(by_prompt.items()))
