"""What the adapter makes of a training's output, without the training."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.study.tasks import load_task
from jfhpo_core.trainers.external.log import StepLine
from jfhpo_core.trainers.openrlhf import OpenRlhfTrainer
from jfhpo_core.trainers.openrlhf.command import Files
from jfhpo_core.trainers.openrlhf.settings import PYTHON_VARIABLE, OpenRlhfSettings
from jfhpo_core.trainers.openrlhf.trainer import ineffective
from jfhpo_core.trainers.openrlhf.training import (
    PROGRESS,
    _launch,
    _Loop,
    _prepare,
    _take_checkpoint,
    link,
    prompt_order,
    score,
)
from tests.trainers.openrlhf.conftest import job, study

METRICS = {
    "zero_variance": 0.375, "actor_grad_norm": 1.45, "actor_lr": 0.001, "entropy_loss": 0.31, "kl": 0.02,
    "ppo_clip_ratio": 0.01, "rollout/reward_mean": 0.5, "rollout/reward_std": 1.0, "rollout/num_samples": 4.0,
    "rollout/response_length_mean": 6.0, "rollout/truncated_rate": 0.25, "timing/generation": 2.0,
    "timing/step_total": 5.0,
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path / "folder", tmp_path / "work")
    files.folder.mkdir()
    files.work.mkdir()
    return files


def loop(files: Files, *, fresh: bool = True, **hyper: object) -> _Loop:
    start = 0 if fresh else 2
    task = job(study(), files.folder, start=start, stop=4, **hyper)
    heldout = load_task(task.study.task).heldout
    return _Loop(task, OpenRlhfSettings(), files, None, lambda _: None, 0.0, 10, heldout, fresh=fresh)  # type: ignore[arg-type]


def test_a_step_in_our_terms(files: Files) -> None:
    record = loop(files)._record_of(StepLine(1, METRICS))
    assert (record.step, record.prompts, record.tokens) == (1, 8, 10 + 4 * 6)
    assert record.reward_std == pytest.approx((3 / 4) ** 0.5)
    assert (record.kl, record.entropy, record.clip_fraction, record.learning_rate) == (0.02, 0.31, 0.01, 0.001)
    assert (record.generation_seconds, record.training_seconds) == (2.0, 3.0)


def test_time_outs_and_single_rewards_are_counted_over_the_samples(files: Files) -> None:
    record = loop(files)._record_of(StepLine(1, {**METRICS, "reward_timeouts": 0.25, "reward_part_short": 0.5}))
    assert (record.reward_timeouts, record.reward_parts) == (1, {"short": 0.5})


def test_without_a_reference_no_kl_is_claimed(files: Files) -> None:
    assert loop(files, kl_coefficient=0.0)._record_of(StepLine(1, METRICS)).kl is None


def test_a_continuation_that_begins_at_the_wrong_step_does_not_count(files: Files) -> None:
    with pytest.raises(InfrastructureError, match="reported step 1 where step 3 was due"):
        loop(files, fresh=False)._record_of(StepLine(1, METRICS))


def test_scores_are_means_over_prompts() -> None:
    evaluation = score([(0, 1.0), (0, 0.0), (1, 1.0), (1, 1.0)], 2, 16, 3.0)
    assert evaluation.score == 0.75
    assert evaluation.standard_error == pytest.approx(0.25)
    assert evaluation.samples == 4
    assert score([(0, 1.0), (1, 1.0)], 2, 16, 3.0).standard_error == 0.25


def test_prompts_of_the_horizon_come_from_the_seed() -> None:
    rows = tuple({"prompt": str(number)} for number in range(5))
    order = prompt_order(rows, 12, seed=1)
    assert order == prompt_order(rows, 12, seed=1)
    assert order != prompt_order(rows, 12, seed=2)
    assert sorted(row["prompt"] for row in order[:5]) == list("01234")
    assert len(order) == 12


def test_what_the_training_reads(files: Files) -> None:
    task = job(study(), files.folder, stop=4)
    assert _prepare(task, OpenRlhfSettings(), load_task(task.study.task), None, files) == 0
    lines = [json.loads(line) for line in files.prompts.read_text().splitlines()]
    assert len(lines) == 48
    label = json.loads(lines[5]["label"])
    assert (label["position"], label["row"]["prompt"]) == (5, lines[5]["input"])
    assert len(files.heldout.read_text().splitlines()) == 32
    plan = json.loads(files.plan.read_text())
    assert (plan["start_step"], plan["prompts"], plan["samples"]) == (0, 8, 4)
    assert [set(one) for one in plan["reward"]] == [{"reference", "weight", "constants"}]
    assert (plan["reward_timeout_seconds"], plan["reward_timeout_score"]) == (10.0, 0.0)
    assert (files.folder / "scoring.py").is_file()
    assert plan["kept_completions"] == 3


def test_of_private_data_no_completions_are_kept(files: Files) -> None:
    task = job(study(tracking={"completions": False}), files.folder, stop=4)
    _prepare(task, OpenRlhfSettings(), load_task(task.study.task), None, files)
    assert json.loads(files.plan.read_text())["kept_completions"] == 0


def test_an_evaluation_shows_what_was_written_for_the_first_prompts(files: Files) -> None:
    path = files.folder / "evaluation-at-0.json"
    content = {"rewards": [[0, 1.0], [1, 0.0]], "timed_out": 1, "seconds": 2.0}
    path.write_text(json.dumps({**content, "completions": [[0, "right", 1.0], [1, "w" * 1000, 0.0]]}))
    running = loop(files)
    found = running._evaluation(path)
    assert [(one.prompt, one.completion, one.reward) for one in found.examples] == [
        (running.heldout[0]["prompt"], "right", 1.0),
        (running.heldout[1]["prompt"], "w" * 300, 0.0),
    ]
    assert found.by_prompt == ()


def test_pass_at_n_is_over_prompts_whatever_the_order_of_completions() -> None:
    found = score([(2, 0.0), (0, 1.0), (1, 0.0), (0, 0.0), (2, 0.0), (1, 1.0)], 2, 16, 1.0)
    assert (found.score, found.samples) == (pytest.approx(1 / 3), 6)
    assert found.pass_at_n is not None
    assert (found.pass_at_n.n, found.pass_at_n.score) == (2, pytest.approx(2 / 3))
    assert found.pass_at_n.standard_error == pytest.approx(1 / 3)
    assert score([(0, 1.0), (1, 0.0)], 2, 16, 1.0).pass_at_n is None
    assert found.by_prompt == ()
    kept = score([(2, 0.0), (0, 1.0), (1, 0.0), (0, 0.0), (2, 0.0), (1, 1.0)], 2, 16, 1.0, by_prompt=True)
    assert kept.by_prompt == (0.5, 0.5, 0.0)


def checkpoint(files: Files, step: int) -> None:
    """A checkpoint as OpenRLHF lays it out."""
    tag = f"global_step{step}"
    for folder, names in (
        (files.checkpoints / "_actor" / tag, ("mp_rank_00_model_states.pt", "metric.json")),
        (files.checkpoints / f"{tag}_hf", ("model.safetensors", "tokenizer_config.json")),
    ):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(name)
    (files.checkpoints / "_actor" / "latest").write_text(tag)


def test_the_last_checkpoint_is_the_model_alone(files: Files, tmp_path: Path) -> None:
    # Of the segment before it DeepSpeed's state still lies there.
    checkpoint(files, 4)
    (files.checkpoints / "global_step4_hf").rename(files.checkpoints / "global_step6_hf")
    stage = tmp_path / "stage"
    stage.mkdir()
    _take_checkpoint(files, stage, 6, tokens=99, resumable=False)
    assert (stage / "model.safetensors").is_file()
    assert not (stage / "checkpoints").exists()


def test_a_checkpoint_holds_the_model_and_all_that_resuming_needs(files: Files, tmp_path: Path) -> None:
    checkpoint(files, 4)
    stage = tmp_path / "stage"
    stage.mkdir()
    _take_checkpoint(files, stage, 4, tokens=99, resumable=True)
    assert (stage / "model.safetensors").is_file()
    assert (stage / "checkpoints" / "_actor" / "latest").read_text() == "global_step4"
    assert json.loads((stage / PROGRESS).read_text()) == {"step": 4, "tokens": 99}

    # The next segment works on links; what is written over in place is its own.
    again = Files(tmp_path / "next", tmp_path / "next-work")
    again.folder.mkdir()
    later = job(study(), tmp_path, start=4, stop=6)
    assert _prepare(later, OpenRlhfSettings(), load_task(later.study.task), stage, again) == 99
    weights = "_actor/global_step4/mp_rank_00_model_states.pt"
    assert (again.checkpoints / weights).samefile(stage / "checkpoints" / weights)
    (again.checkpoints / "_actor" / "latest").write_text("other")
    assert (stage / "checkpoints" / "_actor" / "latest").read_text() == "global_step4"
    assert json.loads(again.plan.read_text())["start_step"] == 4


def test_a_ray_job_is_submitted_and_stopped_by_its_name(files: Files) -> None:
    settings = OpenRlhfSettings(python="/env/python", jobs_address="http://head:8265", environment={"A": "b"})
    variables = {"RAY_AUTH_TOKEN": "secret", "TOKENIZERS_PARALLELISM": "false", "A": "b", "HOME": os.environ["HOME"]}
    submit, stop = _launch(settings, ["--x", "1"], variables, {}, files)
    assert stop is not None
    identity = submit[submit.index("--submission-id") + 1]
    assert stop[-1] == identity
    assert submit[-5:] == ["/env/python", "-m", "openrlhf.cli.train_ppo_ray", "--x", "1"]
    runtime = Path(submit[submit.index("--runtime-env") + 1])
    assert json.loads(runtime.read_text())["env_vars"] == {"A": "b"}
    assert runtime.stat().st_mode & 0o077 == 0
    assert "secret" not in " ".join(submit) + runtime.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"device": "cuda", "python": "python3"}}, "gpus_per_device"),
        ({"settings": {"device": "cpu", "python": "/no/such/python"}}, "make openrlhf-env"),
        ({"settings": {"device": "cpu", "python": "python3", "nodes": 2}}, "settings.nodes"),
        ({"settings": {"device": "cpu", "python": "python3", "lora": {}}}, "cannot train adapters"),
        ({"fixed": {"n_samples": 1}, "settings": {"device": "cpu", "python": "python3"}}, "would train nothing"),
    ],
)
def test_studies_that_cannot_run_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        OpenRlhfTrainer().check(study(trainer={"name": "openrlhf", **changes}))


def test_gpus_are_counted_once() -> None:
    settings = {"python": "python3", "jobs_address": "http://head:8265"}
    with pytest.raises(SpecError, match="would hold the GPUs"):
        OpenRlhfTrainer().check(
            study(trainer={"name": "openrlhf", "settings": settings}, cluster={"gpus_per_device": 1})
        )


def test_a_ray_job_writes_no_checkpoint_to_a_disk_of_one_node() -> None:
    trainer = {"name": "openrlhf", "settings": {"python": "python3", "jobs_address": "http://head:8265"}}
    with pytest.raises(SpecError, match=r"cluster.local_folder: '/scratch'.*another node"):
        OpenRlhfTrainer().check(study(trainer=trainer, cluster={"local_folder": "/scratch"}))


def test_a_checkpoint_on_another_disk_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "weights", tmp_path / "there"
    source.write_text("weights")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link(str(source), str(target))
    assert target.is_symlink()
    assert target.read_text() == "weights"
    target.unlink()
    assert source.exists()


def test_proxies_share_a_gpu_and_the_target_has_several() -> None:
    def check(proxy: int, target: int) -> None:
        family = study().family.model_dump(exclude_none=True)["models"]
        family[0]["devices"], family[1]["devices"] = proxy, target
        OpenRlhfTrainer().check(
            study(
                family=family,
                trainer={"name": "openrlhf", "fixed": study().trainer.fixed, "settings": {"python": "python3"}},
                cluster={"gpus_per_device": 0.5},
            )
        )

    check(1, 16)
    with pytest.raises(SpecError, match=r"1\.5 GPUs"):
        check(1, 3)
    with pytest.raises(SpecError, match="asks for 10 GPUs, more than a node has"):
        check(1, 20)


def test_a_workspace_that_openrlhf_would_misread_is_refused() -> None:
    settings = {"device": "cpu", "python": "python3"}
    with pytest.raises(SpecError, match="separators"):
        OpenRlhfTrainer().check(
            study(trainer={"name": "openrlhf", "settings": settings}, tracking={"workspace": "/home/me@work"})
        )


def test_a_missing_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(SpecError, match=PYTHON_VARIABLE):
        OpenRlhfTrainer().check(study())


def test_searched_hyperparameters_without_effect_are_named() -> None:
    clip = {"clip_high": {"type": "float", "low": 0.1, "high": 0.4}}
    assert set(ineffective(study(space=clip))) == {"clip_high"}
    both = {**clip, "mini_batches": {"type": "choice", "values": [1, 2]}}
    assert ineffective(study(space=both)) == {}
