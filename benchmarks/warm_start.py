"""What an earlier study is worth: a second study starts from nothing, from one that fits, or from one that misleads.

A landscape is named 'SETTING@BUDGET:START:FIRST', where START is one of `STARTS` and FIRST the setting of the earlier
study.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks import prior, report, runner, store
from benchmarks.analysis import Results, recommended_regrets
from benchmarks.foreign import figures, settings
from benchmarks.landscapes import Problem
from benchmarks.markdown import markdown_table, mean_text
from benchmarks.store import Result
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import EarlierStudy
from jfhpo_core.study.trial import Evaluation, SegmentResult, Trial

RESULTS = store.RESULTS / "warm-start"

PEERS_RESULTS = (store.RESULTS / "foreign", prior.PEERS_RESULTS)
"""Where the peers' results lie."""

PAGE = "warm-start.md"

STARTS = {
    "cold": "no earlier study, but what is shipped, less what was recorded of its own task",
    "warm": "the first study beside what is shipped",
    "misled": "the same with every score of the first study turned round: its best is its worst",
}
"""What a second study starts from."""

PAIRS = (
    ("table-arithmetic", "table-instruct"),
    ("table-instruct", "table-arithmetic"),
    ("table-instruct", "table-countdown"),
    ("table-countdown", "table-instruct"),
    ("llm-138m", "llm-278m"),
    ("llm-278m", "llm-900m"),
    ("vlm-21m", "vlm-103m"),
)
"""First and second study: another task on the same models, or another target of the same kind."""

FIRST_BUDGET = 10
"""Of the first study, in full runs of its target."""

ELSEWHERE = "L4"
"""GPU of the first study: prices on another one are not compared."""

BUDGETS = (2, 3, 6, 10)
"""Of the second study, in full runs of its target; one of them is the recipe's."""

STRATEGY = "jfhpo"


def name(second: str, budget: int, start: str, first: str) -> str:
    """A landscape's name."""
    return f"{second}@{budget}:{start}:{first}"


def problem(landscape: str, seed: int) -> Problem:
    """A second study as a landscape; the first one is run for it, with the same seed."""
    second, start, first = landscape.split(":")
    found = settings.problem(second, seed)
    if start == "cold":
        return found
    earlier = first_study(first, seed)
    return replace(found, earlier=(mirrored(earlier) if start == "misled" else earlier,))


@lru_cache(maxsize=8)
def first_study(setting: str, seed: int) -> EarlierStudy:
    """A finished study, remembered in this process."""
    found = settings.problem(f"{setting}@{FIRST_BUDGET}", seed)
    with tempfile.TemporaryDirectory() as folder:
        study = found.study(Path(folder), STRATEGY)
        dispatcher = InlineDispatcher(1, trainer=found.trainer)
        result = run_search(study, MemoryLedger(), dispatcher, strategy=load_strategy(study))
    # Prices of landscapes are relative to the target's full run: those of one say nothing of another's.
    elsewhere = study.spec.model_copy(update={"cluster": study.spec.cluster.model_copy(update={"gpu": ELSEWHERE})})
    return EarlierStudy(elsewhere, study.ladder, tuple(result.trials))


def mirrored(earlier: EarlierStudy) -> EarlierStudy:
    """The same study with the scores of every model turned round between the lowest and the highest one."""
    seen: dict[str, list[float]] = {}
    for trial in earlier.trials:
        seen.setdefault(trial.model, []).extend(evaluation.score for evaluation in trial.evaluations)

    def turned(trial: Trial) -> Trial:
        total = min(seen[trial.model], default=0.0) + max(seen[trial.model], default=0.0)

        def evaluation(item: Evaluation) -> Evaluation:
            return item.model_copy(update={"score": total - item.score})

        def segment(item: SegmentResult) -> SegmentResult:
            return item.model_copy(update={"evaluations": tuple(evaluation(one) for one in item.evaluations)})

        return trial.model_copy(update={"segments": tuple(segment(item) for item in trial.segments)})

    return replace(earlier, trials=tuple(turned(trial) for trial in earlier.trials))


def runs(
    seeds: Sequence[int], second: Sequence[str] | None = None, budgets: Sequence[int] = BUDGETS
) -> list[runner.Run]:
    """Every pair, start and budget with every seed; only some second studies, if they are named."""
    return [
        runner.Run(STRATEGY, name(setting, budget, start, first), seed, {}, STRATEGY)
        for first, setting in PAIRS
        if second is None or setting in second
        for start in STARTS
        for budget in budgets
        for seed in seeds
    ]


def write(results: Results, folder: Path) -> None:
    """Write the page of the docs from the published seeds."""
    mine = {key: result for key, result in results.get(STRATEGY, {}).items() if key[1] >= report.FIRST_SEED}
    peers = _peers()
    sections = ["# What an earlier study is worth", "Generated by `python -m benchmarks warm-start`; do not edit."]
    sections += [_introduction(), "## At every budget", markdown_table(HEAD, list(_rows(mine)))]
    sections += ["## After one full run of the target", ONE_RUN, markdown_table(ONE_HEAD, list(_one_run(mine, peers)))]
    (folder / PAGE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _peers() -> Results:
    peers: dict[str, dict[store.Key, Result]] = {}
    for folder in PEERS_RESULTS:
        for strategy, known in store.load_all(folder).items():
            peers.setdefault(strategy, {}).update(known)
    return peers


def _introduction() -> str:
    starts = "; ".join(f"**{start}**: {what}" for start, what in STARTS.items())
    return (
        f"A first study spends {FIRST_BUDGET} full runs of its target, then a second one begins from one of three "
        f"things. {starts}. Of the second one's budget, one full run is the recipe's. Regret is the true score that "
        "its recommendation lacks, mean ± standard error over seeds, which draw the noise and both strategies' "
        "choices. The pairs of tables are two tasks on the same models; the others are a larger target of the same "
        "kind of model, in [the settings for tuning](foreign.md). None of these settings is untouched: the optimizer "
        "was changed while its results on them were known, but not those of these seeds."
    )


HEAD = ("second study", "first study", "budget", *STARTS, "warm / cold", "misled / cold", "seeds")

ONE_RUN = (
    "Regret of the second study with a budget of 2: the recipe's run and one more. Beside it the best peer's after ten "
    "full runs, over those of the same seeds that it has done."
)

ONE_HEAD = ("second study", "first study", "warm, one run", "best peer, ten runs", "peer", "seeds")


def _rows(mine: dict[store.Key, Result]) -> Iterator[list[str]]:
    for first, second in PAIRS:
        for budget in BUDGETS:
            regrets = {start: recommended_regrets(mine, name(second, budget, start, first)) for start in STARTS}
            seeds = sorted(set.intersection(*(set(found) for found in regrets.values())))
            if not seeds:
                continue
            means = {start: np.array([found[seed] for seed in seeds]) for start, found in regrets.items()}
            cold = float(means["cold"].mean())
            yield [
                second, first, str(budget), *(mean_text(values) for values in means.values()),
                *(f"{means[start].mean() / cold:.2f}" for start in ("warm", "misled")), str(len(seeds)),
            ]  # fmt: skip


def _one_run(mine: dict[store.Key, Result], peers: Results) -> Iterator[list[str]]:
    for first, second in PAIRS:
        warm = recommended_regrets(mine, name(second, BUDGETS[0], "warm", first))
        if not warm:
            continue
        others = [peer for peer in peers if peer != STRATEGY]
        best = figures.best_peer(peers, others, second, FIRST_BUDGET, list(warm))
        value = mean_text(np.array(list(warm.values())))
        told = [f"{best[1].value:.4f}", f"{best[0]} ({best[1].seeds} seeds)"] if best else ["-", "-"]
        yield [second, first, value, *told, str(len(warm))]
