from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from jfhpo.testing.trainers import (
    BREAK,
    TOTAL_STEPS,
    Case,
    TrainerConformance,
    differing,
    process_state,
    timeless_record,
)
from jfhpo_core.embedded import family_members
from jfhpo_core.embedded.base import Shape, build_model, build_tokenizer
from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.run.worker import run_job
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.prompting import Prompting
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from jfhpo_core.study.tasks import load_task
from jfhpo_core.study.trial import EXAMPLES, Decision, Evaluation, FailureKind, Outcome, StepRecord, Value
from jfhpo_core.trainers.trl import TrlSettings, TrlTrainer
from tests.studies import study_data

REWARD = """
def reward(prompts, completions, *, weight, **columns):
    assert not columns, sorted(columns)
    return [w * sum(c.isdigit() for c in completion) / 5 for completion, w in zip(completions, weight, strict=True)]
"""
MAX_TOKENS = 5
PROMPTS_PER_STEP = 4
N_SAMPLES = 3
LEARNING_RATE = 3e-3


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def write_model(folder: Path) -> Path:
    """A random transformer of 5,000 parameters with a character tokenizer."""
    build_model(Shape(hidden=16, layers=2, heads=2, feed_forward=32), seed=1).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


def write_task(folder: Path) -> Path:
    """Ten training prompts (two steps and a half) of different lengths."""
    rows = [{"prompt": "abcdefghij"[: 3 + number % 5] + f"{number:02d}=", "weight": 1.0} for number in range(16)]
    for name, part in (("train", rows[:10]), ("heldout", rows[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


class MakeCase:
    """Makes cases: `settings` are the trainer's, everything else is a hyperparameter."""

    def __init__(self, model_path: Path, task_folder: Path) -> None:
        self.model_path = model_path
        self.task_folder = task_folder

    def __call__(self, settings: dict[str, Any] | None = None, **configuration: Value) -> Case:
        study = {
            "study": "trl-conformance",
            "family": [
                {"name": "small", "path": str(self.model_path), "parameters": 10_000},
                {"name": "large", "path": str(self.model_path), "parameters": 20_000},
            ],
            "target": "large",
            "task": {
                "prompts": str(self.task_folder / "train.jsonl"),
                "heldout": str(self.task_folder / "heldout.jsonl"),
                "reward": str(self.task_folder / "reward.py"),
                "max_completion_tokens": MAX_TOKENS,
                "reward_timeout_seconds": 600,  # a busy machine is no slow reward
            },
            "trainer": {"name": "trl", "settings": settings or {}, "fixed": {"prompts_per_step": PROMPTS_PER_STEP}},
            "space": {"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True}},
            "fidelity": {"horizon_prompts": PROMPTS_PER_STEP * TOTAL_STEPS, "rungs": 1},
            "budget": {"trial_seconds": 100},
            "stopping": {"rules": "none"},
        }
        common: dict[str, Value] = {
            "prompts_per_step": PROMPTS_PER_STEP,
            "n_samples": N_SAMPLES,
            "learning_rate": LEARNING_RATE,
        }
        return Case(
            study=parse_study(json.dumps(study)),
            model_path=str(self.model_path),
            configuration={**common, **configuration},
            other={**common, "loss_type": "rloo", "temperature": 1.5, "mini_batches": 3, "kl_coefficient": 0.0},
        )


@pytest.fixture
def make_case(model_path: Path, task_folder: Path) -> MakeCase:
    return MakeCase(model_path, task_folder)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Value]]] = {
    "grpo": ({}, {"mini_batches": 2, "kl_coefficient": 0.05, "scheduler": "cosine", "warmup_ratio": 0.2}),
    "grpo-no-kl": ({}, {"mini_batches": 1, "kl_coefficient": 0.0}),
    "rloo": ({}, {"loss_type": "rloo", "mini_batches": 1, "kl_coefficient": 0.05}),
    "rloo-no-kl": ({}, {"loss_type": "rloo", "mini_batches": 2, "kl_coefficient": 0.0, "scheduler": "linear"}),
}
"""Trainer settings and hyperparameters by name. The first variant runs always, the others are for the slow suite."""

FURTHER: dict[str, tuple[dict[str, Any], dict[str, Value]]] = {
    "dapo-lora": (
        {"lora": {"rank": 2, "dropout": 0.1}},
        {"loss_type": "dapo", "mini_batches": 2, "kl_coefficient": 0.0},
    ),
    "bnpo-micro-batches": ({"micro_batch": 4, "generation_batch": 5}, {"loss_type": "bnpo", "mini_batches": 2}),
    "dr_grpo-bfloat16": ({"dtype": "bfloat16", "gradient_checkpointing": True}, {"loss_type": "dr_grpo"}),
}
"""Variants that only resuming could treat differently."""


class TestTrlTrainer(TrainerConformance):
    @pytest.fixture(
        params=[name if name == "grpo" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
    )
    def case(self, request: pytest.FixtureRequest, make_case: MakeCase) -> Case:
        settings, configuration = VARIANTS[request.param]
        return make_case(settings, **configuration)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", ["grpo"], indirect=True)
    def test_a_kill_costs_at_most_the_steps_since_the_last_checkpoint(self, case: Case, tmp_path: Path) -> None:
        super().test_a_kill_costs_at_most_the_steps_since_the_last_checkpoint(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FURTHER)
def test_further_variants_resume_exactly(make_case: MakeCase, tmp_path: Path, variant: str) -> None:
    settings, configuration = FURTHER[variant]
    case = make_case(settings, **configuration)
    checkpoints = {}
    records: dict[str, list[StepRecord]] = {"whole": [], "parts": []}
    whole = run_job(case.job(0, TOTAL_STEPS, tmp_path / "whole"), case.trainer, records["whole"].append)
    first = run_job(case.job(0, BREAK, tmp_path / "parts"), case.trainer, records["parts"].append)
    assert first.checkpoint is not None
    second = case.job(BREAK, TOTAL_STEPS, tmp_path / "parts", checkpoints=[first.checkpoint])
    last = run_job(second, case.trainer, records["parts"].append)
    for name, result in (("whole", whole), ("parts", last)):
        assert result.checkpoint is not None
        checkpoints[name] = tmp_path / name / result.checkpoint.path
    assert differing(checkpoints["whole"], checkpoints["parts"]) == []
    assert list(map(timeless_record, records["parts"])) == list(map(timeless_record, records["whole"]))


def records_of(case: Case, folder: Path, stop: int = TOTAL_STEPS) -> list[StepRecord]:
    records: list[StepRecord] = []
    result = run_job(case.job(0, stop, folder / "store"), case.trainer, records.append)
    assert result.outcome is Outcome.REACHED, result.message
    return [timeless_record(record) for record in records]


def test_the_learning_rate_follows_the_schedule_over_the_full_horizon(make_case: MakeCase, tmp_path: Path) -> None:
    # 12 updates: 3 of warm-up, then a cosine down to zero. A record tells the rate of its step's last update.
    case = make_case(scheduler="cosine", warmup_ratio=0.25, mini_batches=2)
    rates = [record.learning_rate for record in records_of(case, tmp_path, 4)]
    updates = [
        update / 3 if update < 3 else 0.5 * (1 + math.cos(math.pi * (update - 3) / 9)) for update in (1, 3, 5, 7)
    ]
    assert rates == pytest.approx([LEARNING_RATE * share for share in updates])


def test_the_kl_is_that_of_trl_whether_or_not_it_is_penalised(make_case: MakeCase, tmp_path: Path) -> None:
    # A coefficient too small to matter makes TRL score the rollout by its reference; with zero the trainer does it.
    negligible = records_of(make_case(kl_coefficient=1e-30), tmp_path / "negligible")
    for loss_type in ("grpo", "rloo"):
        free = records_of(make_case(kl_coefficient=0.0, loss_type=loss_type), tmp_path / loss_type)
        kls = [record.kl or 0.0 for record in free]
        assert kls[0] == pytest.approx(0, abs=1e-6)
        assert kls[-1] > 1e-3
        if loss_type == "grpo":
            assert kls == pytest.approx([record.kl for record in negligible], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_kl_penalty_keeps_the_policy_near_the_reference(make_case: MakeCase, tmp_path: Path) -> None:
    for loss_type in ("grpo", "rloo"):
        free, held = (
            records_of(make_case(kl_coefficient=weight, loss_type=loss_type), tmp_path / f"{loss_type}-{weight}")[-1].kl
            for weight in (0.0, 10.0)
        )
        assert free is not None
        assert held is not None
        assert held < free / 2


def test_only_several_updates_on_a_rollout_clip(make_case: MakeCase, tmp_path: Path) -> None:
    for parts, clipped in ((1, False), (3, True)):
        case = make_case(mini_batches=parts, clip_low=0.01, clip_high=0.01, kl_coefficient=0.0)
        shares = [record.clip_fraction or 0.0 for record in records_of(case, tmp_path / str(parts))]
        assert any(share > 0 for share in shares) is clipped


def test_signals_describe_the_rollout(make_case: MakeCase, tmp_path: Path) -> None:
    hot, cold = (records_of(make_case(temperature=value), tmp_path / str(value), 2) for value in (2.0, 0.05))
    for first, second in (hot, cold):
        for record, tokens in ((first, first.tokens), (second, second.tokens - first.tokens)):
            assert record.completion_tokens == pytest.approx(tokens / (PROMPTS_PER_STEP * N_SAMPLES))
            assert 1 <= record.completion_tokens <= MAX_TOKENS
            assert 0 <= record.reward <= 1
            assert (record.grad_norm or 0) > 0
    assert (hot[0].entropy or 0) > 2 * (cold[0].entropy or 0)
    # Cold samples of a group are alike, hot ones are not.
    assert cold[0].zero_variance_share > hot[0].zero_variance_share


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("learning_rate", 2e-4, "args.learning_rate", 2e-4),
        ("weight_decay", 0.03, "args.weight_decay", 0.03),
        ("max_grad_norm", 0.7, "args.max_grad_norm", 0.7),
        ("kl_coefficient", 0.02, "beta", 0.02),
        ("kl_coefficient", 0.0, "beta", 0.0),
        ("clip_low", 0.11, "epsilon_low", 0.11),
        ("clip_high", 0.33, "epsilon_high", 0.33),
        ("temperature", 0.8, "temperature", 0.8),
        ("n_samples", 6, "num_generations", 6),
        ("mini_batches", 3, "args.steps_per_generation", 3),
        ("mini_batches", 3, "args.max_steps", 3 * TOTAL_STEPS),
        ("prompts_per_step", 8, "args.generation_batch_size", 8 * N_SAMPLES),
        ("loss_type", "bnpo", "loss_type", "bnpo"),
        ("loss_type", "dapo", "scale_rewards", "group"),
        ("loss_type", "dr_grpo", "scale_rewards", "none"),
    ],
)
def test_hyperparameters_reach_trl(
    make_case: MakeCase, tmp_path: Path, name: str, value: Value, attribute: str, expected: object
) -> None:
    from jfhpo_core.trainers.trl_rollout import Ranks
    from jfhpo_core.trainers.trl_training import _build, _own_process_state

    job = make_case(**{name: value}).job(0, TOTAL_STEPS, tmp_path)
    with _own_process_state(1):
        found: Any = _build(job, TrlSettings(), load_task(job.study.task), None, tmp_path, Ranks())
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == expected


def test_every_hyperparameter_is_covered_by_these_tests() -> None:
    # The schedule's two are tested by the rates themselves.
    marks = test_hyperparameters_reach_trl.pytestmark[0].args[1]
    assert {mark[0] for mark in marks} | {"scheduler", "warmup_ratio"} == set(Hyperparameters.model_fields)


def test_padding_does_not_change_what_a_prompt_is_answered(model_path: Path) -> None:
    from jfhpo_core.trainers.trl_rollout import Sampler

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), build_tokenizer()
    sampler = Sampler(tokenizer, (tokenizer.eos_token_id,), MAX_TOKENS, batch=3)
    prompts = sampler.encode(["1+2=", "a", "abcdefgh=", "77"])
    nearly_greedy = 1e-5
    together = sampler.sample(model, prompts, nearly_greedy)
    assert together == [sampler.sample(model, [prompt], nearly_greedy)[0] for prompt in prompts]
    greedy = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(MAX_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        greedy.append(ids[len(prompt) :])
    assert [row[: len(short)] for row, short in zip(greedy, together, strict=True)] == together


def test_completions_end_with_their_first_stop_token(model_path: Path) -> None:
    from jfhpo_core.trainers.trl_rollout import Sampler

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), build_tokenizer()
    stops = tuple(range(2, 20))
    sampler = Sampler(tokenizer, stops, MAX_TOKENS, batch=512)
    completions = sampler.sample(model, sampler.encode(["12="] * 200), 1.0)
    for completion in completions:
        assert not set(completion[:-1]) & set(stops)
        assert sampler.truncated(completion) == (completion[-1] not in stops)
        assert len(completion) == MAX_TOKENS or not sampler.truncated(completion)
    assert {sampler.truncated(completion) for completion in completions} == {True, False}


def test_the_checkpoints_own_sampling_habits_do_not_leak(model_path: Path) -> None:
    from jfhpo_core.trainers.trl_rollout import Sampler

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), build_tokenizer()
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=1.5, max_new_tokens=2)
    habits = model.generation_config.to_dict()
    sampler = Sampler(tokenizer, (tokenizer.eos_token_id,), 1, batch=512)
    drawn = Counter(completion[0] for completion in sampler.sample(model, sampler.encode(["12="] * 4000), 1.0))
    probabilities = model(torch.tensor(sampler.encode(["12="]))).logits[0, -1].softmax(-1)
    error = 5 / math.sqrt(4000)
    for token, probability in enumerate(probabilities.tolist()):
        assert drawn[token] / 4000 == pytest.approx(probability, abs=error)
    assert len(drawn) > 20
    assert model.generation_config.to_dict() == habits


def test_prompts_are_shuffled_anew_in_every_pass_and_whatever_the_batch() -> None:
    from jfhpo_core.trainers.trl_training import PromptSchedule

    rows = tuple({"prompt": str(number)} for number in range(10))

    def stream(prompts_per_step: int, loads: int, seed: int = 3) -> list[str]:
        schedule = PromptSchedule(rows, prompts_per_step, 2, loads, 20 // prompts_per_step, seed)
        assert len(schedule) == 20 // prompts_per_step * loads
        for step in range(20 // prompts_per_step):
            assert all(schedule[step * loads + load] == schedule[step * loads] for load in range(loads))
        steps = [schedule[step * loads] for step in range(20 // prompts_per_step)]
        assert all(batch[0::2] == batch[1::2] for batch in steps)
        return [item["prompt"] for batch in steps for item in batch[0::2]]

    order = stream(4, 1)
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(row["prompt"] for row in rows)
    assert order[:10] != order[10:]
    assert stream(5, 3) == order
    assert stream(4, 1, seed=4) != order


def test_an_evaluation_scores_the_heldout_rows_with_its_standard_error(
    make_case: MakeCase, tmp_path: Path, task_folder: Path
) -> None:
    case = make_case()
    spec = case.study.evaluation.model_copy(update={"prompts": 4, "samples_per_prompt": 3})
    # Rewards that do not depend on the completion's text: the three completions of prompt k are worth k, k+1 and k+2.
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward(prompts, completions, weight):\n"
        "    return [float(p[-3:-1]) + number % 3 for number, p in enumerate(prompts)]\n"
    )
    task = case.study.task.model_copy(update={"reward": str(reward)})
    case = Case(
        case.study.model_copy(update={"evaluation": spec, "task": task}),
        case.model_path,
        case.configuration,
        case.other,
    )
    result = run_job(case.job(0, 1, tmp_path / "store", [0, 1]), case.trainer, lambda record: None)
    assert [evaluation.step for evaluation in result.evaluations] == [0, 1]
    for evaluation in result.evaluations:
        # Means 11 to 14, best completions 12 to 15.
        assert evaluation.score == pytest.approx(12.5)
        assert evaluation.samples == 12
        assert evaluation.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
        assert evaluation.pass_at_n is not None
        assert (evaluation.pass_at_n.n, evaluation.pass_at_n.score) == (3, pytest.approx(13.5))
        assert evaluation.pass_at_n.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_completions_and_rewards_of_prompts_are_kept_where_they_are_wanted(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    steps = [0, 1, TOTAL_STEPS]

    def evaluated(case: Case, folder: str, **changes: Any) -> tuple[Evaluation, ...]:
        job = case.job(0, TOTAL_STEPS, tmp_path / folder, steps).model_copy(update=changes)
        return run_job(job, case.trainer, lambda record: None).evaluations

    kept = evaluated(case, "target", model="large", parameters=20_000)
    first = [row["prompt"] for row in load_task(case.study.task).heldout[:EXAMPLES]]
    assert [[example.prompt for example in evaluation.examples] for evaluation in kept] == [first] * 3
    assert [bool(evaluation.by_prompt) for evaluation in kept] == [False, False, True]
    final = kept[-1]
    assert sum(final.by_prompt) / len(final.by_prompt) == pytest.approx(final.score)
    tracking = case.study.tracking.model_copy(update={"completions": False})
    study = case.study.model_copy(update={"tracking": tracking})
    private = evaluated(Case(study, case.model_path, case.configuration, case.other), "proxy")
    assert [evaluation.examples for evaluation in private] == [()] * 3
    assert [evaluation.by_prompt for evaluation in private] == [()] * 3
    assert [evaluation.score for evaluation in private] == [evaluation.score for evaluation in kept]


def test_a_reward_alike_for_all_prompts_still_has_a_standard_error(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, completions, weight):\n    return [1 for _ in prompts]\n")
    task = case.study.task.model_copy(update={"reward": str(reward)})
    case = Case(case.study.model_copy(update={"task": task}), case.model_path, case.configuration, case.other)
    records: list[StepRecord] = []
    result = run_job(case.job(0, 1, tmp_path / "store", [1]), case.trainer, records.append)
    assert result.evaluations[0].score == 1
    assert result.evaluations[0].standard_error == pytest.approx(0.5 / result.evaluations[0].samples)
    assert result.evaluations[0].pass_at_n is None
    assert records[0].zero_variance_share == 1
    assert records[0].reward_std == 0


def test_a_failing_reward_makes_the_trial_infeasible(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, completions, weight):\n    raise KeyError('no such answer')\n")
    task = case.study.task.model_copy(update={"reward": str(reward)})
    case = Case(case.study.model_copy(update={"task": task}), case.model_path, case.configuration, case.other)
    result = run_job(case.job(0, 2, tmp_path / "store"), case.trainer, lambda record: None)
    assert result.failure is FailureKind.REWARD
    assert "no such answer" in (result.message or "")


def test_weights_that_are_not_finite_reach_the_stopping_rules(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    broken = AutoModelForCausalLM.from_pretrained(case.model_path, dtype=torch.float32)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    build_tokenizer().save_pretrained(tmp_path / "broken")
    stopping = case.study.stopping.model_copy(update={"rules": "default"})
    case = Case(
        case.study.model_copy(update={"stopping": stopping}), str(tmp_path / "broken"), case.configuration, case.other
    )
    records: list[StepRecord] = []
    result = run_job(case.job(0, TOTAL_STEPS, tmp_path / "store"), case.trainer, records.append)
    assert result.failure is FailureKind.NON_FINITE
    assert len(records) == 1
    assert math.isnan(records[0].kl or 0)
    assert math.isnan(records[0].grad_norm or 0)


def test_running_out_of_memory_is_the_configurations_fault(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    before = process_state()

    def observe(event: StepRecord | Evaluation) -> Decision | None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrialFailure, match="CUDA out of memory") as caught:
        case.trainer.run(case.job(0, 2, tmp_path / "store"), None, tmp_path, observe)
    assert caught.value.kind == FailureKind.OUT_OF_MEMORY
    assert process_state() == before


def test_it_runs_in_any_thread(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case()
    here = records_of(case, tmp_path / "here", 2)
    there: list[StepRecord] = []
    thread = threading.Thread(target=lambda: there.extend(records_of(case, tmp_path / "there", 2)))
    thread.start()
    thread.join()
    assert there == here


def test_precision_may_change_between_jobs(make_case: MakeCase, tmp_path: Path) -> None:
    single = records_of(make_case(), tmp_path / "1", 2)
    half = records_of(make_case({"dtype": "bfloat16"}), tmp_path / "2", 2)
    assert half != single
    assert records_of(make_case(), tmp_path / "3", 2) == single


def test_lora_trains_adapters_and_measures_against_the_bare_model(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case({"lora": {"rank": 2}}, kl_coefficient=0.0)
    records: list[StepRecord] = []
    result = run_job(case.job(0, TOTAL_STEPS, tmp_path / "store"), case.trainer, records.append)
    assert result.checkpoint is not None
    files = {path.name for path in (tmp_path / "store" / result.checkpoint.path).iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert records[0].kl == pytest.approx(0, abs=1e-6)
    assert (records[-1].kl or 0) > 1e-5


def test_a_chat_template_wraps_prompts_for_the_model_alone(
    make_case: MakeCase, tmp_path: Path, model_path: Path
) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    from jfhpo_core.trainers.trl_rollout import Sampler

    sampler = Sampler(
        tokenizer, (tokenizer.eos_token_id,), MAX_TOKENS, batch=8, prompting=Prompting(chat_template=True)
    )
    assert sampler.encode(["ab="]) == tokenizer(["<ab=>:"])["input_ids"]
    case = make_case({"chat_template": True})
    case = Case(case.study, str(folder), case.configuration, case.other)
    assert len(records_of(case, tmp_path, 1)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"name": "trl", "fixed": {"prompts_per_step": 4, "mini_batches": 5}}}, "mini_batches=5"),
        (
            {"space": {"mini_batches": {"type": "int", "low": 1, "high": 7}}, "trainer": {"name": "trl"}},
            "mini_batches=3",
        ),
        ({"baselines": [{"name": "odd", "configuration": {"n_samples": 7, "mini_batches": 3}}]}, r"baselines\.odd"),
        ({"trainer": {"name": "trl", "settings": {"lora": {"rnk": 4}}}}, r"trainer\.settings\.lora\.rnk"),
        ({"trainer": {"name": "trl", "settings": {"threads": 0}}}, r"trainer\.settings\.threads"),
    ],
)
def test_contradictions_are_refused_before_any_work(make_case: MakeCase, change: dict[str, Any], message: str) -> None:
    data = {**make_case().study.to_data(), **change, "fidelity": {"horizon_prompts": 960, "rungs": 1}}
    with pytest.raises(SpecError, match=message):
        resolve(parse_study(json.dumps(data)))


def test_a_heldout_set_without_a_standard_error_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    study = make_case().study
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"prompt": "zz=", "weight": 1.0}\n')
    with pytest.raises(SpecError, match="standard error"):
        TrlTrainer().check(study.model_copy(update={"task": study.task.model_copy(update={"heldout": str(heldout)})}))


def test_a_larger_model_that_is_not_trained_may_ask_for_anything(tmp_path: Path) -> None:
    family = [
        {"name": "small", "path": str(family_members("instruct")["s"])},
        {"name": "target", "path": str(family_members("instruct")["m"])},
        {"name": "huge", "path": str(family_members("instruct")["l"]), "devices": 64},
    ]
    changes: dict[str, Any] = {"family": family, "trainer": "trl"}
    assert resolve(StudySpec.model_validate(study_data(tmp_path, target="target", **changes))).ladder.models
    with pytest.raises(SpecError, match="cannot be spread evenly over the 64 devices of model 'huge'"):
        resolve(StudySpec.model_validate(study_data(tmp_path, target="huge", **changes)))
