from __future__ import annotations

from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from jfhpo_core.ledger import Ledger
from mlflow_plugin.ledger import MlflowLedger
from tests.ledger.conformance import LedgerConformance


class TestMlflowLedger(LedgerConformance):
    @pytest.fixture
    def reopen(self, tracking_uri: str) -> Callable[[], Ledger]:
        return lambda: MlflowLedger(MlflowClient(tracking_uri=tracking_uri))
