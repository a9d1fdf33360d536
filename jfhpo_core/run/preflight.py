"""What is checked before a search that a study file alone cannot tell: data, models, reward, environment, disk.

A check yields findings; none of them changes anything. Two methods of a trainer take part if it has them:
`preflight(study) -> Iterator[Finding]` adds checks of its own, and `prompting(spec) -> Prompting` says how it gives
prompts to models of transformers. Without the latter, models and lengths of prompts are not looked at.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from jfhpo_core import embedded
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.forecast import forecast
from jfhpo_core.run.family import examine_family, load_tokenizer
from jfhpo_core.run.untrained import measure, sample
from jfhpo_core.study.data import columns_of, is_conversational
from jfhpo_core.study.models import is_at_hand
from jfhpo_core.study.prompting import Prompting, encode, prompt_limit, without_overlong
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.scoring import PROCESSES
from jfhpo_core.study.tasks import Task, load_task
from jfhpo_core.trainers.base import Finding, Level, failing_as

GIB = 2**30

CHECKPOINT_BYTES = 16
"""Bytes of a checkpoint per parameter: weights for resuming and for use, and Adam's moments."""

CHECKPOINTS_PER_TRIAL = 2
"""A trial keeps the checkpoint that it started from beside the newest one."""

SAMPLED_ROWS = 4
"""Held-out rows whose completions are tried on the reward."""

SAMPLED_TOKENS = 64
"""Length of these completions at most, so that a large model on a CPU is done soon."""

SAMPLED_PARAMETERS = 4 * 10**9
"""No completions are sampled from a larger model: it may not fit into the memory of the driver's machine."""

DOCTOR_PARAMETERS = 10**8
"""`doctor` leaves the measurement of larger models, which takes minutes on a CPU, to `plan --measure`."""

HOSTILE = (
    "",
    " \n\t ",
    "word " * 20_000,
    "\u202e\U0001f600\u0000\ufffd\u0301" * 50,
    r"\boxed{9^{9^{9}}}",
    r"\boxed{" + r"\frac{1}{" * 200 + "1" + "}" * 200 + "}",
    "(" * 5_000 + "1" + ")" * 5_000,
    "{" * 1_000 + '"answer": ' + "[" * 1_000,
)
"""Completions that a model writes sooner or later, and that rewards fail for or hang on."""

PORTS = {4200: "Prefect", 5000: "MLflow", 6379: "Ray", 8265: "Ray's dashboard", 10001: "Ray Client"}
"""Whoever reaches one of these can run code, or read and change results."""

LISTENING = "0A"
ANY_ADDRESS = ("00000000", "0" * 32)


def examine(study: Study) -> Iterator[Finding]:
    """Everything but dispatcher and ledger, which this package does not know."""
    rehearsed = list(rehearse(study))
    yield from rehearsed
    if all(finding.level is not Level.FAILURE for finding in rehearsed):
        yield from measured(study, DOCTOR_PARAMETERS)
    yield _disk(study)
    yield from _ports(Path("/proc/net"))
    own = getattr(study.trainer, "preflight", None)
    if own is not None:
        yield from own(study)


def refuse_unusable(study: Study) -> list[Finding]:
    """Rehearse a study before anything is spent on it. Returns what was found.

    Raises:
        SpecError: With everything that is wrong.
    """
    found = list(rehearse(study))
    wrong = [finding.message for finding in found if finding.level is Level.FAILURE]
    if wrong:
        raise SpecError("\n".join(wrong))
    return found


def trains_models(study: Study) -> bool:
    """Whether a study's trainer gives prompts to models; others simulate, replay, or know their task themselves."""
    return hasattr(study.trainer, "prompting")


def doubts(study: Study) -> Iterator[Finding]:
    """What leaves a search little to gain although nothing is wrong: nothing cheaper than the target, or no budget."""
    spec, ladder = study.spec, study.ladder
    if not ladder.proxies and spec.fidelity.proxies is None:
        yield Finding(
            Level.WARNING, "family",
            f"no model of the family is smaller than the target {ladder.target.name!r}, and larger ones are not used: "
            "every trial runs on the target, and only shorter runs are cheaper; add smaller models of the same family, "
            "or say by fidelity.proxies: [] that this is meant",
        )  # fmt: skip
    smallest, first = ladder.models[0].name, spec.fidelity.levels[0]
    price = forecast(study, []).full_runs[smallest].seconds * first / spec.fidelity.horizon_prompts
    if spec.budget.device_seconds < price:
        left = "a baseline is all that" if spec.baselines else "nothing"
        yield Finding(
            Level.WARNING, "budget",
            f"{spec.budget.device_seconds:.3g} device-seconds do not pay for the cheapest trial ({first} prompts on "
            f"{smallest}, about {price:.3g}): next to nothing will be searched, and {left} can be recommended; raise "
            "budget.gpu_hours or budget.trial_seconds",
        )  # fmt: skip


def told_before_trials(study: Study) -> set[str]:
    """Models that a search measures untrained before its first trial."""
    small = {model.name for model in study.ladder.models if model.parameters <= DOCTOR_PARAMETERS}
    return small if trains_models(study) else set()


def rehearse(study: Study) -> Iterator[Finding]:
    """Try what every trial will need: data, models, and the reward on completions that a model has sampled."""
    if study.spec.task.embedded not in (None, *embedded.NAMES) and not trains_models(study):
        return  # a stand-in for a task that only the trainer knows
    yield from failing_as("task", _task(study))


def measured(study: Study, largest: int | None = None) -> Iterator[Finding]:
    """What the models score before any training, with completions to look at. For a study that is not refused.

    Args:
        study: The study.
        largest: Models of more parameters are left out; None: none are.
    """
    task = load_task(study.spec.task)
    prompting = prompting_of(study, task)
    if prompting is None:
        return
    task = fitting(study, task, prompting)
    with task.reward:
        for model in study.ladder.models:
            if largest is not None and model.parameters > largest:
                message = f"{model.name} is not measured here; `jfhpo plan --measure` does it, best with a GPU"
                yield Finding(Level.OK, "untrained", message)
                continue
            try:
                found = measure(study, task, model, prompting)
            except Exception as error:  # noqa: BLE001  rewards, loaders and models raise what they like
                message = f"{model.name} cannot be measured: {type(error).__name__}: {error}"
                yield Finding(Level.WARNING, "untrained", message)
                continue
            base = found.evaluation
            shown = "".join(f"\n    {example}" for example in base.examples)
            yield Finding(
                Level.OK, "untrained",
                f"{model.name} scores {base.score:.3f} ± {base.standard_error:.3f} on {base.samples}{shown}",
            )  # fmt: skip
            if base.score == 0:
                message = (
                    f"{model.name} gets no reward for any of {base.samples} completions, and without any there is "
                    "nothing to learn from: look whether the reward takes answers like those above, and train the "
                    "model on some right answers first if it never gives one"
                )
                yield Finding(Level.WARNING, "untrained", message)
            if found.warning is not None:
                yield Finding(Level.WARNING, "untrained", found.warning)


def prompting_of(study: Study, task: Task) -> Prompting | None:
    """How a study's trainer gives prompts to its models; None if it has no models that could be asked."""
    if not trains_models(study):
        return None
    prompting: Prompting = study.trainer.prompting(study.spec)  # type: ignore[attr-defined]
    return replace(prompting, chat_template=prompting.chat_template or is_conversational(task.train))


def fitting(study: Study, task: Task, prompting: Prompting) -> Task:
    """The task without prompts that are too long.

    Raises:
        SpecError: There are some, and the study does not say that they shall be dropped.
    """
    limit = prompt_limit(study.spec.task, study.ladder.models, prompting)
    tokenizer = load_tokenizer(study.ladder.target)
    if isinstance(tokenizer, Finding):  # a name on the hub that cannot be asked from here; this has been told
        return task
    return without_overlong(task, study.spec.task, limit, lambda prompts: encode(tokenizer, prompts, prompting))


def _sampled(study: Study, task: Task, prompting: Prompting) -> tuple[list[str], str]:
    """Completions of the first held-out prompts, and what they are."""
    rows = task.heldout[:SAMPLED_ROWS]
    model = study.ladder.models[0]
    empty = [""] * len(rows)
    if model.parameters > SAMPLED_PARAMETERS:
        return empty, f"{len(rows)} empty completions ({model.name} is too large to be sampled here)"
    if not is_at_hand(model.path):
        return empty, f"{len(rows)} empty completions ({model.name} has not been downloaded to this machine)"
    tokens = min(SAMPLED_TOKENS, task.max_completion_tokens)
    try:
        completions = sample(model, [row["prompt"] for row in rows], prompting, tokens)
    except Exception as error:  # noqa: BLE001  loaders and models raise what they like
        raise SpecError(f"model {model.name!r} cannot sample completions: {type(error).__name__}: {error}") from None
    return completions, f"completions of {len(rows)} held-out prompts by untrained {model.name}"


def _task(study: Study) -> Iterator[Finding]:
    task = load_task(study.spec.task)
    prompting = prompting_of(study, task)
    if prompting is not None:
        models = list(examine_family(study.ladder.models, chat=prompting.chat_template))
        yield from models
        if any(finding.level is Level.FAILURE for finding in models):
            return
    yield from failing_as("prompts", _prompts(study, task, prompting))


def _prompts(study: Study, task: Task, prompting: Prompting | None) -> Iterator[Finding]:
    completions = [""] * min(SAMPLED_ROWS, len(task.heldout))
    what = f"{len(completions)} empty completions"
    if prompting is not None:
        task = fitting(study, task, prompting)
        completions, what = _sampled(study, task, prompting)
    yield from _data(study, task)
    yield from failing_as("reward", _reward(task, completions, what))


def _data(study: Study, task: Task) -> Iterator[Finding]:
    horizon = study.spec.fidelity.horizon_prompts
    scored = len(task.heldout[: study.spec.evaluation.prompts])
    yield Finding(
        Level.OK, "data",
        f"{len(task.train)} training prompts ({horizon / len(task.train):.2g} passes in a full trial), "
        f"{len(task.heldout)} held-out prompts, of which {scored} are scored; none is in both",
    )  # fmt: skip
    error = 0.5 / scored**0.5
    if error > 0.05:
        yield Finding(
            Level.WARNING, "data",
            f"{scored} held-out prompts give a standard error of up to {error:.3f}: differences below about "
            f"{2 * error:.2f} cannot be told; score more (evaluation.prompts, evaluation.samples_per_prompt)",
        )  # fmt: skip


def _reward(task: Task, completions: Sequence[str], what: str) -> Iterator[Finding]:
    """Call the reward as a run will: on sampled completions, then on hostile ones."""
    rows = task.heldout[: len(completions)]
    prompts = [row["prompt"] for row in rows]
    with task.reward as reward:
        reward.start()
        began = time.perf_counter()
        scores = reward(prompts, completions, **columns_of(rows))
        seconds = time.perf_counter() - began
        with ThreadPoolExecutor(PROCESSES) as threads:
            answers = list(
                threads.map(lambda one: reward(prompts[:1], [one], **columns_of(rows[:1])).timed_out, HOSTILE)
            )
    limit = reward.limit_seconds
    if len(scores.timed_out) == len(rows):
        yield Finding(
            Level.FAILURE, "reward",
            f"scoring took longer than {limit:g} s for each of {len(rows)} completions; mend the reward, or raise "
            "task.reward_timeout_seconds",
        )  # fmt: skip
        return
    shown = ", ".join(f"{value:g}" for value in scores.rewards)
    yield Finding(Level.OK, "reward", f"it scores {what} with {shown}, in {seconds:.2g} s")
    late = sum(map(len, answers)) + len(scores.timed_out)
    if late:
        yield Finding(
            Level.WARNING, "reward",
            f"scoring took longer than {limit:g} s for {late} of {len(rows) + len(HOSTILE)} completions that were "
            "tried (towers of powers, thousands of brackets and the like); each such one counts "
            f"{reward.timeout_score:g} and takes {limit:g} s: lower task.reward_timeout_seconds if that is too much",
        )  # fmt: skip


def _disk(study: Study) -> Finding:
    folder = study.folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    one = CHECKPOINT_BYTES * study.ladder.target.parameters
    target = study.ladder.target.devices
    at_once = study.spec.slots or max(1, (study.spec.cluster.devices or target) // target)
    needed = CHECKPOINTS_PER_TRIAL * (at_once + study.spec.budget.top_k) * one
    text = (
        f"about {one / GIB:.3g} GiB for a checkpoint of the target, {needed / GIB:.3g} GiB for those in use at a time "
        f"(paused trials come on top); {free / GIB:.3g} GiB are free at {folder}"
    )
    if free < needed:
        return Finding(Level.FAILURE, "disk", f"{text}: free some, or set tracking.workspace elsewhere")
    return Finding(Level.OK, "disk", text)


def _ports(tables: Path) -> Iterator[Finding]:
    """Well-known servers that listen on every interface of this machine."""
    open_ports = set()
    for name in ("tcp", "tcp6"):
        path = tables / name
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        for fields in map(str.split, lines):
            address, _, number = fields[1].partition(":")
            if fields[3] == LISTENING and address in ANY_ADDRESS:
                open_ports.add(int(number, 16))
    for port in sorted(open_ports & set(PORTS)):
        yield Finding(
            Level.WARNING, "ports",
            f"{PORTS[port]} (port {port}) listens on every interface of this machine; bind it to 127.0.0.1, or close "
            "the port in the firewall",
        )  # fmt: skip
