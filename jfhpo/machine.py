"""How many devices the machine or cluster of a study has, and whether they are enough; asked by `plan`."""

from __future__ import annotations

import os
from dataclasses import replace

from jfhpo.session import INLINE
from jfhpo_core.errors import JfhpoError, SpecError
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import ClusterSpec


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


def _gpus(cluster: ClusterSpec) -> float | None:
    if cluster.gpus_per_device == 0:
        return None
    address = os.environ.get("RAY_ADDRESS", "local") if cluster.address == "auto" else cluster.address
    if address in ("local", INLINE):
        import torch

        return float(torch.cuda.device_count())
    from jfhpo_core.run.ray_instance import cluster_resources

    try:
        return cluster_resources(address).get("GPU", 0.0)
    except JfhpoError:
        return None
