"""A study that learns from an earlier one in the same ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jfhpo.session import informed, look, run_study
from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.optimizer.observations import observed_rows
from jfhpo_core.optimizer.strategy import RandomSearch, load_strategy
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import MemoryLedger
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import EarlierStudy, resolve
from jfhpo_core.study.spec import StudySpec
from tests.studies import study_data


def spec(tmp_path: Path, **changes: Any) -> StudySpec:
    return StudySpec.model_validate(
        study_data(
            tmp_path,
            **{
                "strategy": "jfhpo",
                "cluster": {"address": "inline"},
                "budget": {"trial_seconds": 60, "max_parallel": 1},
                "seeds": {"search": 0, "training": [0]},
                "tracking": {"workspace": str(tmp_path), "uri": f"sqlite:///{tmp_path}/mlflow.db"},
                **changes,
            },
        )
    )


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_uri")
def test_an_earlier_study_is_learned_from(tmp_path: Path) -> None:
    first = run_study(spec(tmp_path))
    second = spec(tmp_path, study="second", warm_start=["test"])
    study = informed(resolve(second))
    (earlier,) = study.earlier
    assert earlier.trials == tuple(look(spec(tmp_path)).trials)
    rows = observed_rows(History.of(study, []))
    assert len(rows) > 5
    assert all(row.inputs[-1] == 1 for row in rows)
    outcome = run_study(second)
    assert outcome.result.complete
    assert outcome.result.recommended is not None
    assert first.result.recommended is not None
    assert outcome.result.recommended.mean > first.result.recommended.mean - 0.1


def recorded(tmp_path: Path, name: str, **changes: Any) -> StudySpec:
    """A study by random search, in the ledger."""
    budget = {"trial_seconds": 150, "max_parallel": 1}
    made = spec(tmp_path, study=name, strategy="random", baselines=[], budget=budget, **changes)
    run_study(made)
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_uri")
def test_auto_finds_the_studies_that_fit_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = spec(tmp_path, study="second", warm_start="auto", baselines=[])
    assert informed(resolve(wanted), said.append).earlier == ()
    assert said == ["warm_start: no earlier study in the ledger fits this one"]

    recorded(tmp_path, "alike")
    other = {"temperature": {"type": "float", "low": 0.7, "high": 1.3}}
    recorded(tmp_path, "another-space", space=other)
    recorded(tmp_path, "third", warm_start="auto")
    recorded(tmp_path, "later")

    said.clear()
    count = len(resolve(wanted).space)
    study = informed(resolve(wanted), said.append)
    names = [earlier.spec.study for earlier in study.earlier]
    assert names == ["later", "third", "alike"], "of equally fitting ones the newest first"
    assert said[0] == (
        f"learning from study 'later': same task, 3 of 3 models of the same size, {count} of {count} hyperparameters"
    )
    third = informed(resolve(spec(tmp_path, study="third", warm_start="auto", baselines=[])))
    assert [earlier.spec.study for earlier in third.earlier] == ["alike"], "what began later is none of its past"


def test_auto_is_no_name_of_a_study(tmp_path: Path) -> None:
    assert spec(tmp_path, study="auto", warm_start="auto").warm_start == "auto"
    with pytest.raises(ValueError, match="warm_start"):
        spec(tmp_path, warm_start="another")


@pytest.mark.usefixtures("tracking_uri")
def test_an_unknown_earlier_study_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="holds no study 'never'"):
        run_study(spec(tmp_path, warm_start=["never"]))
    assert not (tmp_path / "test" / "checkpoints").exists()


def test_a_study_cannot_learn_from_itself(tmp_path: Path) -> None:
    with pytest.raises((SpecError, ValueError), match="is this study itself"):
        spec(tmp_path, warm_start=["test"])


def test_a_study_without_baselines_begins_with_what_the_earlier_one_tells(tmp_path: Path) -> None:
    first = spec(tmp_path)
    earlier = resolve(first)
    ledger = MemoryLedger()
    run_search(earlier, ledger, InlineDispatcher(1), strategy=RandomSearch())
    second = resolve(spec(tmp_path, study="second", baselines=[]))
    study = replace(second, earlier=(EarlierStudy(first, earlier.ladder, tuple(ledger.trials())),))
    strategy = load_strategy(study)
    assert strategy.rank(study, []) == []
    assert strategy.suggest(study, [], 60.0, 0) is not None
