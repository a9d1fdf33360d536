from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.strategy import RandomSearch, fresh_configurations
from jfhpo_core.report.recipe import Law, Recipe, law_sentence, parse_size, recipe
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.study.resolved import Study
from tests.studies import simulated_study, trained


def result_of(study: Study, counts: dict[str, int]) -> SearchResult:
    """Full runs of so many configurations on each model; the score falls with the learning rate."""
    trials = []
    for model, count in counts.items():
        for configuration in fresh_configurations(study, [], 0, count):
            score = 0.6 if float(configuration["learning_rate"]) < 1e-3 else 0.3
            trials.append(trained(study, configuration, model, [0.1, 0.2, 0.3, score], len(trials)))
    return conclude(study, trials, RandomSearch(), complete=False)


def test_sizes_are_numbers_models_or_checkpoints(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    assert parse_size("72B", study) == 72_000_000_000
    assert parse_size("0.5 m", study) == 500_000
    assert parse_size("7616000000", study) == 7_616_000_000
    assert parse_size("large", study) == study.ladder["large"].parameters
    for text in ("huge", "-3B", "0", "72Q"):
        with pytest.raises(SpecError, match="--size"):
            parse_size(text, study)
    with pytest.raises(SpecError):
        parse_size(str(tmp_path), study)


@pytest.mark.parametrize(
    ("counts", "count", "said"),
    [
        ({}, 10**9, "no model has 4 configurations that were run (0 on small, 0 on medium, 0 on large)"),
        ({"small": 3}, 10**9, "no model has 4 configurations that were run (3 on small, 0 on medium, 0 on large)"),
        (
            {"small": 8, "large": 2},
            10**9,
            (
                "8 on small, 0 on medium, 2 on large were run. Let the search go on, with a larger budget if it has "
                "ended: 2 more on large do."
            ),
        ),
        ({"small": 8, "large": 8}, 10**15, "run a larger model first"),
    ],
)
def test_where_the_data_do_not_tell_it_says_so(tmp_path: Path, counts: dict[str, int], count: int, said: str) -> None:
    page = recipe(result_of(simulated_study(tmp_path), counts), count)
    assert page.values == ()
    assert page.refusal is not None
    assert said in page.refusal
    assert page.sentences == (page.refusal,)
    assert Recipe.model_validate_json(page.model_dump_json()) == page


@pytest.mark.slow
def test_a_recipe_names_what_is_told_and_what_is_not(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    page = recipe(result_of(study, {"small": 12, "large": 12}), 3 * study.ladder.target.parameters)
    assert page.refusal is None
    assert [item.name for item in page.values] == list(study.space)
    rate = page.values[0]
    assert rate.value is not None
    assert rate.interval is not None
    assert float(rate.value) < 2e-3
    assert page.sentences[0].startswith("For ")
    assert "beyond the largest size" in page.sentences[0]
    untold = [item.name for item in page.values if not item.told]
    assert any(sentence.startswith("Not told by the data") for sentence in page.sentences) == bool(untold)
    assert {law.name for law in page.laws} == {name for name in study.space if study.space[name].shifts_with_size}
    assert Recipe.model_validate_json(page.model_dump_json()) == page


def test_laws_in_words() -> None:
    def law(value: float, low: float, high: float, *, factor: bool) -> str:
        return law_sentence(Law(name="x", value=value, low=low, high=high, factor=factor))

    assert "rises by a factor of 2.0 [1.5, 4.0]" in law(2.0, 1.5, 4.0, factor=True)
    assert "falls by a factor of 2.0 [1.2, 4.0]" in law(0.5, 0.25, 1 / 1.2, factor=True)
    assert "falls by 0.05 [0.01, 0.08]" in law(-0.05, -0.08, -0.01, factor=False)
    assert "do not tell whether" in law(1.1, 0.8, 1.4, factor=True)
    assert "do not tell whether" in law(0.0, -0.1, 0.1, factor=False)
