"""A whole search with genuine OpenRLHF, vLLM and DeepSpeed on CPU: what `make test-openrlhf` is for."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.ray_dispatch import RayDispatcher
from jfhpo_core.run.search import Progress, run_search
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.trial import Configuration, Trial, TrialState
from jfhpo_core.trainers.openrlhf.command import MODULE
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.registry import register_target
from tests.trainers.external.real_search import STOPPING, Script, main_processes, write_task
from tests.trainers.openrlhf.conftest import study

pytestmark = [pytest.mark.openrlhf, pytest.mark.slow, pytest.mark.timeout(3000)]

GOOD: Configuration = {"learning_rate": 1e-5}
WILD: Configuration = {"learning_rate": 3e-2}
UNLUCKY: Configuration = {"learning_rate": 2e-5}


@dataclass
class Watcher:
    """Sees records as they come, and kills the training of the good configuration in the middle of its second part."""

    folder: Path
    streamed: set[tuple[str, int]] = field(default_factory=set)
    killed: list[int] = field(default_factory=list)

    def __call__(self, progress: Progress) -> None:
        for key, record in progress.live.items():
            self.streamed.add((key, record.step))
            trial = next(trial for trial in progress.trials if trial.key == key)
            if (trial.configuration, trial.model) == (GOOD, "m") and 3 <= record.step < 6 and not self.killed:
                for pid in main_processes(self.folder, [b"-m", MODULE.encode()]):
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)


@dataclass(frozen=True)
class Searched:
    study: Study
    failure: str
    result: SearchResult
    ledger: MlflowLedger
    watcher: Watcher
    folder: Path

    def trial(self, configuration: Configuration, model: str) -> Trial:
        return next(t for t in self.result.trials if (t.configuration, t.model) == (configuration, model))


@pytest.fixture(scope="module")
def searched(trainer_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searched]:
    folder = tmp_path_factory.mktemp("on-cpu")
    spec = study(
        task=write_task(folder),
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}", "workspace": str(folder / "workspace")},
        stopping=STOPPING,
        cluster={"address": "local"},
    )
    resolved = resolve(spec)
    ledger, watcher = MlflowLedger(), Watcher(folder)
    ledger.open(spec)
    script = Script(folder, GOOD, WILD, UNLUCKY)
    dispatcher = RayDispatcher(spec.cluster, slots=1, trainer="openrlhf")
    try:
        with pytest.raises(SpecError) as failure:
            run_search(resolved, ledger, dispatcher, watcher, script)
        script.broken.unlink()
        result = run_search(resolved, ledger, dispatcher, watcher, script)
    finally:
        dispatcher.close()
    yield Searched(resolved, str(failure.value), result, ledger, watcher, folder)
    shutil.rmtree(folder, ignore_errors=True)


def test_the_search_is_complete_and_used_two_sizes(searched: Searched) -> None:
    assert searched.result.complete
    assert len(searched.result.trials) == 4
    assert {trial.model for trial in searched.result.trials} == {"m", "l"}


def test_step_records_streamed_in(searched: Searched) -> None:
    for trial in searched.result.trials:
        records = searched.ledger.step_records(trial.key)
        assert [record.step for record in records] == list(range(1, trial.step + 1))
        for record in records:
            assert record.prompts == 8 * record.step
            assert record.kl is not None
            assert record.entropy is not None
            assert record.grad_norm is not None
            assert 0 < record.completion_tokens <= 6
    good = searched.trial(GOOD, "m")
    seen = {step for key, step in searched.watcher.streamed if key == good.key}
    # The newest record at every event; those of one poll come together.
    assert len(seen) >= 3


def test_a_rule_stopped_a_trial_and_the_step_was_scored(searched: Searched) -> None:
    trial = searched.trial(WILD, "m")
    assert trial.state is TrialState.STOPPED
    assert trial.decision is not None
    assert trial.decision.rule == "absolute_kl"
    assert 3 <= trial.step < 6
    assert trial.evaluations[-1].step == trial.step
    assert trial.segments[-1].checkpoint is None


def test_a_killed_training_went_on_from_its_checkpoint(searched: Searched) -> None:
    trial = searched.trial(GOOD, "m")
    assert searched.watcher.killed
    assert trial.state is TrialState.COMPLETED
    first, second = trial.segments
    assert (first.end_step, first.attempts) == (2, 1)
    assert (second.segment.start_step, second.end_step, second.attempts) == (2, 6, 2)
    # Both attempts of the second part began at the third step: nothing before it was trained again.
    logs = sorted((searched.study.folder / "trainings" / trial.key).glob("01-*/train.log"))
    assert len(logs) == 2
    for log in logs:
        text = log.read_text(errors="replace")
        assert "Global step 3:" in text
        assert "Global step 2:" not in text
    tokens = [record.tokens for record in searched.ledger.step_records(trial.key)]
    assert tokens == sorted(set(tokens))


def test_evaluations_come_with_their_standard_error(searched: Searched) -> None:
    good = searched.trial(GOOD, "m")
    assert [evaluation.step for evaluation in good.evaluations] == [0, 2, 4, 6]
    shown = good.evaluations[0].examples
    for evaluation in good.evaluations:
        assert evaluation.samples == 32
        assert 0 < evaluation.standard_error < 0.2
        assert [example.prompt for example in evaluation.examples] == [example.prompt for example in shown]
        assert len(shown) == 3
        assert all(example.reward in (0.0, 1.0) for example in evaluation.examples)
    # The base model, and the same model after two steps that hardly changed it, with the same random numbers.
    assert abs(good.evaluations[0].score - good.evaluations[1].score) < 0.25


def test_a_failing_reward_ended_the_search_and_a_mended_one_went_on(searched: Searched) -> None:
    assert "ValueError: the verifier is broken" in searched.failure
    assert "run the same command again" in searched.failure
    trial = searched.trial(UNLUCKY, "m")
    assert [segment.end_step for segment in trial.segments] == [2]


def test_nothing_is_left_of_the_trainings(searched: Searched) -> None:
    assert main_processes(searched.folder, [b"-m", MODULE.encode()]) == []
    assert list((searched.study.store / "staging").iterdir()) == []


def test_the_target_is_registered_and_generates(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    trial = searched.result.target_trial
    assert trial is not None
    assert trial.checkpoint is not None
    CheckpointStore(searched.study.store).verify(trial.checkpoint)
    registration = register_target(searched.study, searched.result, searched.ledger)
    assert registration.alias == "champion", registration.reason
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(searched.study.spec.tracking.uri))
    answers = mlflow.pyfunc.load_model(f"models:/{registration.name}@champion").predict(["d52853="])
    assert 0 < len(str(answers[0])) <= 6
