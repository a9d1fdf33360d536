"""`jfhpo doctor`: is everything there that a search will need? Starts no run and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from jfhpo.machine import LOCAL, address_of, lacks_gpus
from jfhpo.session import INLINE, informed, recorded
from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.report.text import without_credentials
from jfhpo_core.run.preflight import doubts, examine
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers.base import Finding, Level, failing_as


def diagnose(spec: StudySpec) -> Iterator[Finding]:
    """All findings about a study, as they come."""
    yield from failing_as("study", _study(spec))


def _study(spec: StudySpec) -> Iterator[Finding]:
    study = informed(resolve(spec))
    load_strategy(study)
    sizes = ", ".join(f"{model.name} ({model.parameters:,})" for model in study.ladder.models)
    yield Finding(Level.OK, "study", f"{spec.study}: {sizes}; trainer {spec.trainer.name}")
    yield from examine(study)
    yield from doubts(study)
    yield _ledger(study)
    yield from failing_as("ray", _ray(study))


def _ledger(study: Study) -> Finding:
    try:
        ledger = recorded(study)
        if ledger is not None:
            ledger.refuse_changes()
    except LedgerError as error:
        return Finding(Level.FAILURE, "ledger", str(error))
    except Exception as error:  # noqa: BLE001  whatever its client raises
        return Finding(
            Level.FAILURE, "ledger", f"MLflow does not answer: {without_credentials(str(error))}; check tracking.uri"
        )
    known = "holds no such study yet" if ledger is None else f"holds {len(ledger.trials())} trials of it"
    return Finding(Level.OK, "ledger", f"MLflow answers and {known}")


def _ray(study: Study) -> Iterator[Finding]:
    """Whether the cluster answers and has what the study asks of it."""
    spec = study.spec
    address = address_of(spec.cluster)
    if address == INLINE:
        yield Finding(Level.OK, "ray", "not used: trials run in the driver's own process")
        return
    if (lack := lacks_gpus(spec.cluster)) is not None:
        yield Finding(Level.FAILURE, "ray", lack)
        return
    if address == LOCAL:
        yield Finding(Level.OK, "ray", "a private instance on this machine will be started")
        return
    from jfhpo_core.run.ray_instance import cluster_resources

    resources = cluster_resources(address)
    devices = max(model.devices for model in study.ladder.models)
    wanted = {"GPU": spec.cluster.gpus_per_device * devices, "CPU": spec.cluster.cpus_per_device * devices}
    there = f"{resources.get('GPU', 0.0):g} GPUs and {resources.get('CPU', 0.0):g} CPUs at {address}"
    for unit, needed in wanted.items():
        if resources.get(unit, 0.0) < needed:
            raise SpecError(f"{there}, and the largest trial needs {needed:g} {unit}s; add nodes")
    yield Finding(Level.OK, "ray", there)
