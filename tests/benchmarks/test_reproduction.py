"""The live reproduction: on a target that is a copy of a small model, and the page from made-up results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import reproduction
from benchmarks.reproduction import Live
from jfhpo_core.embedded import family_folder


def live(label: str, seed: int, fresh: float, spent: float = 800.0, trials: int = 8, **other: object) -> Live:
    content: dict[str, object] = {
        "label": label,
        "seed": seed,
        "configuration": {"learning_rate": 1e-4},
        "chosen_score": fresh + 0.02,
        "fresh_score": fresh,
        "standard_error": 0.01,
        "budget_seconds": 800.0,
        "spent_seconds": spent,
        "training_seconds": 100.0,
        "search_trials": {"s": trials - 2, "m": 1, "xl": 1},
        "stopped": 1,
        "continued": 2,
        "completions": 8000,
        "commit": "abc",
        "versions": {"torch": "x"},
        "processor": "a processor, 2 cores",
    }
    return Live.model_validate({**content, **other})


def test_the_page_compares_the_same_seeds_and_says_what_a_trial_costs(tmp_path: Path) -> None:
    found = [
        live("full", 1, 0.7, trials=40),
        live("full", 2, 0.8, trials=40),
        live("bohb", 1, 0.6, trials=10),
        live("no-proxies", 1, 0.65),
        live("no-proxies", 3, 0.99),
        live("verl-recipe", 1, 0.3, trials=3),
    ]
    reproduction.write({(item.label, item.seed): item for item in found}, tmp_path)
    page = (tmp_path / reproduction.PAGE).read_text()
    accuracy, cost, parts = (section.split("\n## ")[0] for section in page.split("\n## ")[1:4])
    assert "Seeds: 1, 2, 3." in page
    assert "| BOHB | 0.600 | 0.600 | 0.620 | -0.100 |" in accuracy
    assert "| VeRL's recipe | 0.300 | 0.300 | 0.320 | -0.400 |" in accuracy
    assert "0.700, 0.800" in accuracy
    assert "without proxies" not in accuracy
    # 20 seconds per trial: a full training of the target has 800 / 8 of them, a trial of BOHB 80.
    assert "| jfhpo | 38.0 on s, 1.0 on m, 1.0 on xl | 100% | 20 | 5.0 | 4.0 | 10 |" in cost
    assert "VeRL" not in cost
    assert "| without proxies: every trial on the target |" in parts
    assert "0.650, 0.990" in parts
    assert "| -0.050 |" in parts


def test_a_second_training_that_failed_counts_as_nothing(tmp_path: Path) -> None:
    found = [live("full", 1, 0.7), live("bohb", 1, 0.6), live("bohb", 2, 0.8, fresh_score=None)]
    reproduction.write({(item.label, item.seed): item for item in found}, tmp_path)
    accuracy = (tmp_path / reproduction.PAGE).read_text().split("\n## ")[1]
    assert f"| BOHB | {reproduction.mean_text([0.6, 0.0])} | 0.600, failed |" in accuracy
    assert "| -0.100 |" in accuracy


def test_a_seed_that_was_looked_at_is_called_so(tmp_path: Path) -> None:
    pages = []
    for seed in (*reproduction.LOOKED_AT, max(reproduction.LOOKED_AT) + 1):
        reproduction.write({("full", seed): live("full", seed, 0.7)}, tmp_path)
        pages.append((tmp_path / reproduction.PAGE).read_text())
    assert [reproduction.NOT_BLIND in page for page in pages] == [True, True, False]


def test_a_mean_comes_with_its_t_interval() -> None:
    assert reproduction.mean_text([]) == "none"
    assert reproduction.mean_text([0.5]) == "0.500"
    # Two values 0.2 apart: their mean's standard error is 0.1, and t(0.975, 1) is 12.706.
    assert reproduction.mean_text([0.4, 0.6]) == "0.500 ± 1.271"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the benchmark's processes; several threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_recipe_is_trained_with_two_seeds_and_scored_on_unseen_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "STEPS", 8)
    monkeypatch.setattr(reproduction, "RUNGS", 2)
    shutil.copytree(family_folder(reproduction.TASK) / "sm", tmp_path / "families" / reproduction.TASK / "xl")
    done, trials = reproduction.search(
        reproduction.YARDSTICK, 3, reproduction.RECIPE_BUDGET, tmp_path / "search", tmp_path
    )
    assert done.configuration == reproduction.RECIPES[reproduction.YARDSTICK]
    assert done.search_trials == {"s": 0, "xl": 1}
    assert done.completions == 8 * reproduction.PROMPTS_PER_STEP * 8
    assert done.chosen_score is not None
    assert done.fresh_score is not None
    assert done.standard_error is not None
    assert 0.2 < done.fresh_score < 0.6
    assert 0 < done.standard_error < 0.03
    assert [trial.purpose for trial in trials] == ["search", "confirmation"]
    again, _ = reproduction.search(reproduction.YARDSTICK, 3, reproduction.RECIPE_BUDGET, tmp_path / "search", tmp_path)
    assert again == done
