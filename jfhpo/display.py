"""What a person sees: a live view of a running study, plain lines where there is no terminal, and the final table."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jfhpo.study_facts import counts
from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import FEWEST_CONFIGURATIONS, Forecast, Quality, forecast, forecast_quality, scaled
from jfhpo_core.optimizer.strategy import Strategy, load_strategy
from jfhpo_core.report.findings import (
    caveats,
    contrasts,
    interval,
    interval_text,
    score_text,
    search_trial_ratio,
    verdict,
)
from jfhpo_core.run.search import Progress, SearchResult, rank
from jfhpo_core.stopping.rules import build_rules
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import BudgetSpec
from jfhpo_core.study.trial import Configuration, Evaluation, Outcome, SegmentResult, StepRecord, Trial, TrialState

if TYPE_CHECKING:
    from jfhpo.session import StudyOutcome

REFRESH_PER_SECOND = 4
SHORTEST_WAIT_SECONDS = 1.0
EVENTS_SHOWN = 6
LABEL_WIDTH = 18
ASSUMED_SHARE = 0.1
"""Share of a bill that counts as spent at full speed before the speed is measured."""
TREND_LENGTH = 16
TREND_LEVELS = "▁▂▃▄▅▆▇█"
SHOWN_STATES = (
    TrialState.RUNNING,
    TrialState.PAUSED,
    TrialState.COMPLETED,
    TrialState.STOPPED,
    TrialState.INFEASIBLE,
    TrialState.LOST,
)


def duration(seconds: float) -> str:
    """Seconds for people: '4.2 s', '45 s', '3 min 05 s', '2 h 10 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bill(cost: CostEstimate) -> str:
    """A forecast for people: '3 min 05 s (2 min 10 s to 4 min 20 s)'; a cost that is known has no interval."""
    if _is_known(cost):
        return duration(cost.seconds)
    return f"{duration(cost.seconds)} ({duration(cost.low)} to {duration(cost.high)})"


def _is_known(cost: CostEstimate) -> bool:
    return cost.high - cost.low < 0.01 * cost.seconds or cost.high == 0


def paid_bill(cost: CostEstimate, budget: BudgetSpec) -> str:
    """A forecast of device time with its price: '2 h 10 min (1 h 40 min to 3 h 00 min), 6.50 USD (5.00 to 9.00)'."""
    hourly = budget.hourly_cost
    ends = ""
    if hourly is not None and not _is_known(cost):
        ends = f" ({cost.low / 3600 * hourly:,.2f} to {cost.high / 3600 * hourly:,.2f})"
    return f"{bill(cost)}{budget.in_money(cost.seconds)}{ends}"


def show_quality(quality: Quality | None) -> str:
    """A forecast of the final score for people: '0.712 (80 % interval 0.671 to 0.745)'."""
    if quality is None:
        return f"cannot be forecast before {FEWEST_CONFIGURATIONS} configurations have scores, one on the target"
    return f"{quality.score:.3f} (80 % interval {quality.low:.3f} to {quality.high:.3f})"


def show_value(value: bool | float | str) -> str:
    """A hyperparameter's value, floats without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_configuration(configuration: Configuration) -> str:
    """A configuration on one line."""
    return " ".join(f"{name}={show_value(value)}" for name, value in configuration.items())


def show_score(evaluation: Evaluation) -> str:
    """Score and standard error."""
    return f"{evaluation.score:.3f} ± {evaluation.standard_error:.3f}"


def describe_end(trial: Trial, result: SegmentResult) -> str:
    """One sentence on how a segment ended and why."""
    segment, reason = result.segment, ""
    if result.outcome is Outcome.STOPPED and result.decision is not None:
        text = f"stopped by {result.decision.rule} at step {result.end_step}"
        reason = f" ({result.decision.signal} {result.decision.value:.3g} against {result.decision.threshold:.3g})"
    elif result.outcome is Outcome.INFEASIBLE:
        text = f"infeasible ({result.failure}) at step {result.end_step}: {_first_line(result.message)}"
    elif result.outcome is Outcome.LOST:
        text = f"lost after {result.attempts} attempt(s): {_first_line(result.message)}"
    elif segment.start_step:
        text = f"continued from step {segment.start_step} to {result.end_step} of {trial.total_steps}"
    else:
        text = f"trained to step {result.end_step} of {trial.total_steps}"
    score = f", score {show_score(result.evaluations[-1])}" if result.evaluations else ""
    return f"#{trial.number} {trial.model} ({trial.label or segment.suggestion.source}): {text}{score}{reason}"


def describe_untrained(trial: Trial, result: SegmentResult) -> list[str]:
    """What the untrained model scored, with completions, if the segment has measured it."""
    base = next((one for one in result.evaluations if one.step == 0 and one.examples), None)
    if base is None:
        return []
    return [f"untrained {trial.model}: score {show_score(base)}", *map(str, base.examples)]


def _first_line(message: str | None) -> str:
    return (message or "no message").strip().splitlines()[0]


@dataclass(frozen=True)
class Best:
    """The highest score seen so far, on some model."""

    trial: Trial
    evaluation: Evaluation

    def sentence(self) -> str:
        """One line for people."""
        share = self.evaluation.step / self.trial.total_steps
        label = f" {self.trial.label}" if self.trial.label else ""
        where = f"#{self.trial.number}{label} on {self.trial.model} at {share:.0%} of full length"
        return f"{show_score(self.evaluation)}  {where}"


def best(trials: Iterable[Trial]) -> Best | None:
    """The trial with the highest latest score; None if none has been trained and scored."""
    scored = [Best(trial, trial.evaluations[-1]) for trial in trials if trial.step and trial.evaluations]
    return max(scored, key=lambda item: item.evaluation.score, default=None)


def standings(study: Study, trials: Sequence[Trial]) -> list[tuple[str, Best]]:
    """Best so far on the target and on the proxies."""
    target = study.ladder.target.name
    found = [
        ("best on the target", best(trial for trial in trials if trial.model == target)),
        ("best on a proxy", best(trial for trial in trials if trial.model != target)),
    ]
    return [(name, item) for name, item in found if item is not None]


class Watch:
    """Follows one call of the search from snapshot to snapshot: what is new, and how long it may still take."""

    def __init__(self) -> None:
        self._committed: dict[str, int] | None = None
        self._began = time.monotonic()
        self._charged_before = 0.0
        self._charged = 0.0
        self._devices: int | None = None
        self._forecast: Forecast | None = None
        self._timed: set[str] = set()
        self._strategy: Strategy | None = None
        self.quality: Quality | None = None
        """The score that the study should end with, as of the last segment that has ended."""

    def news(self, progress: Progress) -> list[str]:
        """A sentence for every segment that has ended since the last snapshot; none for the first snapshot."""
        charged = sum(trial.charge_seconds for trial in progress.trials)
        ended: list[str] = []
        if self._committed is None:
            self._began, self._charged_before = time.monotonic(), charged
        else:
            ended = [
                line
                for trial in progress.trials
                for result in trial.segments[self._committed.get(trial.key, 0) :]
                for line in (*describe_untrained(trial, result), describe_end(trial, result))
            ]
        study, trials = progress.study, progress.trials
        if ended or self._forecast is None:
            self._strategy = self._strategy or load_strategy(study)
            self.quality = forecast_quality(study, rank(study, self._strategy, trials), trials)
        self._devices = progress.load.devices
        if ended or self._forecast is None or (not self._forecast.measured and self._timed != set(progress.live)):
            self._timed = set(progress.live)
            self._forecast = forecast(study, trials, progress.live)
        self._charged = charged
        self._committed = {trial.key: len(trial.segments) for trial in progress.trials}
        return ended

    @property
    def elapsed_seconds(self) -> float:
        """Wall-clock seconds since the first snapshot."""
        return time.monotonic() - self._began

    def left(self) -> CostEstimate | None:
        """Wall-clock seconds that the rest should take, with the cost law's interval; None before the first snapshot.

        The forecast in device-seconds times the wall-clock seconds that each has taken in this call, waiting
        for devices included. The first few say little about that: to them as many are added as the share
        `ASSUMED_SHARE` of the bill takes with all devices busy.
        """
        if self._forecast is None:
            return None
        total, busy = self._forecast.total, self._forecast.wall(self._devices)
        if total.seconds <= 0:
            return total
        charged = self._charged - self._charged_before
        assumed = ASSUMED_SHARE * (charged + total.seconds)
        rate = (self.elapsed_seconds + assumed * busy.seconds / total.seconds) / (charged + assumed)
        return scaled(total, rate) if charged > 0 else busy

    def share_done(self) -> float:
        """Share of the whole bill that has been spent, in [0, 1]."""
        left = self._forecast.total.seconds if self._forecast else 0.0
        return self._charged / (self._charged + left) if self._charged else 0.0


class Display(Protocol):
    """Shows a running study; a context manager around it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def status(self, text: str) -> None:
        """Something that takes seconds begins."""
        ...

    def progress(self, progress: Progress) -> None:
        """A new snapshot."""
        ...


class PlainDisplay:
    """One line per finished segment, for logs.

    Args:
        emit: Takes a line.
    """

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self.watch = Watch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def status(self, text: str) -> None:
        """See `Display.status`."""
        self._emit(text)

    def progress(self, progress: Progress) -> None:
        """See `Display.progress`."""
        news = self.watch.news(progress)
        budget = progress.study.spec.budget
        left = self.watch.left()
        assert left is not None
        quality = f", final score {show_quality(self.watch.quality)}" if self.watch.quality is not None else ""
        for line in news:
            self._emit(
                f"{duration(progress.spent_seconds)} of {duration(budget.device_seconds)} spent, "
                f"about {duration(left.seconds)} left{quality} | {line}"
            )


class SilentDisplay:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def status(self, text: str) -> None:
        """See `Display.status`."""

    def progress(self, progress: Progress) -> None:
        """See `Display.progress`."""


class LiveDisplay:
    """A panel that is drawn anew several times a second, in a terminal.

    Args:
        console: Where to.
        name: Name of the study.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._status = "checking the study"
        self._progress: Progress | None = None
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._trends: dict[str, deque[StepRecord]] = {}
        self._began = time.monotonic()
        self._spinner = Spinner("dots")
        self.watch = Watch()
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def status(self, text: str) -> None:
        """See `Display.status`."""
        self._status = text

    def progress(self, progress: Progress) -> None:
        """See `Display.progress`."""
        self._status = ""
        clock = duration(time.monotonic() - self._began)
        self._events.extend(f"{clock:>12}  {line}" for line in self.watch.news(progress))
        for key, record in progress.live.items():
            seen = self._trends.setdefault(key, deque(maxlen=TREND_LENGTH))
            if not seen or seen[-1].step != record.step:
                seen.append(record)
        self._trends = {key: trend for key, trend in self._trends.items() if key in progress.live}
        self._progress = progress

    def render(self) -> RenderableType:
        """The panel as of now."""
        progress, elapsed = self._progress, duration(time.monotonic() - self._began)
        if progress is None or self._status:
            self._spinner.update(text=Text(f" {self._status} ... {elapsed}"))
            return self._spinner
        parts: list[RenderableType] = [
            _facts_grid(progress, elapsed, self.watch.left(), self.watch.quality),
            Text(),
            *_running(progress, self._trends),
            *[Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._events],
        ]
        return Panel(Group(*parts), title=f"jfhpo: {self._name}", subtitle=f"{progress.phase}", padding=(0, 1))


def _facts_grid(progress: Progress, elapsed: str, left: CostEstimate | None, quality: Quality | None) -> Table:
    spec = progress.study.spec
    spent, budget = progress.spent_seconds, spec.budget.device_seconds
    states = Counter(trial.state for trial in progress.trials)
    # Labels keep their width; what does not fit beside them is cut off.
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="bold", no_wrap=True, width=LABEL_WIDTH)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    bar = Table.grid(padding=(0, 1))
    bar.add_column(width=12)
    bar.add_column(no_wrap=True, overflow="ellipsis")
    bar.add_row(
        ProgressBar(total=budget, completed=min(spent, budget), width=12),
        f"{duration(spent)} of {duration(budget)} of trial time spent{spec.budget.in_money(spent)}",
    )
    grid.add_row("budget", bar)
    grid.add_row("time", f"{elapsed} elapsed" + (f", about {bill(left)} left" if left is not None else ""))
    grid.add_row("final score", show_quality(quality))
    tally = ", ".join(f"{states[state]} {state}" for state in SHOWN_STATES if states[state])
    grid.add_row("trials", f"{len(progress.trials)}: {tally}")
    if progress.load.devices is not None:
        grid.add_row("devices", _devices(progress))
    for name, item in standings(progress.study, progress.trials):
        grid.add_row(name, item.sentence())
    return grid


def _devices(progress: Progress) -> str:
    """How many are busy, and who waits for some: '5 of 8 busy; #12 waits for 8 (large), about 4 min to go'."""
    load, study = progress.load, progress.study
    parts = [f"{load.busy} of {load.devices} busy"]
    for trial in progress.trials:
        if trial.key in load.waiting:
            seconds = load.waiting[trial.key]
            soon = f", about {duration(seconds)} to go" if math.isfinite(seconds) else ""
            parts.append(f"#{trial.number} waits for {study.ladder[trial.model].devices} ({trial.model}){soon}")
    return "; ".join(parts)


def _running(progress: Progress, trends: dict[str, deque[StepRecord]]) -> list[RenderableType]:
    """A table of what is being trained now, and an empty line; nothing if nothing is."""
    running = [trial for trial in progress.trials if trial.open_segment is not None]
    if not running:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("running", "model", "step", "reward", "KL", "trend", "chosen by"):
        table.add_column(heading, no_wrap=True)
    for trial in running:
        assert trial.open_segment is not None
        record = progress.live.get(trial.key)
        step = record.step if record else trial.open_segment.start_step
        table.add_row(
            f"#{trial.number}",
            trial.model,
            f"{step}/{trial.open_segment.stop_step}",
            f"{record.reward:.3f}" if record else "waiting" if trial.key in progress.load.waiting else "starting",
            f"{record.kl:.3f}" if record and record.kl is not None else "",
            trend(seen.reward for seen in trends.get(trial.key, ())),
            trial.label or trial.open_segment.suggestion.source,
        )
    return [table, Text()]


def trend(values: Iterable[float]) -> str:
    """Values as bars, from their smallest to their largest: '▁▃▅█'."""
    numbers = [value for value in values if math.isfinite(value)]
    if len(numbers) < 2:
        return ""
    low, high = min(numbers), max(numbers)
    top = len(TREND_LEVELS) - 1
    return "".join(TREND_LEVELS[round((value - low) / (high - low) * top) if high > low else 0] for value in numbers)


def trial_table(trials: Sequence[Trial]) -> Table:
    """All trials, one per row."""
    table = Table(box=SIMPLE_HEAD)
    for heading, justify in (
        ("#", "right"), ("purpose", "left"), ("model", "left"), ("state", "left"), ("step", "right"),
        ("score", "right"), ("cost", "right"), ("configuration", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for trial in trials:
        state = f"{trial.state} ({trial.decision.rule})" if trial.decision else str(trial.state)
        state += f", changed {', '.join(trial.changed)}" if trial.changed else ""
        table.add_row(
            str(trial.number),
            f"{trial.purpose}{f' {trial.label}' if trial.label else ''}",
            trial.model,
            state,
            f"{trial.step}/{trial.total_steps}",
            show_score(trial.evaluations[-1]) if trial.evaluations else "",
            duration(trial.charge_seconds),
            Text(show_configuration(trial.configuration)),  # values may hold what Rich takes for markup
        )
    return table


def comparison_table(result: SearchResult) -> Table:
    """The recommendation and what it is measured against."""
    table = Table(
        box=SIMPLE_HEAD, title=f"Held-out score on {result.study.ladder.target.name}, full length", title_justify="left"
    )
    for heading, justify in (
        ("", "left"), ("score", "right"), ("95 % interval", "right"), ("seeds", "right"),
        ("recommended is ahead by", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    ahead = {contrast.label: contrast for contrast in contrasts(result)}
    for row in result.rows:
        contrast = ahead.get(row.label)
        least, most = interval(contrast.difference, contrast.standard_error) if contrast else (0.0, 0.0)
        table.add_row(
            row.label,
            score_text(row),
            interval_text(row),
            str(row.seeds),
            f"{contrast.difference:+.3f} ({least:+.3f} to {most:+.3f})" if contrast else "",
        )
    return table


def result_view(result: SearchResult) -> Group:
    """The final table with what it does and does not say."""
    parts: list[RenderableType] = []
    if not result.complete:
        parts.append(Text("The study is not finished; these are its figures so far.", style="yellow"))
    if result.recommended is not None:
        grid = Table.grid(padding=(0, 2))
        for name, value in result.study.complete(result.recommended.configuration).items():
            searched = name in result.recommended.configuration
            grid.add_row(Text(name, style="bold" if searched else "dim"), Text(show_value(value)))
        parts += [Text("Recommended configuration (searched in bold, fixed or default below)"), grid]
    if result.rows:
        parts.append(comparison_table(result))
    parts.append(Text(verdict(result)))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    if result.recommended is not None:
        item = result.recommended
        facts.add_row("model's belief", f"{item.mean:.3f} ± {item.standard_deviation:.3f} for the recommendation")
    ratio = search_trial_ratio(result)
    if ratio is not None:
        facts.add_row(
            "cost per trial",
            f"{duration(ratio[0])} on average against {duration(ratio[1])} for a full target trial "
            f"({ratio[0] / ratio[1]:.0%})",
        )
    budget = result.study.spec.budget
    facts.add_row("search trials", counts(result.study, result.trials).sentence())
    facts.add_row(
        "search spent",
        f"{duration(result.spent_seconds)} of {duration(budget.device_seconds)}{budget.in_money(result.spent_seconds)}",
    )
    waits = [(part.waiting_seconds, trial.number) for trial in result.trials for part in trial.segments]
    if waits and max(waits)[0] >= SHORTEST_WAIT_SECONDS:
        longest, number = max(waits)
        total = duration(sum(seconds for seconds, _ in waits))
        facts.add_row("waited for devices", f"{total} in all, the longest {duration(longest)} (#{number})")
    parts += [Text(), facts]
    parts += [Text(f"Note: {note}", style="dim") for note in caveats(result)]
    return Group(*parts)


def next_steps(outcome: StudyOutcome) -> dict[str, str]:
    """Where to look next: what to do, and by which command, file or address."""
    return {
        "browse": outcome.url or f"mlflow ui --backend-store-uri {outcome.tracking_uri}",
        "report": str(outcome.report),
        "model": f"{outcome.model_uri or 'none registered'}, {outcome.model_note}",
    }


def outlook_view(study: Study, bills: Forecast, quality: Quality | None) -> Table:
    """What is left to spend, how long it takes, and what score it should end with."""
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


def plan_view(
    study: Study,
    bills: Forecast,
    quality: Quality | None = None,
    more: tuple[Study, Forecast, Quality | None] | None = None,
) -> Group:
    """A checked study: its models, how trials are cut, the bill, and what should come of it.

    Args:
        study: The study.
        bills: Its forecast.
        quality: The forecast of its final score; None if there is none yet.
        more: The study with a larger budget, and its forecasts.
    """
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
    grid.add_row("stopping", ", ".join(rule.name for rule in build_rules(spec.stopping)))
    grid.add_row("in parallel", in_parallel(bills))
    parts: list[RenderableType] = [Text(f"Study {spec.study} is usable."), models, grid]
    parts += [_forecast_table(bills, spec.budget), outlook_view(study, bills, quality)]
    if more is not None:
        larger, larger_bills, larger_quality = more
        added = larger.spec.budget.device_seconds - spec.budget.device_seconds
        parts += [
            Text(f"\nWith {duration(added)} more of budget", style="bold"),
            outlook_view(larger, larger_bills, larger_quality),
            Text(),
        ]
    parts.append(Text(bills.basis, "" if bills.measured else "yellow"))
    if (warning := validation_warning(study, bills)) is not None:
        parts.append(Text(warning, style="yellow"))
    return Group(*parts)


def _models_table(study: Study, bills: Forecast) -> Table:
    """The models, and how many full-length runs of each the budget would buy."""
    budget, smallest = study.spec.budget, study.ladder.models[0]
    table = Table(box=SIMPLE_HEAD)
    for heading, justify in (
        ("model", "left"), ("parameters", "right"), ("role", "left"), ("full-length run (90 % interval)", "left"),
        ("budget buys", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for model in study.ladder.models:
        role = "target" if model == study.ladder.target else "smallest proxy" if model == smallest else "intermediate"
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
