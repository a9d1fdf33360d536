"""Another package adds a trainer, a strategy and a rule; it is made up here and found as an installed one would be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jfhpo.cli import app
from jfhpo_core import plugins
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.strategy import fresh_configurations, load_strategy
from jfhpo_core.stopping.rules import Course, StoppingRule, build_rules
from jfhpo_core.study.spec import StoppingSpec
from jfhpo_core.trainers import load_trainer
from tests.studies import simulated_study, step_record, trained

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

from jfhpo_core.optimizer.strategy import RandomSearch
from jfhpo_core.stopping.rules import StoppingRule
from jfhpo_core.study.trial import Decision
from jfhpo_core.trainers.simulated import SimulatedTrainer


def uncertainty(beliefs, inputs, targets):
    return beliefs.values(inputs)[1]


class Walk(RandomSearch):
    name = "walk"


class Other(SimulatedTrainer):
    name = "other"


@dataclass(frozen=True)
class LongCompletions(StoppingRule):
    """Stop when completions grow longer than `threshold` tokens."""

    name: ClassVar[str] = "long_completions"
    threshold: float = 1000.0

    def judge(self, course):
        length = course.records[-1].completion_tokens
        if length <= self.threshold:
            return None
        step = course.records[-1].step
        return Decision(
            stop=True, rule=self.name, signal="completion_tokens", value=length, threshold=self.threshold, step=step
        )
'''

ENTRY_POINTS = """
[jfhpo.strategies]
walk = walker:Walk
random = walker:Walk
lost = nowhere:Lost
[jfhpo.trainers]
other = walker:Other
[jfhpo.acquisitions]
uncertainty = walker:uncertainty
[jfhpo.rules]
long_completions = walker:LongCompletions
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    metadata = tmp_path / "packages" / "walker-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: walker\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (metadata.parent / "walker.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(metadata.parent))
    plugins.registered.cache_clear()
    yield
    plugins.registered.cache_clear()


def rules(override: object) -> dict[str, StoppingRule]:
    return {rule.name: rule for rule in build_rules(StoppingSpec.model_validate({"override": override}))}


def test_a_strategy_and_a_trainer_are_loaded_by_name(tmp_path: Path) -> None:
    assert load_strategy(simulated_study(tmp_path, strategy="walk")).name == "walk"
    assert load_trainer("other").name == "other"


def test_an_acquisition_decides_what_is_trained(tmp_path: Path) -> None:
    settings = {"acquisition": "uncertainty", "initial_trials": 1, "target_share": 0.0}
    study = simulated_study(tmp_path, strategy={"name": "jfhpo", "settings": settings}, baselines=[])
    configurations = fresh_configurations(study, (), 0, 3)
    trials = [trained(study, item, "small", [0.1, 0.2, 0.3, 0.4], number) for number, item in enumerate(configurations)]
    trials += [trained(study, configurations[0], "medium", [0.1, 0.2, 0.3, 0.4], 3)]
    trials += [trained(study, configurations[0], "large", [0.1, 0.2, 0.3, 0.4], 4)]
    proposal = load_strategy(study).suggest(study, trials, 1000.0, 0)
    assert proposal is not None
    assert proposal.suggestion.source == "jfhpo/uncertainty"


def test_an_unknown_acquisition_is_refused(tmp_path: Path) -> None:
    strategy = {"name": "jfhpo", "settings": {"acquisition": "luck"}}
    with pytest.raises(SpecError, match=r"settings\.acquisition: no acquisition 'luck'; .*knowledge-gradient, uncert"):
        load_strategy(simulated_study(tmp_path, strategy=strategy))


def test_nobody_replaces_what_the_package_has(tmp_path: Path) -> None:
    assert load_strategy(simulated_study(tmp_path, strategy="random")).name == "random"


def test_a_plugin_that_does_not_import_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"strategy 'lost' cannot be imported: .*nowhere.*its package"):
        load_strategy(simulated_study(tmp_path, strategy="lost"))


def test_a_rule_joins_a_set_by_an_override_and_stops() -> None:
    rule = rules({"long_completions": {"threshold": 7}})["long_completions"]
    decision = rule.judge(Course(10, records=[step_record(1, completion_tokens=8.0)]))
    assert decision is not None
    assert (decision.value, decision.threshold) == (8.0, 7.0)
    assert "long_completions" not in rules({})


def test_a_rules_parameters_are_checked() -> None:
    with pytest.raises(SpecError, match=r"long_completions: no parameter limit; there are threshold"):
        rules({"long_completions": {"limit": 7}})


def test_an_unknown_rule_is_refused_with_all_names() -> None:
    with pytest.raises(SpecError, match=r"no rule 'long'; there are absolute_kl, .*long_completions"):
        rules({"long": {}})


def test_the_list_of_rules_has_it() -> None:
    text = CliRunner().invoke(app, ["rules"]).stdout
    assert "Stop when completions grow longer than `threshold` tokens." in text
