from __future__ import annotations

from datetime import date
from functools import partial
from pathlib import Path

import pytest

from jfhpo.orchestration.nightly_studies import RecordedStudy, look_up, recorded_studies, tonight
from jfhpo.session import run_study
from jfhpo_core.errors import SpecError
from jfhpo_core.study.spec import StudySpec
from tests.studies import study_data

DAY = date(2026, 11, 23)


@pytest.fixture
def base(tmp_path: Path) -> StudySpec:
    return StudySpec.model_validate(study_data(tmp_path))


def night(base: StudySpec, *recorded: RecordedStudy, learn_from: int = 3) -> StudySpec:
    by_name = {study.name: study for study in recorded}
    return tonight(base, list(by_name), by_name.__getitem__, DAY, learn_from)


def test_the_first_night_is_a_study_of_its_own_beside_the_others(base: StudySpec) -> None:
    spec = night(base)
    assert spec.study == "test-2026-11-23"
    assert spec.warm_start == []
    assert (spec.tracking.experiment, spec.tracking.registered_model) == ("jfhpo/test", "test")
    assert StudySpec.model_validate(spec.model_dump()) == spec


def test_a_night_learns_from_the_newest_finished_ones_and_from_the_study_itself(base: StudySpec) -> None:
    before = [
        RecordedStudy("test", "", complete=True),
        RecordedStudy("test-2026-11-20", "", complete=True),
        RecordedStudy("another-2026-11-20", "", complete=True),
        RecordedStudy("test-2026-11-21", "", complete=False),
        RecordedStudy("test-2026-11-22", "", complete=True),
    ]
    assert night(base, *before).warm_start == ["test", "test-2026-11-20", "test-2026-11-22"]
    assert night(base, *before, learn_from=1).warm_start == ["test-2026-11-22"]
    assert night(base, *before, learn_from=0).warm_start == []
    assert night(base, *before).seeds.search == base.seeds.search + 3


def test_a_second_night_on_a_day_is_numbered(base: StudySpec) -> None:
    names = ["test-2026-11-23", "test-2026-11-23-2"]
    assert night(base, *(RecordedStudy(name, "", complete=True) for name in names)).study == "test-2026-11-23-3"


def test_a_night_that_was_cut_off_is_continued_unless_it_means_something_else(base: StudySpec) -> None:
    first = night(base)
    cut_off = RecordedStudy(first.study, first.identity(), complete=False)
    assert night(base, cut_off) == first
    changed = base.model_copy(update={"evaluation": base.evaluation.model_copy(update={"temperature": 0.5})})
    assert night(changed, cut_off).study == f"{first.study}-2"


def test_a_name_that_becomes_too_long_is_refused(base: StudySpec) -> None:
    with pytest.raises(SpecError, match=r"is too long; shorten"):
        night(base.model_copy(update={"study": "x" * 60}))


@pytest.mark.slow
def test_nights_are_found_in_the_ledger_and_learned_from(tmp_path: Path, tracking_uri: str) -> None:
    base = StudySpec.model_validate(
        study_data(
            tmp_path, cluster={"address": "inline"}, budget={"trial_seconds": 40}, seeds={"training": [0]},
            strategy={"name": "jfhpo", "settings": {"initial_trials": 2}}, baselines=[],
            tracking={"workspace": str(tmp_path), "uri": tracking_uri},
        )
    )  # fmt: skip
    for name, warm_start in (("test-2026-11-23", []), ("test-2026-11-23-2", ["test-2026-11-23"])):
        spec = tonight(base, recorded_studies(base), partial(look_up, base), DAY)
        assert (spec.study, spec.warm_start) == (name, warm_start)
        limited = spec.budget.model_copy(update={"wall_seconds": 1e-6})
        assert not run_study(spec.model_copy(update={"budget": limited})).result.complete
        assert tonight(base, recorded_studies(base), partial(look_up, base), DAY) == spec, "it is to be continued"
        assert run_study(spec).result.complete
