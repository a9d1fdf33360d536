"""Running strategies on landscapes: a run is one strategy on one landscape with one seed, on a simulated clock."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from linear_operator.utils.warnings import NumericalWarning

from benchmarks import store
from benchmarks.landscapes import LANDSCAPES, Problem, load_problem
from benchmarks.store import Result
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.forecast import forecast_quality
from jfhpo_core.optimizer.strategy import Proposal, Recommendation, Strategy, fresh_configurations, load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Outcome, SegmentResult, Trial, canonical_json, spent_seconds
from jfhpo_core.study.yaml_text import read_yaml

ROOT = Path(__file__).parent.parent

SHARED = ("jfhpo_core.errors", "jfhpo_core.optimizer.strategy", "jfhpo_core.study")
"""Modules and packages that say what a study is: a change to them does not make a strategy another one."""

NICENESS = 10

MEMORY = Path("/dev/shm")
"""Where checkpoints go if the system has it: on a disk, flushing them takes longer than the simulated trainings."""

FORECAST_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of the budget at which the forecast of the final score is looked at."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Attributes:
        label: Name under which it is reported: the strategy's unless settings or changes make it a variant.
        changes: To the landscape's study, see `Problem.study`.
    """

    strategy: str
    landscape: str
    seed: int
    settings: Mapping[str, Any]
    label: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """Settings of a strategy from the command line.

    >>> parse_settings(["fresh=64", "proxies=[0.5b]"])
    {'fresh': 64, 'proxies': ['0.5b']}
    """
    return {name: read_yaml(value, name).data for name, _, value in (item.partition("=") for item in items)}


@dataclass(frozen=True)
class Delivery:
    """What a search would deliver if it ended now: the best-ranked configuration that is complete on the target.

    As long as none is, the one that its strategy ranks first.

    Attributes:
        seconds: Spent so far, and what is missing to a full run of it on the target.
    """

    seconds: float
    configuration: Configuration


class Timed:
    """A strategy that is watched: its CPU seconds (the search asks for `rank` with every suggestion) and deliveries.

    Args:
        inner: The strategy.

    Attributes:
        deliveries: What it would deliver, in the order of the search.
        forecasts: See `Result.forecasts`; the first one after each of `FORECAST_SHARES`.
    """

    name: ClassVar[str] = "timed"

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.seconds = 0.0
        self.suggestions = 0
        self.deliveries: list[Delivery] = []
        self.forecasts: dict[float, tuple[float, float, float] | None] = {}

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        self.suggestions += 1
        return self._time(lambda: self.inner.suggest(study, trials, remaining_seconds, seed))

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`."""
        ranked = self._time(lambda: self.inner.rank(study, trials))
        if ranked:
            history = History.of(study, trials)
            finished = [item for item in ranked if history.final(item.configuration)]
            self.deliveries.append(delivery(history, (finished or ranked)[0].configuration))
        spent = spent_seconds(trials) / study.spec.budget.device_seconds
        share = max((share for share in FORECAST_SHARES if share <= spent < 1), default=None)
        if share is not None and share not in self.forecasts:
            quality = forecast_quality(study, ranked, trials)
            self.forecasts[share] = None if quality is None else (quality.low, quality.score, quality.high)
        return ranked

    def _time(self, call: Callable[[], Answer]) -> Answer:
        began = time.process_time()
        try:
            return call()
        finally:
            self.seconds += time.process_time() - began


def run_one(
    strategy: str,
    settings: Mapping[str, Any],
    landscape: str,
    seed: int,
    label: str | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Result:
    """Search one landscape with one strategy to the end of the budget.

    Args:
        strategy: Name that `load_strategy` knows.
        settings: Its settings.
        landscape: Name that `load_problem` knows.
        seed: Of the landscape's instance, the search and the trainings.
        label: Name under which the result is reported; None: the strategy's.
        changes: To the landscape's study, see `Problem.study`.
    """
    problem = load_problem(landscape, seed)
    with tempfile.TemporaryDirectory(prefix="jfhpo-benchmark-", dir=MEMORY if MEMORY.is_dir() else None) as workspace:
        study = problem.study(Path(workspace), strategy, settings, changes)
        timed = Timed(load_strategy(study))
        result = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=problem.trainer), strategy=timed)
    done = in_order(result.trials)
    default = problem.true_score(problem.default)
    return Result(
        strategy=label or strategy,
        base_strategy=strategy,
        settings=dict(settings),
        changes={section: dict(fields) for section, fields in (changes or {}).items()},
        landscape=landscape,
        seed=seed,
        stamp=stamp(strategy, settings, landscape, seed, changes),
        commit=commit(),
        best_score=round(problem.best_score, 5),
        budget_seconds=study.spec.budget.device_seconds,
        training_seconds=problem.training_seconds,
        spent_seconds=round(result.spent_seconds, 1),
        trace=trace(problem, timed.deliveries),
        recommended_score=round(
            problem.true_score(result.recommended.configuration) if result.recommended else default, 5
        ),
        segments={model.name: sum(trial.model == model.name for trial, _ in done) for model in study.ladder.models},
        infeasible=sum(segment.outcome is Outcome.INFEASIBLE for _, segment in done),
        forecasts=tuple(
            (share, *(round(value, 5) for value in shown)) for share, shown in timed.forecasts.items() if shown
        ),
        suggestions=timed.suggestions,
        cpu_seconds_per_suggestion=round(timed.seconds / max(1, timed.suggestions), 5),
    )


def in_order(trials: Sequence[Trial]) -> list[tuple[Trial, SegmentResult]]:
    """All committed segments of the search with their trials, in the order of commitment."""
    pairs = [(trial, segment) for trial in trials if trial.purpose == "search" for segment in trial.segments]
    return sorted(pairs, key=lambda pair: pair[1].committed)


def delivery(history: History, configuration: Configuration) -> Delivery:
    """What it takes to deliver a configuration trained to full length on the target.

    Baselines, which only strategies with a use for them are told, are charged like the search itself.
    """
    study, trials = history.study, history.trials
    target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
    spent = charged_seconds(trials)
    mine = [trial for trial in history.on_target if trial.configuration == configuration]
    if any(trial.final is not None for trial in mine):
        return Delivery(spent, configuration)
    done = max((trial.step * trial.prompts_per_step for trial in mine if trial.checkpoint is not None), default=0)
    missing = CostModel.fit(study, trials).estimate(configuration, target, done, horizon).seconds
    return Delivery(spent + missing, configuration)


def charged_seconds(trials: Sequence[Trial]) -> float:
    """Device-seconds of the search and of the recipes that it was told."""
    return spent_seconds(trials) + spent_seconds(trials, "baseline")


def trace(problem: Problem, deliveries: Sequence[Delivery]) -> tuple[tuple[float, float], ...]:
    """The incumbent's true score against seconds; see `Result` for the rule.

    Args:
        problem: Knows the true scores.
        deliveries: In the order of the search.
    """
    points = [(0.0, round(problem.true_score(problem.default), 5))]
    for item in sorted(deliveries, key=lambda item: item.seconds):
        point = (round(item.seconds, 1), round(problem.true_score(item.configuration), 5))
        if point[1] != points[-1][1]:
            points.append(point)
    return tuple(points)


def run(
    runs: Sequence[Run],
    folder: Path = store.RESULTS,
    workers: int = 1,
    redo: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Do the runs whose results are missing, seed by seed, and store each as soon as it is done.

    Args:
        runs: In any order; they are done in the order of their seeds, so that any prefix is a fair comparison.
        folder: Of the results.
        workers: Processes, one thread each.
        redo: Also replace results whose stamp is not that of the present code.
        say: Takes lines for people.

    Returns:
        How many runs failed.
    """
    todo = [item for item in sorted(runs, key=lambda item: item.seed) if not _is_done(item, folder, redo)]
    say(f"{len(todo)} runs to do, {len(runs) - len(todo)} done before")
    failed = 0
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read by the workers when they import torch
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare_worker) as pool:
        running = {
            pool.submit(
                run_one, item.strategy, item.settings, item.landscape, item.seed, item.label, item.changes
            ): item
            for item in todo
        }
        try:
            for count, future in enumerate(as_completed(running), 1):
                item = running[future]
                place = f"[{count}/{len(todo)}] {item.label} {item.landscape} {item.seed}"
                error = future.exception()
                if error is not None:
                    failed += 1
                    say(f"{place}: FAILED: {type(error).__name__}: {error}")
                    continue
                result = future.result()
                store.save(folder, result)
                say(
                    f"{place}: regret {result.final_regret:.4f}, {result.suggestions} suggestions "
                    f"of {result.cpu_seconds_per_suggestion:.2f} s"
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def prepare_worker() -> None:
    """In a process of a pool: one thread, low priority, few warnings."""
    warnings.simplefilter("ignore", NumericalWarning)  # of BoTorch's models: hundreds of lines between the results
    os.nice(NICENESS)
    torch.set_num_threads(1)


def _is_done(item: Run, folder: Path, redo: bool) -> bool:
    known = store.load(folder, item.label).get((item.landscape, item.seed))
    return known is not None and not (
        redo and known.stamp != stamp(item.strategy, item.settings, item.landscape, item.seed, item.changes)
    )


def stamp(
    strategy: str,
    settings: Mapping[str, Any],
    landscape: str,
    seed: int,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Hash of all that makes a result: source and settings of the strategy, the landscape's true scores and changes."""
    parts = [_source_digest(strategy), dict(settings), _fingerprint(landscape, seed)]
    if changes:
        parts.append({section: dict(fields) for section, fields in changes.items()})
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:12]


@cache
def _source_digest(strategy: str) -> str:
    """Hash of the class of a strategy and of the modules of jfhpo_core that it is built from, directly or not."""
    problem = load_problem(next(iter(LANDSCAPES)), 0)
    kind = type(load_strategy(problem.study(Path("unused"), strategy)))
    found, queue = set[str](), [kind.__module__]
    while queue:
        name = queue.pop()
        if name.startswith("jfhpo_core.") and not name.startswith(SHARED) and name not in found:
            found.add(name)
            queue += [str(getattr(value, "__module__", "")) for value in vars(sys.modules[name]).values()]
    text = inspect.getsource(kind) + "".join(inspect.getsource(sys.modules[name]) for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _fingerprint(landscape: str, seed: int) -> str:
    """Hash of a landscape's study and of the true scores of a few configurations on every model."""
    problem = load_problem(landscape, seed)
    study = problem.study(Path("unused"))
    scores = [
        round(problem.true_score(item, model.name), 9)
        for item in fresh_configurations(study, (), 0, 4)
        for model in study.ladder.models
    ]
    text = canonical_json([dict(problem.data), scores]).replace(str(ROOT), "")
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def commit() -> str:
    """The commit that is checked out, with a plus sign if files of the packages differ from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*arguments: str) -> str:
        return subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = ask("status", "--porcelain", "--untracked-files=no", "jfhpo_core", "benchmarks/*.py")
    return (ask("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")
