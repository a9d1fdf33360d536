"""Scores completions by the user's reward functions, in processes of their own that can be killed.

This file stands alone: jfhpo imports it, it is copied beside the plan of a run that runs in another environment
(`openrlhf`, `verl`), and it is the program of the scoring processes. So it imports nothing but the standard library.

A batch is one call of every function, in one warm process. If the call takes too long, the process is killed and the
batch is scored again, one completion at a time in several processes: then it is known which completions take too long.
They get a score of the user's choice. A process also ends itself in the middle of a call that takes too long, whatever
holds the interpreter, and writes down where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib.util
import inspect
import json
import math
import numbers
import os
import queue
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

STARTUP_SECONDS = 300.0
"""For a scoring process to import the reward files."""

GRACE_SECONDS = 2.0
"""After its time a process ends itself; if it has not done so after this time, it is killed."""

CLOCK_SECONDS = 0.05
"""Two clocks may differ by so much about how long a call took."""

PROCESSES = 4
"""Scoring processes at most, per pool."""

TIMEOUTS_IN_A_ROW = 16
"""After this many completions in a row that took too long, the reward is taken for broken."""

SHOWN = 200
"""Characters of a prompt or completion in a message."""

TRL_ONLY = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What TRL's own loop gives to rewards besides columns. Other trainers do not have it."""

SIGNATURES = (
    "reward(prompts, completions, **columns) as in TRL, "
    "compute_score(data_source, solution_str, ground_truth, extra_info) as in verl, "
    "reward_func(queries, prompts, labels) as in OpenRLHF"
)


class RewardError(Exception):
    """The reward functions do not load, do not fit the data, raise, or return what is no reward."""


@dataclass
class Scores:
    """What became of a batch.

    Attributes:
        rewards: One number per completion.
        parts: With several reward functions: what each returned, by name; None where it abstained or ran out of time.
        timed_out: Indices of completions that took too long.
    """

    rewards: list[float]
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    timed_out: list[int] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- in a scoring process


class _Function:
    """A reward function that is called by its own convention.

    Args:
        reference: 'file.py' or 'file.py:function'.
        weight: Of its rewards in the sum.
        constants: Further arguments; of a class: of its construction.
        loop: Runs it if it is asynchronous.
    """

    def __init__(
        self, reference: str, weight: float, constants: dict[str, Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        file, _, name = reference.partition(":")
        self.reference = reference
        self.name = name or Path(file).stem
        self.weight = weight
        self._loop = loop
        function: Any = getattr(_module(Path(file)), name or "reward", None)
        if not callable(function):
            raise RewardError(f"{file}: it has no function {name or 'reward'!r}; name it as 'file.py:function'")
        if inspect.isclass(function):
            function, constants = function(**constants), {}
        self._function: Callable[..., Any] = function
        self._constants = constants
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{reference}: its signature cannot be read: {error}") from None
        self._signature = f"{self.name}{signature}"
        kinds, arguments = inspect.Parameter, list(signature.parameters.values())
        required = {one.name for one in arguments if one.default is kinds.empty}
        if any(one.kind is kinds.POSITIONAL_ONLY and one.name in required for one in arguments):
            raise self._unfit("arguments before '/' cannot be given by name")
        self._takes_all = any(one.kind is kinds.VAR_KEYWORD for one in arguments)
        self._named = {one.name for one in arguments if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
        self._required = (self._named & required) - set(constants)

    def __call__(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        """Rewards of a batch; None where the function abstains."""
        if self._named >= {"queries", "labels"}:
            texts = [_text(prompt) for prompt in prompts]
            queries = [text + completion for text, completion in zip(texts, completions, strict=True)]
            labels = columns.get("label", columns.get("labels"))
            if labels is None:
                raise self._unfit(
                    f"its labels come from a column 'label', and the columns are {sorted(columns)}: name it in "
                    "task.columns {label: NAME}"
                )
            return self._rewards(self._call({"queries": queries, "prompts": texts, "labels": labels}), completions)
        for end in ("", "s"):
            wanted = {f"solution_str{end}", f"ground_truth{end}"}
            if self._named >= wanted:
                given = self._by_verl(completions, columns)
                if end:
                    return self._rewards(self._call({f"{name}s": given[name] for name in given}), completions)
                rows = ({name: values[row] for name, values in given.items()} for row in range(len(completions)))
                return self._rewards([_verl_score(self._call(row)) for row in rows], completions)
        if "completions" not in self._named and not self._takes_all:
            raise self._unfit(f"that is none of {SIGNATURES}")
        return self._rewards(self._call(self._by_trl(prompts, completions, columns)), completions)

    def _by_trl(
        self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, list[Any]]:
        chats = bool(prompts) and not isinstance(prompts[0], str)
        texts = [[{"role": "assistant", "content": one}] for one in completions] if chats else completions
        given = {**columns, "prompts": prompts, "completions": texts}
        missing = sorted(self._required - set(given))
        if missing:
            own = [name for name in missing if name in TRL_ONLY]
            if own:
                raise self._unfit(f"{', '.join(own)}: only TRL's own loop has that; give it a default")
            raise self._unfit(
                f"{', '.join(missing)}: no such column (there are {', '.join(sorted(given))}); correct the signature, "
                f"name the column in task.columns, or use one of {SIGNATURES}"
            )
        return given

    def _by_verl(self, completions: list[str], columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The arguments of verl's reward functions, from the columns of verl's layout."""
        nothing: list[Any] = [None] * len(completions)
        truths = columns.get("ground_truth")
        if truths is None:
            models = columns.get("reward_model", nothing)
            if not all(isinstance(model, dict) and "ground_truth" in model for model in models):
                raise self._unfit(
                    "its ground_truth comes from a column 'ground_truth', or 'reward_model' with that key, and the "
                    f"columns are {sorted(columns)}: name it in task.columns {{ground_truth: NAME}}"
                )
            truths = [model["ground_truth"] for model in models]
        sources = columns.get("data_source", nothing)
        infos = columns.get("extra_info", nothing)
        return {"data_source": sources, "solution_str": completions, "ground_truth": truths, "extra_info": infos}

    def _unfit(self, reason: str) -> RewardError:
        return RewardError(f"{self.reference}: the signature {self._signature} does not fit: {reason}")

    def _call(self, given: dict[str, Any]) -> Any:
        if not self._takes_all:
            given = {name: value for name, value in given.items() if name in self._named}
        answer = self._function(**{**given, **self._constants})
        return self._loop.run_until_complete(answer) if inspect.isawaitable(answer) else answer

    def _rewards(self, answer: Any, completions: list[str]) -> list[float | None]:
        """What the function returned, checked."""
        if isinstance(answer, dict) and "rewards" in answer:  # OpenRLHF's way to return more
            answer = answer["rewards"]
        if hasattr(answer, "tolist"):  # numpy, torch
            answer = answer.tolist()
        if isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__iter__"):
            raise RewardError(
                f"{self.reference} returned {answer!r:.{SHOWN}}, not a list with a number per completion but a "
                f"{type(answer).__name__}; return a list of floats"
            )
        values = list(answer)
        if len(values) != len(completions):
            raise RewardError(
                f"{self.reference} returned {len(values)} rewards for {len(completions)} completions; return one each"
            )
        return [self._reward(value, index, completions) for index, value in enumerate(values)]

    def _reward(self, value: Any, index: int, completions: list[str]) -> float | None:
        if value is None:
            return None
        if hasattr(value, "item"):
            with contextlib.suppress(ValueError, RuntimeError):  # of an array of several numbers
                value = value.item()
        try:
            number = float(value) if isinstance(value, numbers.Real) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            what = "that is not finite; return a finite number, such as 0 for what cannot be scored"
            if not isinstance(value, numbers.Real):
                what = f"a {type(value).__name__} and no number; return a float for every completion"
            raise RewardError(
                f"{self.reference} returned {value!r:.{SHOWN}} for completion {index} of {len(completions)} "
                f"({completions[index][:SHOWN]!r}): {what}"
            )
        return number


def _module(path: Path) -> Any:
    """The module of a reward file, with what lies beside it within reach of its imports."""
    name = f"jfhpo_reward_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RewardError(f"{path}: there is no reward file here; it is named as 'file.py' or 'file.py:function'")
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a class's module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"{path}: the reward file fails on import: {type(error).__name__}: {error}") from error
    return module


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _verl_score(answer: Any) -> Any:
    return answer["score"] if isinstance(answer, dict) and "score" in answer else answer


def _combined(functions: list[_Function], request: dict[str, Any]) -> dict[str, Any]:
    """Call every function and add up what they return."""
    prompts, completions, columns = request["prompts"], request["completions"], request["columns"]
    parts: dict[str, list[float | None]] = {}
    for function in functions:
        name = function.name if function.name not in parts else function.reference
        try:
            parts[name] = function(prompts, completions, columns)
        except RewardError:
            raise
        except BaseException as error:
            raise RewardError(f"{function.reference} raised {type(error).__name__}: {error}") from error
    rewards = []
    for index, values in enumerate(zip(*parts.values(), strict=True)):
        known = [one.weight * value for one, value in zip(functions, values, strict=True) if value is not None]
        if not known:
            raise RewardError(
                f"{', '.join(one.reference for one in functions)} returned None for completion {index} of "
                f"{len(completions)} ({completions[index][:SHOWN]!r}): a reward may abstain only where another one "
                "scores; return a number"
            )
        rewards.append(sum(known))
    return {"rewards": rewards, "parts": parts if len(functions) > 1 else {}}


def serve() -> None:
    """Answer requests, one JSON text per line, until there are no more; what rewards print goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    own = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != own]  # its modules are none of theirs
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    functions: list[_Function] = []
    for line in iter(requests.readline, b""):
        request = json.loads(line)
        # Random numbers of rewards depend on what is scored: a run that is continued sees the same ones.
        _seed(zlib.crc32(line))
        faulthandler.dump_traceback_later(request["seconds"], exit=True)
        try:
            if "functions" in request:
                functions = [_Function(loop=loop, **one) for one in request["functions"]]
                reply: dict[str, Any] = {}
            else:
                reply = _combined(functions, request)
        except RewardError as error:
            reply = {"error": str(error)}
        except BaseException as error:  # noqa: BLE001  also SystemExit of a reward file
            reply = {"error": f"the reward cannot be made ready: {type(error).__name__}: {error}"}
        finally:
            faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a reward may have closed or replaced it
            sys.stdout.flush()
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


# --------------------------------------------------------------------------------------------------- who has it score


class _TooSlow(Exception):  # noqa: N818  the pool deals with it
    """A call took too long; its process is gone."""


class _Process:
    """A scoring process that has loaded the reward functions.

    Args:
        functions: See `Pool`.
        log: What it prints goes there; None: to this process's standard error.
    """

    def __init__(self, functions: Sequence[dict[str, Any]], log: BinaryIO | None) -> None:
        self._process = subprocess.Popen(  # noqa: S603  this very file
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            reply = self.ask({"functions": list(functions)}, STARTUP_SECONDS)
        except _TooSlow:
            names = ", ".join(str(one["reference"]) for one in functions)
            raise RewardError(f"{names}: importing it took longer than {STARTUP_SECONDS:.0f} s") from None
        if "error" in reply:
            self.kill()
            raise RewardError(reply["error"])

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            _TooSlow: It did not come in time.
            RewardError: The process has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
            self._process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if selector.select(seconds + GRACE_SECONDS):
                    line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            reply: dict[str, Any] = json.loads(line)
            return reply
        self.kill()
        if time.monotonic() - began >= seconds - CLOCK_SECONDS:
            raise _TooSlow
        raise RewardError("the reward ended its own process (a crash, an exit, or no memory was left)")

    def kill(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Pool:
    """Scores batches in processes that start when they are first needed. May be used by several threads.

    Args:
        functions: Of every reward function: 'reference' ('file.py:function'), 'weight', and 'constants', its further
            arguments.
        limit_seconds: Longest time for one completion.
        timeout_score: Reward of a completion that takes longer.
        log: File that what rewards print is appended to; None: standard error.
    """

    def __init__(
        self, functions: Sequence[dict[str, Any]], limit_seconds: float, timeout_score: float, log: Path | None = None
    ) -> None:
        self._functions = list(functions)
        self._limit = limit_seconds
        self._batch_limit = limit_seconds
        self._timeout_score = timeout_score
        self._log = log
        # Places for processes; the last one used comes first.
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._free.put(None)
        self._alive: set[_Process] = set()
        self._slow_in_a_row = 0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._alive)

    def start(self) -> None:
        """Load the reward functions.

        Raises:
            RewardError: They do not load.
        """
        with self._process():
            pass

    def score(self, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list[Any]]) -> Scores:
        """Score completions.

        Args:
            prompts: Text or messages, one per completion.
            completions: Their texts.
            columns: The further columns, one value per completion.

        Raises:
            RewardError: A function raised, returned what is no reward, or takes too long again and again.
        """
        batch = {"prompts": list(prompts), "completions": list(completions), "columns": columns}
        if len(completions) == 1:
            return self._gathered([self._ask_alone(batch)])
        try:
            reply = self._ask(batch, self._batch_limit)
        except _TooSlow:
            return self._one_by_one(batch)
        if "error" in reply:
            raise RewardError(self._place(batch, reply["error"]))
        return Scores(reply["rewards"], reply["parts"])

    def close(self) -> None:
        """End the processes; a log that nothing was printed to goes with them."""
        self._finalizer()
        if self._log is not None and self._log.exists() and self._log.stat().st_size == 0:
            self._log.unlink()

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Process]:
        process = self._free.get()
        try:
            if process is None:
                process = self._started()
            yield process
        except BaseException:
            # Of no further use: it was killed, or is in the middle of something.
            if process is not None:
                self._alive.discard(process)
                process.kill()
            process = None
            raise
        finally:
            self._free.put(process)

    def _started(self) -> _Process:
        if self._log is None:
            process = _Process(self._functions, None)
        else:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                process = _Process(self._functions, log)
        self._alive.add(process)
        return process

    def _ask(self, batch: dict[str, Any], seconds: float) -> dict[str, Any]:
        with self._process() as process:
            return process.ask(batch, seconds)

    def _one_by_one(self, batch: dict[str, Any]) -> Scores:
        """Score every completion in a call of its own, to find those that take too long."""
        singles = [_single(batch, index) for index in range(len(batch["completions"]))]
        began = time.monotonic()
        threads = ThreadPoolExecutor(PROCESSES)
        try:
            replies = list(threads.map(self._ask_alone, singles))
        finally:
            threads.shutdown(cancel_futures=True)
        if None not in replies:
            # Slow as a whole, not stuck: it is not to be cut short again.
            self._batch_limit = max(2 * self._batch_limit, 2 * PROCESSES * (time.monotonic() - began))
        return self._gathered(replies)

    def _gathered(self, replies: list[dict[str, Any] | None]) -> Scores:
        """Replies for single completions, None for those that took too long."""
        names: dict[str, Any] = next((reply["parts"] for reply in replies if reply is not None), {})
        return Scores(
            rewards=[self._timeout_score if reply is None else reply["rewards"][0] for reply in replies],
            parts={name: [None if reply is None else reply["parts"][name][0] for reply in replies] for name in names},
            timed_out=[index for index, reply in enumerate(replies) if reply is None],
        )

    def _ask_alone(self, single: dict[str, Any]) -> dict[str, Any] | None:
        """The reply for one completion; None if it takes too long."""
        try:
            reply = self._ask(single, self._limit)
        except _TooSlow:
            with self._lock:
                self._slow_in_a_row += 1
                if self._slow_in_a_row >= TIMEOUTS_IN_A_ROW:
                    raise RewardError(
                        f"scoring took longer than {self._limit:g} s for {self._slow_in_a_row} completions in a row, "
                        f"the last one {_shown(single)}; mend the reward, or raise task.reward_timeout_seconds"
                    ) from None
            return None
        if "error" in reply:
            raise RewardError(f"{reply['error']} ({_shown(single)})")
        with self._lock:
            self._slow_in_a_row = 0
        return reply

    def _place(self, batch: dict[str, Any], error: str) -> str:
        """The error with the completion that causes it, if one does so by itself."""
        count = len(batch["completions"])
        for index in range(count):
            single = _single(batch, index)
            try:
                alone = self._ask(single, self._limit)
            except _TooSlow:
                continue
            if "error" in alone:
                return f"{error} ({_shown(single)})"
        return f"{error} (for {count} completions at once, the first one {_shown(batch)}; for none of them alone)"


def _kill_all(alive: set[_Process]) -> None:
    for process in list(alive):
        process.kill()
    alive.clear()


def _single(batch: dict[str, Any], index: int) -> dict[str, Any]:
    return {
        "prompts": [batch["prompts"][index]],
        "completions": [batch["completions"][index]],
        "columns": {name: [values[index]] for name, values in batch["columns"].items()},
    }


def _shown(batch: dict[str, Any]) -> str:
    prompt, completion = _text(batch["prompts"][0]), batch["completions"][0]
    return f"prompt {prompt[:SHOWN]!r}, completion {completion[:SHOWN]!r}"


if __name__ == "__main__":
    serve()
