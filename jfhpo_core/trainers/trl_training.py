"""One job of the `trl` trainer: TRL's loop, with our prompts order, our record of every step, and exact resumption.

TRL counts optimizer updates; a step of ours is a rollout and its `mini_batches` updates. Our schedule of prompts makes
one epoch of the whole horizon, so that TRL can skip to any step; learning-rate schedules span the horizon as well,
and a segment merely stops on the way.
"""

from __future__ import annotations

import gc
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate.state
import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import use_adapter

from jfhpo_core.errors import InfrastructureError, TrialFailure
from jfhpo_core.study.data import Prompt, Row, columns_of
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.prompting import Prompting, Tokens, prompt_limit, without_overlong
from jfhpo_core.study.scoring import Scores
from jfhpo_core.study.tasks import Task, load_task
from jfhpo_core.study.trial import Evaluation, FailureKind, Pause, StepRecord
from jfhpo_core.trainers.base import Job, Observer, TrainingResult
from jfhpo_core.trainers.trl_rollout import ONE, Ranks, Sampler, build_sampler, complete, judge, own_randomness
from jfhpo_core.trainers.trl_settings import TrlSettings

PROGRESS = "jfhpo-progress.json"
"""File of a checkpoint with what TRL does not count: our step and the completion tokens so far."""

SCHEDULERS = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
"""Our names to those of transformers."""

# A collection of all that these imports made takes most of a second, and transformers asks for one in every job.
gc.collect()
gc.freeze()


def train(
    job: Job, settings: TrlSettings, start: Path | None, stage: Path, observe: Observer, ranks: Ranks = ONE
) -> TrainingResult:
    """See `Trainer.run`. Of the processes of a run, `ranks` says which this one is; the first one calls `observe`."""
    began = time.perf_counter()
    task = load_task(job.study.task)
    process = "" if ranks.first else f"-{ranks.index}"
    log = Path(job.store).parent / "logs" / f"{job.trial_key}-reward{process}.log"
    with _own_process_state(settings.threads), task.reward.logging_to(log) as reward:
        try:
            trainer = _build(job, settings, replace(task, reward=reward), start, stage, ranks)
            loop = _Loop(trainer, job, observe, began, ranks, fresh=start is None)
            trainer.add_callback(loop)
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            if not loop.stopped:
                trainer.save_state_to(stage, loop.step)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrialFailure(FailureKind.OUT_OF_MEMORY, f"out of memory: {error}") from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise TrialFailure(FailureKind.OUT_OF_MEMORY, f"out of memory: {error}") from error
            raise
    return TrainingResult(
        end_step=loop.step,
        end_prompts=loop.step * job.prompts_per_step,
        evaluations=tuple(loop.evaluations),
        startup_seconds=loop.startup_seconds,
        evaluation_seconds=sum(evaluation.seconds for evaluation in loop.evaluations),
    )


@contextmanager
def _own_process_state(threads: int) -> Iterator[None]:
    """Keep what a job sets for the whole process from the jobs that follow it."""
    threads_before = torch.get_num_threads()
    verbosity = transformers.logging.get_verbosity()
    progress_bars = transformers.logging.is_progress_bar_enabled()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with own_randomness(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads_before)
        transformers.logging.set_verbosity(verbosity)
        if progress_bars:
            transformers.logging.enable_progress_bar()
        # Accelerate keeps device and precision of its first user in singletons.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
        accelerate.state.GradientState._reset_state()  # noqa: SLF001
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


class PromptSchedule(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """The rows of every update of the full horizon: shuffled anew for each pass over the prompts, from the seed alone.

    The order does not depend on the batch size, so configurations of one seed see the same prompts in the same order.

    Args:
        rows: Training rows.
        prompts_per_step: Prompts of a rollout.
        samples: Completions per prompt.
        loads: How often TRL loads the same rollout (once per micro-batch).
        steps: Steps of the full horizon.
        seed: Of the order.
        ranks: Each process loads its share of a rollout; groups may be parted.
    """

    def __init__(
        self,
        rows: tuple[Row, ...],
        prompts_per_step: int,
        samples: int,
        loads: int,
        steps: int,
        seed: int,
        ranks: Ranks = ONE,
    ) -> None:
        self._rows = rows
        self._prompts_per_step = prompts_per_step
        self._samples = samples
        self._loads = loads
        self._steps = steps
        self._seed = seed
        self._ranks = ranks
        self._passes: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._steps * self._loads

    def __getitem__(self, load: int) -> list[dict[str, Any]]:
        first = load // self._loads * self._prompts_per_step
        rows = [self.row(position) for position in range(first, first + self._prompts_per_step)]
        rollout = [{"prompt": self._rows[row]["prompt"], "row": row} for row in rows for _ in range(self._samples)]
        return list(self._ranks.share(rollout))

    def row(self, position: int) -> int:
        """Index of the row at a position of the endless stream of prompts."""
        number, offset = divmod(position, len(self._rows))
        if number not in self._passes:
            self._passes = {number: np.random.default_rng((self._seed, number)).permutation(len(self._rows)).tolist()}
        return self._passes[number][offset]


@dataclass
class _Signals:
    """What is measured during one step."""

    scores: Scores = field(default_factory=lambda: Scores([]))
    completions: list[Tokens] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rate: float = 0.0
    generation_seconds: float = 0.0

    @classmethod
    def of_all(cls, signals: Sequence[_Signals]) -> _Signals:
        """What the processes of a run have measured, in their order."""
        scores = [one.scores for one in signals]
        return cls(
            scores=Scores(
                [reward for one in scores for reward in one.rewards],
                {name: [value for one in scores for value in one.parts[name]] for name in scores[0].parts},
                [index for one in scores for index in one.timed_out],
            ),
            completions=[completion for one in signals for completion in one.completions],
            kls=[kl for one in signals for kl in one.kls],
            grad_norms=signals[0].grad_norms,
            learning_rate=signals[0].learning_rate,
            generation_seconds=max(one.generation_seconds for one in signals),
        )


class _Measured(transformers.Trainer):  # type: ignore[misc]
    """What our trainers have in common: prompts, sampling and records in our hands, the algorithm in TRL's."""

    def __init__(
        self, *args: Any, task: Task, sampler: Sampler, schedule: PromptSchedule, beta: float, **kwargs: Any
    ) -> None:
        self.task = task
        self.sampler = sampler
        self._schedule = schedule
        self.tokens = 0
        self.signals = _Signals()
        super().__init__(*args, reward_funcs=self._score, **kwargs)
        # TRL makes a reference model only for beta > 0; ours is given one in any case, to measure the KL.
        self.beta = beta
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """Disable TRL's telemetry."""

    def get_train_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        return DataLoader(self._schedule, batch_size=1, collate_fn=lambda items: items[0])

    def _score(self, prompts: list[Prompt], completions: list[Any], row: list[int], **_: Any) -> list[float]:
        """The task's reward, called as in evaluation: with the row's own columns and nothing of TRL's."""
        rows = [self.task.train[number] for number in row]
        # Of a chat TRL makes messages, parsed in its own ways.
        texts = completions if isinstance(completions[0], str) else self.sampler.decode(self.signals.completions)
        self.signals.scores = self.task.reward(prompts, texts, **columns_of(rows))
        return self.signals.scores.rewards

    def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[Tokens], None, dict[str, Any]]:
        return self.sampler.encode(prompts), None, {}

    def _sample(self, prompt_ids: list[Tokens]) -> list[Tokens]:
        completions = self.sampler.sample(self.model, prompt_ids, self.temperature)
        self.signals.completions = completions
        return completions

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.beta == 0:
            self._score_by_reference(batch)
        # Whoever asked for it, the reference was the last to score the rollout.
        batch["ref_per_token_logps"] = self._token_logps
        self.signals.generation_seconds = time.perf_counter() - began
        return batch

    @torch.no_grad()
    def _score_by_reference(self, batch: dict[str, Any]) -> None:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width, size = batch["completion_ids"].size(1), self.args.per_device_train_batch_size
        if self.ref_model is not None:
            self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, width, batch_size=size)
        else:  # LoRA: the reference is the model without its adapter
            with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
                self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._token_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        difference = inputs["ref_per_token_logps"] - self._token_logps
        k3 = torch.exp(difference) - difference - 1
        self.signals.kls.append(float((k3 * mask).sum() / mask.sum()))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.signals.grad_norms.append(float(norm))
        self.signals.learning_rate = self._get_learning_rate()
        return norm

    def take_record(self, step: int, prompts: int, seconds: float) -> StepRecord:
        """The record of the step that has just ended.

        Args:
            step: Steps completed.
            prompts: Prompts consumed since step 0.
            seconds: Duration of the step.
        """
        signals, self.signals = _Signals.of_all(gather_object([self.signals])), _Signals()
        metrics = self._metrics["train"]
        lengths = [len(completion) for completion in signals.completions]
        self.tokens += sum(lengths)
        groups = np.array(signals.scores.rewards).reshape(-1, self.num_generations)
        record = StepRecord(
            step=step,
            prompts=prompts,
            tokens=self.tokens,
            reward=float(groups.mean()),
            reward_std=float(groups.std()),
            zero_variance_share=float((groups.max(axis=1) == groups.min(axis=1)).mean()),
            kl=_mean(signals.kls),
            entropy=_mean(metrics["entropy"]),
            clip_fraction=_mean(metrics["clip_ratio/region_mean"]),
            grad_norm=_mean(signals.grad_norms),
            completion_tokens=_mean(lengths),
            truncated_share=_mean([self.sampler.truncated(completion) for completion in signals.completions]),
            learning_rate=signals.learning_rate,
            reward_timeouts=len(signals.scores.timed_out),
            reward_parts=_part_means(signals.scores),
            generation_seconds=signals.generation_seconds,
            training_seconds=max(0.0, seconds - signals.generation_seconds),
        )
        metrics.clear()
        return record

    def save_state_to(self, stage: Path, step: int) -> None:
        """Write all that resuming needs: weights (safetensors), optimizer, scheduler, random states and counters."""
        self.save_model(str(stage))
        self._save_optimizer_and_scheduler(str(stage))
        self._save_rng_state(str(stage))
        if self.accelerator.is_main_process:
            # A pickle that nothing reads back.
            (stage / "training_args.bin").unlink()
            # TRL's summary of the segment, durations and all: equal runs shall give equal checkpoints.
            self.state.log_history = []
            self.state.save_to_json(str(stage / "trainer_state.json"))
            (stage / PROGRESS).write_text(json.dumps({"step": step, "tokens": self.tokens}), encoding="utf-8")
        self.accelerator.wait_for_everyone()


class _Grpo(_Measured, GRPOTrainer):  # type: ignore[misc]
    def _generate_single_turn(self, prompt_ids: list[Tokens], *rest: Any, **named: Any) -> tuple[list[Tokens], Any]:
        if not self.use_vllm:
            return self._sample(prompt_ids), None
        completions, logps = super()._generate_single_turn(prompt_ids, *rest, **named)
        self.signals.completions = completions
        return completions, logps


class _Rloo(_Measured, RLOOTrainer):  # type: ignore[misc]
    def _generate_single_turn(self, prompt_ids: list[Tokens], *rest: Any, **named: Any) -> list[Tokens]:
        if not self.use_vllm:
            return self._sample(prompt_ids)
        self.signals.completions = super()._generate_single_turn(prompt_ids, *rest, **named)
        return self.signals.completions


class _Loop(TrainerCallback):  # type: ignore[misc]
    """Reports every step, evaluates where it is due, and ends the segment; in all processes of a run alike.

    What the first one reports and is answered holds for all.
    """

    def __init__(
        self, trainer: _Measured, job: Job, observe: Observer, began: float, ranks: Ranks, *, fresh: bool
    ) -> None:
        self._trainer = trainer
        self._job = job
        self._observe = observe
        self._began = began
        self._ranks = ranks
        self._fresh = fresh
        self._updates = int(job.configuration["mini_batches"])
        self.step = 0 if fresh else job.segment.start_step
        self.evaluations: list[Evaluation] = []
        self.startup_seconds = 0.0
        self.stopped = False
        self.paused = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.startup_seconds = time.perf_counter() - self._began
        if self._fresh and 0 in self._job.evaluation_steps and (evaluation := self._evaluate()) is not None:
            self._observe(evaluation)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step, rest = divmod(state.global_step, self._updates)
        if rest:
            return
        seconds = time.perf_counter() - self._began
        prompts = self.step * self._job.prompts_per_step
        self.stopped = self._stops(self._trainer.take_record(self.step, prompts, seconds))
        if self.stopped or self.step in self._job.evaluation_steps:
            evaluation = self._evaluate()
            self.stopped = self.stopped or self._stops(evaluation)
        control.should_training_stop = self.stopped or self.paused or self.step >= self._job.segment.stop_step
        self._began = time.perf_counter()

    def _stops(self, event: StepRecord | Evaluation | None) -> bool:
        decision = self._observe(event) if self._ranks.first and event is not None else None
        answer = [isinstance(decision, Pause), decision is not None and decision.stop]
        paused, stop = broadcast_object_list(answer)
        self.paused = self.paused or paused
        return bool(stop)

    def _evaluate(self) -> Evaluation | None:
        """The score of the present policy; None in all processes but the first."""
        spec, task, began = self._job.study.evaluation, self._trainer.task, time.perf_counter()
        rows = task.heldout[: spec.prompts]
        completions = complete(
            self._trainer.model, self._trainer.sampler, rows, spec.samples_per_prompt, spec.temperature, self._ranks
        )
        if not self._ranks.first:
            return None
        evaluation = judge(
            task,
            rows,
            completions,
            self.step,
            self.step * self._job.prompts_per_step,
            began,
            examples=self._job.study.tracking.completions,
            by_prompt=self._job.full_at(self.step),
        )
        self.evaluations.append(evaluation)
        return evaluation


def _build(job: Job, settings: TrlSettings, task: Task, start: Path | None, stage: Path, ranks: Ranks) -> Any:
    chosen = Hyperparameters.model_validate(job.configuration)
    tokenizer = AutoTokenizer.from_pretrained(job.model_path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32)
    prompting = Prompting(settings.chat_template, settings.bos)
    sampler = build_sampler(model, tokenizer, task.max_completion_tokens, settings.generation_batch, prompting)
    if job.study.task.overlong_prompts == "drop":
        limit = prompt_limit(job.study.task, build_ladder(job.study).models, prompting)
        task = without_overlong(task, job.study.task, limit, sampler.encode)
    config = configure(job, settings, stage, task.max_completion_tokens, ranks)
    schedule = PromptSchedule(
        task.train,
        chosen.prompts_per_step,
        chosen.n_samples,
        config.steps_per_generation,
        job.total_steps,
        job.seed,
        ranks,
    )
    kind: Any = _Rloo if isinstance(config, RLOOConfig) else _Grpo
    trainer = kind(
        model=model,
        args=config,
        # TRL insists on a data set of this class; the prompts come from the schedule.
        train_dataset=Dataset.from_dict({"prompt": ["unused"]}),
        processing_class=tokenizer,
        peft_config=_lora(settings),
        task=task,
        sampler=sampler,
        schedule=schedule,
        beta=chosen.kl_coefficient,
    )
    if start is not None:
        trainer.tokens = json.loads((start / PROGRESS).read_text(encoding="utf-8"))["tokens"]
    return trainer


def configure(job: Job, settings: TrlSettings, stage: Path, max_tokens: int, ranks: Ranks = ONE) -> Any:
    """TRL's configuration of a run, in one of its processes.

    Args:
        job: Its segment.
        settings: The study's.
        stage: Folder that takes the checkpoint.
        max_tokens: Length limit of a completion.
        ranks: The processes of the run.
    """
    chosen = Hyperparameters.model_validate(job.configuration)
    part = chosen.prompts_per_step * chosen.n_samples // chosen.mini_batches // ranks.count
    accumulation = _accumulation(part, settings.micro_batch)
    updates = job.total_steps * chosen.mini_batches
    common: dict[str, Any] = {
        "output_dir": str(stage),
        "seed": job.seed,
        "use_cpu": _on_cpu(settings),
        "bf16": settings.dtype == "bfloat16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_steps": updates,
        "learning_rate": chosen.learning_rate,
        "lr_scheduler_type": SCHEDULERS[chosen.scheduler],
        "warmup_steps": math.ceil(chosen.warmup_ratio * updates),
        "weight_decay": chosen.weight_decay,
        "max_grad_norm": chosen.max_grad_norm,
        "num_generations": chosen.n_samples,
        "per_device_train_batch_size": part // accumulation,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": chosen.mini_batches * accumulation,
        # See `_Measured.__init__`: any beta but zero makes TRL keep a reference.
        "beta": chosen.kl_coefficient or 1.0,
        "epsilon": chosen.clip_low,
        "epsilon_high": chosen.clip_high,
        "temperature": chosen.temperature,
        "max_completion_length": max_tokens,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if settings.vllm is not None:
        common |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": settings.vllm.memory_share,
            "vllm_tensor_parallel_size": settings.vllm.tensor_parallel,
            "vllm_enable_sleep_mode": settings.vllm.sleep,
        }
    if chosen.loss_type == "rloo":
        config: Any = RLOOConfig(**common)
    else:
        scale = "none" if chosen.loss_type == "dr_grpo" else "group"
        config = GRPOConfig(**common, loss_type=chosen.loss_type, scale_rewards=scale)
    # With several GPUs in sight transformers would spread a batch over them.
    config._n_gpu = min(config.n_gpu, 1)  # noqa: SLF001
    return config


def _accumulation(part: int, micro_batch: int | None) -> int:
    """Into how many equal micro-batches to cut an update of `part` completions: as few as the limit allows."""
    limit = micro_batch or part
    return next(count for count in range(1, part + 1) if part % count == 0 and part // count <= limit)


def _on_cpu(settings: TrlSettings) -> bool:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InfrastructureError(
            "trainer.settings.device is 'cuda', but this worker sees no GPU; set cluster.gpus_per_device: 1, or "
            "device: auto"
        )
    return settings.device == "cpu" or not torch.cuda.is_available()


def _lora(settings: TrlSettings) -> Any:
    if settings.lora is None:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=settings.lora.target_modules,
    )


def _part_means(scores: Scores) -> dict[str, float]:
    """Mean of every reward function over the completions that it did not abstain from."""
    known = {name: [value for value in values if value is not None] for name, values in scores.parts.items()}
    return {name: _mean(values) for name, values in known.items() if values}


def _mean(values: list[float] | list[int] | list[bool]) -> float:
    return sum(values) / len(values)
