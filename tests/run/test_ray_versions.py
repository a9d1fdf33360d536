"""Versions of Ray. Ray reads its settings when it is imported, so it is imported by the test that needs it alone."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from jfhpo_core.run.ray_versions import version_mismatch

HERE = version("ray")


@pytest.mark.slow
@pytest.mark.parametrize(("cluster", "python"), [("2.40.0", platform.python_version()), (HERE, "3.8.1")])
def test_both_versions_are_named(cluster: str, python: str) -> None:
    message = said_by_ray(cluster, python)
    said = version_mismatch(RuntimeError(message))
    assert said is not None
    assert f"the cluster runs Ray {cluster} with Python {python}, and here is Ray {HERE}" in said
    assert f"'ray[default]=={cluster}'" in said


def said_by_ray(cluster: str, python: str) -> str:
    """What Ray itself says of a cluster of other versions, asked in a process of its own."""
    program = (
        "from ray._private.utils import check_version_info\n"
        "try:\n"
        f"    info = {{'ray_version': {cluster!r}, 'python_version': {python!r}}}\n"
        "    check_version_info(info, '10.0.0.1', raise_on_mismatch=True)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_other_errors_are_not_about_versions() -> None:
    assert version_mismatch(ConnectionError("Could not find any running Ray instance")) is None
