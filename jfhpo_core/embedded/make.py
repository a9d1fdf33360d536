"""Make the tasks and model families of the laptop demo: `python -m jfhpo_core.embedded.make [--task T] [--out DIR]`.

For each task it writes the task folder, fine-tunes the bases, measures them through the task's own reward
function, and refuses to write a manifest unless every larger base is better than the next smaller one and all leave
reinforcement learning room: only then is the family a ladder of fidelities. It takes some ten minutes on one core for
each task, and goes on where it was interrupted: a base whose folder records the present settings is kept.

The same machine, torch and transformers give the same weights. Elsewhere the weights differ in their last bits, and the
accuracies by about their standard errors; the manifest says which files were shipped.
"""

# ruff: noqa: T201  (a command line program prints)

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
import transformers

from jfhpo_core.embedded import FAMILIES, MANIFEST, NAMES, task_folder
from jfhpo_core.embedded.base import (
    LADDERS,
    Accuracy,
    FineTuning,
    Reward,
    build_model,
    evaluate,
    fine_tune,
    save,
)
from jfhpo_core.embedded.corpus import TASKS, Row
from jfhpo_core.errors import SpecError

TRAIN_ROWS = 4000
HELD_OUT_ROWS = 1024
ROWS_SEED = 0

SAMPLES_PER_PROMPT = 8
"""8192 completions judge a base: a standard error of its accuracy below 0.01."""

HEADROOM = (0.1, 0.4)
"""Range of a base's sampled accuracy: below it most groups of 8 samples have no reward to learn from, above it a good
learning rate and a poor one end too close together."""

SMALLEST_GAP = 0.01
"""By how much a larger base must beat the next smaller one in expected accuracy, which has no sampling noise. Where
many answers are right there is only the sampled one, and it must do so beyond its noise."""

SIGNIFICANCE = 2.0
"""Standard errors by which the sampled accuracies may contradict that order."""

ARCHITECTURES: Mapping[str, str] = {"instruct": "qwen2", "arithmetic": "qwen2", "countdown": "gpt_neox"}
"""Kind of model by task."""

FINE_TUNING: Mapping[str, Mapping[str, FineTuning]] = {
    "instruct": {
        "s": FineTuning(steps=800, learning_rate=3e-3, skill_share=0.3),
        "sm": FineTuning(steps=850, learning_rate=3e-3, skill_share=0.3),
        "m": FineTuning(steps=1000, learning_rate=2e-3, skill_share=0.3),
        "l": FineTuning(steps=1700, learning_rate=1.5e-3, skill_share=0.3),
        "xl": FineTuning(steps=1300, learning_rate=1e-3, skill_share=0.3),
    },
    "arithmetic": {
        "s": FineTuning(steps=2000, learning_rate=3e-3),
        "sm": FineTuning(steps=1000, learning_rate=3e-3, skill_share=0.35),
        "m": FineTuning(steps=1150, learning_rate=2e-3, skill_share=0.35),
        "l": FineTuning(steps=2200, learning_rate=2e-3, skill_share=0.35),
    },
    "countdown": {
        "s": FineTuning(steps=280, learning_rate=3e-3, skill_share=0.65),
        "sm": FineTuning(steps=400, learning_rate=3e-3, skill_share=0.65),
        "m": FineTuning(steps=1100, learning_rate=2e-3, skill_share=0.6),
    },
}
"""Settings by task and size, found by trial: the larger the base, the more it sees."""


TRAINING = "training.json"
"""File in a model folder: how the base in it was fine-tuned. Written last, so that a folder with it is complete."""


class GateError(SpecError):
    """The bases made do not form a ladder of fidelities."""


def write_task(name: str, root: Path) -> list[Row]:
    """Write a task folder under `root/tasks` and return its held-out rows.

    `reward.py` is source, not a product: it is copied where `root` is not the package itself.
    """
    folder = root / "tasks" / name
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[name]
    held_out = task.rows(HELD_OUT_ROWS, held_out=True, seed=ROWS_SEED)
    train = task.rows(TRAIN_ROWS, held_out=False, seed=ROWS_SEED)
    for file, rows in (("train.jsonl", train), ("heldout.jsonl", held_out)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward_file = task_folder(name) / "reward.py"
    if folder.resolve() != reward_file.parent.resolve():
        shutil.copyfile(reward_file, folder / "reward.py")
    return held_out


def load_reward(folder: Path) -> Reward:
    """The function `reward` of a task folder's `reward.py`."""
    spec = importlib.util.spec_from_file_location(f"jfhpo_embedded_reward_{folder.name}", folder / "reward.py")
    if spec is None or spec.loader is None:
        raise SpecError(f"{folder / 'reward.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward: Reward = module.reward
    return reward


def gate(accuracies: Mapping[str, Accuracy]) -> None:
    """Refuse bases that are no ladder.

    Args:
        accuracies: by size, small to large.

    Raises:
        GateError: a base is not better than the next smaller one, or leaves no headroom.
    """
    faults = []
    sizes = list(accuracies)
    for smaller, larger in pairwise(sizes):
        low, high = accuracies[smaller], accuracies[larger]
        # All bases answer the same prompts: only the noise of sampling matters, and the binomial law bounds it.
        noise = math.sqrt(sum(each.sampled * (1 - each.sampled) / each.samples for each in (low, high)))
        if low.expected is None or high.expected is None:
            kind, worse, better = "mean reward", low.sampled, high.sampled
            gap = max(SMALLEST_GAP, SIGNIFICANCE * noise)
        else:
            kind, worse, better, gap = "expected accuracy", low.expected, high.expected, SMALLEST_GAP
        if better - worse < gap:
            faults.append(
                f"{larger} ({kind} {better:.3f}) is not better than {smaller} ({worse:.3f}) by {gap:.2g}: "
                f"fine-tune {larger} for longer, {smaller} for less, or tune the learning rate"
            )
        if low.sampled - high.sampled > SIGNIFICANCE * noise:
            faults.append(
                f"the reward function puts {larger} ({high.sampled:.3f}) below {smaller} ({low.sampled:.3f}) although "
                f"its expected accuracy is higher: the evaluation, the tokenizer or the reward is broken"
            )
    for size, accuracy in accuracies.items():
        if not HEADROOM[0] <= accuracy.sampled <= HEADROOM[1]:
            faults.append(
                f"{size} has accuracy {accuracy.sampled:.3f}, outside {HEADROOM}: change the share q or the steps"
            )
    if faults:
        raise GateError("the bases are no ladder of fidelities; change FINE_TUNING. " + "; ".join(faults))


def make_base(name: str, size: str, root: Path, *, fresh: bool) -> None:
    """Fine-tune one base and save it; unless `fresh`, leave one alone that was made with the same settings."""
    folder = root / "families" / name / size
    settings, architecture = FINE_TUNING[name][size], ARCHITECTURES[name]
    shape = LADDERS[architecture][size]
    wanted = {**asdict(settings), "right_share": TASKS[name].right_share, "shape": asdict(shape)}
    record = folder / TRAINING
    if not fresh and record.exists() and json.loads(record.read_text(encoding="utf-8"))["settings"] == wanted:
        print(f"{name}/{size}: already made with these settings", flush=True)
        return
    record.unlink(missing_ok=True)
    started = time.process_time()
    model = build_model(shape, settings.seed, architecture)
    fine_tune(model, TASKS[name], settings, lambda line: print(f"{name}/{size}: {line}", flush=True))
    save(model, folder, architecture)
    content = {
        "settings": wanted,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": round(time.process_time() - started),
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make(name: str, root: Path, *, fresh: bool = False) -> None:
    """Make one task and its family under `root`, manifest last.

    Args:
        name: the task.
        root: folder in which `tasks` and `families` lie.
        fresh: fine-tune all bases, whether or not they are there already.

    Raises:
        GateError: the bases are no ladder; the models stay for inspection, without a manifest.
    """
    family = root / "families" / name
    # A family without a manifest is refused by verify(): nobody uses a half-made one.
    (family / MANIFEST).unlink(missing_ok=True)
    held_out = write_task(name, root)
    reward = load_reward(root / "tasks" / name)
    accuracies, members = {}, {}
    for size in FAMILIES[name]:
        make_base(name, size, root, fresh=fresh)
        accuracy = evaluate(
            family / size,
            held_out,
            reward,
            samples_per_prompt=SAMPLES_PER_PROMPT,
            one_answer=TASKS[name].one_answer,
        )
        print(f"{name}/{size}: {accuracy}", flush=True)
        accuracies[size] = accuracy
        members[size] = {
            **json.loads((family / size / TRAINING).read_text(encoding="utf-8")),
            "base_accuracy": {key: round(value, 5) for key, value in asdict(accuracy).items() if value is not None},
        }
    gate(accuracies)
    content = {
        "task": name,
        "held_out_rows": len(held_out),
        "members": members,
        "files": checksums(name, root),
    }
    (family / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checksums(name: str, root: Path) -> dict[str, str]:
    """sha256 of every file of a task and its family but the manifest, by path relative to `root`."""
    folders = [root / "tasks" / name, *(root / "families" / name / size for size in FAMILIES[name])]
    files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when the gate refuses."""
    parser = argparse.ArgumentParser(
        prog="python -m jfhpo_core.embedded.make", description="Make the tasks and models of the demo."
    )
    parser.add_argument("--task", choices=NAMES, action="append", help="make this task alone (may be repeated)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="root folder (default: the package)")
    parser.add_argument("--fresh", action="store_true", help="fine-tune anew even what is there already")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # One thread adds up in one order: the weights depend on it.
    try:
        for name in options.task or NAMES:
            make(name, options.out, fresh=options.fresh)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
