from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.strategy import STRATEGIES, RandomSearch, fresh_configurations, load_strategy
from jfhpo_core.study.trial import Trial, configuration_key
from tests.studies import evaluation, result, simulated_study


def test_random_search_walks_a_sobol_sequence_at_full_length_on_the_target(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trials: list[Trial] = []
    for number in range(8):
        proposal = RandomSearch().suggest(study, trials, 100.0, seed=number)
        assert proposal is not None
        assert (proposal.model, proposal.stop_prompts) == ("large", 480)
        trials.append(study.new_trial(number, proposal.configuration, proposal.model, 0))
    assert [trial.configuration for trial in trials] == fresh_configurations(study, (), 0, 8)


def test_random_search_ends_with_the_budget(tmp_path: Path) -> None:
    assert RandomSearch().suggest(simulated_study(tmp_path), (), 0.0, 0) is None


def test_random_search_ranks_by_the_final_score_on_the_target(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)

    def trial(number: int, model: str, end: int, score: float) -> Trial:
        done = result(0, 0, end, evaluations=(evaluation(end, score),))
        new = study.new_trial(number, {"learning_rate": 1e-4 * (number + 1)}, model, 0)
        return new.model_copy(update={"segments": (done,)})

    trials = [
        trial(0, "large", 30, 0.4),
        trial(1, "large", 30, 0.6),
        trial(2, "large", 20, 0.9),
        trial(3, "small", 30, 0.9),
    ]
    ranked = RandomSearch().rank(study, trials)
    assert [(item.mean, item.standard_deviation) for item in ranked] == [(0.6, 0.02), (0.4, 0.02)]
    assert RandomSearch().rank(study, []) == []


def test_fresh_configurations_are_new_distinct_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    first = fresh_configurations(study, (), 7, 6)
    assert len({configuration_key(item) for item in first}) == 6
    known = [study.new_trial(number, item, "small", 0) for number, item in enumerate(first[:4])]
    assert fresh_configurations(study, known, 7, 2) == first[4:]
    assert fresh_configurations(study, (), 8, 6) != first


def test_fresh_configurations_fill_the_space(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    points = [study.space.encode(item)[0] for item in fresh_configurations(study, (), 0, 64)]
    counts = [sum(low <= point < low + 0.125 for point in points) for low in (index / 8 for index in range(8))]
    assert all(6 <= count <= 10 for count in counts)


def test_a_finite_space_runs_out(tmp_path: Path) -> None:
    space = {"scheduler": {"type": "choice", "values": ["constant", "cosine"]}}
    study = simulated_study(tmp_path, space=space)
    everything = fresh_configurations(study, (), 0, 5)
    assert sorted(str(item["scheduler"]) for item in everything) == ["constant", "cosine"]
    known = [study.new_trial(number, item, "large", 0) for number, item in enumerate(everything)]
    assert RandomSearch().suggest(study, known, 100.0, 0) is None


def test_random_search_is_loaded_by_name(tmp_path: Path) -> None:
    assert load_strategy(simulated_study(tmp_path)) == RandomSearch()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jfhpo", "paper"])
def test_strategies_with_a_model_are_loaded_by_name(tmp_path: Path, name: str) -> None:
    assert load_strategy(simulated_study(tmp_path, strategy=name)).name == name


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("grid", "strategy.name: no strategy 'grid'; there are .*jfhpo, paper, random, .*tpe"),
        ({"name": "random", "settings": {"depth": 3}}, "strategy.settings: .*depth"),
        ({"name": "jfhpo", "settings": {"target_share": "half"}}, "strategy.settings.target_share: .*got 'half'"),
        ({"name": "jfhpo", "settings": {"anchors": -1}}, "strategy.settings.anchors: .*greater than or equal to 0"),
        ({"name": "paper", "settings": {"proxy": "nope"}}, r"strategy.settings.proxy: 'nope' is not among the models"),
        ({"name": "tpe", "settings": {"model": "nope"}}, r"strategy.settings.model: 'nope' is not .*small, medium"),
        ({"name": "asha", "settings": {"eta": 1}}, "strategy.settings.eta: .*greater than or equal to 2, got 1"),
    ],
)
def test_unknown_strategies_and_settings_are_refused(tmp_path: Path, strategy: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_strategy(simulated_study(tmp_path, strategy=strategy))


@pytest.mark.slow
def test_strategies_carry_the_names_that_they_are_loaded_by(tmp_path: Path) -> None:
    for name in STRATEGIES:
        settings = {"configuration": {}} if name == "given" else {}
        study = simulated_study(tmp_path, strategy={"name": name, "settings": settings})
        assert load_strategy(study).name == name


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "jfhpo_core.peers.optuna", raising=False)
    with pytest.raises(SpecError, match=r"strategy 'tpe' cannot be imported: .*optuna.*pip install 'jfhpo\[peers\]'"):
        load_strategy(simulated_study(tmp_path, strategy="tpe"))
