from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import why
from benchmarks.why import FILE, Outcomes


def test_the_page_counts_what_is_true_and_lists_what_is_not(tmp_path: Path) -> None:
    found = [
        Outcomes(1, {"boundaries": 2}, [], top=True, boundary=True, blamed=False, named=(3, 3), passed=0),
        Outcomes(
            2,
            {"boundaries": 1, "pairs": 1},
            ["pairs: x"],
            top=False,
            boundary=None,
            blamed=False,
            named=(1, 0),
            passed=0,
        ),
    ]
    why.write(found, tmp_path)
    text = (tmp_path / why.PAGE).read_text(encoding="utf-8")
    assert (
        "| the three hyperparameters listed first are the most important ones | 1 of 2 (50%) | 95% | missed |" in text
    )
    assert "is said to be among the three most important ones is one of them | 3 of 4 (75%) | 95% | missed |" in text
    assert "| all | 4 | 1 |" in text
    assert "all three on 1 of these, two on 0, one on 1 and none on 0" in text
    assert "- 2: pairs: x" in text


@pytest.mark.slow
def test_no_sentence_about_a_landscape_is_false(tmp_path: Path) -> None:
    outcome = why.measure(1000, tmp_path)
    assert sum(outcome.judged.values()) >= 3
    assert outcome.false == []


def test_of_the_recorded_sentences_few_are_false() -> None:
    """The page states them; a rise would be a regression of what is said."""
    found = why.load(FILE)
    judged = sum(sum(item.judged.values()) for item in found)
    assert judged
    assert sum(len(item.false) for item in found) <= 0.05 * judged
