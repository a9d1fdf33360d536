"""Reading a run's log as it grows: OpenRLHF prints every step's metrics, and every evaluation, in one line each.

TensorBoard gets the same numbers, but its writer keeps them back for up to two minutes; the log comes at once.
"""

from __future__ import annotations

import ast
import gzip
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

STEP = re.compile(r"Global step (\d+): (\{.*\})")
EVALUATED = re.compile(r"(?:Evaluation completed in \S+, global_step|Eval at step) (\d+)")
NOT_A_NUMBER = re.compile(r"(?<=: )(-?)(nan|inf)\b")

COMPRESSED_BYTES = 2**20
"""Shorter logs stay as they are."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class StepLine:
    """The metrics of a step, by OpenRLHF's names."""

    step: int
    metrics: Metrics


@dataclass(frozen=True)
class EvaluationLine:
    """OpenRLHF has evaluated after this step."""

    step: int


def read_line(line: str) -> StepLine | EvaluationLine | None:
    """What a line of the log says, if it is one of those that count.

    Raises:
        ValueError: It is one of those, and cannot be read.
    """
    if found := STEP.search(line):
        return StepLine(int(found[1]), _metrics(found[2]))
    if found := EVALUATED.search(line):
        return EvaluationLine(int(found[1]))
    return None


def _metrics(text: str) -> Metrics:
    # Python's own notation, but for numbers that are none.
    readable = NOT_A_NUMBER.sub(lambda found: "None" if found[2] == "nan" else f"{found[1]}1e999", text)
    try:
        values = ast.literal_eval(readable)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"the metrics of a step cannot be read: {text[:200]}") from error
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def compress(log: Path) -> None:
    """Replace a long log of a run that has ended well by `NAME.gz`: 270,000 lines of a 7B run become a few MB."""
    if log.stat().st_size < COMPRESSED_BYTES:
        return
    with log.open("rb") as plain, gzip.open(f"{log}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    log.unlink()


class LogTail:
    """The lines of a growing file, each once.

    Args:
        path: Need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> list[str]:
        """Complete lines since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]
