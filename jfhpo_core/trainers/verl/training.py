"""One job of the `verl` trainer: start verl, read what it writes, judge every step, take its checkpoint.

verl writes a step's metrics to a file (logger `file`) once the step, its checkpoint and its validation are done, and
every completion with its score to files of their own. All that is measured comes from these.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.files import replace_file
from jfhpo_core.study import scoring
from jfhpo_core.study.data import Row, messages_of
from jfhpo_core.study.tasks import Task, load_task
from jfhpo_core.study.trial import Evaluation, StepRecord
from jfhpo_core.trainers.base import Job, Observer, TrainingResult
from jfhpo_core.trainers.external.fit import Fit
from jfhpo_core.trainers.external.log import LogTail, compress
from jfhpo_core.trainers.external.process import TrainingProcess, environment, shim_path
from jfhpo_core.trainers.external.ray_session import ray_session
from jfhpo_core.trainers.external.watch import Watch
from jfhpo_core.trainers.openrlhf.training import PROGRESS, kept_examples, link, new_folder, prompt_order, score
from jfhpo_core.trainers.verl.command import MAIN, VerlFiles, build_overrides, to_argv
from jfhpo_core.trainers.verl.settings import VerlHyperparameters, VerlSettings

REWARD = Path(__file__).with_name("inside") / "reward.py"
CPU_SHIM = Path(__file__).with_name("cpu_shim")
LATEST = "latest_checkpointed_iteration.txt"


def train(job: Job, settings: VerlSettings, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
    """See `Trainer.run`."""
    began = time.monotonic()
    settings = settings.of_model(job.model)
    fit = Fit.of(job, settings, critic=VerlHyperparameters.model_validate(job.configuration).trains_critic)
    folder = new_folder(job)
    files = VerlFiles(folder, stage.absolute().with_name(f"{stage.name}.work"))
    try:
        task = load_task(job.study.task)
        tokens = prepare(job, task, start, files)
        overrides = build_overrides(job, settings, fit.placement, files, fresh=start is None)
        assert settings.interpreter is not None
        command = [settings.interpreter, str(MAIN), *to_argv(overrides)]
        (folder / "command.json").write_text(json.dumps(command, indent=1), encoding="utf-8")
        own = variables(settings, files, os.environ, fit.demand.gpus)
        with (
            fit.answering_for_memory(),
            ray_session(own, folder),
            TrainingProcess(command, own, files.log) as process,
        ):
            loop = Loop(job, settings, files, process, observe, began, tokens, task.heldout, fresh=start is None)
            loop.run()
        if not loop.stopped:
            last = job.segment.stop_step == job.total_steps
            compress(files.log)
            take_checkpoint(files, stage, job.segment.stop_step, loop.tokens, resumable=not last)
    finally:
        shutil.rmtree(files.checkpoints.parent, ignore_errors=True)
    return TrainingResult(
        end_step=loop.step,
        end_prompts=loop.step * job.prompts_per_step,
        evaluations=tuple(loop.evaluations),
        startup_seconds=loop.startup_seconds,
        evaluation_seconds=sum(evaluation.seconds for evaluation in loop.evaluations),
    )


def variables(settings: VerlSettings, files: VerlFiles, base: Mapping[str, str], gpus: int) -> dict[str, str]:
    """The environment of a run's processes.

    Args:
        settings: The study's.
        files: Where the run reads and writes.
        base: Environment of the worker.
        gpus: How many GPUs a CPU training shall pretend to have.
    """
    own = {"JFHPO_CONTROL": str(files.control), "VERL_FILE_LOGGER_PATH": str(files.metrics)}
    if settings.device == "cpu":
        own |= {
            "PYTHONPATH": shim_path(CPU_SHIM),
            "RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": gpus, "CPU": ray_cpus(settings, gpus)}),
            "VERL_ENGINE_DEVICE": "cuda",  # verl registers no engine for CPUs; that of GPUs asks the platform
            "VERL_PLATFORM": "cpu",
        }
    return environment(settings.model_copy(update={"environment": {**own, **settings.environment}}), base, gpus)


def ray_cpus(settings: VerlSettings, gpus: int) -> int:
    """CPUs that verl asks Ray for; without them it waits for ever. Three per GPU, and the transfer queue's."""
    return 3 * gpus + settings.workers + 1


def prepare(job: Job, task: Task, start: Path | None, files: VerlFiles) -> int:
    """Write everything that the run reads. Returns the completion tokens generated before it."""
    rows = prompt_order(task.train, job.total_steps * job.prompts_per_step, job.seed)
    _write_rows(files.prompts, rows, "train")
    _write_rows(files.heldout, list(task.heldout[: job.study.evaluation.prompts]), "heldout")
    plan = {
        "reward": task.reward.plan(),
        "reward_timeout_seconds": task.reward.limit_seconds,
        "reward_timeout_score": task.reward.timeout_score,
    }
    files.plan.write_text(json.dumps(plan), encoding="utf-8")
    shutil.copyfile(REWARD, files.reward)
    shutil.copyfile(scoring.__file__, files.reward.with_name("scoring.py"))
    tell(files, released=-1)
    files.checkpoints.mkdir(parents=True)
    if start is None:
        return 0
    step = job.segment.start_step
    target = files.checkpoints / f"global_step_{step}"
    shutil.copytree(start / "checkpoints", target, copy_function=link)
    (files.checkpoints / LATEST).write_text(str(step), encoding="utf-8")
    return int(json.loads((start / PROGRESS).read_text(encoding="utf-8"))["tokens"])


def tell(files: VerlFiles, *, released: int, evaluate: int | None = None) -> None:
    """Tell the run how far it may go, and what to evaluate; see `inside/main.py`."""
    replace_file(files.control, json.dumps({"released": released, "evaluate": evaluate}))


def _write_rows(path: Path, rows: list[Row], source: str) -> None:
    """Verl's schema: the prompt as a chat, and the row itself as the ground truth."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [
        {
            "data_source": source,
            "prompt": messages_of(row["prompt"]),
            "reward_model": {"style": "rule", "ground_truth": _ground_truth(row)},
            "extra_info": {"index": number},
        }
        for number, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)


def _ground_truth(row: Row) -> str:
    return json.dumps(row)


class Loop:
    """Follows a run from its first to its last step of a segment."""

    def __init__(
        self,
        job: Job,
        settings: VerlSettings,
        files: VerlFiles,
        process: TrainingProcess,
        observe: Observer,
        began: float,
        tokens: int,
        heldout: Sequence[Row],
        *,
        fresh: bool,
    ) -> None:
        self.step = 0 if fresh else job.segment.start_step
        self.tokens = tokens
        self.stopped = False
        self.evaluations: list[Evaluation] = []
        self.startup_seconds = 0.0
        self._job = job
        self._files = files
        self._observe = observe
        self._began = began
        self._fresh = fresh
        self._heldout = heldout[: job.study.evaluation.prompts]
        self._watch = Watch(process, files.log, settings.startup_seconds, settings.hang_seconds)
        self._metrics = LogTail(files.metrics)
        self._timeouts = LogTail(files.reward.with_name("reward-timeouts.txt"))
        self._entries: deque[dict[str, Any]] = deque()

    def run(self) -> None:
        """Train up to the segment's end, or a rule's stop."""
        if self._fresh and 0 in self._job.evaluation_steps:
            self._take(self._evaluate_now())
        while self.step < self._job.segment.stop_step and not self.stopped:
            tell(self._files, released=self.step)
            data = self._next(self.step + 1)
            self.step += 1
            self.stopped = self._take(self._record(data))
            if self.stopped or self.step in self._job.evaluation_steps:
                last = self.step == self._job.total_steps
                self.stopped |= self._take(self._evaluation(data) if last else self._evaluate_now())

    def _take(self, event: StepRecord | Evaluation) -> bool:
        """Report what was measured. Whether a rule stops the run."""
        if isinstance(event, Evaluation):
            self.evaluations.append(event)
        decision = self._observe(event)
        return decision is not None and decision.stop

    def _evaluate_now(self) -> Evaluation:
        """Have the run score the held-out prompts before it goes on."""
        tell(self._files, released=self.step - 1, evaluate=self.step)
        return self._evaluation(self._next(self.step))

    def _next(self, step: int) -> dict[str, Any]:
        """The metrics of a step, as soon as they are written.

        Raises:
            InfrastructureError: Another step came.
        """
        while not self._entries:
            self._poll()
            self._entries += [json.loads(line) for line in self._metrics.read()]
        entry = self._entries.popleft()
        if entry["step"] != step:
            raise InfrastructureError(
                f"verl reported step {entry['step']} where step {step} was due: its checkpoint was not loaded; nothing "
                f"of this run counts (log: {self._files.log})"
            )
        self._watch.watchdog.hear(step=step > self.step)
        data: dict[str, Any] = entry["data"]
        return data

    def _poll(self) -> None:
        self._watch.poll(may_end=self.step + 1 >= self._job.total_steps)

    def _wait_for(self, path: Path) -> None:
        """Verl writes completions in a thread of their own."""
        before = 0
        while not (path.exists() and path.stat().st_size == before > 0):
            before = path.stat().st_size if path.exists() else 0
            self._poll()

    def _record(self, data: dict[str, float]) -> StepRecord:
        """A step in our terms. Rewards come from the completions: of their metrics there is no standard deviation."""
        path = self._files.rollouts / f"{self.step}.jsonl"
        self._wait_for(path)
        groups = [[scored.reward for scored in group] for group in _groups(path)]
        rewards = [reward for group in groups for reward in group]
        length = data["response_length/mean"]
        self.tokens += round(len(rewards) * length)
        total, generation = data["timing_s/step"] - data["timing_s/held"], data.get("timing_s/gen", 0.0)
        if not self.startup_seconds:
            evaluated = sum(evaluation.seconds for evaluation in self.evaluations)
            self.startup_seconds = max(0.0, time.monotonic() - self._began - total - evaluated)
        return StepRecord(
            step=self.step,
            prompts=self.step * self._job.prompts_per_step,
            tokens=self.tokens,
            reward=float(np.mean(rewards)),
            reward_std=float(np.std(rewards)),
            zero_variance_share=float(np.mean([max(group) == min(group) for group in groups])),
            kl=data.get("actor/kl_loss", data.get("actor/reward_kl_penalty")),
            entropy=data.get("actor/entropy"),
            clip_fraction=data.get("actor/pg_clipfrac"),
            grad_norm=data.get("actor/grad_norm"),
            completion_tokens=length,
            truncated_share=data["response_length/clip_ratio"],
            learning_rate=data.get("actor/lr"),
            reward_timeouts=len(self._timeouts.read()),
            generation_seconds=generation,
            training_seconds=max(0.0, total - generation),
        )

    def _evaluation(self, data: dict[str, float]) -> Evaluation:
        path = self._files.validations / f"{self.step}.jsonl"
        self._wait_for(path)
        groups = self._by_row(_groups(path))
        kept = [(row, group[0].text, group[0].reward) for row, group in groups]
        found = score(
            [(row, scored.reward) for row, group in groups for scored in group],
            self.step,
            self.step * self._job.prompts_per_step,
            data.get("timing_s/testing", 0.0),
            kept_examples(self._heldout, kept) if self._job.study.tracking.completions else (),
            by_prompt=self._job.full_at(self.step),
        )
        # Those of a step's rollouts are in its record, which has been taken.
        return found.model_copy(update={"reward_timeouts": len(self._timeouts.read())})

    def _by_row(self, groups: list[list[_Scored]]) -> list[tuple[int, list[_Scored]]]:
        """Groups with the numbers of their held-out rows, in the order of rows. verl sorts by random names."""
        numbers: dict[str, list[int]] = {}
        for number, row in enumerate(self._heldout):
            numbers.setdefault(_ground_truth(row), []).append(number)
        return sorted(((numbers[group[0].ground_truth].pop(0), group) for group in groups), key=itemgetter(0))


@dataclass(frozen=True)
class _Scored:
    """A completion in verl's files."""

    text: str
    reward: float
    ground_truth: str


def _groups(path: Path) -> list[list[_Scored]]:
    """A file of completions, those of a prompt together."""
    groups: dict[str, list[_Scored]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # completions may hold other line separators
        entry = json.loads(line)
        # PROMPT_ROLLOUT_OUTPUT
        scored = _Scored(entry["output"], float(entry["score"]), entry["gts"])
        groups.setdefault(entry["uid"].rsplit("_", 2)[0], []).append(scored)
    return list(groups.values())


def take_checkpoint(files: VerlFiles, stage: Path, step: int, tokens: int, *, resumable: bool) -> None:
    """Move a checkpoint into the stage: the model at the top, below `checkpoints` what continuing needs, if it may."""
    source = files.checkpoints / f"global_step_{step}"
    for path in (source / "actor" / "huggingface").iterdir():
        path.rename(stage / path.name)
    if resumable:
        source.rename(stage / "checkpoints")
    (stage / PROGRESS).write_text(json.dumps({"step": step, "tokens": tokens}), encoding="utf-8")
