from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings

# Read by torch and NumPy when they are first imported. The tests fill the cores with processes; more threads than cores
# wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A loaded machine is slow, not wrong.
settings.register_profile("jfhpo", deadline=None)
settings.load_profile("jfhpo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with one of them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
