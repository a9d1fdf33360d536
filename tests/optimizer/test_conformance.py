"""The strategies of this package that are no peers; those are in tests/peers."""

from __future__ import annotations

from typing import Any

import pytest

from jfhpo.testing import StrategyConformance

CHEAP = {"pool": 64, "fresh": 6, "local": 6, "continued": 8}
"""Fewer candidates than by default: the contract is the same, the searches are shorter."""


class TestRandomSearch(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> str:
        return "random"


@pytest.mark.slow
class TestJointFidelity(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> dict[str, Any]:
        return {"name": "jfhpo", "settings": CHEAP}


@pytest.mark.slow
class TestPaperStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> str:
        return "paper"
