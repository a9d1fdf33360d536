"""What OpenRLHF needs besides a valid study: its environment, and GPUs that hold model, optimizer and cache."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jfhpo_core.errors import SpecError
from jfhpo_core.study.models import Model
from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers.base import Finding, Level, failing_as
from jfhpo_core.trainers.external.ask import SECONDS, VERSIONS, ask
from jfhpo_core.trainers.external.fit import demand_of
from jfhpo_core.trainers.external.memory import GIB, WEIGHT_BYTES
from jfhpo_core.trainers.external.placement import Placement, place
from jfhpo_core.trainers.external.preflight import FLASH_ATTENTION, check_gpus, check_versions, needed_gpus
from jfhpo_core.trainers.external.process import environment
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings

TESTED = {
    "openrlhf": "0.11.2", "ray": "2.55.0", "deepspeed": "0.19.6", "vllm": "0.29.0", "transformers": "5.15.0",
}  # fmt: skip
"""Versions that the adapter was written for; another OpenRLHF may have other flags."""


def preflight(study: Study, settings: OpenRlhfSettings, ineffective: dict[str, str]) -> Iterator[Finding]:
    """See `jfhpo_core.run.preflight`.

    Args:
        study: The study.
        settings: Its trainer settings.
        ineffective: Searched hyperparameters that change nothing, with the reason.
    """
    yield from failing_as("trainer", _installed(study, settings))
    for model in study.ladder.models:
        subject = f"model {model.name}"
        yield from failing_as(subject, _fit(study, settings, model, subject))
    for name, reason in ineffective.items():
        yield Finding(Level.WARNING, "space", f"{name} is searched but has no effect: {reason}")


def _installed(study: Study, settings: OpenRlhfSettings) -> Iterator[Finding]:
    """What the trainer's environment and this machine have."""
    assert settings.interpreter is not None
    probe = ask(settings.interpreter, VERSIONS, [*TESTED, FLASH_ATTENTION], environment(settings, os.environ, 1))
    yield from check_versions(probe["versions"], TESTED, settings, "the how-to on OpenRLHF")
    if settings.device == "cuda" and settings.jobs_address is None:
        yield check_gpus(needed_gpus(study), settings, probe["gpus"])
    if settings.jobs_address is not None:
        yield _jobs(settings, settings.jobs_address)


def _jobs(settings: OpenRlhfSettings, address: str) -> Finding:
    """Whether the cluster's job server answers, and lets us in."""
    assert settings.interpreter is not None
    try:
        done = subprocess.run(  # noqa: S603
            [settings.interpreter, "-m", "ray.scripts.scripts", "job", "list", "--address", address],
            env=environment(settings, os.environ, 1), capture_output=True, text=True, check=False,
            timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(
            Level.FAILURE, "jobs", f"no answer from the job server at {address}: {error}; check that it can be reached"
        )
    if done.returncode == 0:
        return Finding(Level.OK, "jobs", f"the job server at {address} answers")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Finding(
        Level.FAILURE, "jobs",
        f"no use of the job server at {address}: {last}; check trainer.settings.jobs_address, and RAY_AUTH_MODE and "
        "RAY_AUTH_TOKEN if the cluster asks for a token",
    )  # fmt: skip


def _fit(study: Study, settings: OpenRlhfSettings, model: Model, subject: str) -> Iterator[Finding]:
    """What a run of a model takes."""
    defaults = study.complete({})
    settings = settings.of_model(model.name)
    demand = demand_of(
        study.spec, settings, model,
        reference=float(defaults["kl_coefficient"]) > 0, critic=defaults["loss_type"] == "ppo",
    )  # fmt: skip
    placement = place(settings, demand)
    if settings.device == "cpu":
        yield Finding(Level.OK, subject, f"{model.parameters:,} parameters, on CPU")
        return
    layout = (
        f"{demand.gpus} GPUs, ZeRO stage {placement.zero_stage}"
        f"{', optimizer in host memory' if placement.offload_optimizer else ''}, {placement.engines} engines of "
        f"{placement.tensor_parallel}; about {placement.training_bytes / GIB:.1f} GiB per GPU "
        f"before activations, {placement.tokens} tokens at once, "
        f"{placement.rollout_bytes / GIB:.1f} GiB in rollouts"
    )
    length = settings.max_prompt_tokens + study.spec.task.max_completion_tokens
    sequences = cached_sequences(model, settings, placement, length)
    if sequences is None:
        yield Finding(Level.OK, subject, layout)
        return
    text = f"{layout}; vLLM's cache holds {sequences:.0f} sequences of {length} tokens per engine"
    if sequences < 1:
        raise SpecError(f"{text}: raise tensor_parallel or vllm_memory_share, or shorten them")
    yield Finding(Level.OK, subject, text)


def cached_sequences(model: Model, settings: OpenRlhfSettings, placement: Placement, length: int) -> float | None:
    """Sequences of full length that an engine's cache holds; None if the model's configuration is not at hand."""
    path = Path(model.path) / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    # Keys and values of every layer, in two bytes each.
    per_token: int = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width * 2
    memory = settings.gpu_memory_gib * GIB * placement.vllm_memory_share * placement.tensor_parallel
    return max(0.0, memory - WEIGHT_BYTES * model.parameters) / (per_token * length)
