"""The scripts of `examples/python` do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path("examples/python").resolve()

EXPECTED = {
    "run_and_look.py": ["recommended", "recipe", "completed", "wrote figures", "report.html"],
    "own_loop.py": ["small to", "large to", "best learning rate on the target"],
    "interrupt_and_continue.py": ["interrupted with", "cost nothing again: True", "recommended: {"],
}


def test_every_script_is_run() -> None:
    assert {path.name for path in SCRIPTS.glob("*.py")} == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPECTED)
def test_a_script_runs_and_prints_what_it_promises(
    script: str,
    tmp_path: Path,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    printed = capsys.readouterr().out
    for part in EXPECTED[script]:
        assert part in printed
