from __future__ import annotations

from collections.abc import Callable

import pytest

from jfhpo.testing.ledgers import LedgerConformance
from jfhpo_core.store.ledger import Ledger, MemoryLedger


class TestMemoryLedger(LedgerConformance):
    @pytest.fixture
    def reopen(self) -> Callable[[], Ledger]:
        ledger = MemoryLedger()
        return lambda: ledger
