"""Making the table: the same configurations trained on every task and size, each training a file of its own.

Some tasks have only the first of the configurations. A training is what the `trl` trainer does with a study's defaults,
without stopping rules: those are judged on the table later. Only a training that has plainly collapsed is cut short,
and marked so.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.stats import qmc
from transformers.utils.logging import disable_progress_bar

from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import load_task
from jfhpo_core.study.trial import Configuration, Evaluation, Record, Segment, StepRecord, Suggestion
from jfhpo_core.trainers import load_trainer

CONFIGURATIONS = {"instruct": 129, "arithmetic": 129, "countdown": 41}
"""How many of the configurations a task is trained with: the first ones."""

TASKS = tuple(CONFIGURATIONS)
SIZES = ("s", "sm", "m")

PROMPTS_PER_STEP = 16
STEPS = 64
RUNGS = 8

SPREAD = 64
"""Configurations spread over the whole space; as many more have a learning rate in `HEALTHY_LEARNING_RATES`."""

HEALTHY_LEARNING_RATES = (3e-5, 1.2e-3)
"""Where most trainings of these sizes neither stand still nor collapse."""

SOBOL_SEEDS = (11, 12)
"""Of the two parts of the design."""

SECOND_SEED_EVERY = 3
"""Every third configuration is trained with a second seed."""

REFERENCE: Configuration = {
    "learning_rate": 1e-4,
    "kl_coefficient": 0.001,
    "scheduler": "constant",
    "clip_high": 0.2,
    "max_grad_norm": 1.0,
    "n_samples": 8,
    "mini_batches": 2,
}
"""Configuration 0: the fixed recipe for models of this size that the demo's study has to beat."""

CHECKS = (24, 40)
"""Steps (rungs) at which a training may be found collapsed."""

COLLAPSED_SHARE = 0.25
"""A collapsed training scores below this share of the base model's score, and ..."""

COLLAPSED_REWARD = 0.01
"""... its mean reward in each of the last `COLLAPSED_STEPS` steps is below this."""

COLLAPSED_STEPS = 4

TEST_SAMPLES = 4
"""Completions per prompt of the final test."""


class Training(Record):
    """Which training: a row of the table's plan."""

    task: str
    size: str
    configuration: int = Field(ge=0, description="Position in `configurations()`.")
    seed: int

    @property
    def name(self) -> str:
        """File name of its part."""
        return f"{self.task}-{self.size}-{self.configuration:03d}-{self.seed}"


class Part(Record):
    """A finished training. All seconds but `wall_seconds` are CPU seconds of its process."""

    training: Training
    hyperparameters: Configuration
    parameters: int
    outcome: Literal["completed", "collapsed"]
    steps: tuple[StepRecord, ...]
    evaluations: tuple[Evaluation, ...] = Field(description="At step 0 and at each rung, on the first 512 prompts.")
    test: Evaluation | None = Field(
        description="Of the trained model, on the held-out prompts that the evaluations leave out. None if collapsed."
    )
    startup_seconds: float
    cpu_seconds: float = Field(description="Of the whole training, evaluations included, the final test excluded.")
    wall_seconds: float = Field(description="The same by the clock, on a machine that had other work to do.")
    versions: dict[str, str]


class Design(NamedTuple):
    """A configuration and the part of the design that it belongs to."""

    part: Literal["reference", "spread", "healthy"]
    configuration: Configuration


def study_of(task: str) -> Study:
    """The study whose trials the table's trainings are; the largest recorded size is its target."""
    return resolve(
        StudySpec.model_validate(
            {
                "study": f"rl-table-{task}",
                "family": task,
                "target": SIZES[-1],
                "task": task,
                "trainer": {"name": "trl", "fixed": {"prompts_per_step": PROMPTS_PER_STEP}},
                "space": "tiny",
                "fidelity": {"horizon_prompts": STEPS * PROMPTS_PER_STEP, "rungs": RUNGS},
                "budget": {"trial_seconds": 1},
                "stopping": {"rules": "none"},
            }
        )
    )


@cache
def configurations() -> tuple[Design, ...]:
    """The configurations of the table: the reference, then spread and healthy ones in turn, each part a Sobol sequence.

    Any prefix fills the space, so that a table which is not finished is a smaller table.
    """
    space = study_of(TASKS[0]).space
    rate = space.slices()["learning_rate"]
    low, high = (space["learning_rate"].encode(value)[0] for value in HEALTHY_LEARNING_RATES)
    spread, healthy = (
        qmc.Sobol(space.dimension, rng=np.random.default_rng(seed)).random(SPREAD) for seed in SOBOL_SEEDS
    )
    healthy[:, rate] = low + (high - low) * healthy[:, rate]
    designs = [Design("reference", REFERENCE)]
    for one, other in zip(spread, healthy, strict=True):
        designs += [Design("spread", space.decode(one)), Design("healthy", space.decode(other))]
    return tuple(designs)


def plan() -> list[Training]:
    """All trainings in the order in which they are made: first seeds by configuration, then the second seeds."""
    every = range(len(configurations()))
    order = [(number, 0) for number in every] + [(number, 1) for number in every[::SECOND_SEED_EVERY]]
    return [
        Training(task=task, size=size, configuration=number, seed=seed)
        for number, seed in order
        for size in SIZES
        for task in TASKS
        if number < CONFIGURATIONS[task]
    ]


def train(training: Training) -> Part:
    """Make one training. The process must have `prepare_process` behind it."""
    began, began_wall = time.process_time(), time.monotonic()
    study = study_of(training.task)
    hyperparameters = configurations()[training.configuration].configuration
    trial = study.new_trial(training.configuration, hyperparameters, training.size, training.seed)
    records: list[StepRecord] = []
    evaluations: list[Evaluation] = []
    startup_seconds, collapsed = 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        start: Path | None = None
        # Segments, because only a segment's end tells the evaluations; resuming is exact, so they leave no trace.
        for index, stop in enumerate((*CHECKS, STEPS)):
            stage = Path(folder) / str(stop)
            stage.mkdir()
            segment = Segment(
                index=index,
                start_step=len(records),
                stop_step=stop,
                suggestion=Suggestion(source="rl-table", explanation=training.name),
            )
            job = study.job(trial, segment, records, base=None)

            def observe(event: StepRecord | Evaluation) -> None:
                if isinstance(event, StepRecord):
                    records.append(event)

            result = study.trainer.run(job, start, stage, observe)
            evaluations += result.evaluations
            startup_seconds += result.startup_seconds
            start = stage
            collapsed = stop < STEPS and _collapsed(records, evaluations)
            if collapsed:
                break
        cpu_seconds, wall_seconds = time.process_time() - began, time.monotonic() - began_wall
        assert start is not None
        test = None if collapsed else test_score(study, start, STEPS)
    return Part(
        training=training,
        hyperparameters=hyperparameters,
        parameters=study.ladder[training.size].parameters,
        outcome="collapsed" if collapsed else "completed",
        steps=tuple(records),
        evaluations=tuple(evaluations),
        test=test,
        startup_seconds=startup_seconds,
        cpu_seconds=cpu_seconds,
        wall_seconds=wall_seconds,
        versions=versions(),
    )


def _collapsed(records: list[StepRecord], evaluations: list[Evaluation]) -> bool:
    silent = all(record.reward < COLLAPSED_REWARD for record in records[-COLLAPSED_STEPS:])
    return silent and evaluations[-1].score < COLLAPSED_SHARE * evaluations[0].score


def test_score(study: Study, folder: Path, step: int) -> Evaluation:
    """Score a model, trained up to a step, on the held-out prompts that no evaluation has used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jfhpo_core.trainers.trl_rollout import Sampler, evaluate

    task, spec = load_task(study.spec.task), study.spec.evaluation
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = task.heldout[spec.prompts :]
    sampler = Sampler(tokenizer, (tokenizer.eos_token_id,), task.max_completion_tokens, batch=len(rows))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return evaluate(model, sampler, task, rows, TEST_SAMPLES, spec.temperature, step, step * PROMPTS_PER_STEP)


@cache
def versions() -> dict[str, str]:
    """What a training's numbers depend on; `trainer` is a digest of the trainer's source."""
    from jfhpo_core.trainers import trl_rollout, trl_training

    sources = (inspect.getsource(module).encode() for module in (trl_training, trl_rollout))
    source = hashlib.sha256(b"".join(sources))
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "numpy")}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **packages,
        "trainer": source.hexdigest()[:12],
    }


def prepare_process() -> None:
    """Prepare a worker process: warm, quiet, its durations in CPU seconds, and interrupts left to its parent.

    The trainer reads `time.perf_counter`. On a shared machine that tells how busy the others are, while the CPU seconds
    of a process with one thread tell what a step costs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_trainer("trl").warm_up()
    torch.set_num_threads(1)
    versions()
    disable_progress_bar()
    time.perf_counter = time.process_time


def make_part(training: Training, folder: Path) -> float:
    """Train and write the part in one move; returns its CPU seconds."""
    part = train(training)
    temporary = folder / f".{training.name}.{os.getpid()}"
    temporary.write_text(part.model_dump_json(), encoding="utf-8")
    temporary.replace(folder / f"{training.name}.json")
    return part.cpu_seconds


def read_parts(folder: Path) -> Iterator[Part]:
    """The finished trainings in a folder, in the order of the plan."""
    for training in plan():
        file = folder / f"{training.name}.json"
        if file.exists():
            yield Part.model_validate_json(file.read_bytes())


def generate(folder: Path, workers: int) -> None:
    """Make every training of the plan that the folder lacks.

    Args:
        folder: Where parts are kept, a JSON file for each training.
        workers: Processes, each with one thread.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainings = plan()
    missing = [training for training in trainings if not (folder / f"{training.name}.json").exists()]
    began, done = time.monotonic(), 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare_process) as pool:
        queue = iter(missing)
        running: dict[Future[float], Training] = {}
        try:
            while True:
                while len(running) < workers and (training := next(queue, None)) is not None:
                    running[pool.submit(make_part, training, folder)] = training
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    training, seconds = running.pop(future), future.result()
                    done += 1
                    left = (time.monotonic() - began) / done * (len(missing) - done)
                    total = len(trainings) - len(missing) + done
                    print(
                        f"{total}/{len(trainings)}  {training.name}  {seconds:.1f} CPU s  {left / 3600:.1f} h left",
                        flush=True,
                    )
        except KeyboardInterrupt:
            print("Interrupted; the running trainings are being finished.", flush=True)
