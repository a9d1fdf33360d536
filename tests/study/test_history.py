"""A study's trials, as search and optimizer see them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import VALIDATION, Evaluation, Outcome, Suggestion, Trial
from tests.studies import simulated_study, trained

RECIPE = {"learning_rate": 1e-4}
SCORES = [0.1, 0.3, 0.5, 0.6]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return simulated_study(tmp_path)


def run(study: Study, number: int, purpose: str = "search", committed: int = 1, source: str = "test") -> Trial:
    """A full run of the target; baselines and confirmations train the recipe."""
    configuration = (
        RECIPE if purpose in ("baseline", "confirmation") else study.space.middle(n_samples=4 if number % 2 else 8)
    )
    trial = trained(study, configuration, "large", SCORES, number, committed=committed)
    segments = tuple(
        segment.model_copy(
            update={
                "segment": segment.segment.model_copy(
                    update={"suggestion": Suggestion(source=source, explanation="test")}
                )
            }
        )
        for segment in trial.segments
    )
    return trial.model_copy(update={"purpose": purpose, "segments": segments})


def test_a_recipe_belongs_to_the_search_with_all_searched_hyperparameters(study: Study) -> None:
    baseline = run(study, 0, "baseline")
    history = History.of(study, [baseline])
    (recipe,) = history.search
    assert recipe.key == baseline.key
    assert set(recipe.configuration) == set(study.space.middle()) | {"learning_rate"}
    assert history.final(recipe.configuration)[0].score == 0.6
    assert history.of_configuration(recipe.configuration) == (baseline,)
    assert history.of_configuration(RECIPE) == (baseline,)


def test_what_judges_the_choice_is_no_part_of_the_search(study: Study) -> None:
    chosen, judged = run(study, 0, committed=1), run(study, 1, "confirmation", committed=2)
    history = History.of(study, [chosen, judged, run(study, 2, "random-search", committed=3)])
    assert history.search == (chosen,)
    assert history.judges(judged)
    assert not history.judges(chosen)


def test_confirmations_become_evidence_when_the_search_goes_on(study: Study) -> None:
    judged = run(study, 1, "confirmation", committed=2)
    before = [run(study, 0, committed=1), judged]
    validated = run(study, 2, committed=3, source=VALIDATION)
    assert History.of(study, [*before, validated]).judges(judged)
    assert not History.of(study, [*before, run(study, 2, committed=3)]).judges(judged)


def test_knowledge_is_refuted_by_what_noise_does_not_explain(study: Study) -> None:
    """The recipe has 0.6; the run of what is said to be best lies below, by less or more than two standard errors."""
    recipe, source = run(study, 0, "baseline"), "jfhpo/known-optimum"
    assert recipe.final is not None
    noise = 2 * math.hypot(recipe.final.standard_error, recipe.final.standard_error)
    assert noise > 0

    def ended(score: float, outcome: Outcome = Outcome.REACHED) -> History:
        trial = trained(study, study.space.middle(), "large", [0.1, 0.3, 0.5, score], 1, committed=2)
        suggestion = Suggestion(source=source, explanation="test")
        segments = tuple(
            item.model_copy(
                update={"segment": item.segment.model_copy(update={"suggestion": suggestion}), "outcome": outcome}
            )
            for item in trial.segments
        )
        return History.of(study, [recipe, trial.model_copy(update={"segments": segments})])

    assert not ended(0.6 - 0.9 * noise).refuted(source)
    assert ended(0.6 - 1.5 * noise).refuted(source)
    assert not ended(0.6 - 1.5 * noise).refuted("jfhpo/earlier-optimum")
    assert ended(0.6, Outcome.STOPPED).refuted(source)
    assert ended(0.6, Outcome.INFEASIBLE).refuted(source)


def test_final_scores_of_all_configurations_take_one_look_at_each_trial(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study of 1,000 trials asks for those of each: looking through all trials for one would be quadratic."""
    rates = [1e-4 * 1.01**number for number in range(100)]
    trials = [
        trained(study, {"learning_rate": rate}, "large", [0.1, 0.2, 0.3, rate], number)
        for number, rate in enumerate(rates)
    ]
    final, looks = Trial.final, []

    def counted(trial: Trial) -> Evaluation | None:
        looks.append(trial.key)
        return final.__get__(trial)

    monkeypatch.setattr(Trial, "final", property(counted))
    history = History.of(study, trials)
    assert [history.final(trial.configuration)[0].score for trial in trials] == rates
    assert len(looks) <= 2 * len(trials)


def test_a_baseline_that_changes_what_the_study_fixes_is_no_recipe(study: Study) -> None:
    spec = study.spec.model_copy(
        update={
            "baselines": [
                study.spec.baselines[0].model_copy(update={"configuration": {**RECIPE, "prompts_per_step": 32}})
            ]
        }
    )
    assert History.of(replace(study, spec=spec), []).recipes == {}
    assert len(History.of(study, []).recipes) == 1
