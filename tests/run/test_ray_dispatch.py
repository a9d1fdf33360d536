"""What goes wrong on workers: killed, hung, out of disk. With real processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jfhpo_core.errors import InfrastructureError, SpecError
from jfhpo_core.run import ray_dispatch
from jfhpo_core.run.dispatch import InlineDispatcher, Streamed
from jfhpo_core.run.ray_dispatch import RayDispatcher
from jfhpo_core.run.worker import Staged
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import ClusterSpec
from jfhpo_core.study.trial import FailureKind, Outcome
from jfhpo_core.trainers import Job
from tests.run.conftest import GPUS
from tests.run.support import ENDING_SECONDS, all_gone, collect, first_job, wait_until
from tests.studies import BECAUSE, simulated_study

pytestmark = pytest.mark.slow

ATTEMPTS = 3
"""The dispatcher of these tests retries twice."""


def fragile_study(tmp_path: Path, how: str, times: int, **changes: Any) -> Study:
    folder = tmp_path / "attempts"
    folder.mkdir()
    settings = {"how": how, "times": times, "folder": str(folder)}
    return simulated_study(tmp_path, trainer={"name": "fragile", "settings": settings}, **changes)


def undisturbed(tmp_path: Path, stop_prompts: int = 480) -> Any:
    """The result of the same job where nothing fails."""
    inline = InlineDispatcher()
    job = first_job(simulated_study(tmp_path / "undisturbed"), stop_prompts=stop_prompts)
    inline.submit(job)
    return collect(inline, 1)[1][job.trial_key]


def test_as_many_jobs_run_side_by_side_as_there_are_slots(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    # The first job goes on only once a second one has begun.
    study = fragile_study(tmp_path, "meet", times=2)
    for index in range(5):
        ray_dispatcher.submit(first_job(study, 1e-4 * (index + 1)))
    running: set[str] = set()
    widest = ended = 0
    while ended < 5:
        for event in ray_dispatcher.wait(0.5):
            if isinstance(event, Streamed):
                running.add(event.key)
                widest = max(widest, len(running))
            else:
                assert event.result.outcome is Outcome.REACHED
                running.discard(event.key)
                ended += 1
    assert widest <= 2


def test_records_arrive_while_the_job_runs(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    study = fragile_study(tmp_path, "hang", times=1)
    job = first_job(study)
    ray_dispatcher.submit(job)
    steps: list[int] = []
    while len(steps) < 5:
        for event in ray_dispatcher.wait(0.5):
            assert isinstance(event, Streamed)
            steps += [record.step for record in event.records]
    assert steps == [1, 2, 3, 4, 5]
    ray_dispatcher.cancel(job.trial_key)


def test_killed_workers_are_replaced_and_the_result_is_the_same(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    job = first_job(fragile_study(tmp_path, "kill", times=ATTEMPTS - 1))
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    event, expected = finished[job.trial_key], undisturbed(tmp_path)
    assert event.result == expected.result.model_copy(update={"attempts": ATTEMPTS, "segment": job.segment})
    assert event.records == expected.records
    assert not list((Path(job.store) / "staging").iterdir()), "a killed attempt left its stage behind"


def hand_over(patch: pytest.MonkeyPatch, store: str, *arguments: Any) -> None:
    """Have every checkpoint stored without devices, in a way of the module of trainer `fragile`."""
    how = getattr(importlib.import_module("fragile_trainer"), store)

    class Storage:
        def store(self, staged: Staged, again: bool) -> Any:
            return how(*arguments, staged)

    patch.setattr(ray_dispatch, "HAND_OVER_BYTES", 0)
    patch.setattr(ray_dispatch, "StorageProcess", Storage)


def test_devices_are_given_back_before_a_large_checkpoint_is_stored(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With two slots, the first two checkpoints are stored only once the third job has begun.
    study = fragile_study(tmp_path, "none", times=0)
    hand_over(monkeypatch, "store_late", Path(study.spec.trainer.settings["folder"]), 3)
    for index in range(3):
        ray_dispatcher.submit(first_job(study, 1e-4 * (index + 1)))
    _, finished = collect(ray_dispatcher, 3)
    store = CheckpointStore(study.store)
    for event in finished.values():
        assert event.result.attempts == 1
        assert event.result.checkpoint is not None
        assert store.verify(event.result.checkpoint).is_dir()
    assert not list((store.root / "staging").iterdir())


@pytest.mark.parametrize("local", [False, True])
def test_if_the_process_dies_that_stores_a_checkpoint_another_one_stores_it(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    cluster = {"local_folder": str(tmp_path / "scratch")} if local else {}
    study = fragile_study(tmp_path, "none", times=0, cluster=cluster)
    hand_over(monkeypatch, "store_or_die", Path(study.spec.trainer.settings["folder"]))
    job = first_job(study)
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    event, expected = finished[job.trial_key], undisturbed(tmp_path)
    assert event.result == expected.result.model_copy(update={"segment": job.segment})
    assert event.records == expected.records
    assert [path.name for path in Path(study.spec.trainer.settings["folder"]).iterdir()] == [f"{job.trial_key}-1"]
    assert not list((tmp_path / "scratch").glob("*/*"))


def test_what_was_measured_counts_if_its_checkpoint_cannot_be_stored(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = fragile_study(tmp_path, "none", times=0)
    hand_over(monkeypatch, "store_never")
    job = first_job(study, stop_prompts=160)
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    event, expected = finished[job.trial_key], undisturbed(tmp_path, stop_prompts=160)
    assert event.result.message is not None
    assert "its checkpoint was not stored" in event.result.message
    assert event.result.model_copy(update={"message": None}) == expected.result.model_copy(
        update={"segment": job.segment, "checkpoint": None}
    )


def test_a_run_at_full_length_is_trained_again_if_its_checkpoint_cannot_be_stored(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = fragile_study(tmp_path, "none", times=0)
    hand_over(monkeypatch, "store_never")
    job = first_job(study)
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    assert finished[job.trial_key].result.outcome is Outcome.LOST
    assert len(list(Path(study.spec.trainer.settings["folder"]).iterdir())) == ATTEMPTS


def test_a_trial_that_is_withdrawn_while_its_checkpoint_is_stored_may_be_submitted_again(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = fragile_study(tmp_path, "none", times=0)
    job = first_job(study)
    with monkeypatch.context() as patch:
        hand_over(patch, "store_late", Path(study.spec.trainer.settings["folder"]), 100)
        ray_dispatcher.submit(job)
        last = 0
        while last < job.segment.stop_step:
            events = [event for event in ray_dispatcher.wait(0.5) if isinstance(event, Streamed)]
            last = max([last, *(record.step for event in events for record in event.records)])
        wait_until(lambda: ray_dispatcher.load().busy == 0, "giving the devices back")
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    assert finished[job.trial_key].result.checkpoint is not None
    assert len(list(Path(study.spec.trainer.settings["folder"]).iterdir())) == 2


@pytest.mark.parametrize(("how", "quote"), [("kill", "worker process has died"), ("disk", "No space left on device")])
def test_what_always_fails_is_lost_and_free(
    ray_dispatcher: RayDispatcher, tmp_path: Path, how: str, quote: str
) -> None:
    job = first_job(fragile_study(tmp_path, how, times=ATTEMPTS))
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    event = finished[job.trial_key]
    assert event.result.outcome is Outcome.LOST
    assert (event.result.attempts, event.result.charge_seconds, event.result.failure) == (ATTEMPTS, 0.0, None)
    assert event.records == ()
    assert quote in str(event.result.message)
    if how != "kill":  # who is killed cannot clean up; the next attempt would
        assert not list((Path(job.store) / "staging").iterdir()), "a failed attempt left its stage behind"


def test_memory_exhausted_in_python_is_the_configurations_fault(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    job = first_job(fragile_study(tmp_path, "memory", times=1))
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    result = finished[job.trial_key].result
    assert (result.failure, result.end_step, result.attempts) == (FailureKind.OUT_OF_MEMORY, 5, 1)


def test_a_job_that_hangs_once_is_started_again(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_dispatch, "HANG_SECONDS", 1.0)
    job = first_job(fragile_study(tmp_path, "hang", times=1))
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    assert finished[job.trial_key].result == undisturbed(tmp_path).result.model_copy(
        update={"attempts": 2, "segment": job.segment}
    )


def test_a_job_that_always_hangs_is_infeasible_and_charged_once(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_dispatch, "HANG_SECONDS", 1.0)
    job = first_job(fragile_study(tmp_path, "hang", times=ATTEMPTS))
    ray_dispatcher.submit(job)
    _, finished = collect(ray_dispatcher, 1)
    event = finished[job.trial_key]
    assert (event.result.outcome, event.result.failure) == (Outcome.INFEASIBLE, FailureKind.HUNG)
    assert [record.step for record in event.records] == [1, 2, 3, 4, 5]
    assert event.result.end_step == 5
    assert event.result.seconds > 1.0


def test_a_workers_children_end_with_it(
    ray_dispatcher: RayDispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_dispatch, "HANG_SECONDS", 1.0)
    study = fragile_study(tmp_path, "child", times=1)
    ray_dispatcher.submit(first_job(study))
    collect(ray_dispatcher, 1)
    child = int((Path(study.spec.trainer.settings["folder"]) / "child").read_text())
    assert all_gone({child})


@pytest.fixture
def running_ray(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    """Ray is up, so that a second dispatcher shares the instance."""
    ray_dispatcher.submit(first_job(simulated_study(tmp_path / "before")))
    collect(ray_dispatcher, 1)


@pytest.mark.usefixtures("running_ray")
def test_trials_share_gpus_and_never_crowd_them(tmp_path: Path) -> None:
    share, together = 0.5, 2
    # Each goes on once there are as many as the GPUs have room for.
    study = fragile_study(tmp_path, "gpu", times=GPUS * together)
    trials = GPUS * together + 2
    dispatcher = RayDispatcher(ClusterSpec(address="local", gpus_per_device=share), slots=trials)
    for index in range(trials):
        dispatcher.submit(first_job(study, 1e-4 * (index + 1)))
    collect(dispatcher, trials)
    dispatcher.close()
    notes = [json.loads(file.read_text()) for file in tmp_path.glob("*.gpu")]
    assert len(notes) == trials
    crowds = [sum(other == gpu and start <= began < end for other, start, end in notes) for gpu, began, _ in notes]
    assert {gpu for gpu, _, _ in notes} == {str(gpu) for gpu in range(GPUS)}
    assert max(crowds) == together


@pytest.mark.usefixtures("running_ray")
def test_a_trial_on_all_gpus_is_not_overtaken_and_no_gpu_is_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checkpoints are stored by processes without GPUs.
    monkeypatch.setattr(ray_dispatch, "HAND_OVER_BYTES", 0)
    # In the order of submission; nothing is known of their lengths, so nothing may overtake.
    sizes = (2, 1, GPUS, 1, 1)
    family = [
        {"name": str(size), "path": "simulated", "parameters": 100_000 * size, "devices": size}
        for size in sorted(set(sizes))
    ]
    # The first two go on once both have begun.
    study = fragile_study(tmp_path, "gpu", times=2, family=family, target=str(GPUS))
    dispatcher = RayDispatcher(ClusterSpec(address="local", gpus_per_device=1), slots=None)
    jobs: dict[str, Job] = {}
    for index, size in enumerate(sizes):
        trial = study.new_trial(index, {"learning_rate": 1e-4 * (index + 1)}, str(size), seed=0)
        jobs[trial.key] = study.job(trial, study.next_segment(trial, 160, BECAUSE), (), None)
        dispatcher.submit(jobs[trial.key])
    _, finished = collect(dispatcher, len(jobs))
    dispatcher.close()
    store = CheckpointStore(study.store)
    for event in finished.values():
        assert event.result.attempts == 1
        assert event.result.checkpoint is not None
        store.verify(event.result.checkpoint)
    notes = {key: json.loads((tmp_path / f"{key}.gpu").read_text()) for key in jobs}
    for key, (gpus, began, end) in notes.items():
        assert len(gpus.split(",")) == jobs[key].devices
        others = [other for other, start, stop in notes.values() if began < start < end]
        assert not {gpu for other in others for gpu in other.split(",")} & set(gpus.split(","))
    (whole,) = (began for key, (_, began, _) in notes.items() if jobs[key].devices == GPUS)
    first = [jobs[key].devices for key, (_, began, _) in notes.items() if began < whole]
    # The two that were submitted before it; what came later had to wait.
    assert sorted(first) == [1, 2]


@pytest.mark.usefixtures("running_ray")
def test_who_waits_for_devices_is_named_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_dispatch, "PLACEMENT_NOTICE_SECONDS", 0.0)
    study = fragile_study(tmp_path, "hang", times=1)
    dispatcher = RayDispatcher(ClusterSpec(address="local"), slots=1)
    with caplog.at_level("INFO", logger=ray_dispatch.__name__):
        for number in (7, 8):
            trial = study.new_trial(number, {"learning_rate": 1e-4 * number}, study.ladder.target.name, seed=0)
            dispatcher.submit(study.job(trial, study.next_segment(trial, 480, BECAUSE), (), None))
        wait_until(lambda: " waits for " in caplog.text, "a notice")
    dispatcher.close()
    assert "trial #8 waits for 1 devices; 1 are busy" in caplog.text


def test_programs_that_a_reward_runs_may_fail_visibly(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    study = fragile_study(tmp_path, "program", times=1)
    ray_dispatcher.submit(first_job(study))
    collect(ray_dispatcher, 1)
    assert (Path(study.spec.trainer.settings["folder"]) / "code").read_text() == "3"
    in_driver = subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=False)
    assert in_driver.returncode == 3


def closes(dispatcher: RayDispatcher) -> bool:
    """Whether `close` comes back within a reasonable time."""
    closing = threading.Thread(target=dispatcher.close, daemon=True)
    closing.start()
    closing.join(ENDING_SECONDS)
    return not closing.is_alive()


@pytest.mark.usefixtures("running_ray")
def test_a_trial_that_was_submitted_twice_does_not_keep_ray_from_closing(tmp_path: Path) -> None:
    dispatcher = RayDispatcher(ClusterSpec(address="local"), slots=1)
    job = first_job(fragile_study(tmp_path, "hang", times=2))
    dispatcher.submit(job)
    while not dispatcher.wait(0.5):
        pass
    dispatcher.submit(job)
    assert closes(dispatcher)


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_trial_that_was_submitted_twice_does_not_keep_ray_from_closing_that_never_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cancelled: bool
) -> None:
    def fail(**options: Any) -> None:
        raise ConnectionError("no memory for the object store")

    errors = SimpleNamespace(RayError=OSError, OutOfMemoryError=OSError)
    broken = SimpleNamespace(is_initialized=lambda: False, init=fail, shutdown=lambda: None, exceptions=errors)
    monkeypatch.setattr(ray_dispatch, "import_ray", lambda private: broken)
    dispatcher = RayDispatcher(ClusterSpec(address="local"), slots=1)
    job = first_job(simulated_study(tmp_path))
    dispatcher.submit(job)
    if cancelled:
        dispatcher.cancel(job.trial_key)
    dispatcher.submit(job)
    with pytest.raises(InfrastructureError, match=r"Ray did not start .*no memory for the object store"):
        collect(dispatcher, 1)
    assert closes(dispatcher)


@pytest.mark.usefixtures("running_ray")
def test_a_gpu_that_is_not_there_is_refused(ray_dispatcher: RayDispatcher, tmp_path: Path) -> None:
    greedy = RayDispatcher(ClusterSpec(address="local", gpus_per_device=1000), slots=1)
    greedy.submit(first_job(simulated_study(tmp_path / "greedy")))
    with pytest.raises(SpecError, match="needs 1000 GPUs and this machine has"):
        collect(greedy, 1)
    greedy.close()
    ray_dispatcher.submit(first_job(simulated_study(tmp_path), 1e-4))
    collect(ray_dispatcher, 1)


@pytest.mark.usefixtures("running_ray")
def test_a_machine_without_a_single_device_is_refused_before_anything_is_submitted() -> None:
    # Where nothing may begin, nothing is submitted, and the search would wait for ever.
    greedy = RayDispatcher(ClusterSpec(address="local", gpus_per_device=1000), slots=None)
    with pytest.raises(SpecError, match=r"a trial needs 1000 GPUs and this machine has 4; lower it .*RAY_ADDRESS"):
        wait_until(lambda: bool(greedy.wait(0.1)), "a refusal")
    greedy.close()


@pytest.mark.usefixtures("running_ray")
def test_a_private_instance_listens_on_loopback_only() -> None:
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:10001", "ray job submit"),
        ("http://127.0.0.1:8265", "ray job submit"),
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("127.0.0.1:port", "no Ray cluster answers"),
    ],
)
def test_a_useless_address_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RayDispatcher(ClusterSpec(address=address), slots=1)
