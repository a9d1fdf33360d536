"""How many devices the machine or cluster of a study has, and whether they are enough; asked by `plan`."""

from __future__ import annotations

import os

from jfhpo.session import INLINE
from jfhpo_core.errors import JfhpoError, SpecError
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import ClusterSpec


def check_devices(study: Study) -> int | None:
    """Refuse a study that asks for more GPUs than there are.

    Returns:
        Devices that there are; None where that cannot be told from here: CPUs, which may be shared, a cluster that is
        not up yet, or a machine without GPUs, from which the search will hardly be run.

    Raises:
        SpecError: The largest model, or as many of the smallest as `budget.max_parallel` says, do not fit.
    """
    cluster, models = study.spec.cluster, study.ladder.models
    gpus = _gpus(cluster)
    if not gpus:
        return None
    there = int(gpus / cluster.gpus_per_device)
    largest, smallest = (choose(models, key=lambda model: model.devices) for choose in (max, min))
    if largest.devices > there:
        raise SpecError(
            f"family: {largest.name!r} holds {largest.devices} devices of {cluster.gpus_per_device:g} GPUs, and there "
            f"are {gpus:g} GPUs; add some, or give it fewer devices"
        )
    parallel = study.spec.budget.max_parallel
    if parallel and parallel * smallest.devices > there:
        raise SpecError(
            f"budget.max_parallel: {parallel} trials of at least {smallest.devices} device(s) need "
            f"{parallel * smallest.devices * cluster.gpus_per_device:g} GPUs, and there are {gpus:g}; at most "
            f"{there // smallest.devices} fit"
        )
    return there


def _gpus(cluster: ClusterSpec) -> float | None:
    if cluster.gpus_per_device == 0:
        return None
    address = os.environ.get("RAY_ADDRESS", "local") if cluster.address == "auto" else cluster.address
    if address in ("local", INLINE):
        import torch

        return float(torch.cuda.device_count())
    from jfhpo_core.run.ray_dispatch import cluster_resources

    try:
        return cluster_resources(address).get("GPU", 0.0)
    except JfhpoError:
        return None
