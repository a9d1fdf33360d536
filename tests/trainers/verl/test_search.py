"""A whole search with genuine verl, vLLM and FSDP on CPU: what `make test-verl` is for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.search import run_search
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.trial import Configuration, Trial, TrialState
from jfhpo_core.trainers.base import Job
from jfhpo_core.trainers.verl.command import MAIN
from mlflow_plugin.ledger import MlflowLedger
from tests.trainers.external.real_search import STOPPING, Script, main_processes, write_task
from tests.trainers.verl.conftest import cpu_study

pytestmark = [pytest.mark.verl, pytest.mark.slow, pytest.mark.timeout(3600)]

GOOD: Configuration = {"learning_rate": 1e-5, "actor_rollout_ref.actor.entropy_coeff": 1e-3}
WILD: Configuration = {"learning_rate": 3e-2, "actor_rollout_ref.actor.entropy_coeff": 0.0}
UNLUCKY: Configuration = {"learning_rate": 2e-5, "actor_rollout_ref.actor.entropy_coeff": 0.0}


class Retrying(InlineDispatcher):
    """Tries again what was lost, as the dispatcher on Ray does, but without a second Ray; and sees to a loss.

    The training of the second part of the good configuration is killed after its first step.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(on_submit=self._watch)
        self.losses: list[tuple[int, str]] = []
        self._folder = folder
        self._killer: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        for _ in range(4):
            try:
                return super().submit(job)
            except InfrastructureError as error:
                self.losses.append((job.segment.start_step, str(error)))
        raise AssertionError(self.losses)

    def _watch(self, job: Job) -> None:
        if job.segment.start_step == 2 and self._killer is None:
            self._killer = threading.Thread(target=self._kill, daemon=True)
            self._killer.start()

    def _kill(self) -> None:
        while not any('"step":3,' in path.read_text() for path in self._folder.glob("**/01-*/metrics.jsonl")):
            time.sleep(0.1)
        for pid in main_processes(self._folder, [bytes(MAIN)]):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Searched:
    study: Study
    failure: str
    result: SearchResult
    ledger: MlflowLedger
    losses: list[tuple[int, str]]
    folder: Path

    def trial(self, configuration: Configuration, model: str) -> Trial:
        return next(t for t in self.result.trials if (t.configuration, t.model) == (configuration, model))


@pytest.fixture(scope="module")
def searched(trainer_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("verl-on-cpu")
    spec = cpu_study(
        folder,
        trainer_python,
        task=write_task(folder),
        space={
            "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
            "actor_rollout_ref.actor.entropy_coeff": {"type": "float", "low": 0.0, "high": 0.01},
        },
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}", "workspace": str(folder / "workspace")},
        stopping=STOPPING,
        cluster={"address": "inline"},
    )
    resolved = resolve(spec)
    ledger, dispatcher = MlflowLedger(), Retrying(folder)
    ledger.open(spec)
    script = Script(folder, GOOD, WILD, UNLUCKY)
    with pytest.raises(SpecError) as failure:
        run_search(resolved, ledger, dispatcher, lambda _: None, script)
    script.broken.unlink()
    result = run_search(resolved, ledger, dispatcher, lambda _: None, script)
    yield Searched(resolved, str(failure.value), result, ledger, dispatcher.losses, folder)
    shutil.rmtree(folder, ignore_errors=True)


def test_the_search_is_complete_and_used_two_sizes(searched: Searched) -> None:
    assert searched.result.complete
    assert len(searched.result.trials) == 4
    assert {trial.model for trial in searched.result.trials} == {"m", "l"}


def test_every_step_is_recorded(searched: Searched) -> None:
    for trial in searched.result.trials:
        records = searched.ledger.step_records(trial.key)
        assert [record.step for record in records] == list(range(1, trial.step + 1))
        for record in records:
            assert record.prompts == 8 * record.step
            assert record.kl is not None
            assert record.entropy is not None
            assert record.grad_norm is not None
            assert 0 < record.completion_tokens <= 6
        tokens = [record.tokens for record in records]
        assert tokens == sorted(set(tokens))


def test_a_rule_stopped_a_trial_at_that_step_and_it_was_scored(searched: Searched) -> None:
    trial = searched.trial(WILD, "m")
    assert trial.state is TrialState.STOPPED
    assert trial.decision is not None
    assert trial.decision.rule == "absolute_kl"
    assert 3 <= trial.step == trial.decision.step < 6
    assert trial.evaluations[-1].step == trial.step
    assert trial.segments[-1].checkpoint is None


def test_a_killed_training_went_on_from_its_checkpoint(searched: Searched) -> None:
    trial = searched.trial(GOOD, "m")
    assert any(start == 2 and "killed by signal 9" in message for start, message in searched.losses)
    assert trial.state is TrialState.COMPLETED
    first, second = trial.segments
    assert first.end_step == 2
    assert (second.segment.start_step, second.end_step) == (2, 6)
    # Every attempt of the second part began at the third step: nothing before it was trained again.
    steps = [
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in (searched.study.folder / "trainings" / trial.key).glob("01-*/metrics.jsonl")
    ]
    assert [first for first, *_ in steps] == [3, 3]
    assert max(steps, key=len) == [3, 4, 4, 5, 6]  # the second 4 is the evaluation there


def test_evaluations_come_with_their_standard_error(searched: Searched) -> None:
    good = searched.trial(GOOD, "m")
    assert [evaluation.step for evaluation in good.evaluations] == [0, 2, 4, 6]
    shown = good.evaluations[0].examples
    for evaluation in good.evaluations:
        assert evaluation.samples == 32
        assert 0 < evaluation.standard_error < 0.2
        assert [example.prompt for example in evaluation.examples] == [example.prompt for example in shown]
        assert len(shown) == 3
    # The base model, and the same model after two steps that hardly changed it.
    assert abs(good.evaluations[0].score - good.evaluations[1].score) < 0.4


def test_a_failing_reward_ended_the_search_and_a_mended_one_went_on(searched: Searched) -> None:
    assert "ValueError: the verifier is broken" in searched.failure
    assert "run the same command again" in searched.failure
    trial = searched.trial(UNLUCKY, "m")
    assert [segment.end_step for segment in trial.segments] == [2]


def test_an_option_of_verl_was_searched(searched: Searched) -> None:
    option = "actor_rollout_ref.actor.entropy_coeff"
    for trial in searched.result.trials:
        for log in (searched.study.folder / "trainings" / trial.key).glob("*/command.json"):
            assert f"{option}={trial.configuration[option]!r}" in log.read_text()


def test_nothing_is_left_of_the_trainings(searched: Searched) -> None:
    assert main_processes(searched.folder, [bytes(MAIN)]) == []
    assert list((searched.study.store / "staging").iterdir()) == []


def test_the_targets_checkpoint_generates(searched: Searched) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trial = searched.result.target_trial
    assert trial is not None
    assert trial.checkpoint is not None
    path = CheckpointStore(searched.study.store).verify(trial.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("d52853=", return_tensors="pt")
    answer = AutoModelForCausalLM.from_pretrained(path).generate(**prompt, max_new_tokens=6)
    assert 0 < answer.shape[1] - prompt["input_ids"].shape[1] <= 6
