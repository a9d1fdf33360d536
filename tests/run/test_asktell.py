from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.optimizer.observations import observed_rows
from jfhpo_core.run.asktell import Assignment, Optimizer
from jfhpo_core.study.history import History
from jfhpo_core.study.trial import Outcome, TrialState, spent_seconds

GUIDE = Path("docs/how-to/ask-tell.md")
SIZES = {"small": 5_000_000, "large": 10_000_000}
BASE = 0.1
BUDGET = 600


def study(**changes: Any) -> dict[str, Any]:
    """Two models, a hyperparameter that jfhpo does not know, rungs at 50 and 100 prompts; a full target takes 100 s."""
    return {
        "study": "own",
        "family": [{"name": name, "parameters": size} for name, size in SIZES.items()],
        "target": "large",
        "space": {
            "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-3, "log": True, "shifts_with_size": True},
            "entropy_bonus": {"type": "float", "low": 0.0, "high": 1.0},
        },
        "fidelity": {"horizon_prompts": 100, "rungs": 2},
        "budget": {"trial_seconds": BUDGET},
        "seeds": {"training": [0]},
        **changes,
    }


def score(work: Assignment) -> float:
    """Best at a learning rate of 1e-4 and a bonus of 0.3; the small model gains less; curves are straight."""
    rate, bonus = float(work.configuration["learning_rate"]), float(work.configuration["entropy_bonus"])
    quality = math.exp(-(math.log10(rate / 1e-4) ** 2) - (bonus - 0.3) ** 2)
    return BASE + (0.6 if work.model == "large" else 0.4) * quality * work.to_prompts / 100


def seconds(work: Assignment) -> float:
    return (work.to_prompts - work.from_prompts) * SIZES[work.model] / SIZES["large"]


def tell(optimizer: Optimizer, work: Assignment) -> None:
    optimizer.tell(work, score(work), 0.02, seconds=seconds(work), base_score=BASE)


def ask(optimizer: Optimizer) -> Assignment:
    work = optimizer.ask()
    assert work is not None
    return work


def advance(optimizer: Optimizer, count: int) -> list[Assignment]:
    done = []
    for _ in range(count):
        work = ask(optimizer)
        tell(optimizer, work)
        done.append(work)
    return done


@pytest.mark.slow
def test_a_search_continues_trials_and_ends_within_its_budget_with_a_good_configuration() -> None:
    budget = 3 * BUDGET
    optimizer = Optimizer(study(budget={"trial_seconds": budget}))
    assert not optimizer.done
    assert optimizer.recommend() is None
    told: dict[str, Assignment] = {}
    models = set()
    continued = 0
    while (work := optimizer.ask()) is not None:
        assert work.why
        assert work.expected_cost_seconds > 0
        assert set(work.configuration) == {"learning_rate", "entropy_bonus"}
        before = told.get(work.trial)
        assert work.from_prompts == (before.to_prompts if before else 0)
        assert work.from_prompts < work.to_prompts <= 100
        if before is not None:
            continued += 1
            # The trial is out again, but its first assignment is still one that was told.
            with pytest.raises(LedgerError, match="told already up to"):
                tell(optimizer, before)
        tell(optimizer, work)
        told[work.trial] = work
        models.add(work.model)
    assert optimizer.done
    assert continued
    assert models == set(SIZES)
    assert spent_seconds(optimizer.trials) <= 1.1 * budget
    best = optimizer.recommend()
    assert best is not None
    assert 10**-4.5 < float(best.configuration["learning_rate"]) < 10**-3.5
    assert best.mean == pytest.approx(0.7, abs=0.1)
    assert best.configuration in [item.configuration for item in optimizer.rank()]


def test_several_asks_before_a_tell_give_different_work_that_counts_as_running() -> None:
    optimizer = Optimizer(study())
    works = [optimizer.ask() for _ in range(3)]
    assert len({(work.trial, work.model) for work in works if work}) == 3
    assert optimizer.pending == works
    first, second, third = (work for work in works if work)
    tell(optimizer, third)
    assert optimizer.pending == [first, second]
    assert not optimizer.done


def test_pending_work_counts_against_the_budget() -> None:
    # Random search names no costs of its own.
    optimizer = Optimizer(study(strategy="random"))
    advance(optimizer, 1)
    out = 0
    while optimizer.ask() is not None:
        out += 1
        assert out < 200
    assert out > 1
    assert len(optimizer.pending) == out
    assert not optimizer.done
    assert spent_seconds(optimizer.trials) + sum(w.expected_cost_seconds for w in optimizer.pending) < 1.5 * BUDGET


@pytest.mark.slow
def test_a_saved_optimizer_goes_on_with_the_same_work(tmp_path: Path) -> None:
    optimizer = Optimizer(study())
    advance(optimizer, 5)
    out = optimizer.ask()
    assert out is not None
    optimizer.save(tmp_path / "state.json")
    again = Optimizer(study())
    again.load(tmp_path / "state.json")
    assert again.trials == optimizer.trials
    assert again.pending == [out]
    for one in (optimizer, again):
        tell(one, out)
    assert advance(again, 2) == advance(optimizer, 2)
    assert again.recommend() == optimizer.recommend()
    assert list(tmp_path.iterdir()) == [tmp_path / "state.json"]


def test_a_state_of_another_study_or_none_at_all_is_refused(tmp_path: Path) -> None:
    optimizer = Optimizer(study())
    advance(optimizer, 1)
    state = tmp_path / "state.json"
    optimizer.save(state)
    other = Optimizer(study(target="small", fidelity={"horizon_prompts": 200}))
    with pytest.raises(LedgerError, match=r"other (values|settings)"):
        other.load(state)
    assert other.trials == []
    with pytest.raises(LedgerError, match="already"):
        optimizer.load(state)
    with pytest.raises(LedgerError, match="cannot be read"):
        other.load(tmp_path / "absent.json")
    state.write_text(json.dumps({"trials": [{"key": 3}], "identity": ""}), encoding="utf-8")
    with pytest.raises(LedgerError, match="cannot be read"):
        other.load(state)


def test_what_is_told_stands_in_the_ledger() -> None:
    optimizer = Optimizer(study())
    works = [work for work in (optimizer.ask() for _ in range(4)) if work]
    reached, stopped, failed, lost = works
    middle = reached.to_prompts // 2
    optimizer.tell(reached, 0.5, 0.02, seconds=9, base_score=BASE, evaluations=[(middle, 0.3, 0.03)])
    optimizer.tell(stopped.trial, 0.05, 0.01, seconds=4, outcome="stopped", prompts=20, message="KL exploded")
    optimizer.tell(failed, seconds=1, outcome=Outcome.INFEASIBLE, message="out of memory")
    optimizer.tell(lost, seconds=2, outcome="lost")
    by_key = {trial.key: trial for trial in optimizer.trials}
    curve = [(item.prompts, item.score) for item in by_key[reached.trial].evaluations]
    assert curve == [(0, BASE), (middle, 0.3), (reached.to_prompts, 0.5)]
    states = [by_key[work.trial].state for work in works]
    expected = TrialState.COMPLETED if reached.to_prompts == 100 else TrialState.PAUSED
    assert states == [expected, TrialState.STOPPED, TrialState.INFEASIBLE, TrialState.LOST]
    assert by_key[stopped.trial].step == 20
    assert by_key[failed.trial].segments[0].message == "out of memory"
    assert spent_seconds(optimizer.trials) == 16
    assert [trial.segments[0].committed for trial in optimizer.trials] == [1, 2, 3, 4]


def patient() -> dict[str, Any]:
    """A study that stays on proxies for long, whose segments have floors."""
    return study(
        strategy={"name": "jfhpo", "settings": {"target_share": 0.1}},
        fidelity={"horizon_prompts": 100, "rungs": 4},
        budget={"trial_seconds": 4 * BUDGET},
    )


@pytest.mark.slow
def test_work_comes_with_floors_between_its_ends() -> None:
    floors = [(work, floor) for work in advance(Optimizer(patient()), 15) for floor in work.floors]
    assert floors
    for work, (prompts, limit) in floors:
        assert work.from_prompts < prompts < work.to_prompts
        assert math.isfinite(limit)


@pytest.mark.parametrize(("below", "rule"), [(True, "unpromising"), (False, None)])
def test_a_stop_below_a_floor_is_no_collapse(below: bool, rule: str | None) -> None:
    optimizer = Optimizer(patient())
    while not (work := ask(optimizer)).floors:
        tell(optimizer, work)
    prompts, floor = work.floors[0]
    optimizer.tell(
        work, floor + (-0.01 if below else 0.01), 0.02, seconds=1, outcome="stopped", prompts=prompts, base_score=BASE
    )
    (trial,) = [trial for trial in optimizer.trials if trial.key == work.trial]
    assert (trial.decision.rule if trial.decision is not None else None) == rule
    observed = observed_rows(History.of(optimizer.study, [trial]))[-1]
    assert observed.inputs[-3] == (prompts / 100 if below else 1.0)


def test_seconds_are_charged_for_every_device() -> None:
    family = [{"name": "small", "parameters": 10}, {"name": "large", "parameters": 100, "devices": 4}]
    optimizer = Optimizer(study(family=family, strategy="random"))
    tell(optimizer, optimizer.ask() or pytest.fail("nothing to do"))
    trial = optimizer.trials[0]
    assert trial.charge_seconds == 4 * trial.segments[0].seconds


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"score": math.nan, "standard_error": 0.1}, "score=nan is not a finite number"),
        ({"score": 0.5, "standard_error": math.inf}, "standard_error=inf"),
        ({"score": 0.5, "standard_error": -0.1}, "at least 0"),
        ({"score": 0.5, "standard_error": 0.1, "seconds": -1.0}, "seconds=-1.0"),
        ({"score": 0.5}, "needs score and standard_error"),
        ({"score": 0.5, "standard_error": 0.1, "outcome": "stopped"}, "and prompts"),
        ({"score": 0.5, "standard_error": 0.1, "outcome": "stopped", "prompts": 101}, "prompts=101 is not in"),
        ({"score": 0.5, "standard_error": 0.1, "prompts": 7}, "outcome='stopped'"),
        ({"score": 0.5, "standard_error": 0.1, "evaluations": [(0, 0.1, 0.1)]}, "prompts=0 is not in"),
        ({"outcome": "crashed"}, "none of reached, stopped, infeasible, lost"),
    ],
)
def test_figures_that_make_no_sense_are_refused_and_change_nothing(figures: dict[str, Any], expected: str) -> None:
    optimizer = Optimizer(study())
    work = optimizer.ask()
    assert work is not None
    before = optimizer.trials
    with pytest.raises(LedgerError, match=re.escape(expected)):
        optimizer.tell(work, **{"seconds": 1.0, **figures})
    assert optimizer.trials == before
    tell(optimizer, work)


def test_unknown_and_repeated_tells_are_refused() -> None:
    optimizer = Optimizer(study())
    first = optimizer.ask()
    assert first is not None
    with pytest.raises(LedgerError, match=f"'nobody' was never asked for; pending: {first.trial}"):
        optimizer.tell("nobody", 0.5, 0.1, seconds=1)
    tell(optimizer, first)
    for again in (first, first.trial):
        with pytest.raises(LedgerError, match=f"told already up to {first.to_prompts} prompts"):
            optimizer.tell(again, 0.5, 0.1, seconds=1)


def test_a_study_file_serves_as_well(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(), sort_keys=False), encoding="utf-8")
    assert Optimizer(path).ask() == Optimizer(study()).ask()
    # A file for `jfhpo search`: its trainer is not asked, its batch size is.
    optimizer = Optimizer("examples/simulated.yaml")
    work = optimizer.ask()
    assert work is not None
    assert work.purpose == "baseline"
    assert work.configuration == {"learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": "huge"}, "'huge' is not in the family"),
        ({"family": [{"name": "large"}]}, "lacks `parameters`"),
        ({"budget": {}}, "trial_seconds or gpu_hours"),
        ({"space": {}}, "the space is empty"),
        ({"strategy": "oracle"}, "no strategy 'oracle'"),
        ({"spaec": {}}, "spaec"),
        ({"fidelity": {"horizon_prompts": 100, "rungs": 3}}, "cannot be cut into 3"),
    ],
)
def test_a_bad_study_is_refused_with_its_fault(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError, match=re.escape(expected)):
        Optimizer(study(**changes))


def test_a_study_that_is_no_mapping_or_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(SpecError, match="cannot be read"):
        Optimizer(path)
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(SpecError, match="mapping"):
        Optimizer(path)


@dataclass(frozen=True)
class Run:
    score: float
    standard_error: float
    seconds: float
    base_score: float


@pytest.mark.slow
def test_the_example_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)

    seeds: dict[str, set[int]] = {}

    def train(configuration: dict[str, Any], model: str, seed: int, begin: int, end: int, folder: str) -> Run:
        seeds.setdefault(folder, set()).add(seed)
        off = math.log10(configuration["learning_rate"] / 1e-6) ** 2 + (configuration["entropy_bonus"] / 0.02) ** 2
        size = 1.0 if model == "7B" else 0.4
        return Run(0.2 + 0.5 * math.exp(-off) * end / 6400, 0.02, size * (end - begin) * 8, 0.2)

    names: dict[str, Any] = {"train": train}
    exec(compile(code, str(GUIDE), "exec"), names)
    assert names["optimizer"].done
    assert all(len(of_a_trial) == 1 for of_a_trial in seeds.values())
    assert {0, 1} <= set.union(*seeds.values())
    assert (tmp_path / "my-loop.json").exists()
    assert str(names["best"].configuration) in capsys.readouterr().out
    assert 10**-6.6 < names["best"].configuration["learning_rate"] < 10**-5.4


def test_metrics_that_are_told_decide_what_is_recommended() -> None:
    data = study(
        constraints={"completion_tokens": "<= 300"}, strategy="random", fidelity={"horizon_prompts": 100, "rungs": 1}
    )
    optimizer = Optimizer(data)
    for length, value in ((400.0, 0.9), (250.0, 0.4), (280.0, 0.5)):
        work = ask(optimizer)
        optimizer.tell(work, value, 0.02, seconds=100.0, metrics={"completion_tokens": length})
    recommended = optimizer.recommend()
    assert recommended is not None
    assert recommended.mean == 0.5
    with pytest.raises(LedgerError, match="metrics: there is no 'length'; there are kl, entropy"):
        optimizer.tell(ask(optimizer), 0.5, 0.02, seconds=100.0, metrics={"length": 3.0})
