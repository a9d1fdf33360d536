from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo.testing.strategies import search
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.strategy import load_strategy
from tests.peers.test_peers import peer_study


def test_a_single_rung_is_refused(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "dehb", fidelity={"horizon_prompts": 480, "rungs": 1})
    with pytest.raises(SpecError, match=r"fidelity\.rungs: .*at least two rungs.*\[480\]"):
        load_strategy(study)


def test_brackets_follow_hyperband(tmp_path: Path) -> None:
    _, recorded = search(peer_study(tmp_path, "dehb", seconds=400))
    asked = [proposal.stop_prompts for _, _, _, proposal in recorded.calls if proposal]
    assert asked[:13] == [48] * 9 + [160] * 3 + [480]
    assert asked[13] == 160, "the second bracket begins at the second rung"
