"""What of the environment for GPUs can be told without one: its lock, and the start without flash-attn."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jfhpo_core.trainers.openrlhf.preflight import TESTED
from jfhpo_core.trainers.openrlhf.training import GPU_SHIM

LOCK = Path(__file__).parents[3] / "deployments" / "openrlhf-gpu.txt"

IMPORTER = """
from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input
from flash_attn.utils.distributed import all_gather
"""

PROGRAM = """
import importlib.util
import openrlhf.models.ring_attn_utils as importer
try:
    importer.pad_input()
    print("real")
except RuntimeError as error:
    print(error, importlib.util.find_spec("flash_attn"))
"""


def test_the_lock_holds_the_tested_versions_and_nothing_that_must_be_compiled_first() -> None:
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.MULTILINE))
    assert {name: locked.get(name) for name in TESTED} == TESTED
    assert "flash-attn" not in locked


@pytest.mark.parametrize("real", [False, True])
def test_openrlhf_starts_without_flash_attention_and_leaves_a_real_one_alone(tmp_path: Path, *, real: bool) -> None:
    files = {
        "openrlhf/__init__.py": "",
        "openrlhf/models/__init__.py": "",
        "openrlhf/models/ring_attn_utils.py": IMPORTER,
    }
    if real:
        names = "index_first_axis = pad_input = rearrange = unpad_input = all_gather = lambda: None"
        files |= {"flash_attn/__init__.py": "", "flash_attn/bert_padding.py": names,
                  "flash_attn/utils/__init__.py": "", "flash_attn/utils/distributed.py": names}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": f"{GPU_SHIM}:{tmp_path}"}, check=True, capture_output=True,
        text=True,
    ).stdout  # fmt: skip
    assert said.strip() == ("real" if real else "flash-attn is not installed: leave packing and ring attention off, or "
                            "install it None")  # fmt: skip
