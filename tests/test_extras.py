"""Without its extras the package still asks and tells, and says which extra a command lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jfhpo_core.plugins import EXTRAS

BLOCK = """
import sys

for name in {names!r}:
    sys.modules[name] = None  # importing it fails, as if it were not installed
"""

ASK_AND_TELL = """
import math

import jfhpo

study = {
    "study": "my-loop",
    "family": [{"name": "small", "parameters": 1_000_000}, {"name": "large", "parameters": 8_000_000}],
    "target": "large",
    "space": {"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True}},
    "fidelity": {"horizon_prompts": 100, "rungs": 2},
    "budget": {"trial_seconds": 60},
    "seeds": {"training": [0]},
}
optimizer = jfhpo.Optimizer(study)
for _ in range(4):
    work = optimizer.ask()
    score = 0.5 - 0.05 * math.log10(work.configuration["learning_rate"] / 1e-4) ** 2
    optimizer.tell(work, score, 0.01, seconds=2.0, base_score=0.1)
print(len(optimizer.trials), optimizer.rank()[0].configuration)
"""

COMMAND = """
from jfhpo.cli import app

app()
"""


def run_without(names: list[str], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=names) + program, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_package_alone_asks_and_tells() -> None:
    done = run_without([*EXTRAS, "pandas"], ASK_AND_TELL)
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "extra"), [("mlflow", "mlflow"), ("ray", "ray")])
def test_a_command_names_the_extra_that_it_lacks(tmp_path: Path, missing: str, extra: str) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "study: mine\nfamily: [{name: a, path: simulated, parameters: 100000}]\ntarget: a\ntask: instruct\n"
        f"trainer: simulated\nspace: tiny\nbudget: {{trial_seconds: 10}}\ntracking: {{workspace: '{tmp_path}'}}\n"
    )
    done = run_without([missing], COMMAND, "search", str(study), "--quiet")
    assert done.returncode == 2
    assert f"pip install 'jfhpo[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
