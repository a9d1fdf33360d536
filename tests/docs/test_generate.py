from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from jfhpo_core.study.hyperparameters import default_spaces

DOCS = Path(__file__).parents[2] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]


@pytest.mark.parametrize("file", PAGES)
def test_pages_made_from_the_code_are_up_to_date(file: str) -> None:
    assert (DOCS / "reference" / file).read_text(encoding="utf-8") == PAGES[file](), "run `python docs/generate.py`"


def test_the_page_has_every_range_of_the_default_spaces() -> None:
    page = PAGES["hyperparameters.md"]()
    for space in default_spaces().values():
        for name, parameter in space.items():
            assert f"| `{name}` |" in page
            for end in ("low", "high"):
                assert end not in parameter or f"{parameter[end]:g}" in page
