"""How a study and its trials look in the MLflow UI: names, statuses, parameters, metrics and descriptions.

Everything here is derived from trials and may be logged again at any time; nothing here is ever read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from mlflow.entities import Metric

from jfhpo_core.report.completions import completions
from jfhpo_core.report.findings import caveats, interval, interval_text, metric_text, score_text, verdict
from jfhpo_core.report.text import duration, number, setting
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.space import Space
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    Configuration,
    Evaluation,
    Segment,
    SegmentResult,
    StepRecord,
    Trial,
    TrialState,
    Value,
    spent_seconds,
)
from mlflow_plugin.provenance import TaskData

NOTE = "mlflow.note.content"
RECOMMENDED = "recommended"
"""Begins metrics (`recommended/NAME`) and tags (`recommended.NAME`) of the study's run."""
STATE = "jfhpo.state"
TRIALS_VIEW = "jfhpo-trials"
"""Id of the saved view to begin with."""
STUDIES_VIEW = "jfhpo-studies"
"""Id of the view of what each study of the experiment recommends."""
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


class StudyState(StrEnum):
    """What became of a call that ran a study."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


STUDY_STATUS = {
    StudyState.RUNNING: "RUNNING",
    StudyState.FINISHED: "FINISHED",
    StudyState.INTERRUPTED: "KILLED",
    StudyState.FAILED: "FAILED",
}
"""The same for the study's run."""


def view_page(experiment_id: str, view: str = TRIALS_VIEW) -> str:
    """The page of a saved view, as MLflow's pages link to each other.

    MLflow 3 opens its pages for LLM applications unless it is asked for those of model training.
    """
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={view}&workflowType=machine_learning"


def experiment_note(experiment_id: str) -> str:
    """Description of an experiment: what to click comes first, since MLflow cuts what is long.

    Some plain words come before it, as the list of experiments shows the beginning without rendering it.
    """
    return (
        "Hyperparameter studies, one run each, trials nested below: "
        f"**[open the trials]({view_page(experiment_id)})** · "
        f"[compare studies]({view_page(experiment_id, STUDIES_VIEW)})\n\n"
        "Made by jfhpo. By hand: *Model training* at the top left, then a view above the table of runs."
    )


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
        ended = {
            TrialState.STOPPED: "stopped at ",
            TrialState.INFEASIBLE: "infeasible at ",
            TrialState.LOST: "lost at ",
        }
        parts.append(f"· {ended.get(trial.state, '')}{trial.step}/{trial.total_steps} steps")
    return " ".join(parts)


def _short(value: Value) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def trial_parameters(
    trial: Trial, model_parameters: int, space: Space, defaults: Mapping[str, Value]
) -> dict[str, str]:
    """Parameters of a trial's run, numbers in a form that the UI's charts can plot.

    MLflow's charts have linear axes only, so what is searched on a logarithmic scale comes as a logarithm, too.

    Args:
        trial: The trial.
        model_parameters: Parameter count of its model.
        space: The search space.
        defaults: Hyperparameters that the trial's configuration does not name.
    """
    fixed = {
        "model": trial.model,
        "model_parameters": model_parameters,
        "seed": trial.seed,
        "purpose": trial.purpose,
        "total_steps": trial.total_steps,
        "prompts_per_step": trial.prompts_per_step,
    }
    configuration = {**defaults, **trial.configuration}
    logarithms = {
        log_name(name): f"{math.log10(value):.6g}"
        for name in logarithmic(space)
        if isinstance(value := configuration.get(name), int | float) and 0 < value < math.inf
    }
    # A project may well have hyperparameters of these names.
    ours = {f"jfhpo.{name}" if name in trial.configuration else name: value for name, value in fixed.items()}
    return {name: str(value) for name, value in {**configuration, **logarithms, **ours}.items()}


def logarithmic(space: Space) -> list[str]:
    """Hyperparameters that are searched on a logarithmic scale."""
    return [name for name in space if space[name].logarithmic]


def log_name(name: str) -> str:
    """Name of the parameter that holds a hyperparameter's decimal logarithm."""
    return f"log10_{name}"


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
        for metric, value in _signals(record).items()
        if value is not None
    ]


def _signals(record: StepRecord) -> dict[str, float | None]:
    """What a step measured, by metric; time-outs of the reward only where there are some."""
    signals = {metric: getattr(record, field) for field, metric in STEP_METRICS.items()}
    parts = {f"train/reward/{name}": value for name, value in record.reward_parts.items()}
    return {**signals, **parts, "train/reward_timeouts": record.reward_timeouts or None}


def result_metrics(
    trial: Trial,
    result: SegmentResult,
    timestamp: int,
    model_id: str | None,
    data: TaskData,
    secondary: Sequence[str] = (),
) -> list[Metric]:
    """Metrics of a committed segment of `trial`: its evaluations, and the trial's charge and time so far.

    The evaluation of the segment's checkpoint also goes to the logged model `model_id` that indexes it. Metrics that
    the study's constraints or second objective name (`secondary`) are shown by their means over each rung.
    """
    saved = result.checkpoint.step if result.checkpoint is not None else None
    heldout = data.heldout
    metrics = [
        Metric(
            name,
            _plottable(value),
            timestamp,
            evaluation.step,
            model_id=model_id if evaluation.step == saved else None,
            dataset_name=heldout.name if heldout is not None else None,
            dataset_digest=heldout.digest if heldout is not None else None,
        )
        for evaluation in result.evaluations
        for name, value in (
            score_metrics(evaluation)
            | {"time/evaluation_seconds": evaluation.seconds}
            | {f"rung/{metric}": evaluation.training[metric] for metric in secondary if metric in evaluation.training}
        ).items()
    ]
    if result.checkpoint is not None:
        # As metrics, because MLflow compares tags and parameters of logged models as texts only.
        saved = result.checkpoint.step
        figures = {"saved/step": saved, "saved/bytes": result.checkpoint.size_bytes}
        metrics += [Metric(name, float(value), timestamp, saved, model_id=model_id) for name, value in figures.items()]
    wall = sum(one.seconds for one in trial.segments)
    return [
        *metrics,
        Metric("spent/device_seconds", trial.charge_seconds, timestamp, result.end_step),
        Metric("time/wall_seconds", wall, timestamp, result.end_step),
    ]


def score_metrics(evaluation: Evaluation) -> dict[str, float]:
    """What an evaluation measured, by metric. Pass@n has n in its name, so that different n never share a chart."""
    metrics = {"eval/score": evaluation.score, "eval/standard_error": evaluation.standard_error}
    if evaluation.reward_timeouts:
        metrics["eval/reward_timeouts"] = float(evaluation.reward_timeouts)
    if (best := evaluation.pass_at_n) is not None:
        name = f"eval/pass_at_{best.n}"
        metrics |= {name: best.score, f"{name}_standard_error": best.standard_error}
    return metrics


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


def outcome_metrics(result: SearchResult, timestamp: int) -> list[Metric]:
    """What a study came to, so that studies can be compared: score, error and numbers of what it recommends."""
    if result.recommended is None or not result.rows or not result.rows[0].seeds:
        return []
    mine, step = result.rows[0], sum(len(trial.segments) for trial in result.trials)
    values = {
        "study/recommended_score": mine.score,
        "study/recommended_standard_error": mine.standard_error,
        "study/expected_score": result.recommended.mean,
    }
    spec = result.study.spec
    values |= {
        f"study/recommended_{name}": mine.measured[name] for name in spec.secondary_metrics if name in mine.measured
    }
    if spec.limits:
        values["study/respects_constraints"] = float(not mine.broken)
    if spec.second_objective is not None:
        values["study/front_configurations"] = float(sum(item.on_front for item in result.tried))
    complete = result.study.complete(result.recommended.configuration)
    values |= {
        f"{RECOMMENDED}/{name}": float(complete[name])
        for name in result.study.space
        if isinstance(complete.get(name), int | float)
    }
    return [Metric(name, _plottable(value), timestamp, step) for name, value in values.items()]


def outcome_labels(result: SearchResult) -> dict[str, str]:
    """Tags of the study's run with the recommended values of searched hyperparameters, those that are texts, too.

    Unlike parameters, tags may change: a raised budget may lead to another recommendation.
    """
    if result.recommended is None:
        return {}
    complete = result.study.complete(result.recommended.configuration)
    return {f"{RECOMMENDED}.{name}": setting(complete[name]) for name in result.study.space if name in complete}


def trial_labels(trial: Trial) -> dict[str, str]:
    """Tags of a trial's run for people and for the UI's filters; values are cut to what MLflow takes."""
    suggestion = trial.open_segment.suggestion if trial.open_segment else trial.segments[-1].segment.suggestion
    labels = {
        STATE: trial.state.value,
        "jfhpo.why": suggestion.explanation,
        "jfhpo.source": suggestion.source,
        NOTE: _trial_note(trial),
    }
    if trial.decision is not None:
        labels["jfhpo.stopped_by"] = trial.decision.explain()
    if trial.changed:
        labels["jfhpo.changed"] = ", ".join(trial.changed)
    if trial.segments and trial.segments[-1].failure is not None:
        last = trial.segments[-1]
        labels["jfhpo.failure"] = f"{last.failure}: {last.message}"
    return {name: text[:NOTE_LIMIT] for name, text in labels.items()}


def _trial_note(trial: Trial) -> str:
    """Description of a trial's run: where it stands, why it was trained, why it ended, how sure its score is.

    The UI folds long descriptions, so the answers come before the table.
    """
    newest = trial.open_segment or trial.segments[-1].segment
    lines = [
        (
            f"**{trial.state.value.capitalize()}** at step {trial.step} of {trial.total_steps}{_score_so_far(trial)}. "
            f"**Why this trial:** {newest.suggestion.explanation}."
        ),
        "",
    ]
    if trial.decision is not None:
        lines += [f"**Why it was stopped:** {trial.decision.explain()}.", ""]
    if trial.segments and trial.segments[-1].message is not None:
        lines += [f"**What happened:** {trial.segments[-1].message}", ""]
    if trial.evaluations:
        last, best = trial.evaluations[-1], ""
        if (of_n := last.pass_at_n) is not None:
            best = f"Pass@{of_n.n} is {number(of_n.score)} ± {number(of_n.standard_error)}. "
        lines += [
            (
                f"**How sure:** the score is of step {last.step}, its 95 % interval rests on {last.samples} "
                f"completions. {best}The spread between training seeds comes on top."
            ),
            "",
        ]
    lines += ["| Steps | Chosen by | Why | Expected | Outcome | Score | Cost |", "|---|---|---|---|---|---|---|"]
    for result in trial.segments:
        score = number(result.evaluations[-1].score) if result.evaluations else ""
        lines.append(
            f"| {result.segment.start_step} to {result.end_step} | {_chosen(result.segment)} | {result.outcome.value} "
            f"| {score} | {duration(result.charge_seconds)} |"
        )
    if trial.open_segment is not None:
        segment = trial.open_segment
        lines.append(f"| {segment.start_step} to {segment.stop_step} | {_chosen(segment)} | running | | |")
    return "\n".join(lines)


def _score_so_far(trial: Trial) -> str:
    """The newest score for the first line of a description: MLflow shows the metrics in its own order."""
    if not trial.evaluations:
        return ""
    last = trial.evaluations[-1]
    low, high = interval(last.score, last.standard_error)
    return f", held-out score **{number(last.score)}** ({number(low)} to {number(high)})"


def _chosen(segment: Segment) -> str:
    """Cells of a table: who chose a segment, why, and what was expected of it."""
    suggestion = segment.suggestion
    expected = []
    if suggestion.expected_gain is not None:
        expected.append(f"gain {suggestion.expected_gain:.2g}")
    if suggestion.expected_cost_seconds is not None:
        expected.append(f"cost {duration(suggestion.expected_cost_seconds)}")
    return f"{suggestion.source} | {_cell(suggestion.explanation)} | {', '.join(expected)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def completions_table(trial: Trial) -> dict[str, list[Any]] | None:
    """Completions of a trial that has ended, by column; None while it may go on, or if none were kept."""
    if trial.state not in (TrialState.COMPLETED, TrialState.STOPPED):
        return None
    rows = [{"step": step, **example.model_dump()} for step, example in completions(trial)]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else None


def study_note(study: StudySpec, trials: Sequence[Trial], result: SearchResult | None = None) -> str:
    """Description of the study's run: the outcome, or how far it is."""
    task = study.task.title
    lines = [] if result is None else _outcome(result)
    if result is None or not result.complete:
        spent, budget = spent_seconds(trials), study.budget.device_seconds
        lines += [
            (
                f"{len(trials)} trials so far, {duration(spent)} of {duration(budget)} device-time spent"
                f"{study.budget.in_money(spent)}. "
                "`jfhpo search` continues the study if nothing is running."
            ),
            "",
        ]
    lines += [
        study.description,
        "",
        (
            f"Hyperparameter search by jfhpo for **{study.target}** on **{task}** ({study.trainer.name}, "
            f"{study.fidelity.horizon_prompts} prompts a full trial, {duration(study.budget.device_seconds)}"
            f"{study.budget.in_money(study.budget.device_seconds)} to spend)."
        ),
        "",
        (
            "- **Views**, above the table of runs: *Trials* has the columns and charts to begin with, *Full length on "
            "...* the full-length runs of one model by score, *Studies* what each study recommends."
        ),
        "- Artifacts: `report.html`, `plots/`, the exact `study.yaml`, `environment.json`.",
        "- On each trial: why it was trained, why it ended, how sure its score is; its checkpoint is under *Models*.",
        "- Metrics: `study/best_target_score` against `study/spent_seconds` is what the search found for which cost.",
    ]
    return "\n".join(lines).strip()[:NOTE_LIMIT]


def _outcome(result: SearchResult) -> list[str]:
    lines = [f"**{verdict(result)}**", ""]
    if result.rows:
        secondary = result.study.spec.secondary_metrics
        lines += [
            f"| Configuration | Score | 95 % interval | Seeds |{''.join(f' {name} |' for name in secondary)}",
            f"|---|---|---|---|{'---|' * len(secondary)}",
        ]
        for row in result.rows:
            more = "".join(f" {metric_text(name, row.measured) if row.seeds else ''} |" for name in secondary)
            lines.append(f"| {row.label} | {score_text(row)} | {interval_text(row)} | {row.seeds} |{more}")
        lines.append("")
    lines += _front(result)
    if result.recommended is not None:
        lines += ["**Recommended:** " + configuration_text(result.recommended.configuration), ""]
        lines += [
            f"**How sure:** the model expects {number(result.recommended.mean)} ± "
            f"{number(result.recommended.standard_deviation)}. " + " ".join(caveats(result)),
            "",
        ]
    return lines


def _front(result: SearchResult) -> list[str]:
    """The Pareto front as a table; empty without a second objective."""
    second, found = result.study.spec.second_objective, [item for item in result.tried if item.on_front]
    if second is None or not found:
        return []
    lines = [f"**Front** of score and {second.metric} ({second.direction}):", ""]
    lines += [f"| Trial | Score | {second.metric} |", "|---|---|---|"]
    lines += [
        f"| {item.trial} | {number(item.score)} ± {number(item.standard_error)} "
        f"| {metric_text(second.metric, item.measured)} |"
        for item in found
    ]
    return [*lines, ""]


def configuration_text(configuration: Configuration) -> str:
    """A configuration in one line of Markdown."""
    return ", ".join(f"`{name}` {setting(value)}" for name, value in configuration.items())
