from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from jfhpo.answers import ANSWERS, PlanAnswer, RulesAnswer, ShowAnswer
from jfhpo.cli import INFRASTRUCTURE, INTERRUPTED, NOTHING, REFUSED, UNFINISHED, app
from jfhpo_core.errors import InfrastructureError, LedgerError, LedgerUnavailable, SpecError
from jfhpo_core.report.recipe import Recipe
from jfhpo_core.report.why import Why
from jfhpo_core.stopping.rules import RULES
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import TrialState
from tests.flows.ledgers import Committed, committed, count, kept

JFHPO = str(Path(sys.executable).with_name("jfhpo"))
SIMULATED = Path("examples/simulated.yaml").resolve()
START_SECONDS = 400
"""How long a loaded machine may take to import MLflow, make its database and train the first trials."""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([JFHPO, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    heavy = {"numpy", "pydantic", "torch", "mlflow", "ray", "prefect"}
    code = f"import sys, jfhpo.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("search", "plan", "show", "why", "recipe", "report", "schema", "rules", "version"):
        assert re.search(rf"^ +{command} ", result.stdout, re.MULTILINE)


def test_schema_is_that_of_the_study_file() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert json.loads(result.stdout) == StudySpec.model_json_schema()


def test_rules_are_listed_with_every_parameter_and_its_default() -> None:
    text = CliRunner().invoke(app, ["rules"]).stdout
    for name, rule in RULES.items():
        section = text.split(f"{name}  (in: ", 1)[1]
        for field in fields(rule):
            assert f"    {field.name} = {field.default}" in section


def test_version() -> None:
    assert re.fullmatch(r"jfhpo \d+\.\d+\.\d+\S*\n", CliRunner().invoke(app, ["version"]).stdout)


@pytest.mark.parametrize("command", ["search", "plan", "show", "report"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: None, ["cannot be read"]),
        (lambda text: "study: [", ["line 1", "not valid YAML"]),
        (lambda text: "- a\n- b\n", ["a study file is a mapping", "jfhpo schema"]),
        (lambda text: text + "budgt: 3\n", ["budgt", "line 18", "jfhpo schema"]),
        (lambda text: text.replace("trial_seconds: 600", "trial_seconds: -5"), ["line 12", "trial_seconds", "-5"]),
        (lambda text: text.replace("target: large", "target: huge"), ["'huge' is not in the family"]),
        (lambda text: text + "target: small\n", ["line 18", "'target' is given twice"]),
        (lambda text: text.replace("rungs: 5", "rungs: 7"), ["960 cannot be cut into 7", "line 11"]),
        (lambda text: text.replace("trainer: simulated", "trainer: magic"), ["no trainer 'magic'", "simulated"]),
        (lambda text: text.replace("strategy: random", "strategy: oracle"), ["no strategy 'oracle'", "random"]),
        (
            lambda text: text.replace("learning_rate: 1.0e-6", "lerning_rate: 1.0e-6"),
            ["baselines.0.configuration", "lerning_rate", "learning_rate"],
        ),
    ],
)
def test_a_bad_study_is_refused_with_place_fault_and_remedy(
    command: str,
    change: Callable[[str], str | None],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = change(SIMULATED.read_text(encoding="utf-8"))
    if text is not None:
        (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, [command, "study.yaml"])
    assert result.exit_code == REFUSED
    for part in expected:
        assert part in result.stderr
    assert "Traceback" not in result.output
    assert "Recommended" not in result.stdout
    assert not (tmp_path / "mlflow.db").exists()


def test_a_plan_checks_forecasts_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(SIMULATED), "--set", "budget.trial_seconds=900"])
    assert result.exit_code == 0
    for part in (
        "100,000",
        "600,000",
        "target",
        "192, 384, 576, 768, 960",
        "15 min 00 s",
        "confirmation",
        "rough guess",
    ):
        assert part in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_answers_what_more_budget_would_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(SIMULATED), "--more", "600s"])
    assert result.exit_code == 0
    assert "With 10 min 00 s more of budget" in result.stdout
    for line in ("cost left", "time left", "final score +cannot be forecast before"):
        assert len(re.findall(line, result.stdout)) == 2
    refused = CliRunner().invoke(app, ["plan", str(SIMULATED), "--more", "much"])
    assert refused.exit_code == REFUSED
    assert "--more 'much'" in refused.stderr


def test_nothing_to_show_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("show", "why", "report"):
        result = CliRunner().invoke(app, [command, str(SIMULATED)])
        assert result.exit_code == REFUSED
        assert "holds no trials of study 'simulated'" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, str]:
    """A folder in which the simulated example has been searched, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copyfile(empty_database, folder / "mlflow.db")
    done = run("search", SIMULATED, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_search_prints_progress_result_and_where_to_look(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    segments = count(committed(folder, SIMULATED))
    assert len(re.findall(r"^.* left[^|]*\| #\d+ large ", printed, re.MULTILINE)) == segments
    for part in (
        "Recommended configuration",
        "learning_rate",
        "95 % interval",
        "recipe",
        "size-appropriate",
        "model's belief",
    ):
        assert part in printed
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in printed
    assert "none registered" in printed
    assert (folder / ".jfhpo" / "simulated" / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_a_finished_study_is_printed_again_without_training(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    before = committed(folder, SIMULATED)
    again = run("search", SIMULATED, cwd=folder)
    assert again.returncode == 0
    assert committed(folder, SIMULATED) == before
    assert " left | #" not in again.stdout
    result = printed[printed.index("Recommended configuration") :]
    assert again.stdout.endswith(result)


@pytest.fixture
def invoke(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command in the folder of the finished search, in this process, which has imported everything already."""
    folder, _ = finished
    monkeypatch.chdir(folder)
    # MLflow keeps connections by URI, so a relative one would lead into the folder of another test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_quiet_prints_the_result_only(finished: tuple[Path, str], invoke: Callable[..., Result]) -> None:
    _, printed = finished
    quiet = invoke("search", "--quiet", SIMULATED).stdout
    assert quiet.startswith("Recommended configuration")
    result = printed[printed.index("Recommended configuration") :]
    assert quiet.split("browse")[0] == result.split("browse")[0]


@pytest.mark.slow
def test_why_prints_sentences_or_the_figures_behind_them(invoke: Callable[..., Result]) -> None:
    page = Why.model_validate_json(invoke("why", "--json", SIMULATED).stdout)
    assert page.study == "simulated"
    assert page.sentences
    said = " ".join(invoke("why", SIMULATED).stdout.split())
    assert said == " ".join(" ".join(page.sentences).split())


@pytest.mark.slow
def test_recipe_prints_sentences_or_the_figures_behind_them(invoke: Callable[..., Result]) -> None:
    done = invoke("recipe", "--size", "3B", "--json", SIMULATED)
    page = Recipe.model_validate_json(done.stdout)
    assert (page.study, page.parameters) == ("simulated", 3_000_000_000)
    assert done.exit_code == (NOTHING if page.refusal else 0)
    said = " ".join(invoke("recipe", "--size", "3B", SIMULATED).stdout.split())
    assert said == " ".join(" ".join(page.sentences).split())
    refused = invoke("recipe", "--size", "many", SIMULATED)
    assert refused.exit_code == REFUSED
    assert "'many' is no number of parameters" in refused.stderr


@pytest.mark.slow
def test_show_plan_and_report_read_the_ledger(finished: tuple[Path, str], invoke: Callable[..., Result]) -> None:
    folder, printed = finished
    trials = committed(folder, SIMULATED)
    shown = invoke("show", SIMULATED)
    assert len(re.findall(r"^ +\d+ +(?:baseline|search|confirmation)", shown.stdout, re.MULTILINE)) == len(trials)
    assert shown.stdout.count("not clearly") == printed.count("not clearly")
    planned = invoke("plan", SIMULATED)
    assert f"rests on {len(trials)} trial(s)" in planned.stdout
    more = invoke("plan", SIMULATED, "--more", "600s")
    scores = [float(found) for found in re.findall(r"final score +(0\.\d+) \(", more.stdout)]
    assert len(scores) == 2
    assert scores[0] < scores[1]
    assert "strategy random believes" in re.sub(r"\s+", " ", more.stdout)
    assert "final score" not in shown.stdout
    assert "final score" in invoke("show", SIMULATED, "--set", "budget.trial_seconds=900").stdout
    report = folder / ".jfhpo" / "simulated" / "report.html"
    report.unlink()
    assert invoke("report", SIMULATED).stdout.strip() == str(report)
    assert report.stat().st_size > 1000
    assert committed(folder, SIMULATED) == trials


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "search", "show", "report", "doctor", "gc"])
def test_answers_as_json_are_those_that_are_documented(invoke: Callable[..., Result], command: str) -> None:
    result = invoke(command, SIMULATED, "--json")
    assert result.exit_code == 0
    answer = ANSWERS[command].model_validate_json(result.stdout)
    assert json.loads(result.stdout) == json.loads(answer.model_dump_json())


@pytest.mark.slow
def test_json_has_the_figures_that_people_are_shown(
    finished: tuple[Path, str], invoke: Callable[..., Result], tmp_path: Path
) -> None:
    folder, printed = finished
    trials = committed(folder, SIMULATED)
    shown = ShowAnswer.model_validate_json(invoke("show", SIMULATED, "--json").stdout)
    assert shown.complete
    assert shown.left is None
    assert shown.verdict in " ".join(printed.split())
    assert len(shown.listed) == shown.trials == len(trials) == sum(shown.states.values())
    first = shown.comparison[0]
    assert first.label == "recommended"
    assert first.score is not None
    assert f"{first.score:.3f}" in printed
    assert shown.recommended is not None
    assert first.configuration.items() <= shown.recommended.items()
    raised = ShowAnswer.model_validate_json(
        invoke("show", SIMULATED, "--json", "--set", "budget.trial_seconds=900").stdout
    )
    assert not raised.complete
    assert raised.left is not None
    assert raised.left.budget_seconds == 900
    assert raised.left.final_score is not None
    asked = PlanAnswer.model_validate_json(invoke("plan", SIMULATED, "--json", "--more", "600s").stdout)
    assert asked.with_more is not None
    assert asked.with_more.budget_seconds == asked.budget_seconds + 600
    refused = invoke("promote", SIMULATED, "--json")
    assert refused.exit_code == REFUSED
    assert refused.stdout == ""


def test_lists_as_json() -> None:
    known = RulesAnswer.model_validate_json(CliRunner().invoke(app, ["rules", "--json"]).stdout).rules
    assert {rule.name for rule in known} >= set(RULES)
    assert re.fullmatch(
        r"\d+\.\d+\.\d+\S*", json.loads(CliRunner().invoke(app, ["version", "--json"]).stdout)["version"]
    )


@pytest.mark.slow
def test_another_study_of_the_same_name_is_refused(finished: tuple[Path, str], invoke: Callable[..., Result]) -> None:
    folder, _ = finished
    before = committed(folder, SIMULATED)
    other = invoke("search", SIMULATED, "--set", "fidelity.rungs=4")
    assert other.exit_code == REFUSED
    assert "exists in the ledger with other values of" in other.stderr
    assert "Traceback" not in other.stderr
    assert committed(folder, SIMULATED) == before


def wait_for_segments(process: subprocess.Popen[str], count: int) -> None:
    """Read the log of a search until so many segments have ended."""
    assert process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    for line in process.stdout:
        count -= " left" in line and " | #" in line
        if count == 0:
            return
        assert time.monotonic() < deadline
    assert process.stderr is not None
    pytest.fail(f"the search ended too early: {process.stderr.read()}")


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_uri")
def test_a_search_survives_ctrl_c_sigterm_and_kill_and_has_one_runner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "study.yaml"
    slow = "trainer: {name: simulated, settings: {real_seconds_per_step: 0.05}}"
    study.write_text(SIMULATED.read_text(encoding="utf-8").replace("trainer: simulated", slow), encoding="utf-8")
    known: Committed = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            [JFHPO, "search", study], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_for_segments(process, 2)
            if not known:
                second = CliRunner().invoke(app, ["search", str(study)])
                assert second.exit_code == REFUSED
                assert "is being run by another process" in second.stderr
                assert "Traceback" not in second.stderr
            os.kill(process.pid, number)
            _, errors = process.communicate(timeout=START_SECONDS)
        finally:
            process.kill()
        if number != signal.SIGKILL:
            assert process.returncode == INTERRUPTED, errors
            assert "interrupted: run the same command to continue" in errors
            assert "Traceback" not in errors
        now = committed(tmp_path, study)
        assert kept(known, now)
        assert count(now) > count(known)
        known = now
    done = run("search", SIMULATED, "--quiet", cwd=tmp_path)  # the same study, and its steps are as fast as can be
    assert done.returncode == 0, done.stderr
    assert "Recommended configuration" in done.stdout
    assert kept(known, committed(tmp_path, study))


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (SpecError("no such model"), REFUSED, "no such model"),
        (LedgerError("another process runs it"), REFUSED, "another process"),
        (LedgerUnavailable("the server is away"), INFRASTRUCTURE, "the server is away"),
        (InfrastructureError("three trials were lost"), INFRASTRUCTURE, "three trials"),
        (OSError(errno.ENOSPC, "No space left on device", "report.html"), INFRASTRUCTURE, "report.html: No space left"),
        (OSError(errno.EROFS, "Read-only file system"), INFRASTRUCTURE, "run the same command to continue"),
        (KeyboardInterrupt(), INTERRUPTED, "run the same command to continue"),
    ],
)
def test_exit_codes_tell_what_ended_a_search(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("jfhpo.session.run_study", fail)
    result = CliRunner().invoke(app, ["search", str(SIMULATED)])
    assert result.exit_code == code
    assert expected in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_exit_codes_tell_how_far_a_search_came(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    arguments = [
        "search",
        str(SIMULATED),
        "--set",
        "budget.max_parallel=1",
        "--set",
        "trainer.settings.memory_limit=1e-3",
    ]
    cut = CliRunner().invoke(app, [*arguments, "--set", "budget.wall_seconds=1e-6"])
    assert cut.exit_code == UNFINISHED
    assert "run the same command to continue" in cut.stdout
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == NOTHING
    assert "Nothing can be recommended" in failed.stdout
    assert "out-of-memory" in failed.stdout
    assert "run the same command" in failed.stdout


def test_trial_states_are_what_the_display_shows() -> None:
    from jfhpo.display.live import SHOWN_STATES

    assert set(SHOWN_STATES) == set(TrialState) - {TrialState.PENDING}
