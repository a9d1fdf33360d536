from __future__ import annotations

from collections.abc import Callable

import pytest

from jfhpo_core.store.ledger import Ledger, MemoryLedger
from tests.store.ledger_conformance import LedgerConformance


class TestMemoryLedger(LedgerConformance):
    @pytest.fixture
    def reopen(self) -> Callable[[], Ledger]:
        ledger = MemoryLedger()
        return lambda: ledger
