from __future__ import annotations

import platform

import pytest
import ray
from ray._private.utils import check_version_info

from jfhpo_core.run.ray_versions import version_mismatch


@pytest.mark.parametrize(("cluster", "python"), [("2.40.0", platform.python_version()), (ray.__version__, "3.8.1")])
def test_both_versions_are_named(cluster: str, python: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": cluster, "python_version": python}, "10.0.0.1", raise_on_mismatch=True)
    said = version_mismatch(raised.value)
    assert said is not None
    assert f"the cluster runs Ray {cluster} with Python {python}, and here is Ray {ray.__version__}" in said
    assert f"'ray[default]=={cluster}'" in said


def test_other_errors_are_not_about_versions() -> None:
    assert version_mismatch(ConnectionError("Could not find any running Ray instance")) is None
