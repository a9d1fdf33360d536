"""Rewards as people write them: by which convention they are called, what counts as a reward, and what if they hang."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.study import scoring
from jfhpo_core.study.scoring import Pool, RewardError, _combined, _Function

ANSWERS: dict[str, list[Any]] = {"answer": ["2", "4"]}
VERL: dict[str, list[Any]] = {
    "data_source": ["mine", "mine"],
    "reward_model": [{"ground_truth": "2"}, {"ground_truth": "4"}],
    "extra_info": [{"index": 0}, {"index": 1}],
}
CHATS = [[{"role": "user", "content": text}] for text in ("1+1=", "2+2=")]
CHAT_REWARD = """
def reward(prompts, completions, answer):
    assert prompts[0] == [{"role": "user", "content": "1+1="}]
    return [float(c == [{"role": "assistant", "content": a}]) for c, a in zip(completions, answer)]
"""


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def write(folder: Path, text: str, name: str = "reward.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def spec(reference: str, weight: float = 1.0, **constants: Any) -> dict[str, Any]:
    return {"reference": reference, "weight": weight, "constants": constants}


class Score:
    """Scores two completions, '2' and '5', in this process."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.folder = folder
        self.loop = loop

    def __call__(
        self, text: str, name: str = "", columns: dict[str, list[Any]] = ANSWERS, chat: bool = False, **constants: Any
    ) -> Any:
        reference = write(self.folder, text) + (f":{name}" if name else "")
        function = _Function(loop=self.loop, **spec(reference, **constants))
        prompts = CHATS if chat else ["1+1=", "2+2="]
        return _combined([function], {"prompts": prompts, "completions": ["2", "5"], "columns": columns})["rewards"]


@pytest.fixture
def score(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> Score:
    return Score(tmp_path, loop)


TRL = """
def reward(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]
def by_keywords(completions, **kwargs):
    return [float(c == a) for c, a in zip(completions, kwargs["answer"])]
def by_name(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]
async def asynchronous(completions, **kwargs):
    return [float(c == "2") for c in completions]
class Stateful:
    def __call__(self, completions, **kwargs):
        return [float(c == "2") for c in completions]
"""
OF_VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "mine" and extra_info["index"] in (0, 1)
    return {"score": float(solution_str == ground_truth), "acc": True}
def short(solution_str, ground_truth):
    return solution_str == ground_truth
def batched(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    return [float(s == g) for s, g in zip(solution_strs, ground_truths)]
"""
OF_OPENRLHF = """
import torch
def reward_func(queries, prompts, labels, **kwargs):
    return {"rewards": torch.tensor([float(q == p + l) for q, p, l in zip(queries, prompts, labels)])}
"""


@pytest.mark.parametrize(
    ("text", "name", "columns"),
    [
        (TRL, "reward", ANSWERS),
        (TRL, "by_keywords", ANSWERS),
        (TRL, "by_name", {**ANSWERS, "id": [1, 2]}),
        (TRL, "asynchronous", ANSWERS),
        (TRL, "Stateful", ANSWERS),
        (OF_VERL, "compute_score", VERL),
        (OF_VERL, "short", {"ground_truth": ["2", "4"]}),
        (OF_VERL, "batched", VERL),
        (OF_OPENRLHF, "reward_func", {"label": ["2", "4"]}),
    ],
)
def test_conventions_are_known_by_their_signature(
    score: Score, text: str, name: str, columns: dict[str, list[Any]]
) -> None:
    assert score(text, name, columns) == [1.0, 0.0]


def test_a_chat_is_scored_as_messages_or_as_text(score: Score) -> None:
    assert score(CHAT_REWARD, chat=True) == [1.0, 0.0]


def test_a_chat_is_a_text_for_conventions_of_text(tmp_path: Path, score: Score) -> None:
    text = "def reward(queries, prompts, labels):\n    return [float(q == '1+1=2') for q in queries]"
    assert score(text, columns={"label": ["", ""]}, chat=True) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prompt, completion, label", r"signature reward\(prompt, completion, label\) does not fit"),
        ("prompt, completion, **k", r"completion, prompt: no such column .*answer, comp.*verl"),
        ("completions, solution", r"signature reward\(completions, solution\) .* task.columns"),
        ("completions, completion_ids", "completion_ids: only TRL's own loop has that"),
        ("a, /, completions", "arguments before '/' cannot be given by name"),
        ("solution_str, ground_truth", r"name it in task.columns \{ground_truth: NAME\}"),
        ("queries, prompts, labels", r"name it in task.columns \{label: NAME\}"),
    ],
)
def test_a_signature_that_does_not_fit_is_named(score: Score, arguments: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(f"def reward({arguments}): ...")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no parser')", "raised ValueError: no parser"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("return [1.0]", "returned 1 rewards for 2 completions"),
        ("return [1.0, 2.0, 3.0]", "returned 3 rewards for 2 completions"),
        ("return None", "returned None, not a list"),
        ("return True", "returned True, not a list"),
        ("return 1.0", "returned 1.0, not a list"),
        ("return 'ab'", "returned 'ab', not a list"),
        ("return {'a': 1, 'b': 2}", "not a list"),
        ("return [1.0, float('nan')]", r"returned nan for completion 1 of 2 \('5'\): that is not finite; return"),
        ("return ['1.0', '0.0']", r"returned '1.0' for completion 0 of 2 \('2'\): a str and no number; return a float"),
        ("return '1.0'", "not a list with a number per completion but a str; return a list of floats"),
        ("return [{'reward': 1.0}, 0.0]", "a dict and no number; return a float for every completion"),
        ("return [float('inf'), 1.0]", "returned inf for completion 0 of 2"),
        ("return [1.0, 10**400]", "returned 1000.* for completion 1 of 2"),
        ("return [1.0, 'good']", "returned 'good' for completion 1 of 2"),
        ("return [1.0, [1.0]]", r"returned \[1.0\] for completion 1 of 2"),
        ("import numpy\n    return numpy.ones((2, 2))", r"returned \[1.0, 1.0\] for completion 0 of 2"),
        ("return [1.0, None]", r"returned None for completion 1 of 2 .* a reward may abstain only where another one"),
    ],
)
def test_what_is_no_reward_is_refused_with_index_and_value(score: Score, body: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(f"def reward(prompts, completions, **columns):\n    {body}\n")


@pytest.mark.parametrize(
    "body",
    [
        "return [True, 0]",
        "return (float(len(c) == 1 and c == '2') for c in completions)",
        "import numpy\n    return numpy.array([1, 0])",
        "import numpy\n    return [numpy.float32(1), numpy.bool_(False)]",
        "import torch\n    return torch.tensor([1.0, 0.0], dtype=torch.bfloat16)",
        "import torch\n    return [torch.tensor(1.0), torch.tensor([0.0])]",
    ],
)
def test_whatever_counts_as_a_number_is_a_reward(score: Score, body: str) -> None:
    rewards = score(f"def reward(prompts, completions, **columns):\n    {body}\n")
    assert rewards == [1.0, 0.0]
    assert all(type(value) is float for value in rewards)


def test_further_arguments_come_from_the_study(score: Score) -> None:
    assert score("def mine(completions, bonus):\n    return [bonus] * 2\n", "mine", bonus=0.5) == [0.5, 0.5]


def test_a_class_is_made_with_them_and_keeps_its_state(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    text = (
        "class Counting:\n"
        "    def __init__(self, start):\n        self.count = start\n"
        "    def __call__(self, completions, **columns):\n"
        "        self.count += 1\n        return [self.count for _ in completions]\n"
    )
    function = _Function(loop=loop, **spec(f"{write(tmp_path, text)}:Counting", start=5))
    assert [function(["a"], ["b"], {}) for _ in range(2)] == [[6.0], [7.0]]


def test_several_rewards_are_added_up_by_weight_and_may_abstain(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    path = write(
        tmp_path,
        "def right(completions, **k):\n    return [1.0, None]\ndef short(completions, **k):\n    return [0.5, 1.0]\n",
    )
    weights = {"right": 2.0, "short": 0.1}
    functions = [_Function(loop=loop, **spec(f"{path}:{name}", weight)) for name, weight in weights.items()]
    found = _combined(functions, {"prompts": ["a", "b"], "completions": ["c", "d"], "columns": {}})
    assert found["rewards"] == pytest.approx([2.05, 0.1])
    assert found["parts"] == {"right": [1.0, None], "short": [0.5, 1.0]}


def test_a_module_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "helpers_of_mine.py").write_text("VALUE = 0.25\n")
    text = "from helpers_of_mine import VALUE\ndef reward(completions, **k):\n    return [VALUE]\n"
    pool = Pool([spec(write(tmp_path, text))], 10.0, 0.0)
    assert pool.score(["a"], ["b"], {}).rewards == [0.25]
    pool.close()


def test_our_own_modules_are_not_in_the_way_of_a_reward(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("VALUE = 0.25\n")
    text = "from data import VALUE\ndef reward(completions, **k):\n    return [VALUE]\n"
    pool = Pool([spec(write(tmp_path, text))], 10.0, 0.0)
    assert pool.score(["a"], ["b"], {}).rewards == [0.25]
    pool.close()


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("x = 1\n", "", "has no function 'reward'"),
        ("reward = 1\n", "", "has no function 'reward'"),
        ("def reward(): ...\n", "other", "has no function 'other'"),
        ("import no_such_module_of_mine\n", "", "fails on import: ModuleNotFoundError"),
        ("def reward(:\n", "", "fails on import: SyntaxError"),
        ("raise SystemExit(1)\n", "", "cannot be made ready: SystemExit"),
        ("class reward:\n    def __init__(self, key): ...\n", "", "cannot be made ready: TypeError.*'key'"),
    ],
)
def test_a_reward_that_does_not_load_is_refused(tmp_path: Path, text: str, name: str, message: str) -> None:
    pool = Pool([spec(write(tmp_path, text) + (f":{name}" if name else ""))], 10.0, 0.0)
    with pytest.raises(RewardError, match=message):
        pool.start()


HANGING = """
import re, signal, time
def reward(completions, **k):
    for completion in completions:
        if completion == "power":
            9**9**9
        if completion == "pattern":
            re.match(r"(a+)+$", "a" * 60 + "b")
        if completion == "sleep":
            time.sleep(1000)
    return [1.0 for _ in completions]
"""


def test_completions_that_hang_are_found_scored_and_counted(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "reward.log"
    pool = Pool([spec(write(tmp_path, HANGING))], 0.5, -1.0, log)
    completions = ["a", "power", "b", "pattern", "sleep", "c"]
    found = pool.score(["p"] * 6, completions, {})
    assert found.rewards == [1.0, -1.0, 1.0, -1.0, -1.0, 1.0]
    assert found.timed_out == [1, 3, 4]
    assert "Timeout" in log.read_text()
    assert 'reward.py", line 6 in reward' in log.read_text()
    pool.close()


def test_a_reward_that_always_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "TIMEOUTS_IN_A_ROW", 3)
    pool = Pool([spec(write(tmp_path, HANGING))], 0.2, 0.0, tmp_path / "log")
    with pytest.raises(RewardError, match=r"longer than 0.2 s for \d completions in a row.*raise task"):
        pool.score(["p"] * 100, ["power"] * 100, {})
    pool.close()


def test_a_batch_that_is_slow_as_a_whole_is_not_cut_short_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    text = (
        f"import time\ndef reward(completions, **k):\n    open({str(calls)!r}, 'a').write(f'{{len(completions)}} ')\n"
    )
    text += "    time.sleep(0.3 * len(completions))\n    return [1.0] * len(completions)\n"
    pool = Pool([spec(write(tmp_path, text))], 0.8, 0.0, tmp_path / "log")
    for _ in range(2):
        assert pool.score(["p"] * 4, ["c"] * 4, {}).rewards == [1.0] * 4
    assert calls.read_text() == "4 1 1 1 1 4 "
    pool.close()


def test_the_completion_that_a_reward_fails_for_is_named(tmp_path: Path) -> None:
    text = "def reward(completions, **k):\n    return [1 / int(c != 'bad') for c in completions]\n"
    pool = Pool([spec(write(tmp_path, text))], 10.0, 0.0)
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError.*prompt 'p7', completion 'bad'"):
        pool.score([f"p{number}" for number in range(9)], ["good"] * 7 + ["bad"] + ["good"], {})
    pool.close()


def test_a_reward_that_fails_once_is_told_with_its_batch(tmp_path: Path) -> None:
    text = """
calls = 0
def reward(completions, **k):
    global calls
    calls += 1
    assert calls != 3
    return [1.0] * len(completions)
"""
    pool = Pool([spec(write(tmp_path, text))], 10.0, 0.0)
    for _ in range(2):
        pool.score(["p", "q"], ["c", "d"], {})
    with pytest.raises(RewardError, match=r"AssertionError.*for 2 completions at once.*prompt 'p'.*none of them alone"):
        pool.score(["p", "q"], ["c", "d"], {})
    pool.close()


def test_prints_go_to_the_log_and_alarms_and_input_do_no_harm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (
        "import os, signal, sys\n"
        "def reward(completions, **k):\n"
        "    print('printed'); os.system('echo from a child'); print('error', file=sys.stderr)\n"
        "    signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1); signal.alarm(0)\n"
        "    return [float(sys.stdin.read() == '')]\n"
    )
    pool = Pool([spec(write(tmp_path, text))], 10.0, 0.0, tmp_path / "log")
    assert pool.score(["p"], ["c"], {}).rewards == [1.0]
    pool.close()
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "error", "from a child", "printed"]
    assert capfd.readouterr() == ("", "")


def test_random_rewards_are_the_same_in_another_process(tmp_path: Path) -> None:
    text = """
import random
import numpy
def reward(completions, **k):
    return [random.random() + numpy.random.rand() + hash(c) % 7 for c in completions]
"""
    path = write(tmp_path, text)
    found = []
    for _ in range(2):
        pool = Pool([spec(path)], 10.0, 0.0)
        found.append(pool.score(["p", "q"], ["c", "d"], {}).rewards)
        pool.close()
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("body", ["os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_reward_that_ends_its_process_is_told_apart_from_a_slow_one(tmp_path: Path, body: str) -> None:
    pool = Pool([spec(write(tmp_path, f"import os\ndef reward(completions, **k):\n    {body}\n"))], 10.0, 0.0)
    with pytest.raises(RewardError, match="ended its own process"):
        pool.score(["p"], ["c"], {})
    pool.close()


def test_processes_end_with_the_pool_and_what_they_started(tmp_path: Path) -> None:
    text = """
import os, subprocess
def reward(completions, **k):
    child = subprocess.Popen(["sleep", "1000"])
    return [os.getpid() + child.pid / 1e8]
"""
    pool = Pool([spec(write(tmp_path, text))], 10.0, 0.0)
    (reward,) = pool.score(["p"], ["c"], {}).rewards
    pool.close()
    for pid in (int(reward), round((reward % 1) * 1e8)):
        deadline = time.monotonic() + 5
        while _runs(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
