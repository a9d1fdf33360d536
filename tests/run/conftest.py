"""Dispatchers for the tests of this folder: every kind, and one private Ray instance that they share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jfhpo_core import plugins
from jfhpo_core.run.dispatch import Dispatcher, InlineDispatcher
from jfhpo_core.run.ray_dispatch import RayDispatcher
from jfhpo_core.study.spec import ClusterSpec

FRAGILE = Path(__file__).parent / "fragile"
GPUS = 4
"""That Ray is told of; the dispatcher that all tests share takes none of them."""


@pytest.fixture(scope="package")
def ray_dispatcher() -> Iterator[RayDispatcher]:
    """One private Ray instance with two workers for all tests of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        # Driver and workers find the trainer `fragile` as they would find an installed distribution.
        patch.syspath_prepend(str(FRAGILE))
        patch.setenv("PYTHONPATH", f"{FRAGILE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"GPU": GPUS}))
        plugins.registered.cache_clear()
        dispatcher = RayDispatcher(ClusterSpec(address="local", segment_retries=2), slots=2)
        yield dispatcher
        dispatcher.close()
    plugins.registered.cache_clear()


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.slow)])
def dispatcher(request: pytest.FixtureRequest) -> Iterator[Dispatcher]:
    """Every dispatcher in turn."""
    if request.param == "inline":
        inline = InlineDispatcher(slots=2)
        yield inline
        inline.close()
    else:
        yield request.getfixturevalue("ray_dispatcher")
