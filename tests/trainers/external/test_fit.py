"""An out-of-memory is first the placement's fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import InfrastructureError, SpecError, TrialFailure
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.trial import FailureKind
from jfhpo_core.trainers.base import Job
from jfhpo_core.trainers.external.fit import Fit, check_models, demand_of
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from tests.trainers.openrlhf.conftest import job, study

MEMORY = TrialFailure(FailureKind.OUT_OF_MEMORY, "out of GPU memory")


def large(folder: Path, *, retries: int = 2, gpus_per_device: float = 1.0) -> Job:
    """A job of 7B on four GPUs."""
    cluster = {"gpus_per_device": gpus_per_device, "segment_retries": retries}
    base = job(study(cluster=cluster), folder, devices=4)
    return base.model_copy(update={"parameters": 7_615_616_512, "model_path": "nobody/has-this"})


def run_out(task: Job, settings: OpenRlhfSettings) -> Fit:
    fit = Fit.of(task, settings)
    with fit.answering_for_memory():
        raise MEMORY
    return fit


def test_the_next_attempt_is_placed_more_safely(tmp_path: Path) -> None:
    task, settings = large(tmp_path), OpenRlhfSettings()
    first = Fit.of(task, settings)
    for level in (1, 2):
        with pytest.raises(InfrastructureError, match="next attempt leaves more memory free"):
            run_out(task, settings)
        assert Fit.of(task, settings).safety == level
    last = Fit.of(task, settings)
    assert last.placement.rollout_bytes < first.placement.rollout_bytes
    # After the last level the configuration is to blame.
    with pytest.raises(TrialFailure) as failure:
        run_out(task, settings)
    assert failure.value.kind is FailureKind.OUT_OF_MEMORY
    # Another model of the family begins anew.
    assert Fit.of(task.model_copy(update={"model": "l"}), settings).safety == 0


@pytest.mark.parametrize(
    ("retries", "settings"),
    [(0, {}), (2, {"micro_batch": 1, "vllm_memory_share": 0.3, "zero_stage": 2})],
)
def test_without_another_attempt_or_placement_it_counts_at_once(
    tmp_path: Path, retries: int, settings: dict[str, Any]
) -> None:
    with pytest.raises(TrialFailure):
        run_out(large(tmp_path, retries=retries), OpenRlhfSettings.model_validate(settings))


def test_other_failures_are_as_they_are(tmp_path: Path) -> None:
    fit = Fit.of(large(tmp_path), OpenRlhfSettings())
    with pytest.raises(TrialFailure, match="reward"), fit.answering_for_memory():
        raise TrialFailure(FailureKind.REWARD, "the reward failed")
    assert not fit.memo.exists()


def test_what_did_for_one_configuration_may_not_do_for_another(tmp_path: Path) -> None:
    # 6.5B on two GPUs fit, but not with less memory than there is.
    task = large(tmp_path).model_copy(update={"devices": 2, "parameters": 6_500_000_000})
    settings = OpenRlhfSettings(offload_optimizer=False)
    memo = Fit.of(task, settings).memo
    memo.parent.mkdir(parents=True)
    memo.write_text('{"safety": 1}')
    assert Fit.of(task, settings).safety == 0


def test_devices_may_be_parts_of_a_gpu(tmp_path: Path) -> None:
    spec = study(
        cluster={"gpus_per_device": 0.5},
        family=[
            {"name": "m", "path": "a/b", "parameters": 500_000_000, "devices": 1},
            {"name": "l", "path": "a/c", "parameters": 7_000_000_000, "devices": 16},
        ],
    )
    small, target = (demand_of(spec, OpenRlhfSettings(), model, reference=True) for model in build_ladder(spec).models)
    assert (small.gpus, small.share) == (1, 0.5)
    assert (target.gpus, target.share) == (8, 1.0)


def test_settings_of_a_model_that_there_is_not() -> None:
    with pytest.raises(SpecError, match="there is no model 'x'; the study has m, l"):
        check_models(study(), OpenRlhfSettings.model_validate({"models": {"x": {"micro_batch": 2}}}))
