"""The command line. Heavy imports wait until a command needs them: `jfhpo --help` answers at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jfhpo_core.errors import CheckpointError, InfrastructureError, JfhpoError, LedgerUnavailable

if TYPE_CHECKING:
    from rich.console import Console

    from jfhpo.display.live import Display
    from jfhpo.session import StudyOutcome
    from jfhpo_core.run.search import Progress
    from jfhpo_core.trainers.base import Finding

REFUSED = 2
"""Exit code when a study or a command is refused, as for a wrong option."""

NOTHING = 3
"""Exit code of a search that is complete without a recommendation."""

UNFINISHED = 4
"""Exit code of a search that its wall-clock limit has ended; the same command continues it."""

INFRASTRUCTURE = 5
"""Exit code after a failure of machines, disks or services; the same command continues once it is mended."""

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM (128 + SIGINT, as shells have it)."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What a disk that is full, locked or broken answers."""

LOG_WIDTH = 160
"""Columns of tables when the output is no terminal."""

NOISY_LOGGERS = (
    "alembic",
    "botorch",
    "datasets",
    "filelock",
    "linear_operator",
    "mlflow",
    "ray",
    "transformers",
    "trl",
)

QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class _Commands(TyperGroup):
    """Ends every command that fails on purpose with a short message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except JfhpoError as error:
            from rich.text import Text

            _console(stderr=True).print(Text(f"{error}", style="red"), soft_wrap=True)
            broken = isinstance(error, InfrastructureError | LedgerUnavailable | CheckpointError)
            raise typer.Exit(INFRASTRUCTURE if broken else REFUSED) from None
        except ModuleNotFoundError as error:
            from jfhpo_core.plugins import missing_extra, remedy

            if missing_extra(error) is None:
                raise
            _console(stderr=True).print(f"{error.name} is not installed: {remedy(error)}", markup=False)
            raise typer.Exit(REFUSED) from None
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _console(stderr=True).print(
                f"{where}{error.strerror}. Nothing that the ledger holds is lost: free or unlock the disk and run the "
                "same command to continue",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(INFRASTRUCTURE) from None
        except KeyboardInterrupt:
            _console(stderr=True).print("interrupted: run the same command to continue")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Joint-fidelity hyperparameter search for reinforcement learning of language models.",
)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a field, e.g. --set budget.trial_seconds=900. May be repeated."
    ),
]


@app.command()
def search(
    study: StudyFile,
    overrides: Overrides = None,
    plain: Annotated[bool, typer.Option("--plain", help="One line per finished segment, no live display.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changed-data",
            help="Go on although data, rewards or models have changed since the study began; marks every later trial.",
        ),
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Go on without what was deleted of the study in MLflow.")
    ] = False,
) -> None:
    """Run a study, or continue it where it was interrupted."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    console = _console()
    with _quiet_libraries(study), _interruptible() as check:
        from jfhpo.display.live import LiveDisplay, PlainDisplay, SilentDisplay
        from jfhpo.session import run_study

        display: Display
        if quiet:
            display = SilentDisplay()
        elif plain or not console.is_terminal:
            display = PlainDisplay(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        else:
            display = LiveDisplay(console, spec.study)

        def on_progress(progress: Progress) -> None:
            check()
            display.progress(progress)

        with display:
            outcome = run_study(spec, on_progress, display.status, accept_changes=accept_changes, forget=forget)
    _print_outcome(console, outcome)
    if not outcome.result.complete:
        raise typer.Exit(UNFINISHED)
    if outcome.result.recommended is None:
        raise typer.Exit(NOTHING)


@app.command()
def plan(
    study: StudyFile,
    overrides: Overrides = None,
    more: Annotated[
        str | None,
        typer.Option("--more", metavar="BUDGET", help="Also forecast with a larger budget: 2.5 GPU-hours, or 600s."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also score the untrained models, and show completions. Takes minutes."),
    ] = False,
) -> None:
    """Check a study and forecast its bill and its final score. Spends and writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.display.plan import plan_view
        from jfhpo.machine import with_counted_devices
        from jfhpo.places import check_places
        from jfhpo.session import informed, recorded
        from jfhpo_core.optimizer.forecast import forecast, forecast_quality, parse_more, with_more
        from jfhpo_core.optimizer.strategy import load_strategy
        from jfhpo_core.run.preflight import measured, refuse_unusable
        from jfhpo_core.run.search import rank
        from jfhpo_core.study.resolved import resolve

        notes: list[str] = []
        resolved = informed(resolve(spec), notes.append)
        check_places(spec)
        resolved = with_counted_devices(resolved)
        findings = refuse_unusable(resolved)
        larger = with_more(resolved, parse_more(more)) if more is not None else None
        ledger = recorded(resolved)
        if ledger is not None:
            ledger.refuse_changes()
        trials = ledger.trials() if ledger is not None else []
        ranked = rank(resolved, load_strategy(resolved), trials)
        view = plan_view(
            resolved,
            forecast(resolved, trials),
            forecast_quality(resolved, ranked, trials),
            None if larger is None else (larger, forecast(larger, trials), forecast_quality(larger, ranked, trials)),
        )
    console = _console()
    console.print(view)
    for note in notes:
        console.print(note, highlight=False)
    _print_findings(console, findings)
    if measure:
        with _quiet_libraries(study):
            _print_findings(console, measured(resolved))


@app.command()
def show(study: StudyFile, overrides: Overrides = None) -> None:
    """Print a study's trials and figures as the ledger has them. Runs and writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.display.plan import outlook_view
        from jfhpo.display.result import result_view, trial_table
        from jfhpo.session import look
        from jfhpo_core.optimizer.forecast import forecast, forecast_quality
        from jfhpo_core.optimizer.strategy import load_strategy
        from jfhpo_core.run.search import rank

        result = look(spec)
        resolved = result.study
        console = _console()
        console.print(trial_table(result.trials))
        console.print(result_view(result))
        if not result.complete:
            ranked = rank(resolved, load_strategy(resolved), result.trials)
            bills = forecast(resolved, result.trials)
            console.print(outlook_view(resolved, bills, forecast_quality(resolved, ranked, result.trials)))


@app.command()
def why(
    study: StudyFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures behind the sentences as JSON.")] = False,
) -> None:
    """Say what matters, where runs collapsed, and why a study recommends what it does. Runs and writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import look
        from jfhpo_core.report.why import why as explain

        page = explain(look(spec))
    if as_json:
        typer.echo(page.model_dump_json(indent=2))
    else:
        _console().print("\n\n".join(page.sentences), markup=False, highlight=False)


@app.command()
def recipe(
    study: StudyFile,
    size: Annotated[
        str,
        typer.Option("--size", metavar="SIZE", help="Parameters (72B, 494M), a model of the study, or a checkpoint."),
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures behind the sentences as JSON.")] = False,
) -> None:
    """Say what to use on a model of another size, with intervals, or that it cannot be told. Writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import look
        from jfhpo_core.report.recipe import parse_size
        from jfhpo_core.report.recipe import recipe as advise

        result = look(spec)
        page = advise(result, parse_size(size, result.study))
    if as_json:
        typer.echo(page.model_dump_json(indent=2))
    else:
        _console().print("\n".join(page.sentences), markup=False, highlight=False)
    if page.refusal is not None:
        raise typer.Exit(NOTHING)


@app.command()
def report(study: StudyFile, overrides: Overrides = None) -> None:
    """Write a study's report again, from the ledger."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import rebuild_report

        path = rebuild_report(spec).report
    _console().print(str(path), markup=False, soft_wrap=True)


@app.command()
def notify(
    webhook: Annotated[
        str, typer.Argument(envvar="JFHPO_WEBHOOK", help="URL that takes JSON by POST, e.g. of a chat room.")
    ],
) -> None:
    """Let Prefect tell a webhook how flow runs end, and notice those that have died."""
    from jfhpo.orchestration.notify import set_up

    for name in set_up(webhook):
        _console().print(name, markup=False)


@app.command()
def gc(
    study: StudyFile,
    overrides: Overrides = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is not worth its space; without it nothing is changed.")
    ] = False,
    limit: Annotated[
        str | None, typer.Option("--limit", metavar="SIZE", help="Keep at most so much, e.g. 500MB or 2TB.")
    ] = None,
) -> None:
    """Show which checkpoints of a study are worth their space, and what deleting the others would free."""
    from jfhpo.checkpoint_usage import garbage_view, parse_size
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    limit_bytes = parse_size(limit) if limit is not None else None
    with _quiet_libraries(study):
        from jfhpo.session import judge_checkpoints

        judgements = judge_checkpoints(spec, limit_bytes)
        view = garbage_view(judgements, delete=delete)
        if delete:
            judge_checkpoints(spec, limit_bytes, delete=True)
    _console().print(view)


@app.command()
def promote(study: StudyFile, overrides: Overrides = None) -> None:
    """Serve the model that a study has registered as the champion, whatever its score."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import promote_model

        said = promote_model(spec)
    _console().print(said, markup=False, soft_wrap=True)


@app.command()
def doctor(study: StudyFile, overrides: Overrides = None) -> None:
    """Check everything that a search will need: environment, hardware, cluster, data, reward, disk. Writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    console = _console()
    failed = False
    with _quiet_libraries(study):
        from jfhpo.doctor import diagnose

        for finding in diagnose(spec):
            failed |= finding.level == "failure"
            _print_findings(console, [finding])
    if failed:
        raise typer.Exit(REFUSED)


@app.command()
def schema() -> None:
    """Print the JSON schema of study files."""
    import json

    from jfhpo_core.study.spec import study_schema

    typer.echo(json.dumps(study_schema(), indent=2))


@app.command()
def rules() -> None:
    """List the stopping rules with their defaults."""
    from dataclasses import fields
    from inspect import getdoc

    from jfhpo_core.plugins import registered
    from jfhpo_core.stopping.rules import ENTRY_POINT_GROUP, RULE_SETS, RULES, load_rule

    for name in [*RULES, *registered(ENTRY_POINT_GROUP)]:
        rule = load_rule(name)
        members = [chosen for chosen, members in RULE_SETS.items() if name in {member.name for member in members}]
        typer.echo(f"{name}  (in: {', '.join(members)})")
        for line in (getdoc(rule) or "").splitlines():
            typer.echo(f"    {line}".rstrip())
        for item in fields(rule):
            typer.echo(f"    {item.name} = {item.default}")
        typer.echo()
    typer.echo("Change them in the study file: stopping: {rules: default, override: {kl_growth: {floor: 0.5}}}")


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"jfhpo {installed('jfhpo')}")


def main() -> None:
    """The console script."""
    app()


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    # Logs and pipes have no width; 80 columns would break the tables.
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=LOG_WIDTH)


def _print_findings(console: Console, findings: Iterable[Finding]) -> None:
    for finding in findings:
        line = f"{finding.level:8} {finding.subject:10} {finding.message}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_outcome(console: Console, outcome: StudyOutcome) -> None:
    from jfhpo.display.result import next_steps, result_view

    console.print(result_view(outcome.result))
    console.print()
    for name, where in next_steps(outcome).items():
        console.print(f"{name:8}{where}", markup=False, soft_wrap=True)
    if not outcome.result.complete:
        console.print(f"\n{outcome.result.note}", markup=False, soft_wrap=True)


@contextmanager
def _quiet_libraries(study: Path) -> Iterator[None]:
    """Keep logs and warnings of libraries off the screen; what they raise is still seen, with the study file's line."""
    from jfhpo_core.study.study_file import with_lines

    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with with_lines(study):
            yield


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Let SIGTERM end a search as Ctrl-C does: workers are released, the study can be continued.

    Yields a function that interrupts if a signal has come before: an exception that is raised while Python runs a
    finalizer or a callback of a library is lost.
    """
    came: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
