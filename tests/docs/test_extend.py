"""The pages on extending jfhpo: their code, installed as a package of its own, passes the suites that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PAGES = Path("docs/extend")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY_POINT = re.compile(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "my_package\.(\w+):\w+"')


def blocks(page: str, language: str) -> list[str]:
    """Blocks of code in a page."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return [code for found, code in BLOCK.findall(text) if found == language]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with what the pages write, as pip would install it; returns the folder that holds it."""
    folder, metadata = tmp_path / "my_package", tmp_path / "my_package-1.0.dist-info"
    folder.mkdir()
    metadata.mkdir()
    (folder / "__init__.py").touch()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    groups = []
    for page in ("rule", "trainer", "acquisition", "strategy"):
        code, *test = blocks(page, "python")
        (toml,) = blocks(page, "toml")
        match = ENTRY_POINT.match(toml)
        assert match is not None
        group, _, module = match.groups()
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
        groups.append(f"[{group}]\n" + toml.split("\n", 1)[1].replace('"', ""))
        for part in test:
            (tmp_path / f"test_{page}.py").write_text(part, encoding="utf-8")
    (metadata / "entry_points.txt").write_text("".join(groups))
    return tmp_path


STUDY = """
import sys
from jfhpo.testing.samples import simulated_study
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
import pathlib, yaml

changes = yaml.safe_load(sys.argv[1])
study = simulated_study(pathlib.Path("workspace"), budget={"trial_seconds": 200, "max_parallel": 1}, **changes)
outcome = run_search(study, MemoryLedger(), InlineDispatcher(1))
print({segment.segment.suggestion.source for trial in outcome.trials for segment in trial.segments})
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{Path.cwd()}"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_what_the_pages_write_passes_the_suites_that_they_name(package: Path) -> None:
    done = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(package), str(package))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.stem for path in package.glob("test_*.py")} == {"test_rule", "test_strategy", "test_trainer"}


@pytest.mark.slow
def test_a_study_uses_the_acquisition_of_the_page(package: Path) -> None:
    (text,) = blocks("acquisition", "yaml")
    changes = yaml.safe_load(text)
    changes["strategy"]["settings"] |= {"initial_trials": 2, "target_share": 0.0}
    done = run(package, "-c", STUDY, yaml.safe_dump(changes))
    assert done.returncode == 0, done.stderr
    assert "jfhpo/uncertainty" in done.stdout
