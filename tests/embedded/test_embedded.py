"""The embedded tasks and families: what is shipped is whole, does not leak, loads as users load it, and is a ladder."""

import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jfhpo_core import embedded
from jfhpo_core.embedded import FAMILIES, NAMES
from jfhpo_core.errors import SpecError

Rows = list[dict[str, str]]


def rows(name: str, split: str) -> Rows:
    return [json.loads(line) for line in (embedded.task_folder(name) / f"{split}.jsonl").read_text().splitlines()]


def reward_of(name: str) -> Callable[..., list[float]]:
    from jfhpo_core.embedded.make import load_reward

    return load_reward(embedded.task_folder(name))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A root with copies of the task and family `instruct`."""
    for kind in ("tasks", "families"):
        shutil.copytree(Path(embedded.__file__).parent / kind / "instruct", tmp_path / kind / "instruct")
    return tmp_path


class TestFiles:
    def test_what_is_shipped_matches_its_manifest(self, name: str) -> None:
        embedded.verify(name)

    def test_manifest_lists_every_file(self, name: str) -> None:
        root = Path(embedded.__file__).parent
        folders = [embedded.task_folder(name), *embedded.family_members(name).values()]
        found = {file.relative_to(root).as_posix() for folder in folders for file in folder.iterdir() if file.is_file()}
        assert set(embedded.manifest(name)["files"]) == found

    def test_files_stay_small(self, name: str) -> None:
        for file in embedded.task_folder(name).glob("*.jsonl"):
            assert file.stat().st_size < 300_000
        for folder in embedded.family_members(name).values():
            assert (folder / "model.safetensors").stat().st_size < 4_000_000

    def test_a_changed_file_is_refused_by_name_with_the_remedy(self, copied: Path) -> None:
        embedded.verify_under(copied, "instruct")
        damaged = copied / "families/instruct/s/model.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(SpecError, match=r"instruct/s/model\.safetensors has sha256") as caught:
            embedded.verify_under(copied, "instruct")
        assert "python -m jfhpo_core.embedded.make --task instruct" in str(caught.value)

    def test_a_missing_file_is_refused(self, copied: Path) -> None:
        (copied / "tasks/instruct/reward.py").unlink()
        with pytest.raises(SpecError, match=r"reward\.py is missing"):
            embedded.verify_under(copied, "instruct")

    def test_a_family_without_a_manifest_is_refused(self, copied: Path) -> None:
        manifest = copied / "families/instruct/MANIFEST.json"
        manifest.write_text("{")
        with pytest.raises(SpecError, match="not JSON"):
            embedded.verify_under(copied, "instruct")
        manifest.unlink()
        with pytest.raises(SpecError, match="has not been made"):
            embedded.verify_under(copied, "instruct")

    def test_unknown_names_are_refused(self) -> None:
        with pytest.raises(SpecError, match="instruct, arithmetic, countdown"):
            embedded.task_folder("../instruct")

    def test_importing_the_package_imports_no_torch(self) -> None:
        code = "import sys, jfhpo_core.embedded; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestCorpus:
    def test_no_training_prompt_is_held_out(self, name: str) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        task = TASKS[name]
        train = {task.canonical(row["prompt"]) for row in rows(name, "train")}
        held_out = {task.canonical(row["prompt"]) for row in rows(name, "heldout")}
        assert not train & held_out

    def test_prompts_do_not_repeat(self, name: str) -> None:
        for split, count in (("train", 4000), ("heldout", 1024)):
            assert len({row["prompt"] for row in rows(name, split)}) == len(rows(name, split)) == count

    def test_no_demonstration_is_of_a_held_out_prompt(self, name: str) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        held_out = {row["prompt"] for row in rows(name, "heldout")}
        rng = random.Random(0)
        assert not any(TASKS[name].draw_train(rng) in held_out for _ in range(3000))

    @pytest.mark.parametrize(
        ("name", "one", "other"),
        [
            ("instruct", "a12345=", "r53412="),
            ("arithmetic", "47+38=", "38+47="),
            ("arithmetic", "47+38=", "47-38="),
            ("countdown", "17!358=", "17!835="),
        ],
    )
    def test_equivalent_prompts_share_a_class(self, name: str, one: str, other: str) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        assert TASKS[name].canonical(one) == TASKS[name].canonical(other)

    @pytest.mark.parametrize(
        ("name", "prompt", "answer"),
        [
            ("instruct", "a30451=", "01345"),
            ("instruct", "d30451=", "54310"),
            ("instruct", "c30451=", "30451"),
            ("instruct", "r30451=", "15403"),
            ("arithmetic", "47+38=", "580"),
            ("arithmetic", "99+99=", "891"),
            ("arithmetic", "47-38=", "900"),
            ("arithmetic", "05+00=", "500"),
        ],
    )
    def test_answers(self, name: str, prompt: str, answer: str) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        assert TASKS[name].answer(prompt) == answer

    def test_careless_answers_have_the_right_length_and_are_mostly_wrong(self, name: str) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        task = TASKS[name]
        rng = random.Random(0)
        prompts = [task.draw(rng) for _ in range(2000)]
        careless = [task.careless(prompt, rng) for prompt in prompts]
        lengths = {len(answer) for answer in careless}
        assert lengths == {task.answer_length} if task.one_answer else len(lengths) > 4
        share = reward_of(name)(prompts, careless, answer=[task.answer(prompt) for prompt in prompts]).count(1.0) / 2000
        assert 0.05 < share < 0.35

    def test_dropped_carries(self) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        rng = random.Random(0)
        seen = {TASKS["arithmetic"].careless("47+38=", rng) for _ in range(50)}
        assert seen == {"900", "570"}  # 47-38 = 9; 4+3 = 7 and 7+8 = 5 without the carry
        assert {TASKS["arithmetic"].careless("42-38=", rng) for _ in range(50)} == {"080", "410"}

    def test_a_countdown_has_many_right_answers_of_different_lengths(self) -> None:
        from jfhpo_core.embedded.corpus import TASKS

        task, rng = TASKS["countdown"], random.Random(0)
        prompts = [row["prompt"] for row in rows("countdown", "heldout")[:200]]
        answers = {prompt: {task.right(prompt, rng) for _ in range(100)} for prompt in prompts}
        assert min(len(found) for found in answers.values()) >= 3
        assert {len(answer) for found in answers.values() for answer in found} == {3, 5, 7}
        tried = [(prompt, answer) for prompt, found in answers.items() for answer in found]
        assert set(reward_of("countdown")([p for p, _ in tried], [a for _, a in tried])) == {1.0}


class TestReward:
    def test_one_for_the_exact_answer_alone(self, name: str) -> None:
        row = rows(name, "train")[0]
        answer = row["answer"]
        completions = [answer, answer + "0", answer[:-1], " " + answer, ""]
        prompts = [row["prompt"]] * len(completions)
        columns = {"answer": [answer] * len(completions), "other_column": [0] * len(completions)}
        rewards = reward_of(name)(prompts, completions, **columns)
        assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert all(type(value) is float for value in rewards)

    def test_every_row_rewards_its_own_answer(self, name: str) -> None:
        data = rows(name, "train") + rows(name, "heldout")
        answers = [row["answer"] for row in data]
        assert set(reward_of(name)([row["prompt"] for row in data], answers, answer=answers)) == {1.0}

    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ("9+9-1", 1.0),
            ("7+9+1", 1.0),
            ("9+7", 0.1 + 0.3 * 0.8),  # one off
            ("9+9+1", 0.1 + 0.3 * 0.6),  # two off
            ("9+9+9", 0.1),  # far off
            ("9+8", 0.1),  # right, but 8 is barred
            ("17", 0.0),
            ("9+", 0.0),
            ("9++8", 0.0),
            ("10+7", 0.0),
            ("9+9-1+1-1", 0.0),  # five digits
        ],
    )
    def test_a_countdown_is_graded(self, completion: str, expected: float) -> None:
        assert reward_of("countdown")(["17!358="], [completion]) == [pytest.approx(expected)]


class TestFamily:
    def test_members_are_ordered_small_to_large(self, name: str) -> None:
        members = embedded.manifest(name)["members"]
        assert tuple(embedded.family_members(name)) == FAMILIES[name] == tuple(members)
        parameters = [member["parameters"] for member in members.values()]
        assert parameters == sorted(set(parameters))
        assert 90_000 < parameters[0] < 150_000
        assert 500_000 < parameters[2] < 700_000

    def test_a_larger_base_is_better_and_all_leave_headroom(self, name: str) -> None:
        accuracies = [member["base_accuracy"] for member in embedded.manifest(name)["members"].values()]
        for key in accuracies[0].keys() & {"sampled", "expected"}:
            values = [accuracy[key] for accuracy in accuracies]
            assert values == sorted(set(values))
            assert values[0] >= 0.1
            assert values[-1] <= 0.4
        assert all(accuracy["samples"] >= 4096 for accuracy in accuracies)

    def test_tokenizer_round_trip(self, name: str) -> None:
        from transformers import AutoTokenizer

        for folder in embedded.family_members(name).values():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert tokenizer.padding_side == "left"
            for row in rows(name, "train")[:50]:
                text = row["prompt"] + row["answer"]
                ids = tokenizer(text)["input_ids"]
                assert len(ids) == len(text)  # one token a character, and nothing added
                assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text

    def test_completions_decode_as_trl_decodes_them(self, name: str) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(embedded.family_members(name)["s"])
        answer = rows(name, "train")[0]["answer"]
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        other = "a  b, it's 1 + 2?"
        completions = [[*tokenizer(answer)["input_ids"], eos, pad, pad], [*tokenizer(other)["input_ids"], eos]]
        assert tokenizer.batch_decode(completions, skip_special_tokens=True) == [answer, other.replace("'", "")]

    def test_prompts_of_unequal_length_are_padded_on_the_left(self, name: str) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(embedded.family_members(name)["s"])
        batch = tokenizer(["12=", "1="], padding=True)
        assert batch["input_ids"][1][0] == tokenizer.pad_token_id
        assert batch["attention_mask"][1] == [0, 1, 1]

    def test_every_way_of_loading_the_tokenizer_agrees(self, name: str) -> None:
        """AutoTokenizer builds the class of the model's type, others take tokenizer.json as it is."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        from jfhpo_core.embedded.base import CHARACTERS, VOCABULARY, build_tokenizer
        from jfhpo_core.embedded.make import ARCHITECTURES

        folder = embedded.family_members(name)["s"]
        loaded = [kind.from_pretrained(folder) for kind in (AutoTokenizer, PreTrainedTokenizerFast)]
        for tokenizer in (build_tokenizer(ARCHITECTURES[name]), *loaded):
            assert tokenizer(CHARACTERS)["input_ids"] == [VOCABULARY[character] for character in CHARACTERS]
            assert tokenizer("1#2")["input_ids"] == tokenizer("12")["input_ids"]  # unknown characters vanish

    def test_models_load_as_float32_with_the_special_tokens_set(self, name: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(embedded.family_members(name)["s"])
        assert model.dtype == torch.float32
        assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)
        assert model.num_parameters() == embedded.manifest(name)["members"]["s"]["parameters"]

    def test_the_smallest_base_has_the_accuracy_of_its_manifest(self, name: str) -> None:
        from jfhpo_core.embedded.base import evaluate

        held_out = rows(name, "heldout")
        shipped = embedded.manifest(name)["members"]["s"]["base_accuracy"]
        measured = evaluate(
            embedded.family_members(name)["s"],
            held_out[:256],  # type: ignore[arg-type]
            reward_of(name),
            samples_per_prompt=1,
            one_answer="expected" in shipped,
            seed=1,
        )
        assert abs(measured.sampled - shipped["sampled"]) < 4 * math.hypot(measured.sampled_se, shipped["sampled_se"])
        assert abs(shipped["sampled"] - shipped.get("expected", shipped["sampled"])) < 4 * shipped["sampled_se"]


class TestMake:
    def test_task_files_are_reproduced_byte_by_byte(self, name: str, tmp_path: Path) -> None:
        from jfhpo_core.embedded.make import write_task

        write_task(name, tmp_path)
        for file in ("train.jsonl", "heldout.jsonl", "reward.py"):
            made = (tmp_path / "tasks" / name / file).read_bytes()
            assert made == (embedded.task_folder(name) / file).read_bytes()

    def test_the_gate_refuses_what_is_no_ladder(self) -> None:
        from jfhpo_core.embedded.base import Accuracy
        from jfhpo_core.embedded.make import GateError, gate

        small = Accuracy(sampled=0.2, sampled_se=0.005, samples=8192, greedy=0.3, greedy_se=0.01, expected=0.2)
        better = replace(small, sampled=0.25, expected=0.25)
        gate({"s": small, "m": better})
        gate({"s": small, "m": replace(better, sampled=0.199)})  # within the noise of sampling
        with pytest.raises(GateError, match=r"m \(expected accuracy 0\.205\) is not better than s \(0\.200\)"):
            gate({"s": small, "m": replace(better, expected=0.205)})
        with pytest.raises(GateError, match=r"reward function puts m \(0\.150\) below s \(0\.200\)"):
            gate({"s": small, "m": replace(better, sampled=0.15)})
        with pytest.raises(GateError, match=r"s has accuracy 0\.050"):
            gate({"s": replace(small, sampled=0.05), "m": small})
        many, more = (replace(each, expected=None) for each in (small, better))
        gate({"s": many, "m": more})
        with pytest.raises(GateError, match=r"m \(mean reward 0\.210\) is not better than s \(0\.200\)"):
            gate({"s": many, "m": replace(more, sampled=0.21)})

    @pytest.mark.slow
    def test_a_family_is_made_small(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole script in miniature, twice: the weights are the same, and a failing gate leaves no manifest."""
        from jfhpo_core.embedded import make
        from jfhpo_core.embedded.base import LADDERS, FineTuning

        settings = {name: dict.fromkeys(FAMILIES[name], FineTuning(steps=2, learning_rate=1e-3))}
        monkeypatch.setattr(make, "FINE_TUNING", settings)
        monkeypatch.setattr(
            make, "LADDERS", {kind: dict.fromkeys(sizes, sizes["s"]) for kind, sizes in LADDERS.items()}
        )
        monkeypatch.setattr(make, "SAMPLES_PER_PROMPT", 1)
        assert make.main(["--task", name, "--out", str(tmp_path / "refused")]) == 1
        with pytest.raises(SpecError, match="has not been made"):
            embedded.verify_under(tmp_path / "refused", name)
        monkeypatch.setattr(make, "gate", lambda _: None)
        assert make.main(["--task", name, "--out", str(tmp_path / "made")]) == 0
        embedded.verify_under(tmp_path / "made", name)
        one, other = (tmp_path / which / "families" / name / "s/model.safetensors" for which in ("refused", "made"))
        assert one.read_bytes() == other.read_bytes()
