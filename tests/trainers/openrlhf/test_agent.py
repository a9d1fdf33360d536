"""Our part of the rollouts, in OpenRLHF's environment but without engines: who may sample when, and what is scored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.study import scoring
from jfhpo_core.trainers.external.process import environment
from jfhpo_core.trainers.openrlhf.settings import OpenRlhfSettings
from jfhpo_core.trainers.openrlhf.training import AGENT

pytestmark = [pytest.mark.openrlhf, pytest.mark.slow]

PREPARE = """
import asyncio, importlib.util, json, os
from pathlib import Path
from types import SimpleNamespace

folder = Path(os.environ["FOLDER"])
spec = importlib.util.spec_from_file_location("agent_module", folder / "agent.py")
agent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agent)
said = {}

def control(released, evaluate=None, beat=0):
    agent.write_json(folder / "control.json", {"released": released, "evaluate": evaluate, "beat": beat})

async def waits(task):
    await asyncio.sleep(0.5)
    return not task.done()
"""

ADMISSION = f"""{PREPARE}
async def main():
    coordinator = agent._Coordinator(str(folder))
    control(-1, evaluate=0)
    first = asyncio.create_task(coordinator.admit(70))
    said["asked"] = await first
    again, other = (asyncio.create_task(coordinator.admit(place)) for place in (70, 11))
    said["held while evaluating"] = await waits(again) and await waits(other)
    coordinator.report([(row, 1.0, False, row == 1, None if n else f"text {{row}}") for row, n in said["asked"]])
    said["held until released"] = await waits(again) and await waits(other)
    control(0, evaluate=0)
    said["first step"] = [await again, await other]
    later = asyncio.create_task(coordinator.admit(42))
    said["second step is held"] = await waits(later)
    control(1, evaluate=0)
    said["second step"] = await later

asyncio.run(main())
print("SAID" + json.dumps(said))
"""

ORPHAN = f"""{PREPARE}
async def main():
    coordinator = agent._Coordinator(str(folder))
    control(-1)
    try:
        await coordinator.admit(1)
    except RuntimeError as error:
        said["ended"] = str(error)

asyncio.run(main())
print("SAID" + json.dumps(said))
"""

REWARD = f"""{PREPARE}
class Tokenizer:
    def __call__(self, text, add_special_tokens): return {{"input_ids": [1, 2]}}
    def decode(self, tokens, skip_special_tokens): return "".join(map(str, tokens))

class Engine:
    async def generate(self, ids, params):
        answer = SimpleNamespace(token_ids=[3, 4], finish_reason="length", logprobs=None)
        return SimpleNamespace(outputs=[answer])

async def main():
    for name in ("good", "raising", "silly", "hanging"):
        function = {{"reference": str(folder / f"{{name}}.py"), "weight": 1.0, "constants": {{}}}}
        pool = agent.scoring.Pool([function], 2.0 if name == "hanging" else 60.0, 0.25, folder / "reward.log")
        sample = agent._Sampling(Engine(), Tokenizer(), 8, pool)
        try:
            params = SimpleNamespace(max_tokens=2, logprobs=None)
            said[name], said[name + " text"] = await sample("p", {{"prompt": "p", "answer": "34"}}, params)
        except RuntimeError as error:
            said[name] = str(error)
    try:
        await sample("p", {{"prompt": "p"}}, SimpleNamespace(max_tokens=7, logprobs=None))
    except RuntimeError as error:
        said["too long"] = str(error)

asyncio.run(main())
print("SAID" + json.dumps(said))
"""


@pytest.fixture
def run(trainer_python: str, tmp_path: Path) -> Any:
    shutil.copyfile(AGENT, tmp_path / "agent.py")
    shutil.copyfile(scoring.__file__, tmp_path / "scoring.py")
    plan = {
        "reward": [],
        "reward_timeout_seconds": 10.0,
        "reward_timeout_score": 0.0,
        "start_step": 0,
        "prompts": 2,
        "samples": 4,
        "heldout": [{"prompt": "a"}, {"prompt": "b"}],
        "heldout_samples": 2,
        "heldout_temperature": 1.0,
        "heldout_seed": 5,
        "kept_completions": 3,
        "chat_template": False,
        "orphan_seconds": 1.0,
    }

    def execute(program: str, **changes: Any) -> dict[str, Any]:
        (tmp_path / "plan.json").write_text(json.dumps({**plan, **changes}))
        variables = {**environment(OpenRlhfSettings(device="cpu"), dict(os.environ), 1), "FOLDER": str(tmp_path)}
        done = subprocess.run(
            [trainer_python, "-c", program], env=variables, capture_output=True, text=True, timeout=300, check=False
        )
        assert "SAID" in done.stdout, done.stderr[-3000:]
        said: dict[str, Any] = json.loads(done.stdout.rpartition("SAID")[2])
        return said

    return execute


def test_rollouts_wait_for_the_driver_and_evaluate_when_asked(run: Any, tmp_path: Path) -> None:
    said = run(ADMISSION, orphan_seconds=100.0)
    assert said["asked"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert said["held while evaluating"]
    assert said["held until released"]
    assert said["first step"] == [None, None]
    assert said["second step is held"]
    assert said["second step"] is None
    written = json.loads((tmp_path / "evaluation-at-0.json").read_text())
    assert written["rewards"] == [[0, 1.0], [0, 1.0], [1, 1.0], [1, 1.0]]
    assert written["timed_out"] == 2
    assert written["completions"] == [[0, "text 0", 1.0], [1, "text 1", 1.0]]


def test_a_training_without_a_driver_ends(run: Any) -> None:
    assert "the driver is gone" in run(ORPHAN)["ended"]


def test_rewards_see_completions_and_their_failures_are_not_swallowed(run: Any, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        "def reward(prompts, completions, answer):\n    return [float(completions == answer and prompts == ['p'])]\n"
    )
    (tmp_path / "raising.py").write_text("def reward(**_):\n    raise ValueError('broken')\n")
    (tmp_path / "silly.py").write_text("def reward(**_):\n    return [float('nan')]\n")
    (tmp_path / "hanging.py").write_text("def reward(**_):\n    return [9**9**9**9]\n")
    said = run(REWARD)
    assert (said["good"]["reward"], said["good"]["extra_logs"]) == (1.0, {"reward_timeouts": 0.0})
    assert (said["hanging"]["reward"], said["hanging"]["extra_logs"]) == (0.25, {"reward_timeouts": 1.0})
    assert said["good"]["truncated"] is True
    assert said["good text"] == "34"
    assert said["good"]["action_ranges"] == [[2, 4]]
    assert said["raising"].startswith("jfhpo: the reward failed: ")
    assert "raising.py raised ValueError: broken" in said["raising"]
    assert "silly.py returned nan for completion 0 of 1" in said["silly"]
    assert "exceed the length of 8" in said["too long"]
