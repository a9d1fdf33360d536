"""What jfhpo adds to a run of OpenRLHF, through its own extension point (`--train.agent_func_path`).

This file is copied beside its plan (`plan.json`) and `scoring.py` into the folder of a run and works there, inside
OpenRLHF's vLLM actors and in the trainer's environment, where jfhpo is not installed. It does four things:

* It calls rewards as every trainer of jfhpo does: prompt, completion without special tokens, the row's columns, in
  processes of their own with a time limit. A reward that fails ends the run with a message; OpenRLHF by itself
  would swallow the error.
* It tells for every group of completions whether all scored alike.
* It writes down what each held-out prompt scored, so that a standard error can be given, and what was written for the
  first ones.
* It holds the rollouts of a step until the driver has judged the step before (`control.json`), and evaluates then if
  asked to. So a stopping rule stops on the very step, with that step's weights. A driver that is gone for
  `orphan_seconds` ends the run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import ray
from openrlhf.utils.agent import AgentExecutorBase

FOLDER = Path(__file__).resolve().parent

REWARD_FAILED = "jfhpo: the reward failed:"
"""Begins the message of a run that its reward function ended. The driver looks for it in the log."""

ORPHANED = "jfhpo: the driver is gone:"

POLL_SECONDS = 0.1

CHUNK = 64
"""Held-out completions that an engine takes at a time."""

Result = tuple[int, float, bool, bool, str | None]
"""What came of a held-out completion: its row, its reward, whether it was cut off, whether scoring it took too long,
and its text if that is to be kept."""


def _scoring() -> Any:
    """The module `scoring.py` beside this file."""
    spec = importlib.util.spec_from_file_location("jfhpo_scoring", FOLDER / "scoring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


scoring = _scoring()


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole at any moment."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


class _Evaluation:
    """Held-out completions that are being collected.

    Args:
        step: Steps completed; None if OpenRLHF asked for it, whose log says at which step.
        wanted: Completions that engines are to take, as (row, sample).
        missing: How many completions have no reward yet.
    """

    def __init__(self, step: int | None, wanted: Iterable[tuple[int, int]], missing: int) -> None:
        self.step = step
        self.open = deque(wanted)
        self.missing = missing
        self.rewards: list[tuple[int, float]] = []
        self.completions: list[tuple[int, str, float]] = []
        self.truncated = 0
        self.timed_out = 0
        self.began = time.time()


class _Coordinator:
    """One per training, shared by all engines: admits rollouts step by step and collects evaluations.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._plan = json.loads((self._folder / "plan.json").read_text(encoding="utf-8"))
        self._admitted: dict[int, int] = {}
        self._released = -1
        self._evaluated: set[int] = set()
        self._asked: _Evaluation | None = None
        self._native: _Evaluation | None = None
        self._native_samples: dict[int, int] = {}
        self._natives = 0
        self._control = ""
        self._heard = time.monotonic()
        self._watching: asyncio.Task[None] | None = None

    async def admit(self, position: int) -> list[tuple[int, int]] | None:
        """Wait until a prompt's completions may be sampled.

        Args:
            position: Of the prompt in the training data.

        Returns:
            None: go on. Else held-out completions (row, sample) to sample and report first; ask again then.
        """
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        # OpenRLHF dispatches a step's prompts only after the weights of the step before have arrived.
        place = self._admitted.setdefault(position, len(self._admitted))
        step = self._plan["start_step"] + place // self._plan["prompts"]
        while True:
            if time.monotonic() - self._heard > self._plan["orphan_seconds"]:
                raise RuntimeError(f"{ORPHANED} no sign of it for {self._plan['orphan_seconds']} s")
            if self._asked is not None and self._asked.open:
                return [self._asked.open.popleft() for _ in range(min(CHUNK, len(self._asked.open)))]
            if self._asked is None and step <= self._released:
                return None
            await asyncio.sleep(POLL_SECONDS)

    def report(self, results: list[Result]) -> None:
        """Take rewards of held-out completions that `admit` asked for."""
        assert self._asked is not None
        if self._take(self._asked, results):
            self._asked = None

    def next_sample(self, row: int) -> int:
        """How many completions of a held-out prompt OpenRLHF has asked for before in the present evaluation."""
        if self._native is None:
            self._native = _Evaluation(None, (), self._plan["heldout_samples"] * len(self._plan["heldout"]))
            self._native_samples = {}
        number = self._native_samples.get(row, 0)
        self._native_samples[row] = number + 1
        return number

    def report_native(self, result: Result) -> None:
        """Take the reward of a held-out completion that OpenRLHF asked for."""
        assert self._native is not None
        if self._take(self._native, [result]):
            self._native = None

    def _take(self, evaluation: _Evaluation, results: list[Result]) -> bool:
        """Whether the evaluation is complete now; it is written then."""
        for row, reward, truncated, timed_out, text in results:
            evaluation.rewards.append((row, reward))
            evaluation.truncated += truncated
            evaluation.timed_out += timed_out
            if text is not None:
                evaluation.completions.append((row, text, reward))
        evaluation.missing -= len(results)
        if evaluation.missing:
            return False
        if evaluation.step is None:
            self._natives += 1
            name = f"evaluation-{self._natives:04d}.json"
        else:
            name = f"evaluation-at-{evaluation.step}.json"
        content = {
            "rewards": sorted(evaluation.rewards),
            "completions": sorted(evaluation.completions),
            "truncated": evaluation.truncated,
            "timed_out": evaluation.timed_out,
            "seconds": time.time() - evaluation.began,
        }
        write_json(self._folder / name, content)
        return True

    async def _watch(self) -> None:
        """Follow what the driver writes."""
        while True:
            try:
                text = (self._folder / "control.json").read_text(encoding="utf-8")
            except OSError:
                text = self._control
            if text != self._control:
                self._control, self._heard = text, time.monotonic()
                control = json.loads(text)
                at = control["evaluate"]
                if at is not None and at not in self._evaluated:
                    self._evaluated.add(at)
                    rows, samples = len(self._plan["heldout"]), self._plan["heldout_samples"]
                    wanted = [(row, sample) for row in range(rows) for sample in range(samples)]
                    self._asked = _Evaluation(at, wanted, len(wanted))
                self._released = control["released"]
            await asyncio.sleep(POLL_SECONDS)


class AgentExecutor(AgentExecutorBase):  # type: ignore[misc]
    """Samples one completion and scores it; see the module."""

    def __init__(self) -> None:
        self._plan = json.loads((FOLDER / "plan.json").read_text(encoding="utf-8"))
        self._pool = scoring.Pool(
            self._plan["reward"],
            self._plan["reward_timeout_seconds"],
            self._plan["reward_timeout_score"],
            FOLDER / "reward.log",
        )
        # Names are seen within one run only.
        self._coordinator = (
            ray.remote(_Coordinator)
            .options(name="jfhpo-coordinator", get_if_exists=True, num_cpus=0, max_concurrency=100_000)
            .remote(str(FOLDER))
        )
        self._admissions: dict[int, asyncio.Task[None]] = {}
        self._groups: dict[int, tuple[list[float], asyncio.Future[bool]]] = {}

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """One completion of a prompt: of a training row, or of a held-out one when OpenRLHF evaluates."""
        place = json.loads(label)
        sample = _Sampling(llm_engine, hf_tokenizer, max_length, self._pool)
        if "heldout" in place:
            row = place["heldout"]
            number = await self._coordinator.next_sample.remote(row)
            params = self._heldout_params(sampling_params, row, number)
            output, text = await sample(prompt, self._plan["heldout"][row], params)
            await self._coordinator.report_native.remote(self._result(row, number, output, text))
            return {**output, "label": label}
        position = place["position"]
        if position not in self._admissions:
            self._admissions[position] = asyncio.create_task(self._admit(position, sample, sampling_params))
        await self._admissions[position]
        output, _ = await sample(prompt, place["row"], deepcopy(sampling_params))
        alike = await self._scored_alike(position, output["reward"])
        return {**output, "label": label, "extra_logs": {**output["extra_logs"], "zero_variance": float(alike)}}

    async def _admit(self, position: int, sample: _Sampling, sampling_params: Any) -> None:
        while True:
            wanted = await self._coordinator.admit.remote(position)
            if wanted is None:
                return
            results = await asyncio.gather(
                *(self._heldout(row, number, sample, sampling_params) for row, number in wanted)
            )
            await self._coordinator.report.remote(results)

    async def _heldout(self, row: int, number: int, sample: _Sampling, sampling_params: Any) -> Result:
        content = self._plan["heldout"][row]
        prompt = content["prompt"]
        if self._plan["chat_template"]:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = sample.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        output, text = await sample(prompt, content, self._heldout_params(sampling_params, row, number))
        return self._result(row, number, output, text)

    def _result(self, row: int, number: int, output: dict[str, Any], text: str) -> Result:
        """What a held-out completion came to. The first one of each of the first rows is kept, to be read."""
        timed_out = bool(output["extra_logs"]["reward_timeouts"])
        kept = text if number == 0 and row < self._plan["kept_completions"] else None
        return row, output["reward"], output["truncated"], timed_out, kept

    def _heldout_params(self, sampling_params: Any, row: int, number: int) -> Any:
        """Every evaluation samples with the same random numbers: configurations are compared on equal terms."""
        params = deepcopy(sampling_params)
        params.temperature = self._plan["heldout_temperature"]
        params.top_p = 1.0
        params.seed = self._plan["heldout_seed"] + row * self._plan["heldout_samples"] + number
        return params

    async def _scored_alike(self, position: int, reward: float) -> bool:
        """Whether all completions of the group scored alike; waits for them."""
        if self._plan["samples"] == 1:
            return False
        rewards, complete = self._groups.setdefault(position, ([], asyncio.get_running_loop().create_future()))
        rewards.append(reward)
        if len(rewards) == self._plan["samples"]:
            del self._groups[position]
            complete.set_result(max(rewards) == min(rewards))
        return await complete


class _Sampling:
    """Samples and scores completions with an engine."""

    def __init__(self, engine: Any, tokenizer: Any, max_length: int, pool: Any) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pool = pool

    async def __call__(self, prompt: str, row: dict[str, Any], params: Any) -> tuple[dict[str, Any], str]:
        """What OpenRLHF wants to know of a completion, and its text without special tokens."""
        ids = self.tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        if len(ids) + params.max_tokens > self.max_length:
            raise RuntimeError(
                f"a prompt of {len(ids)} tokens and a completion of {params.max_tokens} exceed the length of "
                f"{self.max_length} that the engine was started for: {row['prompt'][:80]!r}"
            )
        request = await self.engine.generate(ids, params)
        answer = request.outputs[0]
        tokens = list(answer.token_ids)
        log_probabilities = None
        if params.logprobs is not None:
            log_probabilities = [0.0] * len(ids)
            log_probabilities += [entry[token].logprob for token, entry in zip(tokens, answer.logprobs, strict=True)]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        scores = await asyncio.to_thread(self._score, row, text)
        reward = scores.rewards[0]
        parts = {f"reward_part_{name}": values[0] for name, values in scores.parts.items()}
        output = {
            "prompt": prompt,
            "label": "",
            "images": None,
            "mm_train_inputs": None,
            "observation_tokens": ids + tokens,
            "action_ranges": [(len(ids), len(ids) + len(tokens))],
            "rollout_log_probs": log_probabilities,
            "truncated": answer.finish_reason == "length",
            "reward": reward,
            "scores": reward,
            # OpenRLHF takes means over a step's samples, so every sample has all of them.
            "extra_logs": {
                "reward_timeouts": float(bool(scores.timed_out)),
                **{name: 0.0 if value is None else value for name, value in parts.items()},
            },
        }
        return output, text

    def _score(self, row: dict[str, Any], completion: str) -> Any:
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        try:
            return self.pool.score([row["prompt"]], [completion], columns)
        except scoring.RewardError as error:
            raise RuntimeError(f"{REWARD_FAILED} {error}") from error
