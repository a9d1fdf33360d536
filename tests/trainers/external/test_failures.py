"""Logs of trainings that failed; those marked as made were produced by OpenRLHF 0.11.2 and vLLM here, on CPU."""

from __future__ import annotations

import pytest

from jfhpo_core.errors import InfrastructureError, TrialFailure
from jfhpo_core.study.trial import FailureKind
from jfhpo_core.trainers.external.failures import FATAL, explain

# Made: an actor that failed while it was created. What it died of stands last.
CREATION = """\
(RolloutRayActor pid=1) Exception raised in creation task: The actor died because of an error raised in its creation \
task, \x1b[36mray::RolloutRayActor.__init__()\x1b[39m (pid=1)
(RolloutRayActor pid=1)   File "agent.py", line 53, in <module>
(RolloutRayActor pid=1) AttributeError: 'NoneType' object has no attribute '__dict__'
""".splitlines()
# Made: a missing prompt file.
MISSING = """\
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, ray::PPOTrainer
(PPOTrainer pid=1)     raise FileNotFoundError(error_msg)
(PPOTrainer pid=1) FileNotFoundError: Unable to find 'prompts.jsonl'
""".splitlines()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (
            "RuntimeError: jfhpo: the reward failed: it raised ValueError: the verifier is broken",
            FailureKind.REWARD,
        ),
        (
            "(PolicyModelActor pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            FailureKind.OUT_OF_MEMORY,
        ),
        (
            "(RolloutRayActor pid=7) ValueError: No available memory for the cache blocks. Try increasing memory",
            FailureKind.OUT_OF_MEMORY,
        ),
        ("train_ppo_ray.py: error: unrecognized arguments: --actor.lr", FailureKind.REJECTED),
        ("hydra.errors.ConfigCompositionException: Could not override 'data.nix'.", FailureKind.REJECTED),
    ],
)
def test_what_the_configuration_is_guilty_of(line: str, kind: FailureKind) -> None:
    failure = explain(["something before", line, "ray.exceptions.ActorDiedError: something after"], 1, "train.log")
    assert isinstance(failure, TrialFailure)
    assert failure.kind == kind
    assert line[:40] in str(failure)
    assert "train.log" in str(failure)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("OSError: [Errno 28] No space left on device", "disk full"),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", "host memory"),
        ("ray.exceptions.ActorDiedError: The actor died because its node has died.", "node went away"),
        ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", "vLLM died"),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", "communication"),
        (
            "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
            "an actor died",
        ),
    ],
)
def test_what_says_nothing_about_the_configuration(line: str, name: str) -> None:
    failure = explain(["something before", line], 1, "train.log")
    assert isinstance(failure, InfrastructureError)
    assert name in str(failure)


def test_a_kill_is_told_by_the_exit_code() -> None:
    failure = explain(["Global step 1: {}"], 137, "train.log")
    assert isinstance(failure, InfrastructureError)
    assert "signal 9" in str(failure)


def test_the_cause_is_quoted_and_not_its_echo() -> None:
    assert "AttributeError: 'NoneType'" in str(explain(CREATION, None, "train.log"))
    assert "FileNotFoundError: Unable to find" in str(explain(MISSING, 1, "train.log"))
    assert FATAL.search(CREATION[0])


def test_a_reward_outweighs_the_death_of_the_actor_that_it_caused() -> None:
    lines = [
        "ray.exceptions.ActorDiedError: The actor died unexpectedly",
        "jfhpo: the reward failed: it returned [nan]",
    ]
    assert isinstance(explain(lines, 1, "train.log"), TrialFailure)


def test_verl_may_not_train_on_what_is_left() -> None:
    # Made: verl 0.9.1 with a tokenizer that lacks the end of a line.
    lines = [
        "(AgentLoopWorkerTQ pid=1) ERROR:2026-11-29 11:45:26,445:Error in _run_prompt for uid=39eb1d97",
        "(AgentLoopWorkerTQ pid=1) hydra.errors.InstantiationException: Error in call to target 'SingleTurnAgentLoop':",
    ]
    assert FATAL.search(lines[0])
    failure = explain(lines, None, "train.log")
    assert isinstance(failure, InfrastructureError)
    assert "verl lost completions" in str(failure)


def test_an_engine_that_cannot_take_weights_is_dead() -> None:
    # Made: vLLM 0.29 below verl, which waits for it for ever.
    line = "(EngineCore pid=1) ERROR 11-29 11:35:04 [core.py:1617] Invocation of collective_rpc method failed"
    assert FATAL.search(line)
    assert "vLLM died" in str(explain([line], None, "train.log"))


def test_silence_is_reported_as_such() -> None:
    assert "nothing was printed" in str(explain([], 3, "train.log"))


def test_an_assertion_in_an_actor_is_no_refusal_of_the_command_line() -> None:
    lines = [
        "ray.exceptions.RayTaskError(AssertionError): ray::RayWorkerWrapper.execute_method() (pid=7, ip=10.0.0.1)",
        "AssertionError: unique id mismatch",
        "[rank0]: Watchdog caught collective operation timeout",
    ]
    assert isinstance(explain(lines, 1, "train.log"), InfrastructureError)
    assert isinstance(explain(["AssertionError: rollout_batch_size"], 1, "train.log"), TrialFailure)
