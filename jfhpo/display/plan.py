"""What a study will cost and should reach, before and while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jfhpo.display.words import bill, duration, paid_bill, show_quality
from jfhpo_core.optimizer.forecast import Forecast
from jfhpo_core.optimizer.price import prices
from jfhpo_core.stopping.rules import build_rules
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import BudgetSpec

if TYPE_CHECKING:
    from jfhpo.planning import Prospect


def outlook_view(left: Prospect) -> Table:
    """What is left to spend, how long it takes, and what score it should end with."""
    study, bills, quality = left.study, left.bills, left.quality
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_row("cost left", f"{paid_bill(bills.total, study.spec.budget)} of device time")
    grid.add_row(
        "time left",
        f"{bill(bills.wall())} of wall-clock time with {in_parallel(bills)}, start-up and the optimizer's own time not "
        "included",
    )
    grid.add_row("final score", show_quality(quality))
    if quality is not None:
        grid.add_row(
            "",
            Text(
                f"Measurement noise is not included. It rests on what strategy {study.spec.strategy.name} "
                f"believes of {quality.configurations} configurations (the best: {quality.now:.3f}); the rest of the "
                f"budget is taken to buy {quality.further:.0f} more like them",
                style="dim",
            ),
        )
    return grid


def in_parallel(bills: Forecast) -> str:
    """How much of a study is trained at the same time: '8 devices', 'at most 2 trial(s) on 8 devices'."""
    if bills.slots is None:
        return f"{bills.devices} devices"
    return f"at most {bills.slots} trial(s)" + (f" on {bills.devices} devices" if bills.devices is not None else "")


def plan_view(now: Prospect, larger: Prospect | None = None) -> Group:
    """A checked study: its models, how trials are cut, the bill, and what should come of it.

    Args:
        now: The study and its forecasts.
        larger: The same with a larger budget.
    """
    study, bills = now.study, now.bills
    spec = study.spec
    models = _models_table(study, bills)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_row("task", spec.task.title)
    grid.add_row("trainer", spec.trainer.name)
    grid.add_row("strategy", spec.strategy.name)
    grid.add_row("searched", ", ".join(spec.space))
    grid.add_row("full length", f"{spec.fidelity.horizon_prompts} prompts")
    grid.add_row("rungs", ", ".join(str(level) for level in spec.fidelity.levels))
    if (price := prices(study)) is not None:
        target = study.ladder.target
        written = duration(price.checkpoint(target.name))
        evaluated = duration(price.rung(target.name) - price.checkpoint(target.name))
        copied = (
            f"; copying it takes {duration(copying)}, without its devices"
            if (copying := price.copy(target.name))
            else ""
        )
        grid.add_row(
            "", f"at each {target.name} is evaluated ({evaluated}) and saved ({written}), by estimates{copied}"
        )
    grid.add_row("stopping", ", ".join(rule.name for rule in build_rules(spec.stopping)))
    grid.add_row("in parallel", in_parallel(bills))
    parts: list[RenderableType] = [Text(f"Study {spec.study} is usable."), models, grid]
    parts += [_forecast_table(bills, spec.budget), outlook_view(now)]
    if larger is not None:
        added = larger.study.spec.budget.device_seconds - spec.budget.device_seconds
        parts += [Text(f"\nWith {duration(added)} more of budget", style="bold"), outlook_view(larger), Text()]
    parts.append(Text(bills.basis, "" if bills.measured else "yellow"))
    if (warning := validation_warning(study, bills)) is not None:
        parts.append(Text(warning, style="yellow"))
    return Group(*parts)


def _models_table(study: Study, bills: Forecast) -> Table:
    """The models, and how many full-length runs of each the budget would buy."""
    budget, smallest = study.spec.budget, study.ladder.models[0]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (
        ("model", "left"), ("parameters", "right"), ("role", "left"), ("full-length run\n(90 % interval)", "left"),
        ("budget buys", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for model in study.ladder.models:
        role = "target" if model == study.ladder.target else "smallest" if model == smallest else "intermediate"
        cost = bills.full_runs[model.name]
        runs = [f"{int(budget.device_seconds / seconds):,}" for seconds in (cost.seconds, cost.high, cost.low)]
        bought = runs[0] if runs[1] == runs[2] else f"{runs[0]} ({runs[1]} to {runs[2]})"
        table.add_row(model.name, f"{model.parameters:,}", role, paid_bill(cost, budget), bought)
    return table


def validation_warning(study: Study, bills: Forecast) -> str | None:
    """Says so if the share of the budget that is held back cannot pay for one full-length target trial."""
    budget = study.spec.budget
    held_back = budget.device_seconds * budget.validation_share
    if bills.full_trial.seconds <= held_back:
        return None
    return (
        f"Validation: {duration(held_back)} are held back, less than one full target trial "
        f"({bill(bills.full_trial)}). One is trained all the same; raise the budget or budget.validation_share."
    )


def _forecast_table(bills: Forecast, budget: BudgetSpec) -> Table:
    """The bill, item by item."""
    table = Table(box=SIMPLE_HEAD, title="Still to be spent, in device time (90 % interval)", title_justify="left")
    table.add_column("")
    table.add_column("cost", justify="right")
    table.add_column("what for")
    for item in bills.items:
        table.add_row(item.name, paid_bill(item.cost, budget), item.detail)
    table.add_section()
    table.add_row("total", paid_bill(bills.total, budget), "")
    return table
