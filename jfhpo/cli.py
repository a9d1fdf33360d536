"""The command line. Heavy imports wait until a command needs them: `jfhpo --help` answers at once."""

from __future__ import annotations

import errno
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jfhpo_core.errors import CheckpointError, InfrastructureError, JfhpoError, LedgerUnavailable

if TYPE_CHECKING:
    from pydantic import BaseModel
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
    epilog="Agents begin with `jfhpo agents`.",
)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a field, e.g. --set budget.trial_seconds=900. May be repeated."
    ),
]

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the answer as JSON; see docs/reference/json.md for its fields.")
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
    as_json: AsJson = False,
) -> None:
    """Run a study, or continue it where it was interrupted."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    console = _console(stderr=as_json)
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
            outcome = run_study(
                spec, on_progress, display.status, display.note, accept_changes=accept_changes, forget=forget
            )
        if as_json:
            from jfhpo.answers import search_answer
            from jfhpo.planning import prospect

            answer = search_answer(outcome, prospect(outcome.result))
    if as_json:
        _print_json(answer)
    else:
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
    as_json: AsJson = False,
) -> None:
    """Check a study and forecast its bill and its final score. Spends and writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.answers import plan_answer
        from jfhpo.display.plan import plan_view
        from jfhpo.planning import plan as plan_study
        from jfhpo_core.run.preflight import measured

        planned = plan_study(spec, more)
        if as_json:
            _print_json(plan_answer(planned, measured(planned.now.study) if measure else ()))
            return
        console = _console()
        console.print(plan_view(planned.now, planned.larger))
        for note in planned.notes:
            console.print(note, highlight=False)
        _print_findings(console, planned.findings)
        if measure:
            _print_findings(console, measured(planned.now.study))


@app.command()
def show(study: StudyFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a study's trials and figures as the ledger has them. Runs and writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.answers import show_answer
        from jfhpo.display.plan import outlook_view
        from jfhpo.display.result import result_view
        from jfhpo.display.trials import TrialList
        from jfhpo.planning import prospect
        from jfhpo.session import look

        result = look(spec)
        left = prospect(result)
    if as_json:
        _print_json(show_answer(result, left))
        return
    console = _console()
    console.print(TrialList(result.trials))
    console.print(result_view(result))
    if left is not None:
        console.print(outlook_view(left))


@app.command()
def why(
    study: StudyFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what matters, where runs collapsed, and why a study recommends what it does. Runs and writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import look
        from jfhpo_core.report.why import why as explain

        page = explain(look(spec))
    if as_json:
        _print_json(page)
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
    as_json: AsJson = False,
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
        _print_json(page)
    else:
        _console().print("\n".join(page.sentences), markup=False, highlight=False)
    if page.refusal is not None:
        raise typer.Exit(NOTHING)


@app.command()
def report(study: StudyFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write a study's report again, from the ledger."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import rebuild_report

        path = rebuild_report(spec).report
    if as_json:
        from jfhpo.answers import ReportAnswer

        _print_json(ReportAnswer(report=str(path)))
    else:
        _console().print(str(path), markup=False, soft_wrap=True)


@app.command()
def notify(
    webhook: Annotated[
        str, typer.Argument(envvar="JFHPO_WEBHOOK", help="URL that takes JSON by POST, e.g. of a chat room.")
    ],
    as_json: AsJson = False,
) -> None:
    """Let Prefect tell a webhook how flow runs end, and notice those that have died."""
    from jfhpo.orchestration.notify import set_up

    names = set_up(webhook)
    if as_json:
        from jfhpo.answers import NotifyAnswer

        _print_json(NotifyAnswer(automations=names))
    else:
        _console().print("\n".join(names), markup=False)


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
    as_json: AsJson = False,
) -> None:
    """Show which checkpoints of a study are worth their space, and what deleting the others would free."""
    from jfhpo.checkpoint_usage import parse_size, usage_view
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    limit_bytes = parse_size(limit) if limit is not None else None
    with _quiet_libraries(study):
        from jfhpo.session import judge_checkpoints
        from jfhpo_core.store.retention import size_bytes
        from jfhpo_core.study.resolved import study_folder
        from jfhpo_core.trainers.base import TRAININGS

        judgements, log_bytes = judge_checkpoints(spec, limit_bytes), size_bytes([study_folder(spec) / TRAININGS])
        view = usage_view(judgements, log_bytes, delete=delete)
        if delete:
            judge_checkpoints(spec, limit_bytes, delete=True)
    if as_json:
        from jfhpo.answers import gc_answer

        _print_json(gc_answer(judgements, log_bytes, deleted=delete))
    else:
        _console().print(view)


@app.command()
def promote(study: StudyFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Serve the model that a study has registered as the champion, whatever its score."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    with _quiet_libraries(study):
        from jfhpo.session import promote_model

        said = promote_model(spec)
    if as_json:
        from jfhpo.answers import PromoteAnswer

        _print_json(PromoteAnswer(promoted=said))
    else:
        _console().print(said, markup=False, soft_wrap=True)


@app.command()
def doctor(study: StudyFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check everything that a search will need: environment, hardware, cluster, data, reward, disk. Writes nothing."""
    from jfhpo.overrides import read_study

    spec = read_study(study, overrides or ())
    console = _console()
    found = []
    with _quiet_libraries(study):
        from jfhpo.answers import DoctorAnswer, checks
        from jfhpo.doctor import diagnose

        for finding in diagnose(spec):
            found.append(finding)
            if not as_json:
                _print_findings(console, [finding])
    failed = any(finding.level == "failure" for finding in found)
    if as_json:
        _print_json(DoctorAnswer(usable=not failed, checks=checks(found)))
    if failed:
        raise typer.Exit(REFUSED)


@app.command()
def schema() -> None:
    """Print the JSON schema of study files."""
    import json

    from jfhpo_core.study.spec import study_schema

    typer.echo(json.dumps(study_schema(), indent=2))


@app.command()
def rules(as_json: AsJson = False) -> None:
    """List the stopping rules with their defaults."""
    from jfhpo.answers import known_rules

    known = known_rules()
    if as_json:
        _print_json(known)
        return
    for rule in known.rules:
        typer.echo(f"{rule.name}  (in: {', '.join(rule.sets)})")
        for line in rule.description.splitlines():
            typer.echo(f"    {line}".rstrip())
        for name, value in rule.parameters.items():
            typer.echo(f"    {name} = {value}")
        typer.echo()
    typer.echo("Change them in the study file: stopping: {rules: default, override: {kl_growth: {floor: 0.5}}}")


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    if as_json:
        from jfhpo.answers import VersionAnswer

        _print_json(VersionAnswer(version=installed("jfhpo")))
    else:
        typer.echo(f"jfhpo {installed('jfhpo')}")


@app.command()
def agents() -> None:
    """Print what an agent (a program that drives this one) should know: how to plan, run, watch and read a study."""
    from importlib.resources import files

    typer.echo((files("jfhpo") / "AGENTS.md").read_text(encoding="utf-8"))


@app.command()
def mcp(
    allow_run: Annotated[
        bool, typer.Option("--allow-run", help="Also offer tools that begin and end searches: they spend money.")
    ] = False,
) -> None:
    """Serve studies to agents by the Model Context Protocol, over standard input and output. Read-only by default."""
    with _quiet_libraries(None):
        from jfhpo.mcp_server import build_server

        build_server(allow_run=allow_run).run()


def main() -> None:
    """The console script."""
    app()


def _print_json(answer: BaseModel) -> None:
    typer.echo(answer.model_dump_json(indent=2))


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
def _quiet_libraries(study: Path | None) -> Iterator[None]:
    """Keep logs and warnings of libraries off the screen; what they raise is still seen, with the study file's line."""
    from jfhpo_core.study.study_file import with_lines

    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with with_lines(study) if study is not None else nullcontext():
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
