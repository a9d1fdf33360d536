"""A trainer of another distribution: the simulated one, which on request fails in the ways that workers fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jfhpo_core.run.worker import Staged, store_staged
from jfhpo_core.study.trial import Decision, Evaluation, SegmentResult, StepRecord
from jfhpo_core.trainers.base import Job, Observer, TrainingResult
from jfhpo_core.trainers.simulated import SimulatedTrainer

FAILING_STEP = 5
RENDEZVOUS_SECONDS = 60.0
GPU_SECONDS = 0.5


class FragileTrainer(SimulatedTrainer):
    """Settings: `how` it fails, for the first `times` attempts of each trial, counted by files in `folder`."""

    name = "fragile"

    def check(self, study: Any) -> None:
        """Nothing is refused."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """Train as the simulated trainer does, up to the failing step."""
        settings = job.study.trainer.settings
        folder, how = Path(settings["folder"]), settings["how"]
        attempt = 1
        while (folder / f"{job.trial_key}-{attempt}").exists():
            attempt += 1
        (folder / f"{job.trial_key}-{attempt}").write_text(str(os.getpid()))
        fails = attempt <= settings["times"]

        def fragile(event: StepRecord | Evaluation) -> Decision | None:
            decision = observe(event)
            if fails and event.step == FAILING_STEP:
                fail(how, folder)
            return decision

        began = time.monotonic()
        if how in ("meet", "gpu"):
            meet(folder, int(settings["times"]))
        if how == "gpu":
            time.sleep(GPU_SECONDS)
            note = [os.environ.get("CUDA_VISIBLE_DEVICES"), began, time.monotonic()]
            folder.with_name(f"{job.trial_key}.gpu").write_text(json.dumps(note))
        plain = job.study.model_copy(update={"trainer": job.study.trainer.model_copy(update={"settings": {}})})
        return super().run(job.model_copy(update={"study": plain}), start, stage, fragile)


def fail(how: str, folder: Path) -> None:
    """Fail in one way."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "disk":
        raise OSError(28, "No space left on device")
    if how == "memory":
        raise MemoryError
    if how == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "child").write_text(str(child.pid))
    if how == "program":
        code = subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=False).returncode
        (folder / "code").write_text(str(code))
    if how in ("child", "hang"):
        time.sleep(600)


def store_late(folder: Path, width: int, staged: Staged) -> SegmentResult:
    """Store a checkpoint once `width` trials have begun to train."""
    meet(folder, width)
    return store_staged(staged)


def store_or_die(folder: Path, staged: Staged) -> SegmentResult:
    """Store a checkpoint, but die instead the first time."""
    died = folder.with_name("died")
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return store_staged(staged)


def store_never(staged: Staged) -> SegmentResult:
    """Die instead of storing a checkpoint."""
    os.kill(os.getpid(), signal.SIGKILL)
    return store_staged(staged)


def meet(folder: Path, width: int) -> None:
    """Go on once `width` trials have begun to train."""
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while len(list(folder.iterdir())) < width:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {width} trials train at the same time")
        time.sleep(0.02)
