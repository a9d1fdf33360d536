from __future__ import annotations

import pytest
from pydantic import ValidationError

from jfhpo.orchestration.study_lock import LockSettings


def test_the_environment_sets_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JFHPO_LOCK_EXPIRY_SECONDS", "300")
    assert LockSettings().expiry_seconds == 300


def test_a_lock_that_one_late_heartbeat_would_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JFHPO_LOCK_HEARTBEAT_SECONDS", "60")
    with pytest.raises(ValidationError, match="less than two heartbeats of 60 s"):
        LockSettings()
