"""Searches that are disturbed, with real processes. `python -m benchmarks faults` does so hundreds of times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.campaign import Campaign, Disturbance, Unreliable
from benchmarks.faults.command import SCENARIOS, disturb_command
from benchmarks.faults.records import Kind, Place
from benchmarks.faults.run import disturb_seed
from benchmarks.faults.studies import pieces, study_of, undisturbed
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StrategySpec


@pytest.mark.parametrize("how", [Disturbance(duplicates=True), Disturbance(late=True)])
def test_what_comes_twice_or_late_counts_once(tmp_path: Path, how: Disturbance) -> None:
    study = resolve(study_of(3, tmp_path).model_copy(update={"strategy": StrategySpec(name="random")}))
    found = []
    for disturbance in (Disturbance(), how):
        ledger = MemoryLedger()
        run_search(study, ledger, Unreliable(InlineDispatcher(2), ledger, disturbance))
        found.append(pieces(ledger.trials()))
    assert len(found[0]) > 3
    assert found[0] == found[1]


@pytest.mark.slow
def test_what_does_not_hold_is_noticed(tmp_path: Path) -> None:
    campaign = Campaign(5, tmp_path / "disk", "inline", kinds=())
    campaign.folder.mkdir()
    spec = study_of(5, campaign.folder)
    calm = undisturbed(5)
    assert campaign.run(most=0) == []
    assert campaign._violations(spec, calm) == []
    assert campaign._violations(spec, calm[1:]) != []
    assert campaign._violations(spec, [*calm, calm[-1]]) != []
    with campaign._journal.open("a") as journal:
        journal.write("0 0123456789abcdef\n")
    assert campaign._violations(spec, calm) == ["1 acknowledged result(s) are missing or changed"]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "place", "most"), [(0, "inline", 3), (4, "ray", 1), (2, "server", 1)])
def test_a_disturbed_search_loses_nothing_repeats_nothing_and_leaves_nothing(
    seed: int, place: Place, most: int
) -> None:
    records = disturb_seed(seed, place, most)
    assert len(records) >= most
    assert [record.violations for record in records if record.violations] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SCENARIOS if kind not in ("store-locked", "many-trials")])
def test_what_a_person_does_at_the_command_line_loses_nothing_and_is_answered(tmp_path: Path, kind: Kind) -> None:
    (record,) = disturb_command(3, kind, tmp_path)
    assert record.violations == ()
