"""How busy clusters are and how long trials wait on them, by the scheduler and by the policy before it.

Real searches on a simulated clock: models on 1, 2, 4 and 8 GPUs, of which the strategy wants to spend the same on each.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import ClassVar, Literal

import numpy as np

from benchmarks.markdown import markdown_table
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.strategy import Admits, Proposal, RandomSearch, Recommendation, fresh_configurations
from jfhpo_core.run.dispatch import Event, InlineDispatcher
from jfhpo_core.run.scheduler import Gap, Opening, Scheduler
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Suggestion, Trial

Policy = Literal["before", "after"]

NODES = (1, 2, 8)
"""Sizes of the pretended clusters, in nodes."""

GPUS_PER_NODE = 8

SLOTS_BEFORE = 4
"""What all presets had as `max_parallel`."""

SIZES = {"1": 0.5e9, "2": 1.5e9, "4": 3e9, "8": 7.6e9}
"""Models by their GPUs, with their parameters: with these, a step takes about as long on each."""

LENGTHS = 12
"""Length of a search, in full runs of the target, if all GPUs were busy."""

LAST = 0.1
"""Share of what a search spends that is spent while it comes to its end, with ever fewer segments left to begin."""

DRAWS = 20
"""Segments that the strategy would like next, best first."""


class EqualShares:
    """Wants to spend the same device time on each model, on new configurations up to a random rung."""

    name: ClassVar[str] = "equal-shares"

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        """See `Strategy.suggest`."""
        return self.suggest_among(study, trials, remaining_seconds, seed, lambda *_: True)

    def suggest_among(
        self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int, admits: Admits
    ) -> Proposal | None:
        """See `Selective.suggest_among`."""
        random, costs = np.random.default_rng(seed), CostModel.fit(study, trials)
        configuration = fresh_configurations(study, trials, seed, 1)[0]
        weights = np.array([1 / model.devices for model in study.ladder.models])
        for _ in range(DRAWS):
            model = study.ladder.models[random.choice(len(weights), p=weights / weights.sum())]
            level = int(random.choice(study.spec.fidelity.levels))
            cost = costs.estimate(configuration, model.name, 0, level).seconds
            if cost <= remaining_seconds and admits(model.name, cost):
                suggestion = Suggestion(source=self.name, explanation="drawn", expected_cost_seconds=cost)
                return Proposal(configuration, model.name, level, suggestion)
        return None

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        """See `Strategy.rank`."""
        return RandomSearch().rank(study, trials)


class FirstFit(Scheduler[str]):
    """The policy before: slots count trials, and whatever fits first starts, as Ray places it."""

    def opening(self, now: float) -> Opening | None:
        """A free slot takes anything."""
        if len(self._running) + len(self._queue) >= SLOTS_BEFORE:
            return None
        return Opening((Gap(sys.maxsize, sys.maxsize),), {})

    def _promise(self, *_: object) -> None:
        """Nobody is promised anything."""


class Watched(InlineDispatcher):
    """Notes how many devices were held, and for how long, in (seconds, devices)."""

    held: list[tuple[float, int]]

    def wait(self, timeout_seconds: float) -> list[Event]:
        """See `Dispatcher.wait`."""
        since, busy = self.now(), self.load().busy
        events = super().wait(timeout_seconds)
        self.held.append((self.now() - since, busy))
        return events


def busy_until(held: Sequence[tuple[float, int]], devices: int, share: float) -> float:
    """Share of devices that were held until a share of all their time was spent.

    >>> busy_until([(10.0, 8), (10.0, 2)], 8, 1.0), busy_until([(10.0, 8), (10.0, 2)], 8, 0.9)
    (0.625, 0.75)
    """
    left = spent = share * sum(seconds * busy for seconds, busy in held)
    passed = 0.0
    for seconds, busy in held:
        if seconds * busy >= left:
            return spent / (devices * (passed + left / busy))
        passed, left = passed + seconds, left - seconds * busy
    return spent / (devices * passed)


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        gpus: Of the cluster.
        busy: Share of them that was held, over the whole search.
        busy_before: The same without the time in which the last tenth was spent.
        waits: Seconds waited over length, of every segment, by the devices of its model.
    """

    policy: Policy
    gpus: int
    busy: float
    busy_before: float
    waits: dict[int, list[float]]


def simulate(nodes: int, policy: Policy, seed: int) -> Outcome:
    """Search once."""
    gpus = nodes * GPUS_PER_NODE
    with tempfile.TemporaryDirectory(prefix="jfhpo-cluster-") as workspace:
        study = resolve(_spec(workspace, gpus, seed))
        dispatcher = Watched(None, nodes={f"node-{index}": GPUS_PER_NODE for index in range(nodes)})
        dispatcher.held = []
        if policy == "before":
            dispatcher._scheduler = FirstFit(dispatcher._scheduler._nodes)  # noqa: SLF001
        result = run_search(study, MemoryLedger(), dispatcher, strategy=EqualShares())
    waits: dict[int, list[float]] = {int(size): [] for size in SIZES}
    for trial in result.trials:
        for part in trial.segments:
            waits[part.devices].append(part.waiting_seconds / part.seconds)
    whole, before = (busy_until(dispatcher.held, gpus, share) for share in (1.0, 1.0 - LAST))
    return Outcome(policy, gpus, whole, before, waits)


def _spec(workspace: str, gpus: int, seed: int) -> StudySpec:
    seconds_per_step, steps, rungs = 60.0, 100, 5
    full = steps * seconds_per_step
    return StudySpec.model_validate(
        {
            "study": "cluster",
            "family": [
                {"name": name, "path": "simulated", "parameters": int(parameters), "devices": int(name)}
                for name, parameters in SIZES.items()
            ],
            "target": list(SIZES)[-1],
            "task": "instruct",
            "trainer": {
                "name": "simulated",
                "fixed": {"n_samples": 8},
                "settings": {
                    "size_exponent": 0.0,
                    "seconds_per_step": seconds_per_step,
                    "startup_seconds": 120.0,
                    "evaluation_seconds": 60.0,
                },
            },
            "space": {"learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True}},
            "fidelity": {"horizon_prompts": 16 * steps, "rungs": rungs},
            "stopping": {"rules": "none"},
            "budget": {"trial_seconds": LENGTHS * full * gpus, "top_k": 1, "validation_share": 0.0},
            "seeds": {"search": seed, "training": [0]},
            "cluster": {"address": "inline", "gpus_per_device": 1},
            "tracking": {"workspace": workspace},
        }
    )


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the page of the docs."""
    rows = []
    for gpus in sorted({one.gpus for one in outcomes}):
        for policy in ("before", "after"):
            mine = [one for one in outcomes if (one.gpus, one.policy) == (gpus, policy)]
            every = [wait for one in mine for waits in one.waits.values() for wait in waits]
            largest = [wait for one in mine for wait in one.waits[GPUS_PER_NODE]]
            counts = [sum(len(one.waits[int(size)]) for one in mine) for size in SIZES]
            rows.append([
                str(gpus), policy, f"{mean(one.busy for one in mine):.0%}",
                f"{mean(one.busy_before for one in mine):.0%}", f"{max(every):.1f}",
                f"{median(largest):.1f}" if largest else "none ran", " / ".join(map(str, counts)),
            ])  # fmt: skip
    head = [
        "GPUs", "scheduling", "GPUs busy", "before the last tenth", "longest wait", "median wait on 8 GPUs",
        "segments on 1/2/4/8 GPUs",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    text = PAGE.format(table=markdown_table(head, rows), lengths=LENGTHS, slots=SLOTS_BEFORE,
                       searches=len(outcomes) // (2 * len({one.gpus for one in outcomes})))  # fmt: skip
    (folder / "cluster.md").write_text(text, encoding="utf-8")


PAGE = """# GPU use and waiting

Searches over models on 1, 2, 4 and 8 GPUs, on pretended clusters of nodes with 8 GPUs. A step takes about as long on
each model, segments go up to a random one of five rungs, and the strategy wants to spend the same GPU time on each
model. The searches are those of `jfhpo search` with the simulated trainer on a simulated clock; they last for
{lengths} full runs if all GPUs are busy. Made by `python -m benchmarks cluster`.

{table}

Waits are in multiples of the length of the segment that waited; {searches} search(es) per row. *Before*: slots counted
trials (`max_parallel: {slots}`, as in every preset), and Ray started what fitted first. *After*: devices are counted,
a trial that does not fit is promised a node, and only what ends in time, or leaves enough devices over, starts there
before it (`jfhpo_core/run/scheduler.py`).

*GPUs busy* is the share over a whole search, *before the last tenth* that until nine tenths of its GPU time were spent.
The aim is 85 %, and no wait of more than twice a segment's length. On 64 GPUs a search as short as these misses the
former by its end: once all of the budget is promised to running segments, these come to their ends one by one, and what
they turn out to have left over is spent by one or two more on a cluster that is idle otherwise. That takes two to three
full runs (seen in one of the searches), however long it was before. Promising more of the budget earlier, by bounding
the cost of all running segments together rather than that of each, was tried and did not shorten it.

What else is left idle: a node is drained before a run that takes all of it. The ends of running segments are
expectations of the cost model, wrong at first; on a real cluster the pace of a run's own steps corrects them. On Ray,
with eight pretended GPUs and real worker processes, `tests/run/test_ray_dispatch.py` checks that the order is the
scheduler's and that no GPU is given twice.
"""
