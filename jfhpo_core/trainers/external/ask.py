"""Questions to a trainer's own environment, which this process cannot import."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from jfhpo_core.errors import InfrastructureError

ANSWER = "ANSWER"
"""Stands before the JSON that a program prints last."""

SECONDS = 300.0

VERSIONS = """
import json
from importlib.metadata import PackageNotFoundError, version
def find(*names):
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            pass
import torch
gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
versions = {name: find(name, f"{name}-cpu") for name in json.loads(input())}
print("ANSWER" + json.dumps({"versions": versions, "gpus": gpus}))
"""
"""Reads names of packages; answers with their versions and the memory of each GPU."""


def ask(python: str, program: str, question: Any, variables: Mapping[str, str]) -> Any:
    """Run a program in a trainer's environment and return its answer.

    Args:
        python: The environment's interpreter.
        program: Reads `question` from its input, in JSON, and prints `ANSWER` and its answer in JSON.
        question: Anything that JSON knows.
        variables: The program's whole environment.

    Raises:
        InfrastructureError: There was no answer.
    """
    try:
        done = subprocess.run(  # noqa: S603  an argument list of ours, no shell
            [python, "-c", program], input=json.dumps(question), env=dict(variables), capture_output=True, text=True,
            check=False, timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfrastructureError(f"{python} cannot be asked: {error}") from error
    _, found, answer = done.stdout.rpartition(ANSWER)
    if not found:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InfrastructureError(f"{python} cannot be asked: {last}")
    return json.loads(answer)
