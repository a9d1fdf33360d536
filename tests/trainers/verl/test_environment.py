"""What only verl's own environment can tell: that it takes our command line, and that the CPU shim still fits."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.study.resolved import resolve
from jfhpo_core.trainers.base import Level
from jfhpo_core.trainers.external.process import SHARED_SHIM
from jfhpo_core.trainers.verl import VerlTrainer
from jfhpo_core.trainers.verl.command import MAIN, VerlFiles, to_argv
from jfhpo_core.trainers.verl.preflight import refusal
from jfhpo_core.trainers.verl.settings import Algorithm, VerlSettings
from jfhpo_core.trainers.verl.training import variables
from tests.trainers.verl.conftest import cpu_study
from tests.trainers.verl.test_verl import overrides

pytestmark = [pytest.mark.verl, pytest.mark.slow, pytest.mark.timeout(900)]


def run_inside(python: str, program: str, text: str = "") -> subprocess.CompletedProcess[str]:
    full = variables(VerlSettings(python=python, device="cpu"), VerlFiles(Path("/f"), Path("/w")), dict(os.environ), 1)
    return subprocess.run(
        [python, "-c", program], input=text, env=full, capture_output=True, text=True, timeout=800, check=False
    )


def test_verls_configuration_knows_every_override(trainer_python: str, tmp_path: Path) -> None:
    lines = [to_argv(overrides(tmp_path, loss_type=kind)) for kind in get_args(Algorithm)]
    lines.append(to_argv(overrides(tmp_path / "it's a=b", fresh=False, start=2, stop=4, scheduler="cosine")))
    for line in lines:
        assert refusal(trainer_python, tuple(line)) is None


def test_verl_validates_and_reads_what_we_meant(trainer_python: str, tmp_path: Path) -> None:
    program = """
import json, sys
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
wanted = json.loads(input())
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose(config_name="ppo_trainer", overrides=json.loads(input()))
validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
omega_conf_to_dataclass(config.actor_rollout_ref.actor)
omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
omega_conf_to_dataclass(config.critic)
found = {name: OmegaConf.select(config, name) for name in wanted}
print("WRONG" + json.dumps({name: str(found[name]) for name in wanted if found[name] != wanted[name]}))
"""
    built = overrides(tmp_path, loss_type="ppo")
    wanted = {name.lstrip("+"): value for name, value in built.items()}
    done = run_inside(trainer_python, program, f"{json.dumps(wanted)}\n{json.dumps(to_argv(built))}\n")
    assert "WRONG{}" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


def test_an_option_that_verl_lacks_is_refused_before_anything_starts(trainer_python: str, tmp_path: Path) -> None:
    spec = cpu_study(tmp_path, trainer_python)
    trainer = spec.trainer.model_copy(update={"fixed": {**spec.trainer.fixed, "actor_rollout_ref.actor.entropy": 0.1}})
    with pytest.raises(SpecError, match="Key 'entropy' is not in struct"):
        VerlTrainer().check(spec.model_copy(update={"trainer": trainer}))


def test_its_versions_are_those_we_tested(trainer_python: str, tmp_path: Path) -> None:
    found = list(VerlTrainer().preflight(resolve(cpu_study(tmp_path, trainer_python))))
    assert [finding.level for finding in found] == [Level.OK], found
    assert "verl 0.9.1" in found[0].message


def test_the_shim_finds_every_place_that_it_replaces(trainer_python: str) -> None:
    done = run_inside(trainer_python, (SHARED_SHIM / "on_import.py").read_text())
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()[-4:]) == {
        "importlib.metadata.version",
        "verl.utils.distributed.initialize_global_process_group_ray",
        "verl.utils.fsdp_utils.CPUOffloadPolicy",
        "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
    }


def test_the_trainer_waits_for_the_driver(trainer_python: str, tmp_path: Path) -> None:
    program = f"""
import importlib.util, json, os, threading, time
from pathlib import Path
from typing import get_args
spec = importlib.util.spec_from_file_location("held_main", {str(MAIN)!r})
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
control = Path({str(tmp_path / "control.json")!r})
os.environ["JFHPO_CONTROL"] = str(control)
logged = []
class Logger:
    def log(self, data, step):
        logged.append((step, sorted(data)))
class Trainer:
    def __init__(self):
        self.global_steps, self.timing_raw, self.logger = 3, {{}}, Logger()
    def on_step_begin(self):
        pass
    def _validate(self):
        control.write_text(json.dumps({{"released": 2, "evaluate": 2}}))
        return {{"val": self.global_steps}}
trainer = main.held(Trainer)()
control.write_text(json.dumps({{"released": 1, "evaluate": 2}}))
trainer.on_step_begin()
print("HELD" + json.dumps([logged, trainer.global_steps, sorted(trainer.timing_raw)]))
"""
    done = run_inside(trainer_python, program)
    assert "HELD" in done.stdout, done.stderr[-3000:]
    assert json.loads(done.stdout.rpartition("HELD")[2]) == [[[2, ["timing_s/testing", "val"]]], 3, ["held"]]
