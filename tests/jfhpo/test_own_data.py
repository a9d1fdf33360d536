"""A user's own data, rewards and models, one change to a working study each: what is used, what is refused, and how.

`refuse_unusable` is what `jfhpo plan` and the start of `jfhpo search` ask before anything is spent.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.embedded import family_folder, task_folder
from jfhpo_core.errors import SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.preflight import measured, refuse_unusable
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.contents import changed, contents
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.trial import EXAMPLES
from jfhpo_core.trainers.base import Finding, Level
from tests.studies import simulated_study

ROWS = {
    name: [json.loads(line) for line in (task_folder("instruct") / f"{name}.jsonl").read_text().splitlines()[:count]]
    for name, count in (("train", 64), ("heldout", 32))
}
TRL = """
def reward(prompts, completions, *, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]
def from_mapping(completions, reward_model, **columns):
    return [float(c == m["ground_truth"]) for c, m in zip(completions, reward_model)]
def no_long_ones(completions, **columns):
    return [1.0 if len(c) < 99 else 1 / 0 for c in completions]
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)
def reward_func(queries, prompts, labels):
    return [float(q == p + l) for q, p, l in zip(queries, prompts, labels)]
"""
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
STUDY: dict[str, Any] = {
    "study": "own",
    "family": [{"name": "s", "path": "models/s"}, {"name": "sm", "path": "models/sm"}],
    "target": "sm",
    "trainer": {"name": "trl", "fixed": {"prompts_per_step": 8, "n_samples": 4}},
    "space": {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}},
    "fidelity": {"horizon_prompts": 64, "rungs": 2},
    "evaluation": {"prompts": 32},
    "budget": {"trial_seconds": 20, "max_parallel": 1},
    "cluster": {"address": "inline"},
}


class Own:
    """A folder with models, data and reward, and a study over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("s", "sm"):
            shutil.copytree(family_folder("instruct") / name, folder / "models" / name)
        self.data("jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.reward(TRL)
        self.task: dict[str, Any] = {
            "prompts": "train.jsonl",
            "heldout": "heldout.jsonl",
            "reward": "reward.py",
            "max_completion_tokens": 8,
        }

    def data(self, suffix: str, written: Callable[[list[dict[str, Any]]], bytes], change: Any = dict) -> None:
        for name, rows in ROWS.items():
            (self.folder / f"{name}.{suffix}").write_bytes(written([change(row) for row in rows]))
        self.task = {"prompts": f"train.{suffix}", "heldout": f"heldout.{suffix}"} | {
            key: value for key, value in getattr(self, "task", {}).items() if key not in ("prompts", "heldout")
        }

    def rows(self, change: Any) -> None:
        self.data("jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(), change)

    def reward(self, text: str) -> None:
        (self.folder / "reward.py").write_text(text, encoding="utf-8")

    def edit(self, model: str, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.folder / "models" / model / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def found(self, **changes: Any) -> list[Finding]:
        """What `plan` says; refusals are raised."""
        spec = parse_study(json.dumps({**STUDY, "task": self.task, **changes}), folder=self.folder)
        return refuse_unusable(resolve(spec))

    def warnings(self, **changes: Any) -> str:
        return "\n".join(one.message for one in self.found(**changes) if one.level is Level.WARNING)

    def scores(self, **changes: Any) -> str:
        """What is said of the reward, which has scored completions by a model."""
        (said,) = [one.message for one in self.found(**changes) if (one.subject, one.level) == ("reward", Level.OK)]
        assert "by untrained s with" in said
        return said


@pytest.fixture
def own(tmp_path: Path) -> Own:
    return Own(tmp_path)


def as_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    return ("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows)).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "written"),
    [
        ("bom.jsonl", lambda rows: b"\xef\xbb\xbf" + as_json_lines(rows)),
        ("crlf.jsonl", lambda rows: as_json_lines(rows).replace(b"\n", b"\r\n") + b"\r\n\r\n"),
        ("jsonl.gz", lambda rows: gzip.compress(as_json_lines(rows))),
        ("parquet", as_parquet),
        ("csv", as_csv),
    ],
)
def test_case_1_2_and_4_formats(own: Own, suffix: str, written: Callable[[list[dict[str, Any]]], bytes]) -> None:
    own.data(suffix, written)
    if suffix == "csv":  # `datasets` reads digits as numbers
        own.reward(TRL.replace("c == a", "c == str(a)"))
    assert own.scores()


def test_case_4_a_data_set_by_name_and_split(own: Own) -> None:
    own.task |= {name: {"hub": ".", "split": split} for name, split in (("prompts", "train"), ("heldout", "test"))}
    (own.folder / "heldout.jsonl").rename(own.folder / "test.jsonl")
    shutil.move(own.folder / "models", own.folder.parent / f"{own.folder.name}-models")
    models = [{**model, "path": f"{own.folder}-{model['path']}"} for model in STUDY["family"]]
    assert own.scores(family=models)


def test_case_3_chats(own: Own) -> None:
    own.rows(lambda row: {**row, "prompt": [{"role": "user", "content": row["prompt"]}]})
    own.reward(
        "def reward(prompts, completions, *, answer, **columns):\n"
        "    assert prompts[0][0]['role'] == 'user', prompts\n"
        "    return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]\n"
    )
    with pytest.raises(SpecError, match="model 's' has no chat template, and prompts are given in one"):
        own.found()
    for name in ("s", "sm"):
        (own.folder / "models" / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert own.scores()


def test_case_5_a_mapping_is_handed_to_the_reward(own: Own) -> None:
    own.rows(lambda row: {"prompt": row["prompt"], "reward_model": {"ground_truth": row["answer"]}})
    own.task["reward"] = "reward.py:from_mapping"
    assert own.scores()


def test_case_6_the_layout_of_verl(own: Own) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        model = {"style": "rule", "ground_truth": row["answer"]}
        prompt = [{"role": "user", "content": row["prompt"]}]
        return {"data_source": "mine", "prompt": prompt, "reward_model": model, "extra_info": {"index": 1}}

    own.data("parquet", as_parquet, change)
    own.task["reward"] = "reward.py:compute_score"
    for name in ("s", "sm"):
        (own.folder / "models" / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert own.scores()


def test_case_7_the_layout_of_openrlhf(own: Own) -> None:
    own.rows(lambda row: {"question": row["prompt"], "answer": row["answer"]})
    own.task |= {"reward": "reward.py:reward_func", "columns": {"prompt": "question", "label": "answer"}}
    assert own.scores()


@pytest.mark.parametrize(
    "text",
    [
        "import numpy\ndef reward(completions, **k):\n    return numpy.ones(len(completions))\n",
        pytest.param(
            "import torch\ndef reward(completions, **k):\n    return torch.ones(len(completions))\n",
            marks=pytest.mark.slow,
        ),
        "async def reward(completions, **k):\n    return [1.0 for _ in completions]\n",
        "from helpers_of_mine import one\ndef reward(completions, **k):\n    return [one for _ in completions]\n",
        "def reward(completions, **_):\n    print(9999 * 'x'); signal.alarm(9)\n    return [1] * len(completions)\n",
    ],
    ids=["8-numpy", "8-torch", "10-async", "12-module-beside", "16-prints-and-alarm"],
)
def test_case_8_10_12_and_16_rewards(own: Own, capfd: pytest.CaptureFixture[str], text: str) -> None:
    (own.folder / "helpers_of_mine.py").write_text("one = 1.0\n")
    own.reward(f"import signal\n{text}")
    assert "with 1, 1, 1, 1" in own.scores()
    assert "x" * 9999 not in capfd.readouterr().out


def test_case_18_truth_values_within_a_list_are_ones_and_zeros(own: Own) -> None:
    own.reward("def reward(completions, **k):\n    return [number % 2 == 0 for number in range(len(completions))]\n")
    assert "with 1, 0, 1, 0" in own.scores()


def test_case_9_and_11_several_rewards(own: Own) -> None:
    own.reward(
        "def one(completions, **k):\n    return [1.0 for _ in completions]\n"
        "def none(completions, **k):\n    return [None for _ in completions]\n"
    )
    own.task["reward"] = "reward.py:none"
    with pytest.raises(SpecError, match=r"returned None for completion 0 of 4 .* may abstain only where another"):
        own.found()
    own.task["reward"] = [{"function": "reward.py:one", "weight": 0.5}, {"function": "reward.py:none"}]
    assert "with 0.5, 0.5, 0.5, 0.5" in own.scores()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def reward(prompt, completion, label): ...\n", r"signature reward\(prompt, completion, label\) does not fit"),
        ("import time\ndef reward(completions, **k):\n    time.sleep(40)\n", "longer than 0.3 s for .* raise"),
        ("def reward(completions, **k):\n    return [9**9**9**9]\n", "longer than 0.3 s for .* raise"),
        (TRL.replace("reward(", "unused(").replace("no_long_ones", "reward"), "ZeroDivisionError.*word word"),
        ("def reward(completions, **k):\n    return True\n", "returned True, not a list"),
        ("def reward(completions, **k):\n    return [1, float('nan'), 1, 1]\n", "returned nan for completion 1 of 4"),
        ("def reward(completions, **k):\n    return [1, 1, float('inf'), 1]\n", "returned inf for completion 2 of 4"),
        ("def reward(completions, **k):\n    return [10**400, 1, 1, 1]\n", "returned 1000.* for completion 0 of 4"),
        ("def reward(completions, **k):\n    return [1]\n", "returned 1 rewards for 4 completions"),
    ],
    ids=["13", "14", "15", "17-hostile", "18-bool", "18-nan", "18-inf", "18-huge", "18-short"],
)
def test_case_13_to_15_17_and_18_rewards_that_are_refused(own: Own, text: str, message: str) -> None:
    own.reward(text)
    own.task["reward_timeout_seconds"] = 0.3 if "longer" in message else 10.0
    with pytest.raises(SpecError, match=message):
        own.found()


def test_case_15_a_reward_that_hangs_on_some_completions_is_told(own: Own) -> None:
    own.reward("def reward(completions, **k):\n    return [9**9**9**9 if '^' in c else 1.0 for c in completions]\n")
    own.task["reward_timeout_seconds"] = 1.0
    assert "longer than 1 s for 1 of 12 completions" in own.warnings()


def swap_two_tokens(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_case_19_tokenizers_that_differ_in_two_tokens(own: Own) -> None:
    own.edit("s", "tokenizer.json", swap_two_tokens)
    with pytest.raises(SpecError, match=r"do not read the same text alike: 2 tokens of the vocabulary differ, e.g."):
        own.found()


@pytest.mark.parametrize(("change", "refused"), [(-1, True), (7, False)])
def test_a_model_knows_all_tokens_of_its_tokenizer_or_more(own: Own, change: int, refused: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = own.folder / "models" / "s"
    count = len(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(count + change)
    model.save_pretrained(folder)
    if not refused:
        assert own.scores()
        return
    with pytest.raises(SpecError, match=rf"model 's' knows {count - 1} tokens .* its tokenizer has {count}: .* resize"):
        own.found()


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def leave_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def leave_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_tokenizer, "has no tokenizer; copy the files"),
        (leave_an_adapter, r"holds an adapter \(LoRA\) and no model; merge it"),
        (leave_gguf, "holds a GGUF file, which is for inference"),
        (quantize, r"is quantized \(gptq\) and cannot be trained"),
    ],
)
def test_case_20_folders_that_hold_no_model(own: Own, spoil: Callable[[Path], None], message: str) -> None:
    spoil(own.folder / "models" / "s")
    family = [{**model, "parameters": count} for model, count in zip(STUDY["family"], (100_000, 300_000), strict=True)]
    with pytest.raises(SpecError, match=message):
        own.found(family=family)


def test_case_20_shards_and_tied_embeddings_are_read(own: Own) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("s", "sm"):
        folder = own.folder / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        # A copy in one file, as some publishers add, is not counted again.
        shutil.copy(next(folder.glob("*.safetensors")), folder / "consolidated.safetensors")
    spec = parse_study(json.dumps({**STUDY, "task": own.task}), folder=own.folder)
    counts = {model.name: model.parameters for model in resolve(spec).ladder.models}
    for name, count in counts.items():
        assert count == AutoModelForCausalLM.from_pretrained(own.folder / "models" / name).num_parameters()
    assert own.scores()


def test_case_20_parameter_counts_are_those_of_the_files(own: Own) -> None:
    family = [{**STUDY["family"][0], "parameters": 5_000}, STUDY["family"][1]]
    assert "the study says 5,000 parameters, its files hold 104,640" in own.warnings(family=family)


def test_case_26_prompts_that_are_too_long(own: Own) -> None:
    long = ROWS["train"][5]["prompt"]
    own.rows(lambda row: {**row, "prompt": row["prompt"] * (20 if row["prompt"] == long else 1)})
    own.task["max_prompt_tokens"] = 40
    with pytest.raises(SpecError, match=r"1 of 64 prompts are longer than 40 tokens .*overlong_prompts: drop"):
        own.found()
    own.task["overlong_prompts"] = "drop"
    assert "63 training prompts" in "\n".join(one.message for one in own.found())


@pytest.mark.slow
def test_case_21_a_beginning_of_text_that_models_were_not_pretrained_with() -> None:
    data = {**STUDY, "family": "arithmetic", "task": "arithmetic", "fidelity": {**STUDY["fidelity"], "proxies": []}}
    trainer = {**STUDY["trainer"], "settings": {"bos": "always"}}
    study = resolve(parse_study(json.dumps({**data, "trainer": trainer, "evaluation": {"prompts": 128}})))
    told, warned = measured(study)
    assert (told.level, told.message.count(", reward ")) == (Level.OK, EXAMPLES)
    assert warned.level is Level.WARNING
    assert "untrained sm scores" in warned.message
    assert "set trainer.settings.bos: never" in warned.message


@pytest.mark.parametrize(
    ("rewards", "warns"), [("[0.0] * len(completions)", True), ("[1.0] * len(completions)", False)]
)
def test_a_model_that_never_gets_a_reward_is_warned_of(own: Own, rewards: str, warns: bool) -> None:
    own.reward(f"def reward(completions, **_):\n    return {rewards}\n")
    spec = parse_study(json.dumps({**STUDY, "task": own.task, "evaluation": {"prompts": 8}}), folder=own.folder)
    messages = [one.message for one in measured(resolve(spec)) if one.level is Level.WARNING]
    assert any("gets no reward for any of" in message for message in messages) == warns


def test_case_22_a_choice_has_no_null(own: Own) -> None:
    space = {"max_grad_norm": {"type": "choice", "values": [None, 1.0]}}
    with pytest.raises(
        SpecError, match=r"space.max_grad_norm.values.*a choice has no null; write the number"
    ) as caught:
        own.found(space=space)
    assert "valid boolean" not in str(caught.value)


def test_case_23_a_budget_that_pays_for_the_recipe_only_recommends_the_recipe(tmp_path: Path) -> None:
    study = simulated_study(tmp_path, budget={"trial_seconds": 1, "max_parallel": 1})
    result = run_search(study, MemoryLedger(), InlineDispatcher())
    (recipe,) = study.spec.baselines
    assert result.complete
    assert result.recommended is not None
    assert recipe.configuration.items() <= result.recommended.configuration.items()


def run_case(
    own: Own, *, folder: Path | None = None, home: str | None = None, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """A search by the command line, from another folder than the study's or with another home if one is given."""
    tracking = {"uri": f"sqlite:///{own.folder}/mlflow.db", "workspace": str(own.folder / "work")}
    (own.folder / "study.yaml").write_text(json.dumps({**STUDY, "task": own.task, "tracking": tracking, **changes}))
    command = [str(Path(sys.executable).with_name("jfhpo")), "search", str(own.folder / "study.yaml"), "--plain"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("_HOME", "_CACHE"))}
    return subprocess.run(
        command, cwd=folder or own.folder, capture_output=True, text=True, check=False, timeout=500,
        env=os.environ if home is None else {**environment, "HOME": home},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_uri")
def test_case_17_a_reward_that_fails_in_training_ends_the_search_with_its_row(own: Own) -> None:
    rows = [row["prompt"] for row in ROWS["train"][:10]]
    own.reward(f"def reward(prompts, completions, **k):\n    return [1 / (p not in {rows}) for p in prompts]\n")
    ended = run_case(own)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    said = " ".join(ended.stderr.split())
    assert "reward.py raised ZeroDivisionError: division by zero" in said
    assert any(f"(prompt '{row}', completion " in said for row in rows)
    assert "correct it and run the same command again" in said


@pytest.mark.slow
def test_case_24_a_folder_with_blanks_and_an_umlaut_by_a_link_from_elsewhere(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "Meine Ü bung", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(folder)
    own = Own(tmp_path / "link")
    # Not even root can write to this home.
    ended = run_case(own, folder=elsewhere, home="/proc", budget={"trial_seconds": 1, "max_parallel": 1})
    assert ended.returncode in (0, 3), ended.stdout + ended.stderr
    assert "trained to step" in ended.stdout
    # What all models score untrained comes before the first trial, and what they wrote can be read.
    before, _, _ = ended.stdout.partition(" left")
    for model in ("s", "sm"):
        assert f"untrained {model} scores 0." in before
    assert before.count(" -> ") == 2 * EXAMPLES
    report = (own.folder / "work" / "own" / "report.html").read_text(encoding="utf-8")
    assert ("Completions to read" in report) == (ended.returncode == 0)


def test_case_25_changed_contents_are_named(own: Own) -> None:
    spec = parse_study(json.dumps({**STUDY, "task": own.task}), folder=own.folder)
    before = contents(spec)
    own.reward(f"{TRL}# another one\n")
    (own.folder / "heldout.jsonl").write_bytes(as_json_lines(ROWS["heldout"][:-1]))
    assert sorted(changed(before, contents(spec))) == ["task.heldout", "task.reward"]
