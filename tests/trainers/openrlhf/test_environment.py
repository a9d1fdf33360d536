"""What only OpenRLHF's own environment can tell: that it takes our command line, and that the CPU shim still fits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from jfhpo_core.trainers.external.process import SHARED_SHIM, environment
from jfhpo_core.trainers.openrlhf.command import MODULE, Files, Flags, build_flags, to_argv
from jfhpo_core.trainers.openrlhf.hyperparameters import SCHEDULERS, Algorithm, OpenRlhfHyperparameters
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from tests.trainers.openrlhf.conftest import job, placed, study

pytestmark = [pytest.mark.openrlhf, pytest.mark.slow]

FILES = Files(Path("/folder"), Path("/work"))

# Runs OpenRLHF's main program on each command line up to the moment when it would train.
PARSE = f"""
import json, runpy, sys
from unittest import mock
import ray

class Parsed(Exception):
    pass

def stop(*args, **kwargs):
    raise Parsed

def flat(node, prefix=""):
    if hasattr(node, "__dict__"):
        return {{k: v for name, value in vars(node).items() for k, v in flat(value, f"{{prefix}}{{name}}.").items()}}
    return {{prefix[:-1]: node}}

results = []
for argv in json.load(sys.stdin):
    sys.argv = ["train_ppo_ray", *argv]
    seen = {{}}
    def get_strategy(args):
        seen.update(flat(args))
        raise Parsed
    with mock.patch("ray.is_initialized", lambda: True), mock.patch("openrlhf.utils.get_strategy", get_strategy):
        try:
            runpy.run_module("{MODULE}", run_name="__main__")
        except Parsed:
            pass
    results.append(seen)
print("PARSED" + json.dumps(results))
"""


def command_lines() -> list[Flags]:
    """One for every algorithm, schedule, layout and setting."""
    lines = []

    def add(settings: dict[str, Any] | None = None, devices: int = 1, parameters: int = 600_000, **hyper: Any) -> None:
        chosen = OpenRlhfSettings.model_validate(settings or {})
        full = OpenRlhfHyperparameters.model_validate(hyper)
        placement = placed(chosen, devices, parameters, critic=full.recipe.critic)
        task = job(study(), Path("/store"), devices=devices, **hyper)
        lines.append(build_flags(task, chosen, placement, FILES, resume=devices > 1))

    for loss_type in get_args(Algorithm):
        add(loss_type=loss_type)
    for scheduler in SCHEDULERS:
        add(scheduler=scheduler, warmup_ratio=0.1)
    add({"device": "cpu"})
    add({"chat_template": True})
    add({"asynchronous": True}, devices=4)
    add({"gpus_per_node": 8}, devices=16, parameters=32_000_000_000)
    add(dual_clip=3.0, mini_batches=2, epochs=2, entropy_coefficient=0.01, kl_coefficient=0.0)
    return lines


def run_inside(python: str, program: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    full = environment(OpenRlhfSettings(device="cpu"), dict(os.environ), 1) | variables
    return subprocess.run(
        [python, "-c", program], input=text, env=full, capture_output=True, text=True, timeout=500, check=False
    )


def test_openrlhf_parses_every_flag_to_the_value_we_meant(trainer_python: str) -> None:
    lines = command_lines()
    done = run_inside(trainer_python, PARSE, json.dumps([to_argv(flags) for flags in lines]))
    assert "PARSED" in done.stdout, done.stderr[-3000:]
    parsed = json.loads(done.stdout.rpartition("PARSED")[2])
    assert len(parsed) == len(lines) >= 18
    for flags, seen in zip(lines, parsed, strict=True):
        for name, value in flags.items():
            if name == "critic.model_name_or_path" or value is None:
                continue
            wanted = list(value) if isinstance(value, tuple) else value
            assert seen[name] == wanted, name


def test_the_shim_finds_every_place_that_it_replaces(trainer_python: str) -> None:
    done = run_inside(trainer_python, (SHARED_SHIM / "on_import.py").read_text())
    assert done.returncode == 0, done.stderr[-3000:]
    places = done.stdout.split()[-13:]
    for place_name in (
        "torch.cuda.current_device",
        "openrlhf.utils.deepspeed.deepspeed.init_device_mesh",
        "openrlhf.utils.deepspeed.deepspeed_utils.get_train_ds_config",
        "openrlhf.utils.distributed_util.stateless_init_process_group",
        "openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap.update_weight",
        "openrlhf.trainer.ppo_utils.replay_buffer.NaiveReplayBuffer.__init__",
        "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
        "deepspeed.comm.torch.build_shm_op",
    ):
        assert place_name in places


def test_a_place_that_has_moved_ends_the_process(trainer_python: str) -> None:
    program = """
import types, on_import, openrlhf_on_cpu
try:
    openrlhf_on_cpu._receive_on_cpu(types.SimpleNamespace(WorkerWrap=type("WorkerWrap", (), {})))
except on_import.MovedError as error:
    print("MOVED", error)
"""
    done = run_inside(trainer_python, program)
    assert "MOVED" in done.stdout
    assert "WorkerWrap.update_weight is gone" in done.stdout


def test_the_shim_does_nothing_where_there_is_a_gpu(trainer_python: str) -> None:
    program = """
import torch
before = torch.cuda.current_device
torch.cuda.is_available = lambda: True
try:
    import openrlhf
except ImportError as error:
    print("REFUSED", error, torch.cuda.current_device is before)
"""
    done = run_inside(trainer_python, program)
    assert "REFUSED" in done.stdout, done.stderr[-2000:]
    assert "sees a GPU" in done.stdout
    assert done.stdout.strip().endswith("True")


def test_without_the_shim_nothing_is_replaced(trainer_python: str) -> None:
    program = "import sys, torch; print('openrlhf_on_cpu' in sys.modules, torch.cuda.current_device.__module__)"
    assert run_inside(trainer_python, program, PYTHONPATH="").stdout.split() == ["False", "torch.cuda"]


def test_deepspeed_has_the_extensions_that_are_built_beforehand(trainer_python: str) -> None:
    done = run_inside(trainer_python, "from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder")
    assert done.returncode == 0, done.stderr[-2000:]
