"""How a study and its trials look in the MLflow UI: names, statuses, parameters, metrics and descriptions.

Everything here is derived from trials and may be logged again at any time; nothing here is ever read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlflow.entities import Metric

from jfhpo_core.spec import StudySpec
from jfhpo_core.trial import Evaluation, SegmentResult, StepRecord, Trial, TrialState, Value

NOTE = "mlflow.note.content"
NOTE_LIMIT = 5000
"""Characters of a description; MLflow servers before 2.15 refuse longer tags."""

STEP_METRICS = {
    "reward": "train/reward",
    "reward_std": "train/reward_std",
    "zero_variance_share": "train/zero_variance_share",
    "kl": "train/kl",
    "entropy": "train/entropy",
    "clip_fraction": "train/clip_fraction",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "completion_tokens": "train/completion_tokens",
    "truncated_share": "train/truncated_share",
    "prompts": "progress/prompts",
    "tokens": "progress/tokens",
    "generation_seconds": "time/generation_seconds",
    "training_seconds": "time/training_seconds",
}
"""Field of a step record to the metric that shows it; the slash makes a section in the UI."""

STATUS = {
    TrialState.PENDING: "RUNNING",
    TrialState.RUNNING: "RUNNING",
    TrialState.PAUSED: "FINISHED",
    TrialState.COMPLETED: "FINISHED",
    TrialState.STOPPED: "KILLED",
    TrialState.INFEASIBLE: "FAILED",
    TrialState.LOST: "FAILED",
}
"""Trial state to MLflow run status. MLflow has fewer of them, so the tag `jfhpo.state` holds the exact one."""


def run_name(trial: Trial) -> str:
    """Name of a trial's run: its number, its model, what sets it apart, and how far it got.

    A trial under way has the name without the progress: its latest metrics tell.
    """
    parts = [f"{trial.number:03d}", trial.model]
    if trial.label is not None:
        parts.append(trial.label)
    elif trial.configuration:
        # The learning rate matters most in RL fine-tuning; a space without one shows its first hyperparameter.
        name = "learning_rate" if "learning_rate" in trial.configuration else next(iter(trial.configuration))
        short = "lr" if name == "learning_rate" else name
        parts.append(f"{short}={_short(trial.configuration[name])}")
    if trial.purpose in ("confirmation", "random-search"):
        parts.append(f"seed {trial.seed}" if trial.purpose == "confirmation" else "random")
    if trial.segments:
        parts.append(f"· {trial.step}/{trial.total_steps} steps")
    return " ".join(parts)


def _short(value: Value) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def trial_parameters(trial: Trial, model_parameters: int) -> dict[str, str]:
    """Parameters of a trial's run, numbers in a form that the UI's charts can plot."""
    fixed = {
        "model": trial.model,
        "model_parameters": model_parameters,
        "seed": trial.seed,
        "purpose": trial.purpose,
        "total_steps": trial.total_steps,
        "prompts_per_step": trial.prompts_per_step,
    }
    return {name: str(value) for name, value in {**trial.configuration, **fixed}.items()}


def study_parameters(study: StudySpec) -> dict[str, str]:
    """Parameters of the study's run: what may not change while it goes on, two levels deep."""
    content = study.model_dump(mode="json", include={"family", "target", "task", "trainer", "fidelity", "evaluation"})
    content["space"] = study.model_dump(mode="json")["space"]
    return {name: text for name, text in _flatten(content) if text not in ("", "null", "{}", "[]")}


def _flatten(content: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        for key, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
            yield (name if key is None else f"{name}.{key}"), text


def step_metrics(records: Sequence[StepRecord], timestamp: int) -> list[Metric]:
    """Metrics of step records; what a trainer did not measure is left out."""
    return [
        Metric(metric, _plottable(value), timestamp, record.step)
        for record in records
        for field, metric in STEP_METRICS.items()
        if (value := getattr(record, field)) is not None
    ]


def result_metrics(trial: Trial, result: SegmentResult, timestamp: int, model_id: str | None) -> list[Metric]:
    """Metrics of a committed segment of `trial`: its evaluations, and the trial's charge so far.

    The evaluation of the segment's checkpoint also goes to the logged model `model_id` that indexes it.
    """
    saved = result.checkpoint.step if result.checkpoint is not None else None
    metrics = [
        Metric(
            name,
            _plottable(value),
            timestamp,
            evaluation.step,
            model_id=model_id if evaluation.step == saved else None,
        )
        for evaluation in result.evaluations
        for name, value in _scores(evaluation)
    ]
    return [*metrics, Metric("cost/seconds", trial.charge_seconds, timestamp, result.end_step)]


def _scores(evaluation: Evaluation) -> list[tuple[str, float]]:
    return [
        ("eval/score", evaluation.score),
        ("eval/standard_error", evaluation.standard_error),
        ("time/evaluation_seconds", evaluation.seconds),
    ]


def study_metrics(study: StudySpec, trials: Sequence[Trial], timestamp: int) -> list[Metric]:
    """Metrics of the study's run, one step per committed segment.

    `study/spent_seconds` is among them, so that the UI can plot the incumbent against cost by choosing it as x-axis.
    """
    searched = [trial for trial in trials if trial.purpose == "search"]
    finals = [trial.final.score for trial in searched if trial.model == study.target and trial.final is not None]
    values = {
        "study/spent_seconds": sum(trial.charge_seconds for trial in searched),
        "study/comparison_seconds": sum(trial.charge_seconds for trial in trials if trial.purpose != "search"),
        "study/trials": float(len(trials)),
    }
    if finals:
        values["study/best_target_score"] = max(finals)
    step = sum(len(trial.segments) for trial in trials)
    return [Metric(name, _plottable(value), timestamp, step) for name, value in values.items()]


def _plottable(value: float) -> float:
    # MLflow stores an infinite value as 1.8e308, which flattens every chart it is in; NaN leaves a gap. The exact
    # value is in the step records.
    return value if math.isfinite(value) else math.nan


def trial_labels(trial: Trial) -> dict[str, str]:
    """Tags of a trial's run for people and for the UI's filters; values are cut to what MLflow takes."""
    suggestion = trial.open_segment.suggestion if trial.open_segment else trial.segments[-1].segment.suggestion
    labels = {
        "jfhpo.state": trial.state.value,
        "jfhpo.why": suggestion.explanation,
        "jfhpo.source": suggestion.source,
        NOTE: _trial_note(trial),
    }
    if trial.decision is not None:
        labels["jfhpo.stopped_by"] = trial.decision.explain()
    if trial.segments and trial.segments[-1].failure is not None:
        last = trial.segments[-1]
        labels["jfhpo.failure"] = f"{last.failure}: {last.message}"
    return {name: text[:NOTE_LIMIT] for name, text in labels.items()}


def _trial_note(trial: Trial) -> str:
    lines = [f"**{trial.state.value.capitalize()}** at step {trial.step} of {trial.total_steps}.", ""]
    if trial.decision is not None:
        lines += [f"**Why it was stopped:** {trial.decision.explain()}.", ""]
    if trial.segments and trial.segments[-1].message is not None:
        lines += [f"**What happened:** {trial.segments[-1].message}", ""]
    lines += ["| Steps | Chosen by | Why | Outcome | Score | Seconds |", "|---|---|---|---|---|---|"]
    for result in trial.segments:
        score = f"{result.evaluations[-1].score:.3f}" if result.evaluations else ""
        lines.append(
            f"| {result.segment.start_step} to {result.end_step} | {result.segment.suggestion.source} "
            f"| {_cell(result.segment.suggestion.explanation)} | {result.outcome.value} | {score} "
            f"| {result.charge_seconds:.1f} |"
        )
    if trial.open_segment is not None:
        segment = trial.open_segment
        lines.append(
            f"| {segment.start_step} to {segment.stop_step} | {segment.suggestion.source} "
            f"| {_cell(segment.suggestion.explanation)} | running | | |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def study_note(study: StudySpec) -> str:
    """Description of the study's run."""
    task = study.task.embedded or study.task.prompts
    summary = (
        f"Hyperparameter search by jfhpo for **{study.target}** on **{task}** "
        f"({study.trainer.name}, {study.fidelity.horizon_prompts} prompts per full trial, "
        f"{study.budget.device_seconds:g} device-seconds of search)."
    )
    lines = [
        study.description,
        "",
        summary,
        "",
        "- The nested runs are its trials; `study.yaml` among the artifacts repeats the study.",
        "- `study/best_target_score` against `study/spent_seconds` shows what the search found for which cost.",
        "- `jfhpo.why` and `jfhpo.stopped_by` on a trial say why it was trained and why it was stopped.",
    ]
    return "\n".join(lines).strip()[:NOTE_LIMIT]
