"""The command line of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from benchmarks import ablations, prices, prior, report, reproduction, runner, store, warm_start
from benchmarks.analysis import Results
from benchmarks.foreign.commands import app as foreign
from benchmarks.foreign.settings import RECORDED
from benchmarks.landscapes import LANDSCAPES
from benchmarks.timing import FILE, OBSERVATIONS, TIMINGS, measure

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(foreign, name="foreign")

Folder = Annotated[Path, typer.Option("--results", help="Folder of the results.")]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    """'1000:1020' (the end excluded) or '3,5,8'."""
    low, colon, high = text.partition(":")
    return list(range(int(low), int(high))) if colon else [int(seed) for seed in _names(text)]


def _do(
    runs: Sequence[runner.Run],
    write: Callable[[Results, Path], None],
    folder: Path,
    results: Path,
    workers: int,
    redo: bool,
) -> None:
    """Do the runs that are missing, and write a page if there are published seeds."""
    failed = runner.run(runs, results, workers, redo)
    found = store.load_all(results)
    if any(seed >= report.FIRST_SEED for known in found.values() for _, seed in known):
        write(found, folder)
    if failed:
        raise typer.Exit(1)


@app.command()
def run(
    strategies: Annotated[str, typer.Option(help="Names, with commas.")] = "jfhpo,paper,random",
    landscapes: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(LANDSCAPES),
    seeds: Annotated[str, typer.Option(help="1000:1020 or 3,5,8. Tuning: 0 to 99; publication: from 1000.")] = "0:3",
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    redo: Annotated[bool, typer.Option(help="Replace results that older code has made.")] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, of the strategy.")] = None,
    label: Annotated[str | None, typer.Option(help="Report the one strategy under this name.")] = None,
    results: Folder = store.RESULTS,
) -> None:
    """Do the runs that are missing; a run that is interrupted is the only one to be done again."""
    unknown = [name for name in _names(landscapes) if name not in LANDSCAPES]
    if unknown:
        raise typer.BadParameter(f"no landscape {unknown[0]!r}; there are {', '.join(LANDSCAPES)}")
    settings = runner.parse_settings(setting or ())
    if settings and (label is None or len(_names(strategies)) != 1):
        raise typer.BadParameter("--set makes a variant of one strategy: name that one, and give it a --label")
    runs = [
        runner.Run(strategy, landscape, seed, settings, label or strategy)
        for strategy in _names(strategies)
        for landscape in _names(landscapes)
        for seed in _seeds(seeds)
    ]
    if runner.run(runs, results, workers, redo):
        raise typer.Exit(1)


@app.command()
def table(
    own: Annotated[str, typer.Option(help="Strategy that is compared with the others.")] = "jfhpo",
    seeds: Annotated[str | None, typer.Option(help="Only these.")] = None,
    results: Folder = store.RESULTS,
) -> None:
    """Print mean final regrets and cost ratios as plain text."""
    print(report.text_table(store.load_all(results), own, _seeds(seeds) if seeds else None))


@app.command("report")
def write_report(
    own: Annotated[str, typer.Option(help="Strategy that is compared with the others.")] = "jfhpo",
    strategies: Annotated[str | None, typer.Option(help="Only these, with commas.")] = None,
    folder: Annotated[Path, typer.Option("--to", help="Where figures and page go.")] = report.EVIDENCE,
    results: Folder = store.RESULTS,
) -> None:
    """Write the figures and the page of the docs, from seeds that were not used for tuning."""
    found = store.load_all(results)
    wanted = _names(strategies) if strategies else list(found)
    missing = [name for name in (own, *wanted) if name not in found]
    if missing:
        raise typer.BadParameter(f"no results of {missing[0]!r} in {results}; `python -m benchmarks run` makes them")
    timed = results / FILE
    timings = TIMINGS.validate_json(timed.read_bytes()) if timed.exists() else ()
    summary = "; ".join(item.summary() for item in timings) or None
    report.write({name: found[name] for name in wanted}, own, folder, summary)


@app.command("ablations")
def run_ablations(
    landscapes: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(RECORDED),
    seeds: Annotated[str, typer.Option(help="1000:1020 or 3,5,8. Tuning: 0 to 99; publication: from 1000.")] = "0:3",
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    redo: Annotated[bool, typer.Option(help="Replace results that older code has made.")] = False,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
    results: Folder = ablations.RESULTS,
) -> None:
    """Take one part of the method away at a time, and write the page of the docs from seeds 1000 on."""
    _do(ablations.runs(_names(landscapes), _seeds(seeds)), ablations.write, folder, results, workers, redo)


@app.command("warm-start")
def start_warm(
    seeds: Annotated[str, typer.Option(help="1000:1020 or 3,5,8. Tuning: 0 to 99; publication: from 1000.")] = "0:3",
    second: Annotated[str, typer.Option(help="Second studies, with commas; all by default.")] = "",
    budgets: Annotated[str, typer.Option(help="In full runs, with commas.")] = ",".join(map(str, warm_start.BUDGETS)),
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    redo: Annotated[bool, typer.Option(help="Replace results that older code has made.")] = False,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
    results: Folder = warm_start.RESULTS,
) -> None:
    """Begin studies from nothing, from an earlier study and from one that misleads, and write the page of the docs."""
    known = sorted({setting for _, setting in warm_start.PAIRS})
    unknown = [name for name in _names(second) if name not in known]
    if unknown:
        raise typer.BadParameter(f"no second study {unknown[0]!r}; there are {', '.join(known)}")
    chosen = warm_start.runs(_seeds(seeds), _names(second) or None, [int(item) for item in _names(budgets)])
    _do(chosen, warm_start.write, folder, results, workers, redo)


@app.command("prior")
def begin_with_prior(
    seeds: Annotated[str, typer.Option(help="1000:1020 or 3,5,8. Tuning: 0 to 99; publication: from 1000.")] = "0:3",
    settings: Annotated[str, typer.Option(help="Recorded tables, with commas.")] = ",".join(RECORDED),
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    redo: Annotated[bool, typer.Option(help="Replace results that older code has made.")] = False,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
    results: Folder = prior.RESULTS,
) -> None:
    """Search recorded tables knowing nothing, what is shipped, or what misleads, and write the page of the docs."""
    _do(prior.runs(_seeds(seeds), _names(settings)), prior.write, folder, results, workers, redo)


@app.command()
def reproduce(
    labels: Annotated[str, typer.Option(help="Methods and ablations, with commas.")] = ",".join(reproduction.LABELS),
    seeds: Annotated[str, typer.Option(help="1000:1003 or 3,5.")] = "1000:1003",
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
    results: Folder = reproduction.RESULTS,
) -> None:
    """The paper's three tables with real runs (hours; interrupt it and run it again: it goes on)."""
    unknown = [label for label in _names(labels) if label not in reproduction.LABELS]
    if unknown:
        raise typer.BadParameter(f"no method {unknown[0]!r}; there are {', '.join(reproduction.LABELS)}")
    failed = reproduction.run(_names(labels), _seeds(seeds), workers, results)
    reproduction.write(reproduction.load(results), folder)
    if failed:
        raise typer.Exit(1)


@app.command()
def timing(
    strategy: Annotated[str, typer.Option(help="Strategy that is timed.")] = "jfhpo",
    suggestions: Annotated[int, typer.Option(min=1, help="How many.")] = 40,
    stock: Annotated[int, typer.Option(min=0, help="Suggestions of BoTorch's qMultiFidelityKnowledgeGradient.")] = 3,
    results: Folder = store.RESULTS,
) -> None:
    """Time suggestions at 200 and 1,000 observations, 8 hyperparameters, 3 sizes and 15 levels."""
    first, *further = OBSERVATIONS
    measured = [measure(strategy, first, suggestions, stock)]
    measured += [measure(strategy, observations, suggestions, 0) for observations in further]
    results.mkdir(parents=True, exist_ok=True)
    (results / FILE).write_bytes(TIMINGS.dump_json(tuple(measured), indent=1) + b"\n")
    for item in measured:
        print(item.summary())


@app.command("prices")
def check_prices(
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
) -> None:
    """Compare prices that rest on parameters, tokens and hardware with step times, and write the page of the docs."""
    prices.write(folder)


@app.command("stopping")
def stopping_rule(
    seeds: Annotated[str, typer.Option(help="1000:1020 or 3,5,8. Tuning: 0 to 99; publication: from 1000.")] = "0:3",
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
    results: Annotated[Path | None, typer.Option(help="File of the results; none: the published ones.")] = None,
) -> None:
    """Compare when `stop_gain` ends a search with the best fixed cost, and write the page of the docs."""
    from benchmarks import stopping

    stopping.write(stopping.run(_seeds(seeds), workers, results or stopping.FILE), folder)


@app.command("recipe")
def recipes(
    limit: Annotated[int | None, typer.Option(min=0, help="Do at most so many of the missing cases.")] = None,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
) -> None:
    """Ask for recipes at sizes that were left out, and write the page of the docs. Needs `foreign fetch`."""
    from benchmarks import recipe

    recipe.write(recipe.run(limit), folder)


@app.command("why")
def sentences(
    limit: Annotated[int | None, typer.Option(min=0, help="Do at most so many of the missing cases.")] = None,
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
) -> None:
    """Hold the sentences of `jfhpo why` to landscapes whose truth is known, and write the page of the docs."""
    from benchmarks import why

    why.write(why.run(limit), folder)


@app.command("faults")
def inject_faults(
    faults: Annotated[int, typer.Option(help="Seeds are run until so many faults are on record.")] = 200,
    seeds: Annotated[str, typer.Option(help="1000:1050 or 3,5,8.")] = "1000:1100",
    place: Annotated[
        Literal["inline", "ray", "server", "command"],
        typer.Option(
            help="ray: workers and raylets are killed, too; server: the MLflow server that holds the ledger; command: "
            "what a person does or meets at the command line."
        ),
    ] = "inline",
    only: Annotated[str, typer.Option(help="Kinds of faults, with commas; all of the place by default.")] = "",
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
) -> None:
    """Disturb searches at random moments, as far as it is missing, and write the page of the docs."""
    from benchmarks.faults.page import write
    from benchmarks.faults.records import KINDS, load
    from benchmarks.faults.run import run

    kinds = [kind for kind in KINDS if kind in only.split(",")]
    violations = run(faults, _seeds(seeds), place, kinds)
    write(load(), folder)
    if violations:
        raise typer.Exit(1)


@app.command("simulate")
def simulate_faults(
    schedules: Annotated[int, typer.Option(min=1, help="How many schedules of faults.")] = 10_000,
    first: Annotated[int, typer.Option(help="Seed of the first.")] = 0,
    replay: Annotated[str | None, typer.Option(help="Run this one schedule, as a finding prints it.")] = None,
) -> None:
    """Run schedules of simulated faults; what does not hold is shrunk and printed as a line for --replay."""
    from benchmarks.simulator.schedules import Schedule, explore, fault_of, shrink

    if replay is not None:
        what = fault_of(Schedule.parse(replay))
        print(what or "everything holds")
        raise typer.Exit(what is not None)
    tally = explore(schedules, first, say=lambda tally: print(tally.sentence(), flush=True))
    print(tally.sentence())
    for kind, times in sorted(tally.happened.items()):
        print(f"  {kind}: {times}")
    for finding in tally.findings:
        smallest = shrink(finding.schedule)
        print(f"--replay '{smallest.schedule}'\n  {smallest.what}")
    raise typer.Exit(bool(tally.findings))


@app.command("cluster")
def use_of_clusters(
    seeds: Annotated[str, typer.Option(help="1000:1003 or 3,5.")] = "1000:1003",
    folder: Annotated[Path, typer.Option("--to", help="Where the page goes.")] = report.EVIDENCE,
) -> None:
    """GPU use and waiting on pretended clusters of 8, 16 and 64 GPUs, by the scheduler and by the policy before it."""
    from benchmarks import cluster

    outcomes = []
    for nodes in cluster.NODES:
        for policy in get_args(cluster.Policy):
            for seed in _seeds(seeds):
                outcomes.append(cluster.simulate(nodes, policy, seed))
                print(f"{outcomes[-1].gpus} GPUs, {policy}, seed {seed}: {outcomes[-1].busy:.0%} busy")
    cluster.write(outcomes, folder)


if __name__ == "__main__":
    app()
