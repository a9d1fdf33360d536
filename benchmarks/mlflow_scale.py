"""How a ledger of many trials does in MLflow: `python -m benchmarks.mlflow_scale [--trials 1000] [--uri URI]`.

Trials of a few segments with step records are written through the ledger, as a search writes them, to a fresh SQLite
file or to the store that is given. Then a second process's work is timed: opening the ledger, the queries behind the
UI's table of runs, and the index of checkpoints. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlflow import MlflowClient

from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    Checkpoint,
    Evaluation,
    Outcome,
    Segment,
    SegmentResult,
    StepRecord,
    Suggestion,
    Trial,
    trial_key,
)
from mlflow_plugin.ledger import MlflowLedger

SEGMENTS = 2
STEPS = 30
"""Of a segment."""
BATCH = 16


def main() -> None:
    """Write, read and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--uri", help="tracking store; default: a fresh SQLite file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jfhpo-") as folder:
        uri = given.uri or f"sqlite:///{folder}/mlflow.db"
        study = _study(uri, folder)
        rows = _write(study, given.trials) + _read(study)
    print(f"{given.trials} trials of {SEGMENTS} segments of {STEPS} steps in {uri.split(':')[0]}\n")
    print("| Operation | Wall seconds | CPU seconds of the driver |\n|---|---|---|")
    for name, wall, cpu in rows:
        print(f"| {name} | {wall:.3g} | {cpu:.3g} |")


def _study(uri: str, folder: str) -> StudySpec:
    return StudySpec.model_validate(
        {
            "study": f"scale-{int(time.time())}",
            "family": [{"name": "s", "path": "simulated", "parameters": 1000}],
            "target": "s",
            "task": "instruct",
            "trainer": "simulated",
            "space": "tiny",
            "budget": {"trial_seconds": 600},
            "tracking": {"uri": uri, "workspace": folder},
        }
    )


def _write(study: StudySpec, count: int) -> list[tuple[str, float, float]]:
    ledger = MlflowLedger()
    opening, _ = _timed("open a new study (and create the database)", lambda: ledger.open(study))
    begun: list[tuple[str, float, float]] = []
    committed: list[tuple[str, float, float]] = []
    for number in range(count):
        trial = _trial(study, number)
        for index in range(SEGMENTS):
            segment = _segment(index)
            begun.append(_timed("", partial(ledger.begin, trial, segment))[0])
            result, records = _result(number, segment)
            committed.append(_timed("", partial(ledger.commit, trial.key, result, records))[0])
            trial = ledger.trials()[-1]
    last = committed[-SEGMENTS * min(100, count) :]
    return [
        opening,
        _mean("begin a segment (mean)", begun),
        _mean("commit a segment (mean)", committed),
        _mean("commit a segment (mean of the last 100 trials)", last),
    ]


def _read(study: StudySpec) -> list[tuple[str, float, float]]:
    ledger = MlflowLedger()
    opening, _ = _timed("open the study again", lambda: ledger.open(study))
    client: MlflowClient = ledger.client
    experiment, child = ledger.experiment_id, f"tags.`mlflow.parentRunId` = '{ledger.study_run_id}'"
    best, _ = _timed(
        "the UI's first page of trials, best first",
        lambda: client.search_runs([experiment], child, order_by=["metrics.`eval/score` DESC"], max_results=100),
    )
    filtered, _ = _timed(
        "trials by state and parameter",
        lambda: client.search_runs(
            [experiment], f"{child} and tags.`jfhpo.state` = 'paused' and params.model = 's'", max_results=100
        ),
    )
    models, _ = _timed(
        "checkpoints with a score above 0.5",
        lambda: client.search_logged_models([experiment], "metrics.`eval/score` > 0.5", max_results=50),
    )
    return [opening, best, filtered, models]


def _timed(name: str, call: Callable[[], Any]) -> tuple[tuple[str, float, float], Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer = call()
    return (name, time.perf_counter() - wall, time.process_time() - cpu), answer


def _mean(name: str, rows: list[tuple[str, float, float]]) -> tuple[str, float, float]:
    return name, sum(row[1] for row in rows) / len(rows), sum(row[2] for row in rows) / len(rows)


def _trial(study: StudySpec, number: int) -> Trial:
    configuration = {"learning_rate": 1e-6 * 1.01**number}
    return Trial(
        key=trial_key(study.study, configuration, "s", 0),
        number=number,
        configuration=configuration,
        model="s",
        seed=0,
        total_steps=STEPS * (SEGMENTS + 1),
        prompts_per_step=BATCH,
    )


def _segment(index: int) -> Segment:
    suggestion = Suggestion(source="scale", explanation="to measure the ledger", expected_cost_seconds=1.0)
    return Segment(index=index, start_step=STEPS * index, stop_step=STEPS * (index + 1), suggestion=suggestion)


def _result(number: int, segment: Segment) -> tuple[SegmentResult, list[StepRecord]]:
    step = segment.stop_step
    score = (number % 100) / 100
    evaluation = Evaluation(step=step, prompts=BATCH * step, score=score, standard_error=0.02, samples=512, seconds=1.0)
    checkpoint = Checkpoint(
        step=step, prompts=BATCH * step, path=f"{number:016x}/step-{step:08d}", digest=f"{number:064x}", size_bytes=1
    )
    records = [
        StepRecord(
            step=one, prompts=BATCH * one, tokens=1000 * one, reward=0.5, reward_std=0.5, zero_variance_share=0.1,
            kl=0.01, entropy=0.5, clip_fraction=0.01, grad_norm=0.3, completion_tokens=8.0, truncated_share=0.0,
            generation_seconds=0.5, training_seconds=0.5,
        )
        for one in range(segment.start_step + 1, step + 1)
    ]  # fmt: skip
    result = SegmentResult(
        segment=segment, outcome=Outcome.REACHED, end_step=step, end_prompts=BATCH * step, evaluations=(evaluation,),
        checkpoint=checkpoint, seconds=1.0,
    )  # fmt: skip
    return result, records


if __name__ == "__main__":
    main()
