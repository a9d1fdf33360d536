from __future__ import annotations

import pytest

from jfhpo_core.trainers.base import Finding, Level
from jfhpo_core.trainers.external.memory import GIB
from jfhpo_core.trainers.external.preflight import check_gpus, check_versions
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings

TESTED = {"openrlhf": "0.11.2", "ray": "2.55.0"}


def checked(settings: OpenRlhfSettings | None = None, **found: str | None) -> list[Finding]:
    versions = {**TESTED, "flash-attn": None, **found}
    return list(check_versions(versions, TESTED, settings or OpenRlhfSettings(), "the guide"))


def test_other_versions_are_a_warning_and_missing_ones_a_failure() -> None:
    assert [finding.level for finding in checked()] == [Level.OK]
    (finding,) = checked(openrlhf="0.12.0")
    assert (finding.level, finding.message) == (
        Level.WARNING, "openrlhf is 0.12.0; the adapter was tested with 0.11.2",
    )  # fmt: skip
    (finding,) = checked(ray=None)
    assert finding.level is Level.FAILURE
    assert "ray not installed" in finding.message


def test_flash_attention_is_missing_only_where_it_is_asked_for() -> None:
    wanted = OpenRlhfSettings(attention="flash_attention_2")
    assert [finding.level for finding in checked(wanted)] == [Level.FAILURE]
    assert [finding.level for finding in checked(wanted, **{"flash-attn": "2.8.3"})] == [Level.OK]
    on_cpu = OpenRlhfSettings(attention="flash_attention_2", device="cpu")
    assert [finding.level for finding in checked(on_cpu)] == [Level.OK]


@pytest.mark.parametrize(
    ("found", "level", "message"),
    [
        ([], Level.WARNING, "none on this machine"),
        ([79 * GIB] * 2, Level.WARNING, "2 GPUs here of 79 GiB; the study asks for 4 of 80 GiB"),
        ([40 * GIB] * 8, Level.WARNING, "8 GPUs here of 40 GiB"),
        ([79 * GIB] * 8, Level.OK, "8 GPUs here of 79 GiB"),
    ],
)
def test_gpus_of_this_machine(found: list[int], level: Level, message: str) -> None:
    finding = check_gpus(4, OpenRlhfSettings(), found)
    assert finding.level is level
    assert message in finding.message
