from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo.doctor import _ray
from jfhpo.machine import lacks_gpus, with_counted_devices
from jfhpo.planning import plan
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.forecast import forecast
from jfhpo_core.study.resolved import Study
from jfhpo_core.trainers.base import Level
from tests.studies import simulated_study

FAMILY = [
    {"name": "small", "path": "simulated", "parameters": 100_000, "devices": 2},
    {"name": "large", "path": "simulated", "parameters": 1_000_000, "devices": 8},
]


def study(tmp_path: Path, parallel: int | None, address: str = "local", gpus: float = 1.0, **cluster: int) -> Study:
    return simulated_study(
        tmp_path,
        family=FAMILY,
        budget={"gpu_hours": 210, "max_parallel": parallel},
        cluster={"address": address, "gpus_per_device": gpus, **cluster},
    )


def counted(study: Study) -> int | None:
    return with_counted_devices(study).spec.cluster.devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of this machine and of a cluster."""
    count = [8]
    monkeypatch.setattr("torch.cuda.device_count", lambda: count[0])
    monkeypatch.setattr("jfhpo_core.run.ray_instance.cluster_resources", lambda _: {"GPU": float(count[0])})
    return count


@pytest.mark.parametrize("address", ["local", "head:6379"])
def test_more_devices_than_there_are_are_refused(tmp_path: Path, gpus: list[int], address: str) -> None:
    assert counted(study(tmp_path, 4, address)) == 8
    with pytest.raises(SpecError, match=r"^budget\.max_parallel: 5 trials .* need 10, and there are 8; at most 4 fit"):
        counted(study(tmp_path, 5, address))
    gpus[0] = 4
    with pytest.raises(SpecError, match=r"^family: 'large' holds 8 devices, and there are 4"):
        counted(study(tmp_path, 1, address))


def test_shares_of_gpus_are_counted(tmp_path: Path, gpus: list[int]) -> None:
    gpus[0] = 2
    assert counted(study(tmp_path, 4, gpus=0.25)) == 8


def test_the_study_may_use_less_than_there_is(tmp_path: Path, gpus: list[int]) -> None:
    gpus[0] = 64
    assert counted(study(tmp_path, None, devices=16)) == 16
    gpus[0] = 8
    assert counted(study(tmp_path, None, devices=16)) == 8


def test_where_devices_cannot_be_counted_nothing_is_refused(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counted(study(tmp_path, 500, gpus=0.0)) is None

    def away(_: str) -> dict[str, float]:
        raise SpecError("cluster.address: no cluster answers")

    monkeypatch.setattr("jfhpo_core.run.ray_instance.cluster_resources", away)
    assert counted(study(tmp_path, 500, "head:6379")) is None
    gpus[0] = 0
    assert counted(study(tmp_path, 500)) is None


@pytest.mark.parametrize("parallel", [None, 1, 4])
def test_no_forecast_beats_the_hardware(tmp_path: Path, gpus: list[int], parallel: int | None) -> None:
    bills = forecast(with_counted_devices(study(tmp_path, parallel)), [])
    assert bills.total.seconds >= 210 * 3600
    assert bills.wall().seconds >= bills.total.seconds / 8


def test_gpus_that_this_machine_lacks_are_told_unless_a_cluster_is_named(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jfhpo.machine.NVIDIA", tmp_path / "none")
    wanted = study(tmp_path, None, "auto")
    assert lacks_gpus(wanted.spec.cluster) is None
    gpus[0] = 0
    said = lacks_gpus(wanted.spec.cluster)
    assert said is not None
    assert "RAY_ADDRESS" in said
    assert [one.message for one in plan(wanted.spec).findings if one.level is Level.WARNING] == [said]
    (found,) = _ray(wanted)
    assert (found.level, found.message) == (Level.FAILURE, said)
    assert lacks_gpus(study(tmp_path, None, "auto", gpus=0.0).spec.cluster) is None
    assert lacks_gpus(study(tmp_path, None, "head:6379").spec.cluster) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert lacks_gpus(wanted.spec.cluster) is None
