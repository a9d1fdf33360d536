from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rl_table.generate import Part, Training
from benchmarks.rl_table.pack import write
from jfhpo.testing.trainers import TOTAL_STEPS, Case, TrainerConformance
from jfhpo_core.errors import SpecError
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.run.worker import run_job
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.hyperparameters import Hyperparameters
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import load_study
from jfhpo_core.study.trial import Configuration, Evaluation, StepRecord
from jfhpo_core.trainers.replay_surrogate import cross_validate, fit
from jfhpo_core.trainers.replay_table import SPACE, Recording, read_table
from tests.studies import step_record

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "rl_table" / "data"
EXAMPLE = COMMITTED.parents[2] / "examples" / "replay.yaml"
SIZES = {"small": 10_000, "large": 20_000}
RUNGS = (0, 2, 4, 6)
SHORT = 4
"""Steps of the collapsed training."""
RATES = (1e-5, 5e-5, 2e-4, 1e-3, 9e-3)
"""Learning rates of the hand-made configurations; the last collapses, the second has two seeds."""


def configuration(learning_rate: float) -> Configuration:
    full = Hyperparameters(learning_rate=learning_rate).model_dump()
    return SPACE.restrict(full)


def final_score(learning_rate: float, size: str, seed: int = 0) -> float:
    """A smooth bump over the learning rate, best at 2e-4 and higher on the large model."""
    height = 0.6 if size == "large" else 0.5
    return 0.1 + height * math.exp(-(math.log10(learning_rate / 2e-4) ** 2)) + 0.02 * seed


def part(number: int, size: str, seed: int = 0) -> Part:
    rate = RATES[number]
    collapsed = rate == RATES[-1]
    steps = range(1, (SHORT if collapsed else TOTAL_STEPS) + 1)

    def score(step: int) -> float:
        end = 0.0 if collapsed else final_score(rate, size, seed)
        return 0.1 + (end - 0.1) * min(1.0, step / steps[-1])

    return Part(
        training=Training(task="instruct", size=size, configuration=number, seed=seed),
        hyperparameters=configuration(rate),
        parameters=SIZES[size],
        outcome="collapsed" if collapsed else "completed",
        steps=tuple(step_record(step, reward=score(step), kl=rate * step, generation_seconds=0.25) for step in steps),
        evaluations=tuple(
            Evaluation(step=step, prompts=16 * step, score=score(step), standard_error=0.02, samples=512, seconds=0.5)
            for step in RUNGS
            if step <= steps[-1]
        ),
        test=None,
        startup_seconds=2.0,
        cpu_seconds=10.0,
        wall_seconds=20.0,
        versions={},
    )


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five configurations on two sizes, one of them with a second seed, one collapsed."""
    folder = tmp_path_factory.mktemp("table")
    numbers = range(len(RATES))
    write([*(part(number, size) for size in SIZES for number in numbers), part(1, "large", seed=1)], folder)
    return folder


def study_data(table: Path, **changes: Any) -> dict[str, Any]:
    return {
        "study": "replayed",
        "family": [{"name": name, "path": "recorded", "parameters": count} for name, count in SIZES.items()],
        "target": "large",
        "task": "instruct",
        "trainer": {"name": "replay", "settings": {"table": str(table), "task": "instruct"}},
        "space": {"learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True}},
        "fidelity": {"horizon_prompts": 96, "rungs": 3},
        "budget": {"trial_seconds": 100},
        "stopping": {"rules": "none"},
        **changes,
    }


def case(table: Path, learning_rate: float = 2e-4, mode: str = "nearest") -> Case:
    settings = {"table": str(table), "task": "instruct", "mode": mode}
    return Case(
        study=StudySpec.model_validate(study_data(table, trainer={"name": "replay", "settings": settings})),
        model_path="recorded",
        configuration={"learning_rate": learning_rate},
        other={"learning_rate": 1e-3, "n_samples": 4},
    )


class TestNearest(TrainerConformance):
    @pytest.fixture
    def case(self, table: Path) -> Case:
        return case(table)


class TestCollapsed(TrainerConformance):
    @pytest.fixture
    def case(self, table: Path) -> Case:
        return case(table, learning_rate=RATES[-1])


class TestSurrogate(TrainerConformance):
    @pytest.fixture
    def case(self, table: Path) -> Case:
        return case(table, mode="surrogate")


def replay(case: Case, folder: Path, *evaluation_steps: int, **changes: Any) -> tuple[Any, list[StepRecord]]:
    records: list[StepRecord] = []
    job = case.job(0, TOTAL_STEPS, folder, evaluation_steps).model_copy(update=changes)
    return run_job(job, case.trainer, records.append), records


def test_a_recorded_configuration_is_answered_as_recorded(table: Path, tmp_path: Path) -> None:
    result, records = replay(case(table), tmp_path, *RUNGS)
    assert [record.reward for record in records] == pytest.approx([r.reward for r in part(2, "small").steps])
    scores = [evaluation.score for evaluation in result.evaluations]
    assert scores == pytest.approx([evaluation.score for evaluation in part(2, "small").evaluations])
    assert result.seconds == pytest.approx(2.0 + TOTAL_STEPS * (0.25 + 0.5) + len(RUNGS) * 0.5)
    assert (result.startup_seconds, result.evaluation_seconds) == (2.0, len(RUNGS) * 0.5)


def test_others_are_answered_by_the_nearest_on_the_same_model(table: Path, tmp_path: Path) -> None:
    for rate, nearest in ((3e-5, 1), (1.5e-4, 2), (1.1e-3, 3)):
        for size, parameters in SIZES.items():
            folder = tmp_path / f"{rate}{size}"
            _, records = replay(case(table, rate), folder, model=size, parameters=parameters, seed=0)
            assert records[-1].reward == pytest.approx(part(nearest, size).steps[-1].reward)


def test_seeds_are_shared_out_among_the_recorded_ones(table: Path, tmp_path: Path) -> None:
    finals = [
        replay(case(table, RATES[1]), tmp_path / str(seed), TOTAL_STEPS, seed=seed, model="large")[0]
        .evaluations[0]
        .score
        for seed in range(4)
    ]
    first, second = final_score(RATES[1], "large"), final_score(RATES[1], "large", seed=1)
    assert finals == pytest.approx([first, second, first, second])


def test_a_training_cut_short_goes_on_as_it_ended(table: Path, tmp_path: Path) -> None:
    result, records = replay(case(table, RATES[-1]), tmp_path, SHORT, TOTAL_STEPS)
    assert [record.reward for record in records[SHORT - 1 :]] == [0.0] * 3
    assert [record.prompts for record in records] == [16 * step for step in range(1, TOTAL_STEPS + 1)]
    assert [evaluation.score for evaluation in result.evaluations] == [0.0, 0.0]
    assert result.evaluations[-1].prompts == 16 * TOTAL_STEPS


def test_between_two_rungs_scores_are_interpolated(table: Path, tmp_path: Path) -> None:
    result, _ = replay(case(table), tmp_path, 2, 3, 4)
    before, between, after = (evaluation.score for evaluation in result.evaluations)
    assert between == pytest.approx((before + after) / 2)
    assert before < after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fidelity": {"horizon_prompts": 192, "rungs": 3}}, "horizon_prompts is 192"),
        ({"family": [{"name": "large", "path": "x", "parameters": 30_000}]}, "'large' with 30000 parameters"),
        ({"baselines": [{"name": "tiny", "configuration": {"learning_rate": 1e-6}}]}, r"baselines.*'tiny'.*outside"),
        ({"baselines": [{"name": "odd", "configuration": {"n_samples": 5}}]}, "5 is not one of"),
        ({"space": {"temperature": {"type": "float", "low": 0.6, "high": 1.2}}}, "temperature.*all recorded"),
        ({"space": {"n_samples": {"type": "int", "low": 4, "high": 16}}}, r"space\.n_samples.*make it a choice"),
        ({"trainer": {"name": "replay", "settings": {"task": "instruct"}}}, r"trainer\.settings\.table"),
        ({"trainer": {"name": "replay", "settings": {"table": "nowhere", "task": "x"}}}, "nowhere.*cannot be read"),
    ],
)
def test_what_the_table_cannot_answer_is_refused(table: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(StudySpec.model_validate(study_data(table, **change)))


def test_a_task_that_is_not_in_the_table_is_refused(table: Path) -> None:
    with pytest.raises(SpecError, match="'poetry'; the table has instruct"):
        read_table(str(table), "poetry")


def test_files_that_do_not_belong_together_are_refused(table: Path, tmp_path: Path) -> None:
    write([part(1, "small"), part(2, "small")], tmp_path)
    (tmp_path / "steps.parquet").write_bytes((table / "steps.parquet").read_bytes())
    with pytest.raises(SpecError, match="do not belong together"):
        read_table(str(tmp_path), "instruct")


def test_the_surrogate_follows_the_scores_between_recorded_configurations(tmp_path: Path) -> None:
    rates = 10 ** np.linspace(-4.9, -2.1, 16)
    recorded = [
        part(0, size).model_copy(
            update={
                "training": Training(task="instruct", size=size, configuration=number, seed=0),
                "hyperparameters": configuration(float(rate)),
                "evaluations": tuple(
                    evaluation.model_copy(
                        update={"score": 0.1 + (final_score(float(rate), size) - 0.1) * evaluation.step / TOTAL_STEPS}
                    )
                    for evaluation in part(0, size).evaluations
                ),
            }
        )
        for size in SIZES
        for number, rate in enumerate(rates)
    ]
    write(recorded, tmp_path)
    table = read_table(str(tmp_path), "instruct")
    surrogate = fit(table.recordings)
    for rate in (3e-5, 1.3e-4, 4e-4, 3e-3):
        for size in SIZES:
            point = SPACE.encode(configuration(rate))
            assert surrogate.score(size, point, TOTAL_STEPS) == pytest.approx(final_score(rate, size), abs=0.02)
            assert surrogate.score(size, point, 3) == pytest.approx((0.1 + final_score(rate, size)) / 2, abs=0.02)
            assert surrogate.score(size, point, 0) == pytest.approx(0.1)
    error = cross_validate(table)
    assert error.noise == pytest.approx(0.02)
    assert error.rmse < 0.2 * float(np.std(error.recorded))


def test_the_surrogates_noise_between_seeds_leaves_that_of_the_evaluation_out(table: Path) -> None:
    recordings = read_table(str(table), "instruct").recordings
    assert fit(recordings).seed_noise == 0.0  # the seeds differ by as much as the evaluation explains
    apart = tuple(
        replaced if (replaced := recording).seed == 0 else _with_final(recording, recording.evaluations[-1].score + 0.2)
        for recording in recordings
    )
    assert fit(apart).seed_noise == pytest.approx(math.sqrt(0.22**2 / 2 - 0.02**2), rel=1e-3)


def _with_final(recording: Recording, score: float) -> Recording:
    last = recording.evaluations[-1].model_copy(update={"score": score})
    return replace(recording, evaluations=(*recording.evaluations[:-1], last))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nearest", pytest.param("surrogate", marks=pytest.mark.slow)])
def test_a_search_on_the_committed_table_finds_a_good_configuration(tmp_path: Path, mode: str) -> None:
    spec = StudySpec.model_validate(
        {
            "study": "replayed",
            "family": "instruct",
            "target": "m",
            "task": "instruct",
            "trainer": {"name": "replay", "settings": {"table": str(COMMITTED), "task": "instruct", "mode": mode}},
            "space": "tiny",
            "fidelity": {"horizon_prompts": 1024, "rungs": 8},
            "budget": {"trial_seconds": 200},
            "strategy": "random",
            "tracking": {"workspace": str(tmp_path)},
        }
    )
    ledger = MemoryLedger()
    run_search(resolve(spec), ledger, InlineDispatcher(2))
    trials = [trial for trial in ledger.trials() if trial.purpose == "search"]
    finals = [trial.final.score for trial in trials if trial.final is not None]
    base = read_table(str(COMMITTED), "instruct").of_size("m")[0].evaluations[0].score
    assert len(trials) > 5
    assert max(finals) > base + 0.1
    assert sum(trial.charge_seconds for trial in trials) > 150


@pytest.mark.slow
def test_the_example_is_answered_by_the_committed_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[1])
    study = resolve(load_study(EXAMPLE))
    assert [model.name for model in study.ladder.models] == ["s", "sm", "m"]
