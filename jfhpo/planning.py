"""A study that is checked before anything is spent on it, with its bill and its prospects; for command line and MCP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jfhpo.machine import lacks_gpus, with_counted_devices
from jfhpo.places import check_places
from jfhpo.session import informed, recorded
from jfhpo_core.optimizer.forecast import Forecast, Quality, forecast, forecast_quality, parse_more, with_more
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.preflight import doubts, refuse_unusable
from jfhpo_core.run.standing import rank
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.trainers.base import Finding, Level


@dataclass(frozen=True)
class Prospect:
    """What a budget still costs, and what should come of it.

    Attributes:
        quality: Forecast of the final score; None if there is none yet.
    """

    study: Study
    bills: Forecast
    quality: Quality | None


@dataclass(frozen=True)
class Plan:
    """A study that is usable.

    Attributes:
        larger: The same with the larger budget that was asked about; None if none was.
        findings: What the rehearsal found, warnings among them.
        notes: Which earlier studies it learns from, and why.
    """

    now: Prospect
    larger: Prospect | None
    findings: Sequence[Finding]
    notes: Sequence[str]


def plan(spec: StudySpec, more: str | None = None) -> Plan:
    """Check a study and forecast its bill and its final score. Spends and writes nothing.

    Args:
        spec: The study.
        more: A budget to be added, e.g. "2.5" (GPU-hours) or "600s"; None forecasts only what the study has.

    Raises:
        SpecError: The study is not usable, or `more` is no budget.
        LedgerError: The ledger holds a different study of this name, or data that it was begun with have changed.
    """
    notes: list[str] = []
    study = informed(resolve(spec), notes.append)
    check_places(spec)
    study = with_counted_devices(study)
    findings = [*refuse_unusable(study), *doubts(study)]
    if (lack := lacks_gpus(spec.cluster)) is not None:
        findings.append(Finding(Level.WARNING, "gpus", lack))
    larger = with_more(study, parse_more(more)) if more is not None else None
    ledger = recorded(study)
    if ledger is not None:
        ledger.refuse_changes()
    trials = ledger.trials() if ledger is not None else []
    ranked = rank(study, load_strategy(study), trials)
    now, then = (
        Prospect(one, forecast(one, trials), forecast_quality(one, ranked, trials)) if one is not None else None
        for one in (study, larger)
    )
    assert now is not None
    return Plan(now, then, findings, notes)


def prospect(result: SearchResult) -> Prospect | None:
    """What is left of a study; None if it is complete."""
    if result.complete:
        return None
    study, trials = result.study, result.trials
    ranked = rank(study, load_strategy(study), trials)
    return Prospect(study, forecast(study, trials), forecast_quality(study, ranked, trials))
