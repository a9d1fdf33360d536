"""One job of the `openrlhf` trainer: start OpenRLHF, read what it prints, judge every step, take its checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jfhpo_core.errors import InfrastructureError
from jfhpo_core.files import replace_file
from jfhpo_core.study import scoring
from jfhpo_core.study.data import Prompt, Row, is_conversational, text_of
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.prompting import Prompting, encode, prompt_limit, without_overlong
from jfhpo_core.study.tasks import Task, load_task
from jfhpo_core.study.trial import EXAMPLES, Evaluation, Example, PassAtN, StepRecord
from jfhpo_core.trainers.base import TRAININGS, Job, Observer, TrainingResult
from jfhpo_core.trainers.external.compile_locks import build_extensions, remove_stale_locks
from jfhpo_core.trainers.external.fit import Fit
from jfhpo_core.trainers.external.log import StepLine, compress, read_line
from jfhpo_core.trainers.external.process import TrainingProcess, environment
from jfhpo_core.trainers.external.ray_session import ray_session
from jfhpo_core.trainers.external.watch import Watch
from jfhpo_core.trainers.openrlhf.command import MODULE, Files, build_flags, evaluation_interval, final_segment, to_argv
from jfhpo_core.trainers.openrlhf.hyperparameters import OpenRlhfHyperparameters
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings

GPU_SHIM = Path(__file__).with_name("gpu_shim")
"""On PYTHONPATH of runs on GPUs."""

AGENT = Path(__file__).with_name("inside") / "agent.py"
PROGRESS = "jfhpo-progress.json"
"""File of a checkpoint with what OpenRLHF does not count."""

EVALUATION_SEED = 20240213
"""As in the `trl` trainer: every evaluation of every trial samples with these random numbers."""

BEAT_SECONDS = 5.0
"""The agent hears from us this often."""

ORPHAN_SECONDS = 900.0
"""A run that has not heard from its driver for so long ends itself. Longer than any pause of a shared disk."""

UNBOUNDED = 10**9
"""More steps than any run has."""

SETTLE_SECONDS = 1.0
"""A checkpoint is complete when its files have not changed for so long after its last part appeared."""

HF_LAST = "tokenizer_config.json"
"""OpenRLHF writes a model's tokenizer after its weights."""

PART = "reward_part_"
"""Begins the agent's names for the rewards of single functions, if there are several."""


def train(job: Job, settings: OpenRlhfSettings, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
    """See `Trainer.run`."""
    began = time.monotonic()
    chosen = OpenRlhfHyperparameters.model_validate(job.configuration)
    settings = settings.of_model(job.model)
    fit = Fit.of(job, settings, critic=chosen.recipe.critic)
    files = Files(folder=new_folder(job), work=stage.absolute().with_name(f"{stage.name}.work"))
    files.work.mkdir()
    try:
        task = load_task(job.study.task)
        settings = settings.model_copy(
            update={"chat_template": settings.chat_template or is_conversational(task.train)}
        )
        if job.study.task.overlong_prompts == "drop":
            task = _without_overlong(job, settings, task)
        tokens = _prepare(job, settings, task, start, files)
        argv = to_argv(build_flags(job, settings, fit.placement, files, resume=start is not None))
        variables = environment(settings, os.environ, fit.demand.gpus)
        if settings.device == "cuda":
            own = settings.environment.get("PYTHONPATH")
            variables["PYTHONPATH"] = os.pathsep.join([str(GPU_SHIM), *([own] if own else [])])
            remove_stale_locks(variables)
            if settings.jobs is None and settings.interpreter is not None:
                adam = "CPUAdamBuilder" if fit.placement.offload_optimizer else "FusedAdamBuilder"
                build_extensions(settings.interpreter, variables, [adam])
        command, stop = _launch(settings, argv, variables, job.environment, files)
        (files.folder / "command.json").write_text(json.dumps(command, indent=1), encoding="utf-8")
        own_ray = ray_session(variables, files.folder) if settings.jobs is None else nullcontext()
        with fit.answering_for_memory(), own_ray, TrainingProcess(command, variables, files.log, stop) as process:
            loop = _Loop(job, settings, files, process, observe, began, tokens, task.heldout, fresh=start is None)
            loop.run()
            if not loop.stopped:
                loop.await_checkpoint()
        if not loop.stopped:
            compress(files.log)
            _take_checkpoint(files, stage, job.segment.stop_step, loop.tokens, resumable=not final_segment(job))
    finally:
        shutil.rmtree(files.work, ignore_errors=True)
    return TrainingResult(
        end_step=loop.step,
        end_prompts=loop.step * job.prompts_per_step,
        evaluations=tuple(loop.evaluations),
        startup_seconds=loop.startup_seconds,
        evaluation_seconds=sum(evaluation.seconds for evaluation in loop.evaluations),
    )


def _without_overlong(job: Job, settings: OpenRlhfSettings, task: Task) -> Task:
    """The task without prompts that would end the run."""
    from transformers import AutoTokenizer

    prompting = Prompting(settings.chat_template, "never", settings.max_prompt_tokens)
    limit = prompt_limit(job.study.task, build_ladder(job.study).models, prompting)
    tokenizer = AutoTokenizer.from_pretrained(job.model_path)
    return without_overlong(task, job.study.task, limit, lambda prompts: encode(tokenizer, prompts, prompting))


def new_folder(job: Job) -> Path:
    """A folder for what a run leaves behind for people, beside the checkpoint store."""
    root = Path(job.store).absolute().parent
    folder = root / TRAININGS / job.trial_key / f"{job.segment.index:02d}-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    return folder


def _prepare(job: Job, settings: OpenRlhfSettings, task: Task, start: Path | None, files: Files) -> int:
    """Write everything that the run reads. Returns the completion tokens generated before it."""
    heldout = task.heldout[: job.study.evaluation.prompts]
    rows = prompt_order(task.train, job.total_steps * job.prompts_per_step, job.seed)
    _write_lines(
        files.prompts,
        (_line(row["prompt"], {"position": position, "row": row}) for position, row in enumerate(rows)),
    )
    _write_lines(files.heldout, (_line(row["prompt"], {"heldout": number}) for number, row in enumerate(heldout)))
    plan = {
        "reward": task.reward.plan(),
        "reward_timeout_seconds": task.reward.limit_seconds,
        "reward_timeout_score": task.reward.timeout_score,
        "start_step": job.segment.start_step if start is not None else 0,
        "prompts": job.prompts_per_step,
        "samples": job.configuration["n_samples"],
        "heldout": heldout,
        "heldout_samples": job.study.evaluation.samples_per_prompt,
        "heldout_temperature": job.study.evaluation.temperature,
        "heldout_seed": EVALUATION_SEED,
        "kept_completions": EXAMPLES if job.study.tracking.completions else 0,
        "chat_template": settings.chat_template,
        "orphan_seconds": ORPHAN_SECONDS,
    }
    files.plan.write_text(json.dumps(plan), encoding="utf-8")
    shutil.copyfile(AGENT, files.agent)
    shutil.copyfile(scoring.__file__, files.folder / "scoring.py")
    if start is None:
        return 0
    shutil.copytree(start / "checkpoints", files.checkpoints, copy_function=link)
    return int(json.loads((start / PROGRESS).read_text(encoding="utf-8"))["tokens"])


def prompt_order(rows: tuple[Row, ...], count: int, seed: int) -> list[Row]:
    """The rows of a full horizon: shuffled anew for each pass over them, from the seed alone.

    OpenRLHF shuffles the whole list once more, with random numbers that do not depend on its seed.
    """
    order: list[int] = []
    for number in range(math.ceil(count / len(rows))):
        order += np.random.default_rng((seed, number)).permutation(len(rows)).tolist()
    return [rows[number] for number in order[:count]]


def _line(prompt: Prompt, label: dict[str, Any]) -> str:
    return json.dumps({"input": prompt, "label": json.dumps(label)})


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def link(source: str, target: str) -> str:
    """Link to a file that is only read or deleted; what DeepSpeed writes over in place is copied."""
    if Path(source).name == "latest":
        return str(shutil.copyfile(source, target))
    try:
        os.link(source, target)
    except OSError:  # on another disk
        Path(target).symlink_to(Path(source).absolute())
    return target


def _launch(
    settings: OpenRlhfSettings, argv: list[str], variables: dict[str, str], tracking: dict[str, str], files: Files
) -> tuple[list[str], list[str] | None]:
    """The command that trains, and the one that stops it elsewhere.

    A job's variables are those that the driver does not have, or has for tracking only. They go by a file that is
    nobody else's to read: in a command line all of this machine would see them.
    """
    assert settings.interpreter is not None
    program = [settings.interpreter, "-m", MODULE, *argv]
    if settings.jobs_address is None:
        return program, None
    identity = f"jfhpo-{uuid.uuid4().hex}"
    ray = [settings.interpreter, "-m", "ray.scripts.scripts", "job"]
    # Merged with the variables that OpenRLHF sets itself; the same name in both would be refused.
    # Programs lie elsewhere on the nodes.
    taken = {"TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "PATH"}
    remote = {
        name: value
        for name, value in variables.items()
        if (name in tracking or os.environ.get(name) != value) and name not in taken and not name.startswith("RAY_")
    }
    files.runtime.touch(mode=0o600)
    files.runtime.write_text(json.dumps({"env_vars": remote}), encoding="utf-8")
    submit = [
        *ray, "submit", "--address", settings.jobs_address, "--submission-id", identity,
        "--runtime-env", str(files.runtime), "--", *program,
    ]  # fmt: skip
    return submit, [*ray, "stop", "--address", settings.jobs_address, identity]


@dataclass
class _Loop:
    """Follows a run from its first to its last step of a segment."""

    job: Job
    settings: OpenRlhfSettings
    files: Files
    process: TrainingProcess
    observe: Observer
    began: float
    tokens: int
    heldout: tuple[Row, ...]
    fresh: bool
    stopped: bool = False
    evaluations: list[Evaluation] = field(default_factory=list)
    startup_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.step = 0 if self.fresh else self.job.segment.start_step
        self._watch = Watch(self.process, self.files.log, self.settings.startup_seconds, self.settings.hang_seconds)
        self._steps: deque[StepLine] = deque()
        self._native_steps: list[int] = []
        self._beaten = 0.0
        self._interval = evaluation_interval(self.job)
        self._released = -1
        self._evaluate: int | None = None

    def run(self) -> None:
        """Train up to the segment's end, or a rule's stop."""
        if self.fresh and 0 in self.job.evaluation_steps:
            self._take(self._evaluate_now())
        self._release()
        while self.step < self.job.segment.stop_step and not self.stopped:
            while not self._steps:
                self._follow()
            self.stopped = self._take(self._record_of(self._steps.popleft()))
            if self.step % self._interval == 0:
                evaluation = self._await_native()
                if self.stopped or self.step in self.job.evaluation_steps:
                    self.stopped |= self._take(evaluation)
            elif self.stopped and not self.settings.asynchronous:
                self._take(self._evaluate_now())
            if not self.stopped and self.step < self.job.segment.stop_step:
                self._release()

    def await_checkpoint(self) -> None:
        """Wait until OpenRLHF has written the checkpoint of the segment's end."""
        tag = f"global_step{self.step}"
        model = self.files.checkpoints / f"{tag}_hf" / HF_LAST
        before: dict[str, int] | None = None
        while True:
            now = _sizes(self.files.checkpoints)
            state = [folder / tag / "metric.json" for folder in self.files.checkpoints.glob("_*")]
            complete = final_segment(self.job) or (state and all(part.is_file() for part in state))
            if complete and model.is_file() and now == before:
                return
            before = now
            settled = time.monotonic() + SETTLE_SECONDS
            while time.monotonic() < settled:
                self._poll(may_end=self.step == self.job.total_steps)

    def _take(self, event: StepRecord | Evaluation) -> bool:
        """Report what was measured. Whether a rule stops the run."""
        if isinstance(event, Evaluation):
            self.evaluations.append(event)
        decision = self.observe(event)
        return decision is not None and decision.stop

    def _record_of(self, line: StepLine) -> StepRecord:
        """A step in our terms.

        Raises:
            InfrastructureError: It is not the step that was due.
        """
        if line.step != self.step + 1:
            raise InfrastructureError(
                f"OpenRLHF reported step {line.step} where step {self.step + 1} was due: its checkpoint was not loaded "
                f"or a line of its log was lost; nothing of this run counts (log: {self.files.log})"
            )
        metrics = line.metrics
        total, generation = metrics["timing/step_total"], metrics["timing/generation"]
        if not self.startup_seconds:
            evaluated = sum(evaluation.seconds for evaluation in self.evaluations)
            self.startup_seconds = max(math.ulp(1.0), time.monotonic() - self.began - total - evaluated)
        self._watch.watchdog.hear(step=True)
        self.step = line.step
        samples, length = round(metrics["rollout/num_samples"]), metrics["rollout/response_length_mean"]
        self.tokens += round(samples * length)
        # OpenRLHF divides by the number less one.
        spread = metrics["rollout/reward_std"] * math.sqrt((samples - 1) / samples) if samples > 1 else 0.0
        return StepRecord(
            step=self.step,
            prompts=self.step * self.job.prompts_per_step,
            tokens=self.tokens,
            reward=metrics["rollout/reward_mean"],
            reward_std=spread,
            zero_variance_share=min(1.0, max(0.0, metrics["zero_variance"])),
            kl=metrics.get("kl") if float(self.job.configuration["kl_coefficient"]) > 0 else None,
            entropy=metrics.get("entropy_loss"),
            clip_fraction=metrics.get("ppo_clip_ratio"),
            grad_norm=metrics.get("actor_grad_norm"),
            completion_tokens=length,
            truncated_share=metrics["rollout/truncated_rate"],
            learning_rate=metrics.get("actor_lr"),
            reward_timeouts=round(samples * metrics.get("reward_timeouts", 0.0)),
            reward_parts={name.removeprefix(PART): value for name, value in metrics.items() if name.startswith(PART)},
            generation_seconds=generation,
            training_seconds=max(0.0, total - generation),
        )

    def _release(self) -> None:
        """Let the rollouts after the present step begin."""
        self._released = UNBOUNDED if self.settings.asynchronous else self.step
        self._tell()

    def _tell(self) -> None:
        """Write to the agent; the beat shows that we are alive."""
        self._beaten = time.monotonic()
        message = {"released": self._released, "evaluate": self._evaluate, "beat": self._beaten}
        replace_file(self.files.control, json.dumps(message))

    def _evaluate_now(self) -> Evaluation:
        """Have the agent evaluate before the next rollouts."""
        self._evaluate = self.step
        self._tell()
        path = self.files.folder / f"evaluation-at-{self.step}.json"
        while not path.exists():
            self._follow()
        return self._evaluation(path)

    def _await_native(self) -> Evaluation:
        """OpenRLHF's own evaluation after the present step."""
        while self.step not in self._native_steps:
            self._follow()
        # The agent numbers them as they come.
        number = self._native_steps.index(self.step) + 1
        return self._evaluation(self.files.folder / f"evaluation-{number:04d}.json")

    def _evaluation(self, path: Path) -> Evaluation:
        content = json.loads(path.read_text(encoding="utf-8"))
        self._watch.watchdog.hear(step=False)
        job = self.job
        found = score(
            content["rewards"],
            self.step,
            self.step * job.prompts_per_step,
            content["seconds"],
            kept_examples(self.heldout, content["completions"]),
            by_prompt=job.full_at(self.step),
        )
        return found.model_copy(update={"reward_timeouts": content["timed_out"]})

    def _follow(self) -> None:
        """Read what has been logged meanwhile."""
        for line in self._poll():
            event = read_line(line)
            if isinstance(event, StepLine):
                self._steps.append(event)
            elif event is not None:
                self._native_steps.append(event.step)

    def _poll(self, *, may_end: bool = False) -> list[str]:
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._tell()
        return self._watch.poll(may_end=may_end)


def kept_examples(heldout: Sequence[Row], kept: Sequence[tuple[int, str, float]]) -> tuple[Example, ...]:
    """What is to be read of an evaluation, from (row, completion, reward) in the order of rows."""
    prompts = [text_of(heldout[row]["prompt"]) for row, _, _ in kept]
    return Example.first(prompts, [text for _, text, _ in kept], [reward for _, _, reward in kept])


def score(
    rewards: list[tuple[int, float]],
    step: int,
    prompts: int,
    seconds: float,
    examples: tuple[Example, ...] = (),
    *,
    by_prompt: bool = False,
) -> Evaluation:
    """Mean over held-out prompts, its standard error, and pass@n, from (row, reward) of every completion."""
    by_row: dict[int, list[float]] = {}
    for row, reward in rewards:
        by_row.setdefault(row, []).append(reward)
    means = np.array([statistics.fmean(values) for values in by_row.values()])
    # All prompts scoring alike does not prove a noiseless score; half a completion's weight is the least to claim.
    return Evaluation(
        step=step,
        prompts=prompts,
        score=float(means.mean()),
        standard_error=max(float(means.std(ddof=1)) / math.sqrt(len(means)), 0.5 / len(rewards)),
        samples=len(rewards),
        seconds=seconds,
        pass_at_n=PassAtN.of(by_row.values()),
        examples=examples,
        by_prompt=tuple(statistics.fmean(by_row[row]) for row in sorted(by_row)) if by_prompt else (),
    )


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _take_checkpoint(files: Files, stage: Path, step: int, tokens: int, *, resumable: bool) -> None:
    """Move a checkpoint into the stage: the model at the top, below `checkpoints` what continuing needs, if it may."""
    tag = f"global_step{step}"
    for path in (files.checkpoints / f"{tag}_hf").iterdir():
        path.rename(stage / path.name)
    for part in files.checkpoints.glob("_*") if resumable else ():
        target = stage / "checkpoints" / part.name
        target.mkdir(parents=True)
        (part / tag).rename(target / tag)
        (target / "latest").write_text(tag, encoding="utf-8")
    (stage / PROGRESS).write_text(json.dumps({"step": step, "tokens": tokens}), encoding="utf-8")
