"""What agents are told is true: commands, fields and study file of AGENTS.md; the MCP server by the SDK's client."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Coroutine
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from typer.testing import CliRunner

from jfhpo.answers import ANSWERS, PlanAnswer, ShowAnswer, StatusAnswer
from jfhpo.cli import app
from jfhpo.mcp_server import SearchBegun, SearchEnded, build_server
from jfhpo_core.report.recipe import Recipe
from jfhpo_core.report.why import Why
from jfhpo_core.study.study_file import validate_study
from jfhpo_core.study.yaml_text import read_yaml

GUIDE = (files("jfhpo") / "AGENTS.md").read_text(encoding="utf-8")
SIMULATED = Path("examples/simulated.yaml").resolve()


def test_the_guide_is_printed_and_stands_in_the_clone() -> None:
    assert CliRunner().invoke(app, ["agents"]).stdout.strip() == GUIDE.strip()
    assert Path("AGENTS.md").read_text(encoding="utf-8") == GUIDE


def test_the_guide_names_commands_and_fields_that_exist() -> None:
    rows = re.findall(r"^\| [^|]+ \| `jfhpo (\w+)[^`]*--json` \| ([^|]*) \|$", GUIDE, re.MULTILINE)
    assert len(rows) >= 6
    for command, read in rows:
        for name in re.findall(r"`(\w+)", read):
            assert name in ANSWERS[command].model_fields, f"{command} has no {name}"
    known = {command.name for command in app.registered_commands} | {
        command.callback.__name__ for command in app.registered_commands if command.callback is not None
    }
    assert set(re.findall(r"`jfhpo (\w+)", GUIDE)) <= known


def test_the_study_file_of_the_guide_is_valid() -> None:
    text = re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    assert text is not None
    assert validate_study(read_yaml(text[1], "AGENTS.md"), "AGENTS.md").target == "large"


def talk(folder: Path, conversation: Callable[[Client], Coroutine[Any, Any, None]], *options: str) -> None:
    """Start `jfhpo mcp` in a folder and talk to it by its standard input and output."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "jfhpo.cli", "mcp", *options], cwd=folder)

    async def main() -> None:
        async with Client(server) as client:
            await conversation(client)

    asyncio.run(main())


def wait_for_result(log: Path) -> None:
    """Until a search has printed its result, or pytest's own time limit."""
    while "Recommended configuration" not in log.read_text(encoding="utf-8"):
        time.sleep(0.5)


@pytest.mark.slow
def test_an_agent_plans_runs_watches_and_reads_a_study(tmp_path: Path) -> None:
    study = {"study": "study.yaml"}
    (tmp_path / "study.yaml").write_text(SIMULATED.read_text(encoding="utf-8"), encoding="utf-8")

    async def conversation(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"plan", "status", "show", "why", "recipe", "search", "end"}
        assert not tools["search"].annotations.read_only_hint  # type: ignore[union-attr]

        refused = await client.call_tool("plan", {"study": "none.yaml"})
        assert refused.is_error
        assert "cannot be read" in str(refused.content)
        refused = await client.call_tool("plan", {**study, "changes": ["budget.gpu_hours=-1"]})
        assert refused.is_error
        assert "budget" in str(refused.content)
        plan = await client.call_tool("plan", {**study, "more": "600s"})
        answer = PlanAnswer.model_validate(plan.structured_content)
        assert answer.with_more is not None
        assert not (tmp_path / "mlflow.db").exists()
        early = await client.call_tool("status", study)
        assert early.is_error
        assert "begin it with `jfhpo search`" in str(early.content)

        begun = await client.call_tool("search", study)
        log = Path(SearchBegun.model_validate(begun.structured_content).log)
        await asyncio.to_thread(wait_for_result, log)
        ended = SearchEnded.model_validate((await client.call_tool("end", study)).structured_content)
        assert ended.exit_code in (0, -15)

        status = StatusAnswer.model_validate((await client.call_tool("status", study)).structured_content)
        assert status.complete
        assert status.recommended
        shown = ShowAnswer.model_validate((await client.call_tool("show", {**study, "newest": 3})).structured_content)
        assert [line.number for line in shown.listed] == list(range(status.trials - 3, status.trials))
        recipe = await client.call_tool("recipe", {**study, "size": "1M"})
        assert Recipe.model_validate(recipe.structured_content).parameters == 1_000_000
        assert Why.model_validate((await client.call_tool("why", study)).structured_content).sentences

    talk(tmp_path, conversation, "--allow-run")


def test_nothing_is_run_unless_it_is_allowed() -> None:
    async def names() -> dict[str, bool | None]:
        tools = await build_server().list_tools()
        return {tool.name: tool.annotations and tool.annotations.read_only_hint for tool in tools}

    assert asyncio.run(names()) == dict.fromkeys(("plan", "status", "show", "why", "recipe"), True)
