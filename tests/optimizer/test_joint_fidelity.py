"""The strategies `jfhpo` and `paper` on simulated studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from torch.linalg import LinAlgError

from jfhpo_core.optimizer import surrogate
from jfhpo_core.optimizer.acquisition import expected_improvement
from jfhpo_core.optimizer.allocation import Priced
from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.candidates import Candidate, candidate_inputs
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.optimizer.joint_fidelity import FINISHED_FIRST, PAYS_AFTER, JointFidelity
from jfhpo_core.optimizer.paper import PaperStrategy
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.planning import call_seed, plan_next
from jfhpo_core.run.search import run_search
from jfhpo_core.run.standing import recommend
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.hyperparameters import default_spaces
from jfhpo_core.study.resolved import EarlierStudy, Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import (
    Configuration,
    Evaluation,
    Outcome,
    Suggestion,
    Trial,
    TrialState,
    committed_seconds,
)
from jfhpo_core.trainers.simulated import study_surface, true_score
from tests.studies import result

NO_REASON = Suggestion(source="test", explanation="test")


def simulated(tmp_path: Path, **changes: Any) -> Study:
    """A study of three simulated models, 0.02M to 0.6M parameters."""
    raw: dict[str, Any] = {
        "study": "optimizer-test",
        "family": [
            {"name": "small", "path": "simulated", "parameters": 20_000},
            {"name": "medium", "path": "simulated", "parameters": 300_000},
            {"name": "large", "path": "simulated", "parameters": 600_000},
        ],
        "target": "large",
        "task": "instruct",
        "trainer": "simulated",
        "space": "tiny",
        "budget": {"trial_seconds": 800, "max_parallel": 2},
        "seeds": {"search": 0, "training": [0]},
        "tracking": {"workspace": str(tmp_path)},
    }
    return resolve(StudySpec.model_validate(raw | changes))


def search(study: Study) -> tuple[SearchResult, MemoryLedger]:
    ledger = MemoryLedger()
    return run_search(study, ledger, InlineDispatcher(study.spec.budget.max_parallel)), ledger


def true_final(result: SearchResult) -> float:
    assert result.recommended is not None
    study = result.study
    return true_score(study_surface(study.spec), study.complete(result.recommended.configuration), 1.0, 1.0)


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(simulated(tmp_path_factory.mktemp("optimizer")))[0]


@pytest.mark.slow
def test_a_search_uses_proxies_continues_checkpoints_and_keeps_its_budget(completed: SearchResult) -> None:
    mine = [trial for trial in completed.trials if trial.purpose == "search"]
    assert {trial.model for trial in mine} >= {"small", "large"}
    complete = sum(trial.model == "large" and trial.final is not None for trial in mine)
    assert sum(trial.model == "small" for trial in mine) >= complete
    assert any(result.segment.start_step > 0 for trial in mine for result in trial.segments)
    assert complete >= 1
    longest = max(result.seconds for trial in mine for result in trial.segments)
    assert completed.spent_seconds <= 800 + 2 * longest


@pytest.mark.slow
def test_it_ends_well_above_the_untrained_model(completed: SearchResult) -> None:
    assert true_final(completed) > 0.6
    assert completed.recommended is not None
    assert completed.recommended.mean == pytest.approx(true_final(completed), abs=0.1)


@pytest.mark.slow
def test_every_suggestion_says_why_and_what_it_should_cost(completed: SearchResult) -> None:
    segments = [result.segment for trial in completed.trials for result in trial.segments]
    assert {segment.suggestion.source for segment in segments} >= {"jfhpo/initial-design", "jfhpo/knowledge-gradient"}
    for segment in segments:
        assert segment.suggestion.explanation
        assert segment.suggestion.expected_cost_seconds is not None


@pytest.mark.slow
def test_the_target_gets_its_share(completed: SearchResult) -> None:
    """At every moment after the initial design the target has had its share, up to one segment per slot."""
    mine = [trial for trial in completed.trials if trial.purpose == "search"]
    on_target = [trial for trial in mine if trial.model == "large"]
    assert committed_seconds(on_target) >= 0.5 * committed_seconds(mine) - 2 * 70


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jfhpo", "paper", "random"])
def test_suggestions_are_a_pure_function_of_the_ledger(tmp_path: Path, name: str, completed: SearchResult) -> None:
    study = simulated(tmp_path, strategy=name)
    trials = [trial for trial in completed.trials if trial.number < 20]
    seed = call_seed(study, trials)
    first = load_strategy(study).suggest(study, trials, 300.0, seed)
    surrogate._remembered_parameters.cache_clear()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  the global state must not matter
    second = load_strategy(study).suggest(study, trials, 300.0, seed)
    assert first is not None
    assert first == second


@pytest.mark.slow
def test_a_running_training_is_not_suggested_again(tmp_path: Path, completed: SearchResult) -> None:
    study = simulated(tmp_path)
    trials = [trial for trial in completed.trials if trial.number < 15]
    strategy = JointFidelity()
    first = strategy.suggest(study, trials, 300.0, 1)
    assert first is not None
    new = study.new_trial(len(trials), first.configuration, first.model, 0)
    known = next((trial for trial in trials if trial.key == new.key), new)
    running = known.model_copy(update={"open_segment": study.next_segment(known, first.stop_prompts, first.suggestion)})
    second = strategy.suggest(study, [*(t for t in trials if t.key != new.key), running], 300.0, 1)
    assert second is not None
    assert (second.configuration, second.model) != (first.configuration, first.model)


@pytest.mark.slow
def test_nothing_is_suggested_that_might_not_fit_the_remaining_budget(tmp_path: Path, completed: SearchResult) -> None:
    study = simulated(tmp_path)
    trials = list(completed.trials)
    assert JointFidelity().suggest(study, trials, 12.0, 1) is None  # a cheap segment, but no means for its winner
    affordable = JointFidelity().suggest(study, trials, 150.0, 1)
    assert affordable is not None
    chosen = (affordable.configuration, affordable.model)
    same = next((trial for trial in trials if (trial.configuration, trial.model) == chosen), None)
    costs = CostModel.fit(study, trials)
    start = same.step * same.prompts_per_step if same is not None else 0
    cost = costs.estimate(affordable.configuration, affordable.model, start, affordable.stop_prompts)
    assert affordable.suggestion.expected_cost_seconds == cost.seconds
    assert cost.seconds < cost.high <= 150.0


def test_a_study_in_which_everything_fails_ends_without_a_recommendation(tmp_path: Path) -> None:
    study = simulated(tmp_path, trainer={"name": "simulated", "settings": {"memory_limit": 1e-3}})
    result, _ = search(study)
    assert result.complete
    assert result.recommended is None
    assert all(trial.state is TrialState.INFEASIBLE for trial in result.trials)


@pytest.mark.parametrize("name", ["jfhpo", "paper"])
@pytest.mark.slow
def test_a_space_of_four_points_is_searched_and_ends(tmp_path: Path, name: str) -> None:
    space = {
        "learning_rate": {"type": "choice", "values": [1e-4, 5e-4]},
        "scheduler": {"type": "choice", "values": ["constant", "cosine"]},
    }
    result, _ = search(simulated(tmp_path, strategy=name, space=space))
    assert result.complete
    assert result.recommended is not None
    assert result.recommended.configuration["learning_rate"] == 5e-4


@pytest.mark.slow
def test_the_paper_strategy_never_looks_beyond_its_proxy_before_validation(tmp_path: Path) -> None:
    result, _ = search(simulated(tmp_path, strategy="paper", budget={"trial_seconds": 300, "max_parallel": 2}))
    searched = [
        (trial.model, segment.segment.suggestion.source)
        for trial in result.trials
        for segment in trial.segments
        if segment.segment.suggestion.source.startswith("paper/")
    ]
    assert {model for model, _ in searched} == {"small"}
    assert {source for _, source in searched} == {"paper/initial-design", "paper/expected-improvement"}
    assert result.recommended is not None
    assert isinstance(load_strategy(result.study), PaperStrategy)


@pytest.mark.slow
def test_it_beats_random_search_at_equal_cost(tmp_path: Path) -> None:
    """On a landscape whose best learning rate moves with size; the recipe there learns nothing."""
    own = simulated(tmp_path)
    recipe = {"name": "recipe", "configuration": own.space.restrict(own.complete({}))}
    scores: dict[str, float] = {}
    for name in ("jfhpo", "random"):
        results = [
            search(
                simulated(
                    tmp_path / f"{name}{seed}",
                    strategy=name,
                    budget={"trial_seconds": 300, "max_parallel": 2},
                    seeds={"search": seed, "training": [seed]},
                    baselines=[recipe],
                )
            )[0]
            for seed in range(6)
        ]
        scores[name] = mean(true_final(result) for result in results)
    assert scores["jfhpo"] > scores["random"]


def test_the_search_begins_where_the_user_expects_the_best(tmp_path: Path) -> None:
    space = {name: dict(parameter) for name, parameter in default_spaces()["tiny"].items()}
    plain = simulated(tmp_path, space=space)
    space["learning_rate"] |= {"expected": 1e-3, "spread": 0.1}
    informed = simulated(tmp_path, space=space)

    def distance(study: Study) -> float:
        trials: list[Trial] = []
        for _ in range(6):
            proposal = JointFidelity().suggest(study, trials, 1e6, 0)
            assert proposal is not None
            trials.append(study.new_trial(len(trials), proposal.configuration, proposal.model, 0))
        return mean(abs(np.log10(float(trial.configuration["learning_rate"]) / 1e-3)) for trial in trials)

    assert distance(informed) < 0.5 * distance(plain)


@pytest.mark.slow
def test_a_further_seed_that_is_being_trained_is_not_proposed_again(completed: SearchResult) -> None:
    study, strategy = completed.study, JointFidelity()
    done = next(trial for trial in completed.trials if trial.model == "large" and trial.final is not None)
    ranked = [done.configuration]
    (first,) = strategy._candidates._replicates(History.of(study, completed.trials), ranked)
    assert first.seed is not None
    fresh = study.new_trial(len(completed.trials), done.configuration, "large", first.seed)
    running = fresh.model_copy(update={"open_segment": study.next_segment(fresh, first.stop_prompts, NO_REASON)})
    (second,) = strategy._candidates._replicates(History.of(study, [*completed.trials, running]), ranked)
    assert second.seed == first.seed + 1


@pytest.mark.slow
def test_a_lost_continuation_is_a_candidate_again(completed: SearchResult) -> None:
    study = completed.study
    trials = list(completed.trials)
    paused = next(trial for trial in trials if trial.state is TrialState.PAUSED and trial.purpose == "search")
    lost = result(len(paused.segments), paused.step, paused.step + 1, outcome=Outcome.LOST)
    changed = paused.model_copy(update={"segments": (*paused.segments, lost)})
    known = [changed if trial is paused else trial for trial in trials]
    beliefs = Beliefs.form(History.of(study, known))
    assert beliefs is not None
    candidates = JointFidelity()._candidates.segments(beliefs, [paused.configuration], [], np.random.default_rng(0))
    mine = [item for item in candidates if item.trial == paused.number and item.model == paused.model]
    assert {item.start_prompts for item in mine} == {paused.step * paused.prompts_per_step}
    assert study.spec.fidelity.horizon_prompts in {item.stop_prompts for item in mine}


@pytest.mark.slow
def test_a_lost_further_seed_is_tried_again_as_what_it_is(completed: SearchResult) -> None:
    study, trials = completed.study, list(completed.trials)
    done = next(trial for trial in trials if trial.model == "large" and trial.final is not None)
    fresh = study.new_trial(len(trials), done.configuration, "large", 7)
    lost = fresh.model_copy(update={"segments": (result(0, 0, 1, outcome=Outcome.LOST),)})
    known = [*trials, lost]
    beliefs = Beliefs.form(History.of(study, known))
    assert beliefs is not None
    candidates = JointFidelity()._candidates.segments(beliefs, [done.configuration], [], np.random.default_rng(0))
    mine = [item for item in candidates if item.trial == lost.number]
    assert mine
    assert {(item.seed, item.start_prompts) for item in mine} == {(7, 0)}


@pytest.mark.slow
def test_a_surrogate_that_cannot_be_fitted_ends_no_search(
    completed: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LinAlgError("not positive definite")

    monkeypatch.setattr(Beliefs, "form", broken)
    trials = [trial for trial in completed.trials if trial.purpose == "search"]
    assert recommend(completed.study, JointFidelity(), trials) is not None
    study = completed.study
    larger = study.spec.model_copy(
        update={"budget": study.spec.budget.model_copy(update={"trial_seconds": 2 * study.spec.budget.device_seconds})}
    )
    step = plan_next(replace(study, spec=larger), JointFidelity(), trials)
    assert step.segment is not None
    assert "could not be fitted" in step.segment.suggestion.explanation


@pytest.mark.slow
def test_expectations_fade_with_the_number_of_trials(tmp_path: Path, completed: SearchResult) -> None:
    space = {name: dict(parameter) for name, parameter in default_spaces()["tiny"].items()}
    space["learning_rate"] |= {"expected": 1e-5, "spread": 0.2}
    study, strategy = simulated(tmp_path, space=space), JointFidelity()
    points = torch.full((1, study.space.dimension + 4), 0.5, dtype=torch.double)
    few, many = (
        float(strategy._weights(History.of(study, completed.trials[:count]), points, study.space)) for count in (8, 30)
    )
    assert few < many < 1


@pytest.mark.slow
def test_trainings_that_cannot_matter_any_more_are_stopped(tmp_path: Path) -> None:
    rule = {"override": {"unpromising": {"probability": 0.45}}}
    result, _ = search(simulated(tmp_path, stopping=rule, budget={"trial_seconds": 400, "max_parallel": 1}))
    segments = [done for trial in result.trials for done in trial.segments]
    stopped = [done for done in segments if done.decision and done.decision.rule == "unpromising"]
    assert stopped
    for done in stopped:
        floors = {floor.step: floor.score for floor in done.segment.floors}
        assert done.end_step < done.segment.stop_step
        assert done.evaluations[-1].score < floors[done.end_step]
    chosen = [done for done in segments if done.segment.suggestion.source.startswith("jfhpo/")]
    assert any(done.segment.floors for done in chosen)
    assert not any(done.segment.floors for done in segments if done not in chosen), "a validation is never cut short"
    on_target = sorted(
        (done.committed, bool(done.segment.floors)) for trial in result.trials for done in trial.segments
         if trial.model == "large" and done in chosen
    )  # fmt: skip
    assert not any(floors for _, floors in on_target[:FINISHED_FIRST]), "the first full run corrects the model"
    assert any(floors for _, floors in on_target)


@pytest.mark.slow
def test_it_goes_on_as_long_as_some_full_run_is_expected_to_bring_its_price(completed: SearchResult) -> None:
    study, history = completed.study, History.of(completed.study, completed.trials)
    beliefs = Beliefs.form(history)
    assert beliefs is not None
    assert len(history.finished) >= PAYS_AFTER
    tried = [trial.configuration for trial in history.search[:8]]
    runs = [Candidate(item, "large", 0, study.spec.fidelity.horizon_prompts, len(history.trials)) for item in tried]
    means, deviations = beliefs.values(beliefs.at_target(tried))
    incumbent = float(beliefs.worth(beliefs.at_target(trial.configuration for trial in history.finished)).max())
    gains = expected_improvement(means, deviations, incumbent) * beliefs.accepted(candidate_inputs(study, runs))
    best = int(gains.argmax())
    worth = float(gains[best]) * beliefs.scale.unit()
    usual, dear = ([Priced(item, seconds) for item in runs] for seconds in (30.0, 60.0))
    for price, cheap_pays, dear_pays in ((0.0, True, True), (0.4 * worth, True, True), (0.9 * worth, True, False)):
        strategy = JointFidelity(stop_gain=price)
        assert (strategy.pays(beliefs, usual, 30.0), strategy.pays(beliefs, dear, 30.0)) == (cheap_pays, dear_pays)
    assert not JointFidelity(stop_gain=1.1 * worth).pays(beliefs, usual, 30.0)
    first = replace(beliefs, history=History.of(study, [trial for trial in completed.trials if trial.model != "large"]))
    assert JointFidelity(stop_gain=1.1 * worth).pays(first, usual, 30.0), "nothing has finished yet"
    short = [Priced(replace(item, stop_prompts=16), 1.0) for item in runs]
    assert JointFidelity(stop_gain=1.1 * worth).pays(beliefs, short, 30.0), "no full run is to be had"


@pytest.mark.slow
def test_a_search_ends_when_nothing_more_is_to_be_gained(tmp_path: Path) -> None:
    study = simulated(tmp_path, strategy={"name": "jfhpo", "settings": {"stop_gain": 0.5}})
    result, _ = search(study)
    assert result.complete
    assert result.recommended is not None
    assert result.spent_seconds < 0.75 * 800


def rescaled(trials: Sequence[Trial], factor: float, shift: float, base: float) -> list[Trial]:
    """Trials whose scores are multiplied and shifted, and whose untrained scores are something else."""

    def changed(evaluation: Evaluation) -> Evaluation:
        score = base if evaluation.step == 0 else factor * evaluation.score + shift
        return evaluation.model_copy(
            update={"score": score, "standard_error": factor * evaluation.standard_error, "pass_at_n": None}
        )

    return [
        trial.model_copy(
            update={
                "segments": tuple(
                    segment.model_copy(update={"evaluations": tuple(changed(item) for item in segment.evaluations)})
                    for segment in trial.segments
                )
            }
        )
        for trial in trials
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "shift", "base"), [(1.0, 0.0, -3.0), (100.0, 0.0, 20.0), (0.5, -7.0, -9.0)])
def test_units_offsets_and_the_untrained_score_change_no_decision(
    completed: SearchResult, factor: float, shift: float, base: float
) -> None:
    study, strategy = completed.study, JointFidelity()
    for count in (12, 20):
        plain = [trial for trial in completed.trials if trial.number < count]
        other = rescaled(plain, factor, shift, base)
        first, second = (strategy.suggest(study, trials, 300.0, 1) for trials in (plain, other))
        assert first is not None
        assert second is not None
        assert (first.configuration, first.model, first.stop_prompts) == (
            second.configuration,
            second.model,
            second.stop_prompts,
        )
        ranked = [[item.configuration for item in strategy.rank(study, trials)] for trials in (plain, other)]
        assert ranked[0] == ranked[1]


def with_recipe(tmp_path: Path, configuration: Configuration, **changes: Any) -> Study:
    return simulated(tmp_path, baselines=[{"name": "recipe", "configuration": configuration}], **changes)


@pytest.mark.slow
def test_a_recipe_is_a_candidate_for_everything(tmp_path: Path) -> None:
    """A space of two points, and the recipe is the better one: nothing trains it twice."""
    space = {"learning_rate": {"type": "choice", "values": [1e-5, 5e-4]}}
    result, _ = search(with_recipe(tmp_path, {"learning_rate": 5e-4}, space=space))
    assert result.recommended is not None
    assert result.recommended.configuration == {"learning_rate": 5e-4}
    assert result.target_trial is not None
    assert result.target_trial.purpose == "baseline"
    on_target = [t for t in result.trials if t.model == "large" and t.configuration == {"learning_rate": 5e-4}]
    assert len({trial.seed for trial in on_target}) == len(on_target)


def test_a_budget_for_nothing_else_recommends_the_recipe(tmp_path: Path) -> None:
    result, _ = search(with_recipe(tmp_path, {"learning_rate": 5e-4}, budget={"trial_seconds": 1, "max_parallel": 1}))
    assert result.recommended is not None
    assert result.recommended.configuration["learning_rate"] == 5e-4


@pytest.mark.slow
def test_the_first_full_run_comes_after_a_short_lead(completed: SearchResult) -> None:
    """What is spent before the target has a full run is below one such run and the segment that completes it."""
    results = sorted(
        ((segment.committed, trial, segment) for trial in completed.trials for segment in trial.segments),
        key=lambda item: item[0],
    )
    spent = 0.0
    for _, trial, segment in results:
        if trial.model == "large" and segment.end_step == trial.total_steps:
            break
        spent += segment.charge_seconds
    full = CostModel.fit(completed.study, completed.trials).estimate(
        completed.study.space.middle(), "large", 0, completed.study.spec.fidelity.horizon_prompts
    )
    assert spent < 2 * full.high


@pytest.mark.slow
def test_the_best_of_an_earlier_study_is_the_first_run_of_the_target(tmp_path: Path, completed: SearchResult) -> None:
    earlier = EarlierStudy(completed.study.spec, completed.study.ladder, tuple(completed.trials))
    study = replace(simulated(tmp_path), earlier=(earlier,))
    proposal = JointFidelity().suggest(study, [], 400.0, 0)
    assert proposal is not None
    assert (proposal.model, proposal.stop_prompts) == ("large", study.spec.fidelity.horizon_prompts)
    value = true_score(study_surface(study.spec), study.complete(proposal.configuration), 1.0, 1.0)
    assert value == pytest.approx(true_final(completed), abs=0.05)
