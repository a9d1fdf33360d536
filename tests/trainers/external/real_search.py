"""What searches with genuine trainers of other packages have in common: a scripted course, and a reward that breaks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jfhpo_core import embedded
from jfhpo_core.optimizer.strategy import Proposal, Recommendation
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Suggestion, Trial

REWARD = """
from pathlib import Path

def reward(prompts, completions, *, answer, **columns):
    if Path(__file__).with_name("broken").exists():
        raise ValueError("the verifier is broken")
    return [float(completion == right) for completion, right in zip(completions, answer)]
"""

STOPPING = {"rules": "none", "override": {"absolute_kl": {"threshold": 0.5, "window": 3}}}
"""Stops what has left the reference by half a nat, from its third step on. Not by growth: OpenRLHF's estimate is
clamped, so that of a collapsed policy may stand still."""


@dataclass
class Script:
    """Proposes a fixed sequence of segments; the reward is broken during that of the unlucky configuration.

    A good configuration is stopped at its first rung and continued, a wild one is stopped by a rule, and the good one
    is trained on the target.
    """

    folder: Path
    good: Configuration
    wild: Configuration
    unlucky: Configuration
    name: ClassVar[str] = "script"

    @property
    def broken(self) -> Path:
        """File that breaks the reward."""
        return self.folder / "broken"

    def suggest(self, study: Study, trials: Sequence[Trial], remaining_seconds: float, seed: int) -> Proposal | None:
        segments = [
            (self.good, "m", 16), (self.wild, "m", 48), (self.good, "m", 48), (self.unlucky, "m", 16),
            (self.good, "l", 48),
        ]  # fmt: skip
        done = sum(len(trial.segments) for trial in trials)
        if done >= len(segments):
            return None
        configuration, model, prompts = segments[done]
        if configuration is self.unlucky:
            self.broken.touch()
        else:
            self.broken.unlink(missing_ok=True)
        suggestion = Suggestion(source="script", explanation="", expected_cost_seconds=1.0)
        return Proposal(configuration, model, prompts, suggestion)

    def rank(self, study: Study, trials: Sequence[Trial]) -> list[Recommendation]:
        return [Recommendation(self.good, 0.5, 0.1)]


def write_task(folder: Path) -> dict[str, Any]:
    """Put the task's files into a folder; returns the section `task` of a study."""
    (folder / "reward.py").write_text(REWARD)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copyfile(embedded.task_folder("instruct") / name, folder / name)
    return {
        "prompts": str(folder / "train.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "reward": str(folder / "reward.py"),
        "max_completion_tokens": 6,
    }


def main_processes(workspace: Path, program: list[bytes]) -> list[int]:
    """Processes that train for a workspace, by what follows the interpreter in their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if arguments[1 : 1 + len(program)] == program and str(workspace).encode() in b"".join(arguments):
                found.append(int(folder.name))
    return found
