"""Which devices the machine or cluster of a study has, and whether they are enough; asked by `plan` and `doctor`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from jfhpo.session import INLINE
from jfhpo_core.errors import JfhpoError, SpecError
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import ClusterSpec

LOCAL = "local"

NVIDIA = Path("/proc/driver/nvidia/gpus")
"""The kernel has a folder for each GPU here, whether or not the torch that is installed could use it."""


def with_counted_devices(study: Study) -> Study:
    """The study with the number of devices that it can use at a time, so that no forecast beats the hardware.

    It stays as it is where they cannot be counted from here: CPUs, which may be shared, a cluster that is not up yet,
    or a machine without GPUs, from which the search will hardly be run.

    Raises:
        SpecError: The largest model, or as many of the smallest as `budget.max_parallel` says, do not fit.
    """
    cluster, models, parallel = study.spec.cluster, study.ladder.models, study.spec.budget.max_parallel
    known = [] if cluster.devices is None else [cluster.devices]
    if gpus := _gpus(cluster):
        known.append(int(gpus / cluster.gpus_per_device))
    if not known:
        return study
    there = min(known)
    largest, smallest = (choose(models, key=lambda model: model.devices) for choose in (max, min))
    if largest.devices > there:
        raise SpecError(
            f"family: {largest.name!r} holds {largest.devices} devices, and there are {there}; give it fewer, add "
            "some, or correct cluster.devices"
        )
    if parallel is not None and parallel * smallest.devices > there:
        raise SpecError(
            f"budget.max_parallel: {parallel} trials of at least {smallest.devices} device(s) need "
            f"{parallel * smallest.devices}, and there are {there}; at most {there // smallest.devices} fit"
        )
    counted = cluster.model_copy(update={"devices": there})
    return replace(study, spec=study.spec.model_copy(update={"cluster": counted}))


def address_of(cluster: ClusterSpec) -> str:
    """Where trials will run: 'inline', 'local', or the address of a cluster."""
    return (os.environ.get("RAY_ADDRESS") or LOCAL) if cluster.address == "auto" else cluster.address


def lacks_gpus(cluster: ClusterSpec) -> str | None:
    """What to say if trials want GPUs, would run on this machine, and it has none."""
    if cluster.gpus_per_device == 0 or address_of(cluster) != LOCAL or _gpus(cluster) or any(NVIDIA.glob("*")):
        return None
    return (
        f"cluster.gpus_per_device is {cluster.gpus_per_device:g}, no address of a cluster is given, and this machine "
        "has no GPU: a search begun here would be refused. Run it where there are GPUs, give the address of a cluster "
        "(cluster.address, or RAY_ADDRESS in the environment), or train on CPUs (leave gpus_per_device out)"
    )


def _gpus(cluster: ClusterSpec) -> float | None:
    if cluster.gpus_per_device == 0:
        return None
    address = address_of(cluster)
    if address in (LOCAL, INLINE):
        import torch

        return float(torch.cuda.device_count())
    from jfhpo_core.run.ray_instance import cluster_resources

    try:
        return cluster_resources(address).get("GPU", 0.0)
    except JfhpoError:
        return None
