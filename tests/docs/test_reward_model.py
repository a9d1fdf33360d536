"""The reward of docs/how-to/own-task.md that asks a served reward model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.study.spec import TaskSpec
from jfhpo_core.study.tasks import load_task

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-task.md"


class Scorer(BaseHTTPRequestHandler):
    """Answers as `openrlhf.cli.serve_rm` does: the longer, the better."""

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"rewards": [float(len(query)) for query in asked["query"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Scorer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/get_reward"
        server.shutdown()
        thread.join()


def test_a_reward_may_ask_a_served_model(tmp_path: Path, url: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "rewards.py").write_text(next(block for block in blocks if "class RewardModel" in block))
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name} one"}}\n{{"prompt": "{name} two"}}\n')
    task = load_task(
        TaskSpec.model_validate(
            {
                "prompts": str(tmp_path / "train.jsonl"),
                "heldout": str(tmp_path / "heldout.jsonl"),
                "reward": {"function": f"{tmp_path}/rewards.py:RewardModel", "kwargs": {"url": url}},
                "reward_timeout_seconds": 600,
                "max_completion_tokens": 8,
            }
        )
    )
    with task.reward.logging_to(tmp_path / "reward.log") as reward:
        assert reward(["ab", "abc"], ["c", "defg"]).rewards == [3.0, 7.0]
