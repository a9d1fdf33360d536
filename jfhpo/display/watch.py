"""What is new in a running study, what is best so far, and how long the rest may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jfhpo.display.words import describe_end, describe_untrained, duration, show_score
from jfhpo_core.optimizer.cost import CostEstimate
from jfhpo_core.optimizer.forecast import Forecast, Quality, forecast, forecast_quality, scaled
from jfhpo_core.optimizer.strategy import Strategy, load_strategy
from jfhpo_core.run.preflight import told_before_trials
from jfhpo_core.run.search import Progress
from jfhpo_core.run.standing import rank
from jfhpo_core.study.resolved import Study, base_scores
from jfhpo_core.study.trial import Evaluation, Trial

QUIET_SECONDS = 30.0
"""Nothing is said for so long before a display says that work goes on."""
ASSUMED_SHARE = 0.1
"""Share of a bill that counts as spent at full speed before the speed is measured."""


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
        self._untrained: set[str] = set()
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
            # What was measured before is told once, by the session or by an earlier call.
            self._untrained = {*base_scores(progress.trials), *told_before_trials(progress.study)}
        else:
            for trial in progress.trials:
                for result in trial.segments[self._committed.get(trial.key, 0) :]:
                    untrained = describe_untrained(trial, result)
                    if untrained and trial.model not in self._untrained:
                        self._untrained.add(trial.model)
                        ended += untrained
                    ended.append(describe_end(trial, result))
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


class Quiet:
    """Speaks up while nothing is heard: sampling or scoring that takes minutes shall not look like a hang.

    Args:
        clock: Seconds of a clock that only goes forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spoke = clock()
        self._begun = ("", self._spoke)
        self._heard: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def begin(self, what: str) -> None:
        """Something that takes seconds begins, outside any trial."""
        self._spoke = self._clock()
        self._begun = (what, self._spoke)

    def heard(self, progress: Progress | None, *, spoken: bool) -> list[str]:
        """What to say now: a line now and then, unless something else was `spoken`.

        Args:
            progress: The newest snapshot; None before the first one, and since something else has begun.
            spoken: Whether something has just been said.
        """
        with self._lock:  # a display listens in a thread of its own
            return self._due(progress, spoken=spoken)

    def _due(self, progress: Progress | None, *, spoken: bool) -> list[str]:
        now = self._clock()
        if progress is None:
            what, since = self._begun
            if not what or now - self._spoke < QUIET_SECONDS:
                return []
            self._spoke = now
            return [f"still at work: {what}, for {duration(now - since)}"]
        running = {trial.key: trial for trial in progress.trials if trial.open_segment is not None}
        for key, trial in running.items():
            assert trial.open_segment is not None
            record = progress.live.get(key)
            step = record.step if record is not None else trial.open_segment.start_step
            if key not in self._heard or self._heard[key][0] != step or key in progress.load.waiting:
                self._heard[key] = (step, now)
        self._heard = {key: heard for key, heard in self._heard.items() if key in running}
        if spoken:
            self._spoke = now
        latest = max(self._heard, key=lambda key: self._heard[key][1], default=None)
        if latest is None or min(now - self._spoke, now - self._heard[latest][1]) < QUIET_SECONDS:
            return []
        self._spoke = now
        step, since = self._heard[latest]
        trial = running[latest]
        at = f"#{trial.number} {trial.model} at step {step} of {trial.total_steps}"
        what = "sampling or scoring" if latest in progress.live else "starting, loading or the first evaluation"
        return [f"still at work: {at}, nothing heard for {duration(now - since)}: {what} takes long"]
