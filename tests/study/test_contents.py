from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jfhpo_core.study.contents import SAMPLES, changed, contents
from jfhpo_core.study.spec import StudySpec
from tests.studies import study_data


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    """A study of files of its own: two models, data, and a reward with a module beside it."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        save_file({"weight": np.arange(40_000, dtype=np.float32)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "b"}\n')
    (tmp_path / "reward.py").write_text("import json\nfrom parsing import answer\n")
    (tmp_path / "parsing.py").write_text("def answer(text): return text\n")
    (tmp_path / "unrelated.py").write_text("")
    models = [
        {"name": name, "path": str(tmp_path / name), "parameters": n} for n, name in enumerate(("small", "large"), 1)
    ]
    task = {name: str(tmp_path / f"{file}") for name, file in
            (("prompts", "train.jsonl"), ("heldout", "heldout.jsonl"), ("reward", "reward.py"))}  # fmt: skip
    return StudySpec.model_validate(study_data(tmp_path, family=models, task=task))


def test_everything_that_a_study_reads_has_a_digest(spec: StudySpec) -> None:
    assert sorted(contents(spec)) == ["family.large", "family.small", "task.heldout", "task.prompts", "task.reward"]
    assert contents(spec) == contents(spec)


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("train.jsonl", "task.prompts"),
        ("heldout.jsonl", "task.heldout"),
        ("reward.py", "task.reward"),
        ("parsing.py", "task.reward"),
        ("large/config.json", "family.large"),
        ("small/model.safetensors", "family.small"),
    ],
)
def test_a_change_is_seen_where_it_is(spec: StudySpec, tmp_path: Path, file: str, field: str) -> None:
    before = contents(spec)
    content = bytearray((tmp_path / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / file).write_bytes(content)
    assert changed(before, contents(spec)) == [field]


@pytest.mark.parametrize("file", ["unrelated.py", "large/README.md", "large/.cache"])
def test_what_a_study_does_not_read_may_change(spec: StudySpec, tmp_path: Path, file: str) -> None:
    before = contents(spec)
    (tmp_path / file).write_text("something else")
    assert contents(spec) == before


def test_of_large_weights_a_sample_is_read(spec: StudySpec, tmp_path: Path) -> None:
    """A sparse file of 64 GB is not read through; training, which changes everything, is noticed."""
    large = tmp_path / "large" / "model.safetensors"
    with large.open("r+b") as file:
        file.truncate(64 * 2**30)
    before = contents(spec)
    with large.open("r+b") as file:
        for block in range(4 * SAMPLES):
            file.seek(block * large.stat().st_size // (4 * SAMPLES))
            file.write(b"\1")
    assert changed(before, contents(spec)) == ["family.large"]


def test_a_simulated_study_reads_nothing(tmp_path: Path) -> None:
    assert contents(StudySpec.model_validate(study_data(tmp_path))) == {}
