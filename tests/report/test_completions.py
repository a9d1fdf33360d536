from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jfhpo_core.optimizer.strategy import RandomSearch
from jfhpo_core.report.completions import MOST_STOPPED, readings
from jfhpo_core.report.page import write_report
from jfhpo_core.run.outcome import conclude
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Decision, Example, Outcome, Trial
from mlflow_plugin.presentation import completions_table
from tests.studies import simulated_study, trained

KL = Decision(stop=True, rule="kl_growth", signal="kl", value=3.0, threshold=0.5, step=10)


def wrote(study: Study, number: int, model: str, *, kept: bool = True, **changes: object) -> Trial:
    """A trial that was evaluated at steps 0 and 10, with what it wrote."""
    configuration: Configuration = {"learning_rate": 1e-4 * (number + 1)}
    trial = trained(study, configuration, model, [0.1, 0.5], number, **changes)
    (result,) = trial.segments
    evaluations = tuple(
        evaluation.model_copy(
            update={"examples": (Example(prompt="2+2=", completion=f"<b>{number} at {evaluation.step}", reward=1.0),)}
        )
        if kept
        else evaluation
        for evaluation in result.evaluations
    )
    return trial.model_copy(update={"segments": (result.model_copy(update={"evaluations": evaluations}),)})


def test_recommended_recipes_and_stops_can_be_read_in_the_report(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    ended = {"outcome": Outcome.STOPPED, "decision": KL}
    stopped = [wrote(study, number, "small", **ended) for number in range(MOST_STOPPED + 2)]
    large = wrote(study, 20, "large", **ended)
    recipe = wrote(study, 21, "large").model_copy(update={"purpose": "baseline", "label": "recipe"})
    silent = wrote(study, 22, "large", kept=False, **ended)
    best = wrote(study, 23, "large")
    result = replace(
        conclude(study, [*stopped, large, recipe, silent, best], RandomSearch(), complete=True), target_trial=best
    )
    found = readings(result)
    assert [reading.title for reading in found[:3]] == [
        "#23 on large, recommended",
        "#21 on large, recipe recipe",
        "#20 on large, stopped",
    ]
    assert len(found) == 2 + MOST_STOPPED
    assert found[2].ending == KL.explain()
    ((prompt, written),) = found[0].prompts
    assert prompt == "2+2="
    assert [(step, example.completion) for step, example in written] == [(0, "<b>23 at 0"), (10, "<b>23 at 10")]

    page = write_report(result, {}, tmp_path).read_text(encoding="utf-8")
    assert "Completions to read" in page
    assert "&lt;b&gt;20 at 10" in page
    assert "<b>20" not in page


def test_without_completions_the_report_has_no_such_section(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    result = conclude(study, [wrote(study, 0, "large", kept=False)], RandomSearch(), complete=False)
    assert "Completions to read" not in write_report(result, {}, tmp_path).read_text(encoding="utf-8")


def test_a_trial_that_has_ended_has_a_table_for_mlflow(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    assert completions_table(wrote(study, 0, "large")) is None
    table = completions_table(wrote(study, 0, "large", outcome=Outcome.STOPPED, decision=KL))
    assert table == {
        "step": [0, 10],
        "prompt": ["2+2=", "2+2="],
        "completion": ["<b>0 at 0", "<b>0 at 10"],
        "reward": [1.0, 1.0],
    }
    assert completions_table(wrote(study, 0, "large", kept=False, outcome=Outcome.STOPPED, decision=KL)) is None
