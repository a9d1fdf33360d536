"""Conformance suites, with pytest, for what other packages may add to jfhpo.

Derive a test class from a suite, and give the fixture that it asks for:

    class TestMyTrainer(TrainerConformance):
        @pytest.fixture
        def case(self) -> TrainerCase: ...

They need the extra `jfhpo[testing]`.
"""

import pytest

pytest.register_assert_rewrite(*(f"jfhpo.testing.{suite}" for suite in ("ledgers", "rules", "strategies", "trainers")))

from jfhpo.testing.ledgers import LedgerConformance  # noqa: E402  only what is imported later is rewritten
from jfhpo.testing.rules import RuleConformance  # noqa: E402
from jfhpo.testing.strategies import StrategyConformance  # noqa: E402
from jfhpo.testing.trainers import Case as TrainerCase  # noqa: E402
from jfhpo.testing.trainers import TrainerConformance  # noqa: E402

__all__ = ["LedgerConformance", "RuleConformance", "StrategyConformance", "TrainerCase", "TrainerConformance"]
