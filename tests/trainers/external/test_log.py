"""Lines as OpenRLHF 0.11.2 prints them, by way of Ray."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest

from jfhpo_core.trainers.external.log import EvaluationLine, LogTail, StepLine, compress, read_line

PREFIX = "\x1b[36m(PPOTrainer pid=25826)\x1b[0m INFO 11-23 06:46:29 ppo_trainer.py:551] \u2728 "
STEP = (
    f"{PREFIX}Global step 1: {{'score': 0.3125, 'zero_variance': 0.375, 'actor_grad_norm': 1.453456997871399, "
    "'actor_lr': 0.001, 'entropy_loss': 0.3113132119178772, 'kl': 0.0, 'rollout/reward_mean': 0.3125, "
    "'rollout/num_samples': 32.0, 'timing/step_total': 1.0773544311523438}"
)
EVALUATION = (
    f"{PREFIX}Evaluation completed in 0:00:00, global_step 2, eval_metrics: "
    "{'eval_default_pass1': 0.1875, 'eval_num_samples': 32.0}"
)


def test_a_step() -> None:
    event = read_line(STEP)
    assert isinstance(event, StepLine)
    assert event.step == 1
    assert event.metrics["rollout/reward_mean"] == 0.3125
    assert event.metrics["zero_variance"] == 0.375


def test_an_evaluation_of_either_mode() -> None:
    assert read_line(EVALUATION) == EvaluationLine(2)
    assert read_line("(TrainingActor pid=1) INFO Eval at step 4: {'eval_default_pass1': 0.5}") == EvaluationLine(4)


def test_values_that_are_no_numbers() -> None:
    event = read_line("Global step 3: {'kl': nan, 'policy_loss': -inf, 'actor_grad_norm': inf, 'nan_count': 2.0}")
    assert isinstance(event, StepLine)
    assert math.isnan(event.metrics["kl"])
    assert event.metrics["policy_loss"] == -math.inf
    assert event.metrics["actor_grad_norm"] == math.inf
    assert event.metrics["nan_count"] == 2.0


def test_other_lines_say_nothing() -> None:
    for line in ("", "Episode [1/1]:  50%|#####     | 16/32", "(PPOTrainer pid=1) Generate samples: 100%"):
        assert read_line(line) is None


def test_a_mangled_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_line("Global step 3: {'kl': tensor(0.1)}")


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    tail = LogTail(path)
    assert tail.read() == []
    path.write_bytes(b"one\ntw")
    assert tail.read() == ["one"]
    with path.open("ab") as file:
        file.write("o\u2728\nthr".encode())
    assert tail.read() == ["two\u2728"]
    assert tail.read() == []


def test_long_logs_are_compressed(tmp_path: Path) -> None:
    short, long = tmp_path / "short.log", tmp_path / "long.log"
    short.write_text("a line\n")
    long.write_text("a line\n" * 200_000)
    compress(short)
    compress(long)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.log.gz", "short.log"]
    with gzip.open(tmp_path / "long.log.gz", "rt") as packed:
        assert packed.read() == "a line\n" * 200_000
