"""Is the moment right at which `stop_gain` ends a search?

python -m benchmarks stopping        does the searches that are missing, and writes docs/evidence/stopping.md

Each search spends its whole budget. Noted is, whenever it asks what to buy next, what it would deliver and what another
full run is worth to it; with a price of a full run, that says when it would have ended.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from benchmarks.foreign.settings import RECORDED, TUNING
from benchmarks.landscapes import load_problem
from benchmarks.markdown import markdown_table
from benchmarks.report import EVIDENCE
from benchmarks.runner import MEMORY, charged_seconds, prepare_worker
from benchmarks.store import RESULTS
from jfhpo_core.optimizer.allocation import Priced
from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.candidates import ranked_configurations
from jfhpo_core.optimizer.joint_fidelity import JointFidelity, worth_of_going_on
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.trial import Configuration

FILE = RESULTS / "stopping" / "cases.jsonl"
PAGE = "stopping.md"

BUDGET = 10
"""Full runs of the target, the recipe's among them."""

PRICES = (0.01, 0.02, 0.05, 0.1)
"""Of a full run, as shares of what the recipe lacks."""

SETTINGS = (*(f"{name}:{prior}" for name in RECORDED for prior in ("none", "shipped")), *(f"{n}:none" for n in TUNING))
"""Problem, and what is known before."""

ASKED = 1.1
"""Loss of the rule over that of the best fixed cost, at most."""


@dataclass(frozen=True)
class Moment:
    """When a search asks what to buy next, or has ended.

    Attributes:
        cost: Spent so far, in full runs of the target.
        regret: What the configuration lacks that it would deliver.
        worth: Of another full run, in score; None if there is nothing to go by.
    """

    cost: float
    regret: float
    worth: float | None


@dataclass(frozen=True)
class Search:
    """One search.

    Attributes:
        recipe: Regret of the recipe.
        moments: In their order; the last one is the end.
    """

    setting: str
    seed: int
    recipe: float
    moments: tuple[Moment, ...]

    def at(self, cost: float) -> float:
        """Regret of what is delivered if the search ends at a cost; the recipe's before anything is."""
        return next((moment.regret for moment in reversed(self.moments) if moment.cost <= cost), self.recipe)

    def stop(self, price: float) -> Moment:
        """Where it would have ended with a price of a full run, in score."""
        return next((item for item in self.moments if item.worth is not None and item.worth <= price), self.moments[-1])


@dataclass(frozen=True)
class Watched(JointFidelity):
    """The strategy, never stopping, that notes what another full run is worth."""

    noted: list[tuple[float, Configuration | None, float | None]] = field(default_factory=list)

    def pays(self, beliefs: Beliefs, items: Sequence[Priced], full_seconds: float) -> bool:
        """See `JointFidelity.pays`."""
        history = beliefs.history
        ranked = [item.configuration for item in ranked_configurations(beliefs)]
        delivered = next((item for item in ranked if history.final(item)), None)
        worth = worth_of_going_on(beliefs, items, full_seconds)
        self.noted.append((charged_seconds(history.trials), delivered, worth if math.isfinite(worth) else None))
        return True


def search(setting: str, seed: int) -> Search:
    """One search to the end of its budget."""
    name, _, prior = setting.partition(":")
    problem = load_problem(f"{name}@{BUDGET}", seed)
    strategy = Watched(prior=prior)
    with tempfile.TemporaryDirectory(prefix="jfhpo-benchmark-", dir=MEMORY if MEMORY.is_dir() else None) as workspace:
        study = problem.study(Path(workspace), "jfhpo", {"prior": prior})
        result = run_search(study, MemoryLedger(), InlineDispatcher(1, trainer=problem.trainer), strategy=strategy)

    def regret(configuration: Configuration | None) -> float:
        return problem.best_score - problem.true_score(problem.default if configuration is None else configuration)

    full = problem.training_seconds
    moments = [Moment(spent / full, regret(delivered), worth) for spent, delivered, worth in strategy.noted]
    last = None if result.recommended is None else result.recommended.configuration
    moments.append(Moment(charged_seconds(result.trials) / full, regret(last), None))
    return Search(setting, seed, regret(None), tuple(moments))


def load(file: Path = FILE) -> list[Search]:
    """Searches that have been done."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Search(**{**row, "moments": tuple(Moment(**item) for item in row["moments"])}) for row in rows]


def run(seeds: Sequence[int], workers: int = 1, file: Path = FILE) -> list[Search]:
    """Do the searches that are missing; returns all that have been done."""
    done = {(item.setting, item.seed) for item in load(file)}
    missing = [(setting, seed) for seed in seeds for setting in SETTINGS if (setting, seed) not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare_worker) as pool:
        for found in pool.map(search, *zip(*missing, strict=True)) if missing else ():
            with file.open("a", encoding="utf-8") as sink:
                sink.write(f"{json.dumps(asdict(found))}\n")
            print(f"{found.setting} {found.seed}: {len(found.moments)} moments", flush=True)
    return load(file)


@dataclass(frozen=True)
class Comparison:
    """The rule against the best fixed cost, on searches of one setting with one price.

    Attributes:
        rule: Mean loss: what is delivered lacks so much, and has cost so much at the price.
        stopped: Mean cost at which the rule ends the search.
        fixed: Mean loss of the best fixed cost, chosen in hindsight.
        best: That cost.
        never: Mean loss of spending the budget.
    """

    rule: float
    stopped: float
    fixed: float
    best: float
    never: float


def compare(found: Sequence[Search], share: float) -> Comparison:
    """The rule against every fixed cost.

    Args:
        found: Searches of one setting.
        share: Price of a full run, as a share of what the recipe lacks.
    """
    price = share * fmean(item.recipe for item in found)
    stops = [item.stop(price) for item in found]
    fixed = {
        cost: fmean(item.at(cost) for item in found) + price * cost
        for cost in (step / 4 for step in range(4 * BUDGET + 1))
    }
    best = min(fixed, key=lambda cost: fixed[cost])
    return Comparison(
        rule=fmean(stop.regret + price * stop.cost for stop in stops),
        stopped=fmean(stop.cost for stop in stops),
        fixed=fixed[best],
        best=best,
        never=fmean(item.moments[-1].regret + price * item.moments[-1].cost for item in found),
    )


def write(found: Sequence[Search], folder: Path = EVIDENCE) -> None:
    """Write the page of the docs."""
    rows = list(_rows(found))
    ratios = [float(row[3]) for row in rows]
    held = sum(ratio <= ASKED for ratio in ratios)
    seeds = sorted({item.seed for item in found})
    head = [
        "problem",
        "known before",
        "price",
        "rule / best fixed",
        "rule ends at",
        "best fixed cost",
        "never / best fixed",
    ]
    (folder / PAGE).write_text(
        f"""# When to stop

Made by `python -m benchmarks stopping`. With `stop_gain`, the price of a full run of the target in units of the score,
a search ends when no full run is expected to gain more than it costs
([method](../explanation/method.md)). {len(found)} searches (seeds {seeds[0]} to {seeds[-1]}) spent a budget of
{BUDGET} full runs, the recipe's among them, and noted all along what they would deliver and what another full run was
worth to them. That says when each would have ended at a price, and what it would have come to: the **loss** is the
regret of what is delivered, plus what has been spent at that price. Beside it stands the best fixed cost: chosen in
hindsight for every row, which no search could know. Prices are shares of what the recipe lacks, for one full run.

**At most {ASKED:.0%} of the loss of the best fixed cost in {held} of {len(rows)} rows** (asked for: all), on average
{fmean(ratios):.2f}, at worst {max(ratios):.2f}; to spend the budget has {fmean(float(row[6]) for row in rows):.2f}.

{markdown_table(head, rows)}

The foreign settings are those for tuning, with the recipe known and nothing else; of the recorded RL runs each is left
out of what is shipped. A fixed cost of 0 is not to search, and to take the recipe.
""",
        encoding="utf-8",
    )


def _rows(found: Sequence[Search]) -> Iterator[list[str]]:
    for setting in SETTINGS:
        mine = [item for item in found if item.setting == setting]
        if not mine:
            continue
        name, _, prior = setting.partition(":")
        for share in PRICES:
            item = compare(mine, share)
            yield [
                f"`{name}`", "the recipe" if prior == "none" else "what is shipped", f"{share:.0%}",
                f"{item.rule / item.fixed:.2f}", f"{item.stopped:.1f}", f"{item.best:.2g}",
                f"{item.never / item.fixed:.2f}",
            ]  # fmt: skip
