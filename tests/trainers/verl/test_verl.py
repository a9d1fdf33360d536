"""The adapter for verl, without verl: what it would be started with, and what is made of its files.

With `JFHPO_VERL_PYTHON` naming a Python that has verl, hydra-core and omegaconf (no GPU needed), every override is also
checked against verl's own configuration.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jfhpo.overrides import read_study
from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.study import scoring
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import load_task
from jfhpo_core.study.trial import Decision, Evaluation, PassAtN, StepRecord
from jfhpo_core.trainers import Job, load_trainer
from jfhpo_core.trainers.external.process import TrainingProcess
from jfhpo_core.trainers.verl import VerlTrainer
from jfhpo_core.trainers.verl.command import VerlFiles, build_overrides, to_argv
from jfhpo_core.trainers.verl.options import refuse_owned
from jfhpo_core.trainers.verl.settings import VerlHyperparameters, VerlSettings
from jfhpo_core.trainers.verl.training import (
    REWARD,
    Loop,
    prepare,
    take_checkpoint,
    tell,
    variables,
)
from tests.trainers.openrlhf import conftest as common

EXAMPLE = Path(__file__).parents[3] / "examples" / "verl" / "qwen2.5-gsm8k.yaml"

# Writes what verl 0.9.1 writes below `inside/main.py`: a step once it is released, and evaluations when they are asked
# for, but for the one of the last step, which verl makes itself.
FAKE = """
import json, sys, time
from pathlib import Path
folder, step, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
truths = json.loads((folder / "truths.json").read_text())
def generations(name, step, rewards):
    (folder / name).mkdir(exist_ok=True)
    lines = [
        {"input": "", "output": f"one\u2028{place}", "gts": truths[place // 2], "score": reward, "step": step,
         "uid": f"p{place // 2}_{place % 2}_0"}
        for place, reward in enumerate(rewards)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\\n" for line in lines)
    (folder / name / f"{step}.jsonl").write_text(text)
def log(step, data):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
def evaluate():
    generations("validations", step, [0, 1, 1, 1] if step in (0, 6) else [0, 1, 0, 1])
    return {"val-core/heldout/reward/mean@2": 0.5, "timing_s/testing": 2.0}
evaluated = False
while True:
    control = json.loads((folder / "control.json").read_text())
    if control["released"] >= step:
        step, evaluated = step + 1, False
        generations("rollouts", step, [1, 1, 0, 1])
        log(step, {
            "response_length/mean": 5.0, "response_length/clip_ratio": 0.25, "timing_s/step": 7.0, "timing_s/gen": 1.0,
            "timing_s/held": 4.0, "actor/kl_loss": 0.01 * step, "actor/entropy": 0.4, "actor/pg_clipfrac": 0.02,
            "actor/grad_norm": 0.3, "actor/lr": 1e-6, **(evaluate() if step == last else {}),
        })
    elif control["evaluate"] == step and not evaluated:
        evaluated = True
        log(step, evaluate())
    time.sleep(0.01)
"""


def study(**settings: Any) -> StudySpec:
    return common.study(
        trainer={"name": "verl", "fixed": {"prompts_per_step": 2, "n_samples": 2}, "settings": settings},
        cluster={"gpus_per_device": 1},
    )


def job(folder: Path, *, start: int = 0, stop: int = 2, **hyper: Any) -> Job:
    spec = study()
    base = common.job(common.study(), folder, start=start, stop=stop)
    full = VerlHyperparameters.model_validate({**spec.trainer.fixed, **hyper}).model_dump()
    return base.model_copy(update={"study": spec, "configuration": full, "prompts_per_step": 2})


@pytest.fixture
def files(tmp_path: Path) -> VerlFiles:
    (tmp_path / "folder").mkdir()
    return VerlFiles(tmp_path / "folder", tmp_path / "work")


def overrides(folder: Path, *, fresh: bool = True, start: int = 0, stop: int = 2, **hyper: Any) -> dict[str, Any]:
    task = job(folder, start=start, stop=stop, **hyper)
    return build_overrides(task, VerlSettings(), common.placed(VerlSettings()), VerlFiles(folder, folder), fresh=fresh)


def test_it_is_registered() -> None:
    assert load_trainer("verl").name == "verl"


def test_segments_differ_in_where_they_save_and_validate_only(tmp_path: Path) -> None:
    first, second = overrides(tmp_path), overrides(tmp_path, fresh=False, start=2, stop=6)
    assert {name for name in first if first[name] != second[name]} == {
        "trainer.resume_mode", "trainer.save_freq",
    }  # fmt: skip
    assert first["trainer.total_training_steps"] == 6


def test_algorithms(tmp_path: Path) -> None:
    rloo = overrides(tmp_path, loss_type="rloo")
    assert (rloo["algorithm.adv_estimator"], rloo["algorithm.use_kl_in_reward"]) == ("rloo", True)
    assert rloo["actor_rollout_ref.actor.use_kl_loss"] is False
    assert not any(name.startswith("critic.") for name in rloo)
    plus = overrides(tmp_path, loss_type="reinforce", n_samples=1)
    assert (plus["algorithm.adv_estimator"], plus["algorithm.use_kl_in_reward"]) == ("reinforce_plus_plus", True)
    group = overrides(tmp_path, loss_type="reinforce_baseline")
    assert group["algorithm.adv_estimator"] == "reinforce_plus_plus_baseline"
    assert (group["actor_rollout_ref.actor.use_kl_loss"], group["actor_rollout_ref.actor.kl_loss_type"]) == (
        True,
        "mse",
    )
    ppo = overrides(tmp_path, loss_type="ppo", critic_learning_rate=1e-5, gae_lambda=0.95)
    assert (ppo["algorithm.adv_estimator"], ppo["algorithm.lam"]) == ("gae", 0.95)
    assert (ppo["critic.optim.lr"], ppo["critic.model.path"]) == (1e-5, ppo["actor_rollout_ref.model.path"])
    with pytest.raises(ValueError, match="compares completions of one prompt"):
        VerlHyperparameters(n_samples=1)
    plain = overrides(tmp_path, loss_type="dr_grpo", kl_coefficient=0.0)
    assert plain["algorithm.norm_adv_by_std_in_grpo"] is False
    assert plain["actor_rollout_ref.actor.use_kl_loss"] is False
    assert overrides(tmp_path, prompts_per_step=8, mini_batches=4)["actor_rollout_ref.actor.ppo_mini_batch_size"] == 2


def test_values_in_hydras_notation() -> None:
    argv = to_argv({"a.b": True, "c": None, "d": 1e-6, "e": ["x", "y"], "f": "it's a=b"})
    assert argv == ["a.b=true", "c=null", "d=1e-06", "e=['x','y']", "f='it\\'s a=b'"]


def test_options_reach_the_command_line(tmp_path: Path) -> None:
    task = job(tmp_path, **{"actor_rollout_ref.actor.entropy_coeff": 0.01})
    chosen = VerlSettings.model_validate({"extra": {"actor_rollout_ref.model.use_liger": True}})
    built = build_overrides(task, chosen, common.placed(chosen), VerlFiles(tmp_path, tmp_path), fresh=True)
    assert built["actor_rollout_ref.actor.entropy_coeff"] == 0.01
    assert built["actor_rollout_ref.model.use_liger"] is True


def test_what_jfhpo_sets_cannot_be_set_otherwise(tmp_path: Path) -> None:
    free = {"clip_ratio_c", "entropy_coeff", "ppo_max_token_len_per_gpu"}
    for name in overrides(tmp_path, loss_type="ppo"):
        if name.rpartition(".")[2] not in free:
            with pytest.raises(ValueError, match="cannot be set here"):
                refuse_owned(name)
    for name, message in {
        "actor_rollout_ref.actor.optim": "set learning_rate",
        "++trainer.logger": "leave it out",
        "reward.reward_model.enable": "task.reward, which can ask a reward model that is served",
        "+reward.reward_model.model_path": "task.reward",
        "data.image_key": "leave it out",
        "trainer.v1.trainer_mode": "leave it out",
        "model_engine": "no option of verl",
        "~trainer.logger": "no option of verl",
    }.items():
        with pytest.raises(ValueError, match=message):
            VerlSettings.model_validate({"extra": {name: "x"}})
    with pytest.raises(ValueError, match="set learning_rate"):
        VerlHyperparameters.model_validate({"actor_rollout_ref.actor.optim.lr": 1.0})
    with pytest.raises(ValueError, match=r"trainer\.settings\.extra"):
        VerlHyperparameters.model_validate({"+a.b": 1.0})


def test_a_cpu_pretends_to_be_the_gpus(files: VerlFiles) -> None:
    on_gpu = variables(VerlSettings(), files, {"CUDA_VISIBLE_DEVICES": "3"}, 1)
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "3"
    assert {"PYTHONPATH", "VERL_PLATFORM", "RAY_OVERRIDE_RESOURCES"}.isdisjoint(on_gpu)
    on_cpu = variables(VerlSettings(device="cpu", workers=2, environment={"A": "b"}), files, {}, 2)
    assert json.loads(on_cpu["RAY_OVERRIDE_RESOURCES"]) == {"GPU": 2, "CPU": 9}
    assert on_cpu["PYTHONPATH"].split(":")[0].endswith("verl/cpu_shim")
    assert (on_cpu["VERL_PLATFORM"], on_cpu["A"]) == ("cpu", "b")


def test_what_it_reads(tmp_path: Path, files: VerlFiles) -> None:
    import pyarrow.parquet as pq

    task = job(tmp_path)
    assert prepare(task, load_task(task.study.task), None, files) == 0
    rows = pq.read_table(files.prompts).to_pylist()
    assert len(rows) == 12
    row = json.loads(rows[0]["reward_model"]["ground_truth"])
    assert rows[0]["prompt"] == [{"role": "user", "content": row["prompt"]}]
    assert set(row) == {"prompt", "answer"}


def test_its_reward_is_ours(tmp_path: Path) -> None:
    shutil.copyfile(REWARD, tmp_path / "reward.py")
    (tmp_path / "own.py").write_text(
        "def score(prompts, completions, answer):\n"
        "    9**9**9**9 if completions == ['hang'] else None\n"
        "    return [1 / 0 if completions == ['x'] else float(completions == answer)]\n"
    )
    shutil.copyfile(scoring.__file__, tmp_path / "scoring.py")
    plan = {
        "reward": [{"reference": f"{tmp_path / 'own.py'}:score", "weight": 1.0, "constants": {}}],
        "reward_timeout_seconds": 1.0,
        "reward_timeout_score": -1.0,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    program = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("r", sys.argv[1] + "/reward.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
row = json.dumps({"prompt": "p", "answer": "34"})
print(*(module.compute_score("d", text, row) for text in ("34", "35", "hang")))
module.compute_score("d", "x", row)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.stdout.splitlines()[0] == "1.0 0.0 -1.0"
    assert (tmp_path / "reward-timeouts.txt").read_text() == "'p'\n"
    assert "own.py:score raised ZeroDivisionError" in done.stdout
    assert "jfhpo: the reward failed: " in done.stdout
    assert done.returncode != 0


def follow(
    task: Job, files: VerlFiles, first: int, decide: Decision | None = None
) -> tuple[Loop, list[StepRecord | Evaluation]]:
    seen: list[StepRecord | Evaluation] = []

    def observe(event: StepRecord | Evaluation) -> Decision | None:
        seen.append(event)
        return decide if isinstance(event, StepRecord) else None

    tell(files, released=-1)
    # verl's names of prompts are random, so that their order is, too.
    heldout = load_task(task.study.task).heldout
    truths = [json.dumps(row) for row in (heldout[1], heldout[0])]
    (files.metrics.parent / "truths.json").write_text(json.dumps(truths))
    command = [sys.executable, "-c", FAKE, str(files.metrics.parent), str(first), str(task.total_steps)]
    with TrainingProcess(command, {}, files.log) as process:
        fresh = task.segment.start_step == 0
        loop = Loop(task, VerlSettings(), files, process, observe, time.monotonic(), 10, heldout, fresh=fresh)
        loop.run()
    return loop, seen


def test_records_and_evaluations_from_its_files(tmp_path: Path, files: VerlFiles) -> None:
    loop, seen = follow(job(tmp_path), files, 0)
    base, one, two, rung = seen
    assert isinstance(base, Evaluation)
    assert (base.step, base.score, base.samples) == (0, 0.75, 4)
    assert base.standard_error == pytest.approx(0.25)
    assert base.pass_at_n == PassAtN(n=2, score=1.0, standard_error=0.25)
    assert isinstance(one, StepRecord)
    assert (one.step, one.prompts, one.tokens, one.reward) == (1, 2, 30, 0.75)
    assert (one.zero_variance_share, one.kl, one.clip_fraction, one.learning_rate) == (0.5, 0.01, 0.02, 1e-6)
    assert one.reward_std == pytest.approx(0.75**0.5 / 2)
    assert isinstance(two, StepRecord)
    assert two.tokens == 50
    assert isinstance(rung, Evaluation)
    assert (rung.step, rung.score, rung.seconds) == (2, 0.5, 2.0)
    assert not loop.stopped


def test_completions_are_kept_in_the_order_of_held_out_rows_unless_they_are_private(
    tmp_path: Path, files: VerlFiles
) -> None:
    task = job(tmp_path, start=4, stop=6)
    task = task.model_copy(update={"target_parameters": task.parameters})
    prompts = [row["prompt"] for row in load_task(task.study.task).heldout]
    private = task.study.model_copy(update={"tracking": task.study.tracking.model_copy(update={"completions": False})})
    for study, kept in (
        (task.study, [(prompts[0], "one\u20282", 1.0), (prompts[1], "one\u20280", 0.0)]),
        (private, []),
    ):
        files.metrics.unlink(missing_ok=True)
        *_, last = follow(task.model_copy(update={"study": study}), files, 4)[1]
        assert isinstance(last, Evaluation)
        assert [(example.prompt, example.completion, example.reward) for example in last.examples] == kept
        # A full-length run of the target is compared prompt by prompt.
        assert last.by_prompt == (1.0, 0.5)


def test_a_rule_stops_it(tmp_path: Path, files: VerlFiles) -> None:
    stop = Decision(stop=True, rule="test", signal="kl", value=1.0, threshold=0.5, step=1)
    loop, seen = follow(job(tmp_path), files, 0, stop)
    assert loop.stopped
    # The base model, the step, and the evaluation at that very step.
    assert [event.step for event in seen] == [0, 1, 1]
    assert isinstance(seen[-1], Evaluation)


def test_the_last_step_is_evaluated_by_verl_itself(tmp_path: Path, files: VerlFiles) -> None:
    loop, seen = follow(job(tmp_path, start=4, stop=6), files, 4)
    assert [event.step for event in seen] == [5, 6, 6]
    assert not loop.stopped


def test_a_continuation_that_begins_at_the_wrong_step_does_not_count(tmp_path: Path, files: VerlFiles) -> None:
    with pytest.raises(InfrastructureError, match="reported step 1 where step 3 was due"):
        follow(job(tmp_path, start=2, stop=4), files, 0)


def test_a_checkpoint_comes_and_goes(tmp_path: Path, files: VerlFiles) -> None:
    actor = files.checkpoints / "global_step_2" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "model.safetensors").write_text("weights")
    (actor / "model_world_size_1_rank_0.pt").write_text("shard")
    stage = tmp_path / "stage"
    stage.mkdir()
    take_checkpoint(files, stage, 2, tokens=7, resumable=True)
    assert (stage / "model.safetensors").read_text() == "weights"

    again = VerlFiles(tmp_path / "folder", tmp_path / "again")
    task = job(tmp_path, start=2, stop=4)
    assert prepare(task, load_task(task.study.task), stage, again) == 7
    assert (again.checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (again.checkpoints / "global_step_2" / "actor" / "model_world_size_1_rank_0.pt").read_text() == "shard"


@pytest.mark.parametrize(
    ("settings", "cluster", "message"),
    [
        ({"python": "/no/such"}, 1, "is no Python here"),
        ({"python": sys.executable}, 0, "would share GPUs"),
        ({"python": sys.executable, "engines": 2}, 1, "settings.engines"),
    ],
)
def test_studies_that_cannot_run_are_refused(settings: dict[str, Any], cluster: float, message: str) -> None:
    spec = study(**settings).model_copy(
        update={"cluster": study().cluster.model_copy(update={"gpus_per_device": cluster})}
    )
    with pytest.raises(SpecError, match=message):
        VerlTrainer().check(spec)


def test_options_are_shown_to_verls_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refusal(python: str, overrides: tuple[str, ...]) -> str | None:
        asked.append(overrides)
        return "Key 'nix' is not in struct"

    monkeypatch.setattr("jfhpo_core.trainers.verl.preflight.refusal", refusal)
    spec = study(python=sys.executable, extra={"actor_rollout_ref.model.nix": 1})
    spec = spec.model_copy(update={"trainer": spec.trainer.model_copy(update={"fixed": {"data.seed": 3}})})
    with pytest.raises(SpecError, match=r"actor_rollout_ref\.model\.nix, data\.seed: Key 'nix'"):
        VerlTrainer().check(spec)
    assert asked == [("actor_rollout_ref.model.nix=1", "data.seed=3")]


def test_the_example_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jfhpo_core.trainers.verl.preflight.refusal", lambda python, overrides: None)
    changes = [f"trainer.settings.python={sys.executable}"]
    for part, numbers in (("prompts", range(4)), ("heldout", range(4, 8))):
        rows = [f'{{"prompt": "{number}+1=", "answer": "{number + 1}"}}\n' for number in numbers]
        (tmp_path / f"{part}.jsonl").write_text("".join(rows))
        changes.append(f"task.{part}={tmp_path / part}.jsonl")
    spec = read_study(EXAMPLE, changes)
    study = resolve(spec)
    for baseline in spec.baselines:
        full = study.complete(baseline.configuration)
        assert full["actor_rollout_ref.actor.entropy_coeff"] == 0.0


def test_steps_are_parted_by_prompts() -> None:
    with pytest.raises(ValueError, match="no multiple of mini_batches"):
        VerlHyperparameters(prompts_per_step=6, mini_batches=4)
