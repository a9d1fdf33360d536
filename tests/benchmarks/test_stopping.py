"""What is said of the moment at which a search ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.stopping import PAGE, Moment, Search, compare, load, run, write


def searched(*moments: tuple[float, float, float | None], seed: int = 1) -> Search:
    return Search("table-instruct:none", seed, 1.0, tuple(Moment(*moment) for moment in moments))


FALLING = searched((2.0, 0.8, None), (4.0, 0.3, 0.2), (6.0, 0.25, 0.04), (8.0, 0.24, 0.15), (9.5, 0.24, None))


@pytest.mark.parametrize(("price", "cost"), [(0.3, 4.0), (0.1, 6.0), (0.04, 6.0), (0.01, 9.5)])
def test_a_search_ends_where_another_run_is_first_worth_no_more_than_its_price(price: float, cost: float) -> None:
    assert FALLING.stop(price).cost == cost


@pytest.mark.parametrize(("cost", "regret"), [(0.0, 1.0), (1.9, 1.0), (2.0, 0.8), (5.9, 0.3), (10.0, 0.24)])
def test_at_a_fixed_cost_it_delivers_what_it_knew_before(cost: float, regret: float) -> None:
    assert FALLING.at(cost) == regret


def test_the_rule_is_held_to_the_best_cost_in_hindsight() -> None:
    found = compare([FALLING], share=0.1)
    assert found.rule == pytest.approx(0.25 + 0.6)
    assert (found.stopped, found.best) == (6.0, 4.0)
    assert found.fixed == pytest.approx(0.3 + 0.4)
    assert found.never == pytest.approx(0.24 + 0.95)


def test_where_a_run_costs_more_than_can_be_gained_it_is_best_not_to_search() -> None:
    assert compare([FALLING], share=0.5).best == 0.0


@pytest.mark.slow
def test_searches_are_done_once_and_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.stopping.SETTINGS", ("table-instruct:shipped",))
    file = tmp_path / "stopping.jsonl"
    found = run([5], file=file)
    assert load(file) == found == run([5], file=file)
    costs = [moment.cost for moment in found[0].moments]
    assert costs == sorted(costs)
    assert any(moment.worth is not None for moment in found[0].moments)
    write(found, tmp_path)
    assert "of 4 rows" in (tmp_path / PAGE).read_text(encoding="utf-8")
