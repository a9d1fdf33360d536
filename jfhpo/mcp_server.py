"""Studies for agents by the Model Context Protocol: plan, status, trials and reasons; with `--allow-run` searches, too.

Answers are those of the commands with `--json` (`jfhpo.answers`). Paths of study files are relative to the folder that
the server was started in; so is an MLflow store that the study file does not name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from jfhpo import planning
from jfhpo.answers import Answer, PlanAnswer, ShowAnswer, StatusAnswer, plan_answer, show_answer, status_answer
from jfhpo.overrides import read_study
from jfhpo.session import look
from jfhpo_core.errors import JfhpoError
from jfhpo_core.plugins import remedy
from jfhpo_core.report.recipe import Recipe, parse_size
from jfhpo_core.report.recipe import recipe as advise
from jfhpo_core.report.why import Why
from jfhpo_core.report.why import why as explain
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import with_lines

Kind = TypeVar("Kind")

LOG = "search.log"
"""What a search prints that an agent has begun, in the folder of its study."""

STOP_SECONDS = 60
"""How long a search may take to end in good order."""

INSTRUCTIONS = (
    "Hyperparameter search for reinforcement learning of language models. A study is a YAML file. `plan` checks it and "
    "says what it costs; `status` says how far it is and what it recommends; `show` lists its trials; `why` says what "
    "matters; `recipe` what to use on another model size. Searches are begun by `search` if this server offers it, or "
    "by people: `jfhpo search STUDY.yaml`."
)

READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
RUNS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)

StudyFile = Annotated[str, Field(description="Path of the study file.")]
Changes = Annotated[
    list[str] | None, Field(description="Changes to the file, as `--set` takes them: ['budget.gpu_hours=5'].")
]


class SearchBegun(Answer):
    """A search that this server has begun."""

    process: int = Field(description="Its process id.")
    log: str = Field(description="The file that takes what it prints; progress is also in `status`.")


class SearchEnded(Answer):
    """How a search ended."""

    exit_code: int = Field(description="See docs/reference/exit-codes.md; 130: ended on request, can be continued.")
    said: str = Field(description="The last lines of its log.")


def build_server(*, allow_run: bool = False) -> MCPServer[None]:
    """The server; `run()` serves standard input and output until the client leaves.

    Args:
        allow_run: Also offer tools that begin and end searches.
    """
    server: MCPServer[None] = MCPServer(
        "jfhpo", instructions=INSTRUCTIONS, version=version("jfhpo"), log_level="WARNING"
    )

    @server.tool(annotations=READS)
    def plan(
        study: StudyFile,
        changes: Changes = None,
        more: Annotated[
            str | None, Field(description="Also forecast with a larger budget: '2.5' (GPU-hours) or '600s'.")
        ] = None,
    ) -> PlanAnswer:
        """Check a study file and forecast its bill and its final score. Spends and writes nothing; takes seconds."""
        with _told(study, changes) as spec:
            return plan_answer(planning.plan(spec, more))

    @server.tool(annotations=READS)
    def status(study: StudyFile, changes: Changes = None) -> StatusAnswer:
        """How a study stands: recommendation, comparison, caveats, trials by state, what is left to spend."""
        with _told(study, changes) as spec:
            return _of(spec, status_answer)

    @server.tool(annotations=READS)
    def show(
        study: StudyFile,
        changes: Changes = None,
        newest: Annotated[int, Field(ge=1, le=1000, description="So many trials, the newest.")] = 30,
    ) -> ShowAnswer:
        """The newest trials of a study, each with configuration, score, state and reason, and how the study stands."""
        with _told(study, changes) as spec:
            return _of(spec, lambda result, left: show_answer(result, left, newest))

    @server.tool(annotations=READS)
    def why(study: StudyFile, changes: Changes = None) -> Why:
        """Which hyperparameters matter, beyond which values runs collapse, why this recommendation: with intervals."""
        with _told(study, changes) as spec:
            page: Why = explain(look(spec))
            return page

    @server.tool(annotations=READS)
    def recipe(
        study: StudyFile,
        size: Annotated[str, Field(description="Parameters ('72B', '494M'), a model of the study, or a checkpoint.")],
        changes: Changes = None,
    ) -> Recipe:
        """What to use on a model of another size, with 80 % intervals; `refusal` says why if it cannot be told."""
        with _told(study, changes) as spec:
            result = look(spec)
            page: Recipe = advise(result, parse_size(size, result.study))
            return page

    if allow_run:
        _add_searches(server)
    return server


def _add_searches(server: MCPServer[None]) -> None:
    """Tools that spend money."""
    begun: dict[Path, tuple[subprocess.Popen[bytes], Path]] = {}

    @server.tool(annotations=RUNS)
    def search(study: StudyFile, changes: Changes = None) -> SearchBegun:
        """Begin a search, or continue it. Returns at once; it goes on by itself, also when this server ends."""
        path = Path(study).resolve()
        known = begun.get(path)
        if known is not None and known[0].poll() is None:
            return SearchBegun(process=known[0].pid, log=str(known[1]))
        with _told(study, changes) as spec:
            log = resolve(spec).folder / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [part for change in changes or () for part in ("--set", change)]
        with log.open("ab") as file:
            process = subprocess.Popen(  # noqa: S603  the study file names what is run, as on the command line
                [sys.executable, "-m", "jfhpo.cli", "search", str(path), "--plain", *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        begun[path] = process, log
        return SearchBegun(process=process.pid, log=str(log))

    @server.tool(annotations=RUNS)
    def end(study: StudyFile) -> SearchEnded:
        """End a search that this server has begun, in good order; `search` continues it. Says how it ended."""
        known = begun.get(Path(study).resolve())
        if known is None:
            raise ToolError(f"this server has begun no search of {study!r}")
        process, log = known
        process.terminate()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise ToolError(f"the search has not ended within {STOP_SECONDS} s; ask again") from None
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:]
        return SearchEnded(exit_code=code, said="\n".join(said))


@contextmanager
def _told(study: str, changes: list[str] | None) -> Iterator[StudySpec]:
    """The study of a file; what is refused, now or later, is told to the client in the words of the command line."""
    path = Path(study)
    try:
        with with_lines(path):
            yield read_study(path, changes or ())
    except JfhpoError as error:
        raise ToolError(str(error)) from error
    except ModuleNotFoundError as error:
        raise ToolError(f"{error.name} is not installed: {remedy(error)}") from error


def _of(spec: StudySpec, answer: Callable[[SearchResult, planning.Prospect | None], Kind]) -> Kind:
    result = look(spec)
    return answer(result, planning.prospect(result))
