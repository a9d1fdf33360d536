from __future__ import annotations

from collections.abc import Callable

import pytest

from jfhpo_core.ledger import Ledger, MemoryLedger
from tests.ledger.conformance import LedgerConformance


class TestMemoryLedger(LedgerConformance):
    @pytest.fixture
    def reopen(self) -> Callable[[], Ledger]:
        ledger = MemoryLedger()
        return lambda: ledger
