"""Study files that `plan` and `search` must refuse: with line, field, value and remedy, leaving nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jfhpo.cli import REFUSED, app
from jfhpo_core.study.yaml_text import DEEPEST, MOST_VALUES

GOOD = Path("examples/simulated.yaml").read_text(encoding="utf-8")
LAST = len(GOOD.splitlines()) + 1
SEARCHED = "space:\n  learning_rate: {type: float, low: 1e-5, high: 1e-2, log: true}\n"


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def searching(parameter: str) -> str:
    return changed("space: tiny", f"{SEARCHED}  temperature: {parameter}")


def bomb(levels: int) -> str:
    lists = [
        f"&{name} [{', '.join([item] * levels)}]"
        for name, item in zip("abcdefghi", ["x", *["*a", "*b", "*c", "*d", "*e", "*f", "*g", "*h"]], strict=True)
    ]
    return "description: [" + ", ".join(lists) + "]\n"


BAD = {
    "budget beyond float": (
        changed("trial_seconds: 600", "gpu_hours: 1e308"), 12, "budget.gpu_hours", "1e+308", "less than or equal",
    ),
    "infinite spread": (
        searching("{type: float, low: 0.5, high: 1, expected: 0.9, spread: .inf}"),
        12, "space.temperature.spread", "inf", "give a number",
    ),
    "choice of NaN": (
        searching("{type: choice, values: [.nan, 0.1]}"), 12, "space.temperature.values", "nan", "give a number",
    ),
    "choice of infinity": (
        searching("{type: choice, values: [.inf, 1.0]}"), 12, "space.temperature.values", "inf", "give a number",
    ),
    "integer beyond 64 bits": (
        searching(f"{{type: int, low: 1, high: 1{'0' * 400}}}"),
        12, "space.temperature.high", "1000000", "give a smaller number",
    ),
    "condition without values": (
        changed("space: tiny", f"{SEARCHED}  scheduler: {{type: choice, values: [constant, cosine]}}\n"
                "  temperature: {type: float, low: 0.5, high: 1, when: {scheduler: []}}"),
        13, "space.temperature.when.scheduler", "", "at least 1 item",
    ),
    "empty condition": (
        searching("{type: float, low: 0.5, high: 1, when: {}}"),
        12, "space.temperature.when", "{}", "remove it, or name a choice",
    ),
    "workspace a file": (
        GOOD + "tracking: {workspace: study.yaml}\n", LAST, "tracking.workspace", "study.yaml", "name a folder",
    ),
    "workspace in /proc": (
        GOOD + "tracking: {workspace: /proc/jfhpo}\n", LAST, "tracking.workspace", "/proc/jfhpo", "name a folder",
    ),
    "long experiment": (
        GOOD + f"tracking: {{experiment: {'x' * 501}}}\n", LAST, "tracking.experiment", "xxx", "at most 500",
    ),
    "deep nesting": (
        GOOD + f"description: {'[' * 1000}{']' * 1000}\n", LAST, "", "", f"more than {DEEPEST} levels of nested",
    ),
    "alias bomb": (GOOD + bomb(9), LAST, "", f"{MOST_VALUES:,}", "remove aliases of aliases"),
    "too many values": (
        GOOD + f"description: [{'1, ' * 30_000}]\n", LAST, "", f"{MOST_VALUES:,}", "a study has a few dozen",
    ),
    "lone surrogate": (GOOD + 'description: "\\ud800"\n', LAST, "description", r"\ud800", "remove it"),
    "thirty million rungs": (
        changed("horizon_prompts: 960, rungs: 5", "horizon_prompts: 960000000, rungs: 30000000"),
        11, "fidelity", "30000000", "limit 1000",
    ),
    "a billion validations": (
        changed("trial_seconds: 600", "trial_seconds: 600, top_k: 1000000000"),
        12, "budget.top_k", "1000000000", "less than or equal to 1000",
    ),
    "no name": (changed("study: simulated", "study: null"), 2, "study", "null", "put the name in quotes"),
    "a proxy twice": (
        changed("rungs: 5", "rungs: 5, proxies: [small, small]"), 11, "fidelity", "['small', 'small']", "must differ",
    ),
    "unknown embedded task": (
        changed("task: instruct", "task: {embedded: nosuch}"), 8, "task", "nosuch", "instruct, arithmetic",
    ),
    "database in /proc": (
        GOOD + "tracking: {uri: 'sqlite:////proc/no/mlflow.db'}\n", LAST, "tracking.uri", "/proc/no", "name a folder",
    ),
    "file store in /proc": (
        GOOD + "tracking: {uri: /proc/no/mlruns}\n", LAST, "tracking.uri", "/proc/no", "name a folder",
    ),
    "registered model with a slash": (
        GOOD + "tracking: {registered_model: a/b}\n", LAST, "tracking.registered_model", "a/b", "use letters, digits",
    ),
    "registered model with a quote": (
        GOOD + "tracking: {registered_model: \"a'b\"}\n", LAST, "tracking.registered_model", "a'b", "use letters",
    ),
    "sexagesimal": (
        changed("trial_seconds: 600", "trial_seconds: 1:30"), 12, "budget.trial_seconds", '"1:30"', "valid number",
    ),
    "unknown strategy": (changed("strategy: random", "strategy: oracle"), 14, "strategy.name", "'oracle'", "random"),
    "wrong strategy setting": (
        changed("strategy: random", "strategy: {name: jfhpo, settings: {fallback_seconds: lots}}"),
        14, "strategy.settings", "", "",
    ),
    "misspelled hyperparameter of a baseline": (
        changed("learning_rate: 1.0e-6", "lerning_rate: 1.0e-6"),
        16, "baselines.0.configuration", "lerning_rate", "its hyperparameters are learning_rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "search"])
@pytest.mark.parametrize(("text", "line", "field", "value", "remedy"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_and_leaves_nothing(
    command: str,
    text: str,
    line: int,
    field: str,
    value: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, [command, "study.yaml"])
    assert result.exit_code == REFUSED
    assert result.stderr.startswith(f"study.yaml, line {line}: {field}")
    assert value in result.stderr
    assert remedy in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "study.yaml"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed("address: inline", "address: '127.0.0.1:1'"), "line 13: cluster.address: no Ray cluster answers at"),
        (GOOD + "tracking: {uri: 'http://127.0.0.1:1'}\n", "http://127.0.0.1:1 does not answer"),
    ],
)
def test_a_search_whose_services_are_away_leaves_nothing(
    change: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(change, encoding="utf-8")
    result = CliRunner().invoke(app, ["search", "study.yaml"])
    assert result.exit_code == REFUSED
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "study.yaml"]
