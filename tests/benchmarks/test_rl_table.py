from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.rl_table import rules, thresholds, transfer
from benchmarks.rl_table.generate import (
    CONFIGURATIONS,
    HEALTHY_LEARNING_RATES,
    SIZES,
    SPREAD,
    TASKS,
    Part,
    Training,
    configurations,
    plan,
    prepare_process,
    read_parts,
    train,
)
from benchmarks.rl_table.pack import pack, unpack
from jfhpo_core.errors import JfhpoError
from jfhpo_core.stopping.rules import RULES, BelowBase, NonFinite, PaperRewardDrop, RewardDrop, Unpromising, ZeroReward
from jfhpo_core.study.trial import Evaluation
from jfhpo_core.trainers.replay_table import SPACE, Recording, Table, read_table
from tests.studies import step_record

STEPS = 16
RECORDED = Path(__file__).parents[2] / "benchmarks" / "rl_table" / "data"


def part(training: Training, final: float = 0.6, steps: int = STEPS) -> Part:
    return Part(
        training=training,
        hyperparameters=configurations()[training.configuration].configuration,
        parameters=1000,
        outcome="completed" if steps == STEPS else "collapsed",
        steps=tuple(step_record(step) for step in range(1, steps + 1)),
        evaluations=tuple(evaluation(step, 0.2 if step == 0 else final) for step in range(0, steps + 1, 2)),
        test=evaluation(STEPS, final) if steps == STEPS else None,
        startup_seconds=1.0,
        cpu_seconds=2.0,
        wall_seconds=3.0,
        versions={"torch": "x"},
    )


def evaluation(step: int, score: float) -> Evaluation:
    return Evaluation(step=step, prompts=16 * step, score=score, standard_error=0.02, samples=512, seconds=0.5)


def recording(number: int, rewards: list[float], final: float, size: str = "s", total: int = STEPS) -> Recording:
    configuration = configurations()[number].configuration
    return Recording(
        size=size,
        parameters=1000,
        number=number,
        configuration=configuration,
        point=SPACE.encode(configuration),
        seed=0,
        completed=len(rewards) == total,
        steps=tuple(
            step_record(step, reward=reward, reward_std=0.5 * (reward > 0)) for step, reward in enumerate(rewards, 1)
        ),
        evaluations=(evaluation(0, 0.2), evaluation(len(rewards), final)),
        test_score=final if len(rewards) == total else None,
        startup_seconds=1.0,
    )


def test_every_task_has_the_first_configurations_on_every_size() -> None:
    designs = configurations()
    assert len({json.dumps(design.configuration) for design in designs}) == len(designs) == 2 * SPREAD + 1
    assert max(CONFIGURATIONS.values()) == len(designs)
    for task, count in CONFIGURATIONS.items():
        for size in SIZES:
            own = [training for training in plan() if (training.task, training.size) == (task, size)]
            assert sorted(training.configuration for training in own if training.seed == 0) == list(range(count))
            assert sum(training.seed == 1 for training in own) == len(range(count)[::3])
    assert len({training.name for training in plan()}) == len(plan())


def test_half_of_the_configurations_have_healthy_learning_rates_and_each_half_fills_the_space() -> None:
    low, high = HEALTHY_LEARNING_RATES
    for kind, bounds in (("spread", (1e-5, 1e-2)), ("healthy", (low, high))):
        own = [design.configuration for design in configurations() if design.part == kind]
        rates = np.array([float(configuration["learning_rate"]) for configuration in own])
        assert len(own) == SPREAD
        assert bounds[0] <= rates.min() < bounds[0] * 1.2
        assert bounds[1] / 1.2 < rates.max() <= bounds[1]
        for name in ("n_samples", "mini_batches", "scheduler"):
            counts = Counter(configuration[name] for configuration in own)
            assert max(counts.values()) - min(counts.values()) <= 3


def test_a_prefix_of_the_plan_has_the_first_configurations_everywhere() -> None:
    prefix = plan()[: 10 * len(TASKS) * len(SIZES)]
    assert {(training.task, training.size, training.configuration) for training in prefix} == {
        (task, size, number) for task in TASKS for size in SIZES for number in range(10)
    }


def test_packed_trainings_are_read_back_and_the_card_counts_them(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    last = Training(task="arithmetic", size="m", configuration=126, seed=1)
    chosen = [*plan()[:4], last]
    assert last in plan()
    for position, training in enumerate(chosen):
        made = part(training, final=0.5 + position / 20, steps=10 if position == 1 else STEPS)
        (parts / f"{training.name}.json").write_text(made.model_dump_json())
    pack(parts, tmp_path / "data")
    card = (tmp_path / "data" / "README.md").read_text()
    assert f"5 of {len(plan())} planned trainings, with {4 * STEPS + 10} steps" in card
    assert "| arithmetic | s | 1 / 129 (1) | 0 / 43 (0) |" in card
    assert "| arithmetic | m | 0 / 129 (0) | 1 / 43 (0) |" in card
    read = {task: read_table(str(tmp_path / "data"), task).recordings for task in TASKS}
    counts = {task: (len(found), sum(one.completed for one in found)) for task, found in read.items()}
    assert counts == {"instruct": (2, 2), "arithmetic": (2, 1), "countdown": (1, 1)}
    for recorded, made in zip(
        read["instruct"], [p for p in read_parts(parts) if p.training.task == "instruct"], strict=True
    ):
        assert recorded.configuration == made.hyperparameters
        assert recorded.evaluations[-1].score == pytest.approx(made.evaluations[-1].score)
        assert [step.kl for step in recorded.steps] == pytest.approx([step.kl for step in made.steps])


def test_a_table_is_unpacked_to_parts_that_give_the_same_table(tmp_path: Path) -> None:
    parts, data = tmp_path / "parts", tmp_path / "data"
    parts.mkdir()
    for training in (*plan()[:3], plan()[-1]):
        (parts / f"{training.name}.json").write_text(part(training).model_dump_json())
    pack(parts, data)
    mine = parts / f"{plan()[0].name}.json"
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()
    (again / mine.name).write_bytes(mine.read_bytes())
    unpack(data, again)
    assert (again / mine.name).read_bytes() == mine.read_bytes()
    recorded = pq.read_schema(RECORDED / "evaluations.parquet")
    assert pq.read_schema(data / "evaluations.parquet").equals(recorded)
    pack(again, other)
    assert {file.name: file.read_bytes() for file in data.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }


def test_a_part_of_another_design_is_not_packed(tmp_path: Path) -> None:
    training = plan()[0]
    changed = part(training).model_copy(update={"hyperparameters": configurations()[1].configuration})
    (tmp_path / f"{training.name}.json").write_text(changed.model_dump_json())
    with pytest.raises(JfhpoError, match=r"instruct-s-000-0.*remove that part"):
        pack(tmp_path, tmp_path / "data")


def test_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JfhpoError, match="generate"):
        pack(tmp_path, tmp_path / "data")


def test_a_rule_is_judged_by_what_the_trainings_come_to() -> None:
    silent, falling = [0.0] * 10, [0.5] * 6 + [0.01] * 10
    table = Table(
        (
            recording(0, silent, 0.0),
            recording(1, falling, 0.1),
            recording(2, [0.5] * STEPS, 0.5),
            recording(3, [0.5] * STEPS, 0.6),
            recording(4, falling, 0.9),
            recording(5, [0.6] * STEPS, 0.7),
        )
    )
    zero = rules.judge(rules.fates([ZeroReward(patience=5)], table, "s"))
    assert (zero.trainings, zero.stopped, zero.precision, zero.recall, zero.caught) == (6, 1, 1.0, 1 / 3, 1.0)
    assert (zero.false_kills, zero.step) == (0, 5)
    # The silent training stops after step 5 of 16; a step costs one second.
    assert zero.saved == pytest.approx(11 / (6 * STEPS))
    both = rules.judge(rules.fates([ZeroReward(patience=5), RewardDrop()], table, "s"))
    assert (both.stopped, both.false_kills, both.good) == (3, 1, 2)
    assert both.precision == pytest.approx(2 / 3)
    low, high = both.false_kill_interval
    assert low < 0.05
    assert high > 0.95


def test_a_stop_for_want_of_prospects_is_judged_by_what_was_best_then() -> None:
    def fate(final: float, rule: str | None) -> rules.Fate:
        return rules.Fate(
            stopped=8 if rule else None, rule=rule, final=final, poor=False, good=False, best=False, collapsed=False,
            seconds=1.0, saved_seconds=0.5,
        )  # fmt: skip

    order = [fate(0.5, None), fate(0.6, "unpromising"), fate(0.9, "reward_drop"), fate(0.55, "unpromising"),
             fate(0.7, None), fate(0.65, "unpromising"), fate(0.71, "unpromising")]  # fmt: skip
    assert rules.would_have_led(order) == (3, 4)


def test_thresholds_are_chosen_for_what_they_save_without_stopping_good_trainings() -> None:
    falling, dipping = [0.5] * 4 + [0.01] * 12, [0.5] * 5 + [0.3] * 3 + [0.9] * 8
    table = Table(
        tuple(
            recording(number, rewards, final)
            for number, (rewards, final) in enumerate([(falling, 0.1), (falling, 0.2), (dipping, 0.3), (dipping, 0.9)])
        )
    )
    mild, middling, strict = (RewardDrop(threshold=drop, patience=1, warmup=4) for drop in (0.9, 0.5, 0.2))
    watched = thresholds.watch([mild, middling, strict], table, ["s"])
    assert watched.good.tolist() == [False, False, False, True]
    # A step costs a second: the strict variant stops the falling ones after step 7 and the dipping ones after step 8.
    assert watched.stops.tolist() == [[8, 7, 7]] * 2 + [[16, 16, 8]] * 2
    assert [watched.saved([i]) for i in range(3)] == [16 / 64, 18 / 64, 34 / 64]
    assert [watched.false_kills([i]) for i in range(3)] == [0, 0, 1]
    assert thresholds.best_variant(watched, RewardDrop) == 1
    assert thresholds.best_variant(watched, ZeroReward) is None
    assert thresholds.best_set(watched) == [1]
    assert thresholds.described(middling) == "`reward_drop` (threshold 0.5, patience 1, warmup 4)"


def test_every_variant_of_a_grid_is_a_rule_of_its_own() -> None:
    found = [rule for kind in thresholds.GRIDS for rule in thresholds.variants(kind)]
    assert len(set(found)) == len(found)
    assert {type(rule) for rule in found} | {Unpromising, PaperRewardDrop, NonFinite} == set(RULES.values())


@pytest.mark.slow
def test_hindsight_saves_what_lies_below_every_good_training_at_the_same_step() -> None:
    table = read_table(str(RECORDED), "instruct")
    watched = thresholds.watch(thresholds.variants(BelowBase), table, ["s"])
    safe = [watched.saved([i]) for i in range(len(watched.rules)) if watched.false_kills([i]) == 0]
    assert max(safe) < thresholds.hindsight(table, ["s"]) < 1


@pytest.mark.slow
def test_floors_of_the_model_stop_only_after_a_warm_up_and_only_at_rungs() -> None:
    table = read_table(str(RECORDED), "instruct")
    first = [one for one in table.of_size("s") if one.seed == 0][:16]
    table = Table(tuple(first))
    without = rules.fates_in_sequence([ZeroReward()], table, "s", order=0)
    alone = rules.fates([ZeroReward()], table, "s")
    assert sorted(map(repr, without)) == sorted(map(repr, alone))
    found = rules.fates_in_sequence([Unpromising(0.2)], table, "s", order=0, warm_up=9)
    assert all(fate.stopped is None for fate in found[:9])
    assert any(fate.stopped for fate in found[9:])
    assert all(fate.stopped % 8 == 0 and fate.stopped < 64 for fate in found if fate.stopped)
    cautious = rules.fates_in_sequence([Unpromising(0.001)], table, "s", order=0, warm_up=9)
    assert sum(fate.saved_seconds for fate in cautious) < sum(fate.saved_seconds for fate in found)


def test_regret_is_what_a_choice_on_the_proxy_loses_on_the_target() -> None:
    dear = {number: float(number) for number in range(20)}
    test = {number: score + 0.5 for number, score in dear.items()}
    reverse = {number: -score for number, score in dear.items()}
    assert transfer.regret(dear, dear, test, 1).value == 0
    assert transfer.regret(dear, dear, test, 1).high == 0
    assert transfer.regret(reverse, dear, test, 1).value == 19
    assert transfer.regret(reverse, dear, test, 3).value == 17
    assert transfer.chance_regret(dear, test) == pytest.approx(9.5)


@pytest.mark.slow
def test_transfer_counts_a_configuration_once_and_only_where_all_sizes_have_it(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    random = np.random.default_rng(0)
    for training in plan():
        if training.configuration < 12 and (training.configuration, training.size) != (11, "m"):
            final = float(random.uniform(0.1, 0.9))
            (parts / f"{training.name}.json").write_text(part(training, final).model_dump_json())
    pack(parts, tmp_path / "data")
    transfer.write(tmp_path / "data", tmp_path / "out")
    page = (tmp_path / "out" / "transfer.md").read_text()
    counts = [f"11 configurations on `{task}`" for task in TASKS]
    assert f"{counts[0]}, {counts[1]} and {counts[2]}" in page
    assert "| countdown | instruct | 11 |" in page
    for figure in ("transfer-sizes.svg", "transfer-steps.svg", "transfer-learning-rate.svg"):
        assert figure in page
        assert (tmp_path / "out" / figure).read_text().startswith("<?xml")
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    transfer.write(tmp_path / "data", tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    [
        Training(task="arithmetic", size="s", configuration=4, seed=0),
        Training(task="instruct", size="sm", configuration=7, seed=0),
    ],
    ids=lambda training: training.name,
)
def test_a_recorded_training_can_be_made_again(training: Training, tmp_path: Path) -> None:
    unpack(RECORDED, tmp_path)
    recorded = Part.model_validate_json((tmp_path / f"{training.name}.json").read_bytes())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare_process) as process:
        made = process.submit(train, training).result()
    assert made.hyperparameters == recorded.hyperparameters
    assert (made.outcome, len(made.steps)) == (recorded.outcome, len(recorded.steps))
    # On another kind of CPU the last bits differ, a sampled token flips sooner or later, and the curves part slowly.
    for one, other in zip(made.steps[:4], recorded.steps[:4], strict=True):
        assert one.reward == pytest.approx(other.reward, abs=0.05)
        assert one.kl == pytest.approx(other.kl, rel=0.2, abs=1e-3)
    assert [one.step for one in made.evaluations] == [one.step for one in recorded.evaluations]
    for one, other in zip(made.evaluations, recorded.evaluations, strict=True):
        assert abs(one.score - other.score) <= 5 * math.hypot(one.standard_error, other.standard_error)


@pytest.mark.slow
def test_a_generation_makes_what_is_missing_and_an_interrupt_loses_nothing(tmp_path: Path) -> None:
    before = part(plan()[0]).model_dump_json()
    (tmp_path / f"{plan()[0].name}.json").write_text(before)
    folders = ["--parts", str(tmp_path), "--data", str(tmp_path / "no table")]
    command = [sys.executable, "-m", "benchmarks.rl_table", "generate", "--workers", "1", *folders]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 500
        while len(list(tmp_path.glob("*.json"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.splitlines()[0].startswith(f"2/{len(plan())}  {plan()[1].name}")
    made = list(read_parts(tmp_path))
    assert [one.training for one in made] == plan()[: len(made)]
    assert {file.name for file in tmp_path.iterdir()} == {f"{one.training.name}.json" for one in made}
    assert made[0].model_dump_json() == before
    for one in made[1:]:
        assert one.outcome == "completed"
        assert one.test is not None
