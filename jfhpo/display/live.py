"""A running study as it is shown: a live panel in a terminal, plain lines in a log, or nothing."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jfhpo.display.watch import Quiet, Watch, standings
from jfhpo.display.words import bill, duration, show_quality, trend
from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import Quality
from jfhpo_core.run.search import Progress
from jfhpo_core.study.trial import StepRecord, TrialState

REFRESH_PER_SECOND = 4
LISTEN_SECONDS = 1.0
EVENTS_SHOWN = 6
LABEL_WIDTH = 18
TREND_LENGTH = 16
SHOWN_STATES = (
    TrialState.RUNNING,
    TrialState.PAUSED,
    TrialState.COMPLETED,
    TrialState.STOPPED,
    TrialState.INFEASIBLE,
    TrialState.LOST,
)


class Display(Protocol):
    """Shows a running study; a context manager around it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def status(self, text: str) -> None:
        """Something that takes seconds begins."""
        ...

    def note(self, text: str) -> None:
        """Something worth keeping in sight was found."""
        ...

    def progress(self, progress: Progress) -> None:
        """A new snapshot."""
        ...


class PlainDisplay:
    """One line per finished segment, for logs; and while nothing is heard, a line now and then.

    Args:
        emit: Takes a line.
    """

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._progress: Progress | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.watch = Watch()
        self.quiet = Quiet()

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="display", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _listen(self) -> None:
        """Snapshots may stay away for long: a trial may train in the very thread that they come from."""
        while not self._over.wait(LISTEN_SECONDS):
            with self._lock:
                for line in self.quiet.heard(self._progress, spoken=False):
                    self._emit(line)

    def status(self, text: str) -> None:
        """See `Display.status`."""
        with self._lock:
            self._progress = None
            self.quiet.begin(text)
            self._emit(text)

    def note(self, text: str) -> None:
        """See `Display.note`."""
        self._emit(text)

    def progress(self, progress: Progress) -> None:
        """See `Display.progress`."""
        with self._lock:
            self._tell(progress)

    def _tell(self, progress: Progress) -> None:
        self._progress = progress
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
        for line in self.quiet.heard(progress, spoken=bool(news)):
            self._emit(line)


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

    def note(self, text: str) -> None:
        """See `Display.note`."""

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
        self.quiet = Quiet()
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

    def note(self, text: str) -> None:
        """See `Display.note`."""
        self._events.append(f"{duration(time.monotonic() - self._began):>12}  {text}")

    def progress(self, progress: Progress) -> None:
        """See `Display.progress`."""
        self._status = ""
        news = self.watch.news(progress)
        for line in [*news, *self.quiet.heard(progress, spoken=bool(news))]:
            self.note(line)
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
        for line in self.quiet.heard(progress, spoken=False):
            self.note(line)
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
