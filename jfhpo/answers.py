"""What commands answer with `--json`, and what the MCP server returns: one documented model for each.

Numbers are in the units that their names or descriptions say; null stands for what is not known, NaN never appears.
Fields may be added in later versions, none changes its meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from inspect import getdoc
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import Forecast, Quality
from jfhpo_core.plugins import registered
from jfhpo_core.report.findings import caveats, interval, verdict
from jfhpo_core.report.recipe import Recipe
from jfhpo_core.report.why import Why
from jfhpo_core.run.outcome import Comparison, SearchResult
from jfhpo_core.stopping.rules import ENTRY_POINT_GROUP, RULE_SETS, RULES, load_rule
from jfhpo_core.store.retention import Judgement
from jfhpo_core.study.trial import Configuration, Trial
from jfhpo_core.trainers.base import Finding

if TYPE_CHECKING:
    from jfhpo.planning import Plan, Prospect
    from jfhpo.session import StudyOutcome


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(Answer):
    """A quantity with an interval."""

    value: float = Field(description="Expected value or median.")
    low: float = Field(description="Lower end of the interval.")
    high: float = Field(description="Upper end of the interval.")


class Check(Answer):
    """Something that was looked at."""

    level: Literal["ok", "warning", "failure"]
    subject: str = Field(description="What was looked at, in one or two words.")
    message: str = Field(description="What was found; for a failure also what to do about it.")


class ModelPlan(Answer):
    """A model of the family."""

    name: str
    parameters: int
    devices: int = Field(description="Devices that one of its training runs holds.")
    role: Literal["target", "proxy"]
    full_run_seconds: Range = Field(description="Device-seconds of a full-length run, 90 % interval.")


class BillItem(Answer):
    """A line of the bill."""

    name: str
    what_for: str
    seconds: Range = Field(description="Device-seconds still to be spent, 90 % interval.")


class Outlook(Answer):
    """What a budget still costs, and what should come of it."""

    budget_seconds: float = Field(description="The search budget, device-seconds.")
    bill: list[BillItem]
    cost_seconds: Range = Field(description="The whole bill, device-seconds, 90 % interval.")
    wall_seconds: Range = Field(description="Wall-clock time that it takes, start-up not included, 90 % interval.")
    final_score: Range | None = Field(description="Forecast of the final score, 80 % interval; null: not yet known.")


class PlanAnswer(Outlook):
    """`jfhpo plan`: the study is usable; this is what it costs."""

    study: str
    task: str
    trainer: str
    strategy: str
    searched: list[str] = Field(description="Names of the searched hyperparameters.")
    horizon_prompts: int = Field(description="Training prompts of a full-length run.")
    rungs: list[int] = Field(description="Prompts at which runs may be cut, the horizon last.")
    models: list[ModelPlan] = Field(description="Small to large.")
    measured: bool = Field(description="Whether the forecast rests on timed runs of this study; else it is a guess.")
    basis: str = Field(description="What the forecast rests on.")
    checks: list[Check] = Field(description="What was tried: models, data, reward; with --measure untrained scores.")
    notes: list[str] = Field(description="Which earlier studies it learns from, and why.")
    with_more: Outlook | None = Field(description="The same with the budget of --more added; null without it.")


class TrialLine(Answer):
    """A trial: one configuration on one model with one seed."""

    number: int
    purpose: Literal["search", "baseline", "confirmation", "random-search"]
    label: str | None = Field(description="The recipe's name, or what it confirms.")
    model: str
    seed: int
    state: Literal["pending", "running", "paused", "completed", "stopped", "infeasible", "lost"]
    step: int = Field(description="Completed steps.")
    total_steps: int = Field(description="Steps at full length.")
    score: float | None = Field(description="Newest held-out score.")
    standard_error: float | None = Field(description="Its standard error.")
    cost_seconds: float = Field(description="Device-seconds charged.")
    why: str = Field(description="Why it was trained, last.")
    ended_by: str | None = Field(description="The stopping rule with its evidence, or the failure; null otherwise.")
    configuration: Configuration


class Row(Answer):
    """A configuration on the target at full length, over the training seeds."""

    label: str
    score: float | None = Field(description="Mean held-out score; null if no run reached full length.")
    low: float | None = Field(description="Lower end of its 95 % interval.")
    high: float | None = Field(description="Upper end.")
    seeds: int = Field(description="Runs that reached full length.")
    measured: dict[str, float] = Field(
        description="Means over the last rung of these runs: KL, entropy, length, truncation, device-seconds."
    )
    breaks: list[str] = Field(description="Constraints that these values do not respect.")
    configuration: Configuration


class TriedLine(Answer):
    """A configuration that may be recommended, by the search's full runs of it on the target."""

    trial: int = Field(description="Number of its first run.")
    score: float = Field(description="Mean held-out score.")
    standard_error: float = Field(description="Its standard error, by evaluation noise.")
    measured: dict[str, float] = Field(description="Means over the last rung of training, by metric.")
    breaks: list[str] = Field(description="Constraints that it does not respect.")
    on_front: bool = Field(description="Whether it is on the Pareto front of score and second objective.")
    configuration: Configuration


class StatusAnswer(Answer):
    """How a study stands."""

    study: str
    complete: bool = Field(description="Whether nothing is left to do within the budget.")
    verdict: str = Field(description="The outcome so far, in a sentence or two.")
    recommended: Configuration | None = Field(description="The complete recommended configuration; null: none yet.")
    expected_score: Range | None = Field(description="What the model believes of it, 95 % interval.")
    respected: float | None = Field(
        description="Probability that it respects all constraints, by the model; null without constraints or model."
    )
    constraints: list[str] = Field(description="Of the study, as 'kl <= 0.2'.")
    tried: list[TriedLine] = Field(
        description="Configurations with full runs, best score first; empty without constraints and second objective."
    )
    comparison: list[Row] = Field(description="The recommendation first, then recipes and random search.")
    caveats: list[str] = Field(description="What limits these results.")
    trials: int = Field(description="Number of trials.")
    states: dict[str, int] = Field(description="Number of trials by state.")
    running: list[int] = Field(description="Numbers of trials that are being trained, or were when a search ended.")
    spent_seconds: float = Field(description="Device-seconds charged to the search budget.")
    budget_seconds: float = Field(description="The search budget, device-seconds.")
    left: Outlook | None = Field(description="What is left to spend; null if the study is complete.")


class ShowAnswer(StatusAnswer):
    """`jfhpo show`: how a study stands, with its trials."""

    listed: list[TrialLine] = Field(description="Its trials in order of creation; the MCP tool gives the newest.")


class SearchAnswer(StatusAnswer):
    """`jfhpo search`: what the study came to, and where to look at it."""

    note: str = Field(description="Why the call ended before the study was complete, and what to do; else empty.")
    tracking_uri: str = Field(description="The MLflow store, a password in it masked.")
    url: str | None = Field(description="The study's page on an MLflow server; null without a server.")
    page: str = Field(description="The trials in MLflow's UI: what follows the address of its server.")
    report: str = Field(description="Path of the HTML report.")
    model_uri: str | None = Field(description="The registered version, 'models:/NAME/VERSION'; null: none.")
    model_note: str = Field(description="Which alias it was given and why, or why nothing was registered.")


class ReportAnswer(Answer):
    """`jfhpo report`: the file that was written."""

    report: str = Field(description="Path of the HTML report.")


class PromoteAnswer(Answer):
    """`jfhpo promote`: what is served now."""

    promoted: str


class NotifyAnswer(Answer):
    """`jfhpo notify`: what was made in Prefect."""

    automations: list[str]


class CheckpointLine(Answer):
    """A checkpoint and its fate."""

    trial: int | None = Field(description="Number of its trial; null if the ledger knows none.")
    step: int | None = Field(description="Its training step; null if its writing was cut off.")
    bytes: int = Field(description="Size of its files; those shared with other checkpoints count here, too.")
    keep: bool
    why: str


class GcAnswer(Answer):
    """`jfhpo gc`: which checkpoints are worth their space."""

    deleted: bool = Field(description="Whether those that are not kept were deleted.")
    checkpoints: list[CheckpointLine]
    log_bytes: int = Field(description="Size of what runs left in `trainings/`; this command never deletes it.")


class DoctorAnswer(Answer):
    """`jfhpo doctor`: everything that a search will need."""

    usable: bool = Field(description="Whether no check failed.")
    checks: list[Check]


class RuleLine(Answer):
    """A stopping rule."""

    name: str
    sets: list[str] = Field(description="Values of stopping.rules that include it.")
    description: str
    parameters: dict[str, float | str | bool | None] = Field(description="Names and defaults, for stopping.override.")


class RulesAnswer(Answer):
    """`jfhpo rules`: all stopping rules."""

    rules: list[RuleLine]


class VersionAnswer(Answer):
    """`jfhpo version`."""

    version: str


ANSWERS: Mapping[str, type[BaseModel]] = {
    "plan": PlanAnswer,
    "search": SearchAnswer,
    "show": ShowAnswer,
    "why": Why,
    "recipe": Recipe,
    "report": ReportAnswer,
    "doctor": DoctorAnswer,
    "gc": GcAnswer,
    "promote": PromoteAnswer,
    "notify": NotifyAnswer,
    "rules": RulesAnswer,
    "version": VersionAnswer,
}
"""What each command prints with `--json`. `jfhpo schema` prints JSON in any case."""


def checks(findings: Iterable[Finding]) -> list[Check]:
    """Findings as part of an answer."""
    return [Check(level=one.level.value, subject=one.subject, message=one.message) for one in findings]


def plan_answer(plan: Plan, measured: Iterable[Finding] = ()) -> PlanAnswer:
    """A plan, with what `--measure` found."""
    study, bills = plan.now.study, plan.now.bills
    spec = study.spec
    return PlanAnswer(
        **dict(_outlook(plan.now)),
        study=spec.study,
        task=spec.task.title,
        trainer=spec.trainer.name,
        strategy=spec.strategy.name,
        searched=list(spec.space),
        horizon_prompts=spec.fidelity.horizon_prompts,
        rungs=list(spec.fidelity.levels),
        models=[
            ModelPlan(
                name=model.name,
                parameters=model.parameters,
                devices=model.devices,
                role="target" if model == study.ladder.target else "proxy",
                full_run_seconds=_cost(bills.full_runs[model.name]),
            )
            for model in study.ladder.models
        ],
        measured=bills.measured,
        basis=bills.basis,
        checks=checks([*plan.findings, *measured]),
        notes=list(plan.notes),
        with_more=None if plan.larger is None else _outlook(plan.larger),
    )


def status_answer(result: SearchResult, left: Prospect | None) -> StatusAnswer:
    """How a study stands; `left` is None for one that is complete."""
    return StatusAnswer(**_status(result, left))


def show_answer(result: SearchResult, left: Prospect | None, newest: int | None = None) -> ShowAnswer:
    """How a study stands, with its newest trials, or all."""
    trials = result.trials if newest is None else result.trials[max(0, len(result.trials) - newest) :]
    return ShowAnswer(**_status(result, left), listed=[_line(trial) for trial in trials])


def search_answer(outcome: StudyOutcome, left: Prospect | None) -> SearchAnswer:
    """What a search came to."""
    return SearchAnswer(
        **_status(outcome.result, left),
        note=outcome.result.note,
        tracking_uri=outcome.tracking_uri,
        url=outcome.url,
        page=outcome.page,
        report=str(outcome.report),
        model_uri=outcome.model_uri,
        model_note=outcome.model_note,
    )


def gc_answer(judgements: Sequence[Judgement], log_bytes: int, *, deleted: bool) -> GcAnswer:
    """The fate of checkpoints."""
    lines = [
        CheckpointLine(
            trial=one.trial.number if one.trial is not None else None,
            step=one.step,
            bytes=one.size_bytes,
            keep=one.keep,
            why=one.why,
        )
        for one in judgements
    ]
    return GcAnswer(deleted=deleted, checkpoints=lines, log_bytes=log_bytes)


def known_rules() -> RulesAnswer:
    """All stopping rules, those of other packages included."""
    found = []
    for name in [*RULES, *registered(ENTRY_POINT_GROUP)]:
        rule = load_rule(name)
        sets = [chosen for chosen, members in RULE_SETS.items() if name in {member.name for member in members}]
        parameters = {item.name: item.default for item in fields(rule)}
        found.append(RuleLine(name=name, sets=sets, description=getdoc(rule) or "", parameters=parameters))
    return RulesAnswer(rules=found)


def _outlook(prospect: Prospect) -> Outlook:
    bills: Forecast = prospect.bills
    return Outlook(
        budget_seconds=prospect.study.spec.budget.device_seconds,
        bill=[BillItem(name=item.name, what_for=item.detail, seconds=_cost(item.cost)) for item in bills.items],
        cost_seconds=_cost(bills.total),
        wall_seconds=_cost(bills.wall()),
        final_score=_quality(prospect.quality),
    )


def _cost(cost: CostEstimate) -> Range:
    return Range(value=cost.seconds, low=cost.low, high=cost.high)


def _quality(quality: Quality | None) -> Range | None:
    return None if quality is None else Range(value=quality.score, low=quality.low, high=quality.high)


def _status(result: SearchResult, left: Prospect | None) -> dict[str, object]:
    recommended, states = result.recommended, [trial.state.value for trial in result.trials]
    expected = None
    if recommended is not None:
        low, high = interval(recommended.mean, recommended.standard_deviation)
        expected = Range(value=recommended.mean, low=low, high=high)
    return {
        "study": result.study.spec.study,
        "complete": result.complete,
        "verdict": verdict(result),
        "recommended": None if recommended is None else result.study.complete(recommended.configuration),
        "expected_score": expected,
        "respected": None if recommended is None else recommended.respected,
        "constraints": [str(limit) for limit in result.study.spec.limits],
        "tried": [
            TriedLine(
                trial=item.trial,
                score=item.score,
                standard_error=item.standard_error,
                measured=item.measured,
                breaks=[str(limit) for limit in item.broken],
                on_front=item.on_front,
                configuration=item.configuration,
            )
            for item in (result.tried if result.study.spec.secondary_metrics else ())
        ],
        "comparison": [_row(row) for row in result.rows],
        "caveats": caveats(result),
        "trials": len(result.trials),
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "running": [trial.number for trial in result.trials if trial.open_segment is not None],
        "spent_seconds": result.spent_seconds,
        "budget_seconds": result.study.spec.budget.device_seconds,
        "left": None if left is None else _outlook(left),
    }


def _row(row: Comparison) -> Row:
    score, low, high = (_known(value) for value in (row.score, *interval(row.score, row.standard_error)))
    return Row(
        label=row.label,
        score=score,
        low=low,
        high=high,
        seeds=row.seeds,
        measured=dict(row.measured),
        breaks=[str(limit) for limit in row.broken],
        configuration=row.configuration,
    )


def _line(trial: Trial) -> TrialLine:
    newest = trial.open_segment or trial.segments[-1].segment
    last = trial.evaluations[-1] if trial.evaluations else None
    ended = trial.decision.explain() if trial.decision is not None else None
    if ended is None and trial.segments and trial.segments[-1].failure is not None:
        ended = f"{trial.segments[-1].failure}: {trial.segments[-1].message}"
    return TrialLine(
        number=trial.number,
        purpose=trial.purpose,
        label=trial.label,
        model=trial.model,
        seed=trial.seed,
        state=trial.state.value,
        step=trial.step,
        total_steps=trial.total_steps,
        score=_known(last.score) if last is not None else None,
        standard_error=_known(last.standard_error) if last is not None else None,
        cost_seconds=trial.charge_seconds,
        why=newest.suggestion.explanation,
        ended_by=ended,
        configuration=trial.configuration,
    )


def _known(value: float | None) -> float | None:
    """A number that JSON has."""
    return value if value is not None and math.isfinite(value) else None
