"""Finished trainings as three compressed Parquet files and a data card that states what is in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from benchmarks.rl_table import generate as made
from benchmarks.rl_table.generate import Part, Training, configurations, plan, read_parts, study_of
from jfhpo_core.errors import JfhpoError
from jfhpo_core.report.text import listed
from jfhpo_core.study.trial import Evaluation, StepRecord

_Group = tuple[str, str, int]
"""Task, size and seed."""

KEY = {
    "task": "Embedded task: what is learned, and the family of base models.",
    "size": "Model of the family.",
    "configuration": "Number of the configuration; the same number is the same configuration everywhere.",
    "seed": "Of prompt order and sampling.",
}
"""Columns that name a training, in every file."""

TRAINING = {
    "parameters": "Parameter count of the model.",
    "design": "Part of the design: reference (a fixed recipe), spread (whole space), healthy (middle learning rates).",
    "outcome": "completed, or collapsed: cut short, see below.",
    "steps": "Steps trained; so many rows of steps.parquet.",
    "evaluations": "Evaluations made; so many rows of evaluations.parquet.",
    "base_score": "Held-out score before training.",
    "score": "Held-out score at the last recorded step.",
    "standard_error": "Of the score.",
    "test_score": "Like score, on 512 further prompts that no evaluation uses, 4 completions each; null if collapsed.",
    "test_standard_error": "Of the test score.",
    "startup_seconds": "CPU seconds of loading and set-up before the first step.",
    "cpu_seconds": "CPU seconds of the whole training, evaluations included, the test excluded.",
    "wall_seconds": "The same by the clock. The machine had other work: do not use as a cost.",
    "versions": "JSON: library versions, and a digest of the trainer's source.",
}
"""Further columns of trainings.parquet; the hyperparameters stand between `KEY` and these."""

UNRECORDED = {"by_prompt", "examples", "pass_at_n", "reward_parts", "reward_timeouts", "training", "rewarded"}
"""Fields of evaluations and steps that are no columns: the design has one completion per prompt, and one reward; means
over steps follow from the steps."""


def pack(parts: Path, data: Path) -> None:
    """Write the finished trainings of a folder as a table.

    Args:
        parts: Folder of `generate`.
        data: Folder for the Parquet files and the data card.

    Raises:
        JfhpoError: There is no training, or one was made with another configuration than the plan has.
    """
    found = list(read_parts(parts))
    if not found:
        raise JfhpoError(f"{parts}: no finished training is here; run `python -m benchmarks.rl_table generate` first")
    for part in found:
        planned = configurations()[part.training.configuration].configuration
        if part.hyperparameters != planned:
            raise JfhpoError(
                f"{part.training.name} was trained with {part.hyperparameters}, but the plan says {planned}; "
                "the design or the space has changed: remove that part and generate it again"
            )
    write(found, data)
    (data / "README.md").write_text(_card(found), encoding="utf-8")


def write(parts: Sequence[Part], data: Path) -> None:
    """Write trainings as the three Parquet files."""
    data.mkdir(parents=True, exist_ok=True)
    _write(data / "trainings.parquet", [_training_row(part) for part in parts])
    _write(
        data / "steps.parquet",
        [_key(part) | record.model_dump(exclude=UNRECORDED) for part in parts for record in part.steps],
    )
    _write(
        data / "evaluations.parquet",
        [_key(part) | evaluation.model_dump(exclude=UNRECORDED) for part in parts for evaluation in part.evaluations],
    )


def unpack(data: Path, parts: Path) -> None:
    """Write the table's trainings as parts again, where the folder lacks them, so that `generate` need not make them.

    Packing them once more gives the same table. What it does not hold (seconds and pass@n of the final test) is lost.
    """
    if not (data / "trainings.parquet").exists():
        return
    parts.mkdir(parents=True, exist_ok=True)
    steps, evaluations = (_by_training(data / f"{name}.parquet") for name in ("steps", "evaluations"))
    for row in pq.read_table(data / "trainings.parquet").to_pylist():
        training = Training.model_validate({name: row[name] for name in KEY})
        file = parts / f"{training.name}.json"
        if file.exists():
            continue
        tested = row["test_score"] is not None
        part = Part(
            training=training,
            hyperparameters={name: row[name] for name in configurations()[0].configuration},
            parameters=row["parameters"],
            outcome=row["outcome"],
            steps=tuple(StepRecord.model_validate(record) for record in steps[training]),
            evaluations=tuple(Evaluation.model_validate(record) for record in evaluations[training]),
            test=Evaluation(
                step=made.STEPS,
                prompts=made.STEPS * made.PROMPTS_PER_STEP,
                score=row["test_score"],
                standard_error=row["test_standard_error"],
                samples=evaluations[training][-1]["samples"] * made.TEST_SAMPLES,
                seconds=0.0,
            )
            if tested
            else None,
            startup_seconds=row["startup_seconds"],
            cpu_seconds=row["cpu_seconds"],
            wall_seconds=row["wall_seconds"],
            versions=json.loads(row["versions"]),
        )
        file.write_text(part.model_dump_json(), encoding="utf-8")


def _by_training(path: Path) -> dict[Training, list[dict[str, Any]]]:
    """The rows of a file without the key, by the training that they belong to."""
    found: dict[Training, list[dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        training = Training.model_validate({name: row.pop(name) for name in KEY})
        found.setdefault(training, []).append(row)
    return found


def _key(part: Part) -> dict[str, Any]:
    return part.training.model_dump(include=set(KEY))


def _training_row(part: Part) -> dict[str, Any]:
    last = part.evaluations[-1]
    return {
        **_key(part),
        **part.hyperparameters,
        "parameters": part.parameters,
        "design": configurations()[part.training.configuration].part,
        "outcome": part.outcome,
        "steps": len(part.steps),
        "evaluations": len(part.evaluations),
        "base_score": part.evaluations[0].score,
        "score": last.score,
        "standard_error": last.standard_error,
        "test_score": part.test and part.test.score,
        "test_standard_error": part.test and part.test.standard_error,
        "startup_seconds": part.startup_seconds,
        "cpu_seconds": part.cpu_seconds,
        "wall_seconds": part.wall_seconds,
        "versions": json.dumps(part.versions),
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Measurements are kept as 32-bit floats, hyperparameters exactly."""
    table = pa.Table.from_pylist(rows)
    exact = set(configurations()[0].configuration) if "design" in table.column_names else set()
    fields = [
        field.with_type(pa.float32()) if pa.types.is_float64(field.type) and field.name not in exact else field
        for field in table.schema
    ]
    pq.write_table(table.cast(pa.schema(fields)), path, compression="zstd", compression_level=19)


def _card(parts: Sequence[Part]) -> str:
    planned = Counter((training.task, training.size, training.seed) for training in plan())
    done = Counter((part.training.task, part.training.size, part.training.seed) for part in parts)
    collapsed = Counter(
        (part.training.task, part.training.size, part.training.seed) for part in parts if part.outcome == "collapsed"
    )
    seconds = sum(part.cpu_seconds for part in parts)
    versions = sorted({json.dumps(part.versions) for part in parts})
    low, high = made.HEALTHY_LEARNING_RATES
    hyperparameters = {
        name: json.dumps(parameter.model_dump(exclude_defaults=True, exclude={"shifts_with_size"}))
        for name, parameter in study_of(made.TASKS[0]).space.root.items()
    }
    counts = listed(f"{count} on `{task}`" for task, count in made.CONFIGURATIONS.items())
    return f"""# Recorded RL trainings

Learning curves of GRPO trainings of tiny language models: up to {len(configurations())} configurations of
{len(hyperparameters)} hyperparameters ({counts}) on {len(made.SIZES)} model sizes,
every third of them with two seeds. Everything is real: transformers, sampling, TRL's trainer.
`python -m benchmarks.rl_table` made this folder, this page included.

## How much of it is here

{len(parts)} of {sum(planned.values())} planned trainings, with {sum(len(part.steps) for part in parts)} steps and
{seconds / 3600:.1f} CPU hours. They are made in an order in which the first configurations are complete, on all tasks
and sizes, before the next ones begin; second seeds come last. A task with fewer configurations has the first ones,
which fill the same space more thinly. Trainings present / planned (of these, cut short as collapsed):

{_counts(planned, done, collapsed)}

## How it was made

- Tasks: the embedded tasks {listed(f"`{task}`" for task in made.TASKS)}. On the first two an answer is
  right or wrong, and only one is right. On `countdown` a number is to be written as a sum or difference of two to four
  digits, and three digits are barred (`17!358=` may be answered by `9+9-1`): many answers of different lengths are
  right, and others earn something for being well-formed and near.
- Base models: {listed(f"`{size}`" for size in made.SIZES)} of the family with the task's name, which are Qwen2 models,
  for `countdown` GPT-NeoX models.
- Trainer: `trl` with its defaults on a CPU, one thread, float32; {made.STEPS} steps of {made.PROMPTS_PER_STEP} prompts;
  no stopping rules.
- Configurations: number 0 is a fixed recipe (`reference`). Odd numbers (`spread`) are a Sobol sequence over the default
  space `tiny`; even numbers (`healthy`) are another one with the learning rate in [{low:g}, {high:g}].
- Held-out score: 512 prompts, one completion each at temperature 1, the same random numbers for every training; before
  training and after every {made.STEPS // made.RUNGS} steps.
- Collapsed trainings: at steps {" and ".join(map(str, made.CHECKS))} a training is cut short if its held-out score is
  below {made.COLLAPSED_SHARE:g} of the base model's and the mean training reward of each of the last
  {made.COLLAPSED_STEPS} steps is below {made.COLLAPSED_REWARD:g}.
- Made on virtual machines with two cores, at first of an AMD EPYC, later of an Intel Xeon (which of them made which
  training was not recorded, but that `countdown` was made on the latter, beside much other work), with:

{_bullets(versions)}

## Known flaws

- The models have 0.1M to 0.6M parameters and the tasks are synthetic. What holds here need not hold for models ten
  thousand times larger.
- The largest size is six times the smallest: transfer over a wider range of sizes is not tested by this table.
- Many curves still rise at the end of the horizon.
- All scores carry evaluation noise (columns `standard_error`), and with common random numbers the noise of two
  trainings is not independent. Choose by `score`, judge by `test_score`.
- Scores of different tasks are not comparable: on `countdown` much of what a base model earns is partial credit.
- Two seeds tell the size of the noise between seeds, not its distribution.
- With one update per step (`mini_batches` 1) the clip range has no effect.
- A collapsed training might have recovered after the cut; its further curve is unknown.
- CPU seconds depend on the machine and on its other work: the reference configuration on `instruct`, `s` took 8.6 s on
  the idle machine and 9.9 s beside others.
- Numbers are reproduced exactly only with the same versions on the same kind of CPU.

## Files

Every file has the columns that name a training:

{_schema(KEY)}

### trainings.parquet: one row per training

{_schema(hyperparameters | TRAINING)}

### steps.parquet: one row per step

{_schema(_described(StepRecord))}

### evaluations.parquet: one row per evaluation on the held-out set

{_schema(_described(Evaluation))}

Rows stand in the order of trainings.parquet, then of steps. Durations are CPU seconds, but for `wall_seconds`.
Measurements are 32-bit floats, hyperparameters 64-bit ones. NaN was measured as such, null is not measured.
"""


def _described(kind: type[BaseModel]) -> dict[str, str]:
    return {name: field.description or "" for name, field in kind.model_fields.items() if name not in UNRECORDED}


def _schema(columns: dict[str, str]) -> str:
    return "\n".join(
        ["| column | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in columns.items())]
    )


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"  - `{item}`" for item in items)


def _counts(
    planned: Counter[tuple[str, str, int]],
    done: Counter[tuple[str, str, int]],
    collapsed: Counter[tuple[str, str, int]],
) -> str:
    lines = ["| task | size | seed 0 | seed 1 |", "|---|---|---|---|"]
    for task in made.TASKS:
        for size in made.SIZES:
            cells = [
                f"{done[task, size, seed]} / {planned[task, size, seed]} ({collapsed[task, size, seed]})"
                for seed in (0, 1)
            ]
            lines.append(f"| {task} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)
