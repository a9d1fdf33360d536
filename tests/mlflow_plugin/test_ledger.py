from __future__ import annotations

import base64
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from requests import HTTPError
from sqlalchemy import Engine, event

from jfhpo.testing.ledgers import (
    TOTAL_STEPS,
    LedgerConformance,
    make_record,
    make_records,
    make_result,
    make_segment,
    make_study,
    make_trial,
    text,
)
from jfhpo_core.errors import LedgerError, LedgerUnavailable
from jfhpo_core.optimizer.strategy import Recommendation
from jfhpo_core.report.page import write_plots
from jfhpo_core.run.dispatch import InlineDispatcher
from jfhpo_core.run.outcome import Comparison, SearchResult
from jfhpo_core.run.search import run_search
from jfhpo_core.store.ledger import Ledger, MemoryLedger
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.space import Space
from jfhpo_core.study.spec import StudySpec, TrackingSpec
from jfhpo_core.study.trial import Decision, FailureKind, Outcome, PassAtN, Trial
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.presentation import StudyState
from mlflow_plugin.study_run import recorded_before
from mlflow_plugin.tags import TAG_LIMIT
from mlflow_plugin.tracking import absolute_uri, store_exists


@pytest.fixture
def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri)


@pytest.fixture
def ledger(client: MlflowClient) -> MlflowLedger:
    ledger = MlflowLedger(client)
    ledger.open(make_study())
    return ledger


class TestMlflowLedger(LedgerConformance):
    @pytest.fixture
    def reopen(self, tracking_uri: str) -> Callable[[], Ledger]:
        return lambda: MlflowLedger(MlflowClient(tracking_uri=tracking_uri))

    @pytest.mark.slow
    def test_whatever_is_valid_comes_back_exactly(self, ledger: Ledger, reopen: Callable[[], Ledger]) -> None:
        super().test_whatever_is_valid_comes_back_exactly(ledger=ledger, reopen=reopen)


def run_of(ledger: MlflowLedger, trial: Trial) -> Run:
    return ledger.client.get_run(ledger.run_id(trial.key))


def test_what_people_see_of_a_trial(ledger: MlflowLedger) -> None:
    trial = make_trial(7, "small", learning_rate=3.2e-4, scheduler="cosine")
    first, second = make_segment(0, 0, 4, "it looked good"), make_segment(1, 4, TOTAL_STEPS, "it went on well")
    ledger.begin(trial, first)
    run = run_of(ledger, trial)
    assert (run.info.run_name, run.info.status) == ("007 small lr=0.00032", "RUNNING")
    assert run.data.tags["mlflow.parentRunId"] == ledger.study_run_id
    assert run.data.params["learning_rate"] == "0.00032"
    assert run.data.params["model_parameters"] == "100000"
    assert float(run.data.params["log10_learning_rate"]) == pytest.approx(math.log10(3.2e-4), abs=1e-4)
    # What the trial leaves to the trainer is shown as well, so that no column of the comparison has holes.
    assert float(run.data.params["weight_decay"]) == 0.0
    assert run.data.tags["mlflow.user"]
    heldout, train = sorted(run.inputs.dataset_inputs, key=lambda one: one.dataset.name)
    assert (heldout.dataset.name, heldout.tags[0].value) == ("instruct-heldout", "evaluation")
    assert (train.dataset.name, train.tags[0].value) == ("instruct-train", "training")

    ledger.commit(trial.key, make_result(first), make_records(0, 4))
    run = run_of(ledger, trial)
    assert (run.info.run_name, run.info.status) == ("007 small lr=0.00032 · 4/12 steps", "FINISHED")
    assert run.data.tags["jfhpo.state"] == "paused"
    assert run.data.metrics["eval/score"] == pytest.approx(0.4)
    history = ledger.client.get_metric_history(run.info.run_id, "train/reward")
    assert [(metric.step, metric.value) for metric in history] == [(r.step, r.reward) for r in make_records(0, 4)]

    ledger.begin(ledger.trials()[0], second)
    assert run_of(ledger, trial).info.status == "RUNNING"
    stopped = make_result(
        second,
        outcome=Outcome.STOPPED,
        end_step=6,
        checkpoint=None,
        evaluations=(),
        decision=Decision(stop=True, rule="kl-growth", signal="kl", value=0.9, threshold=0.15, step=6),
    )
    ledger.commit(trial.key, stopped, make_records(4, 6))
    run = run_of(ledger, trial)
    assert (run.info.run_name, run.info.status) == ("007 small lr=0.00032 · stopped at 6/12 steps", "KILLED")
    assert run.data.tags["jfhpo.stopped_by"] == "kl-growth: kl = 0.9 against 0.15 at step 6"
    assert run.data.tags["jfhpo.why"] == "it went on well"
    assert run.data.metrics["spent/device_seconds"] == pytest.approx(5.0)
    for words in ("Stopped", "it looked good", "it went on well", "kl-growth", "95 % interval", "gain 0.01"):
        assert words in run.data.tags["mlflow.note.content"]


def test_pass_at_n_is_shown_with_its_n(ledger: MlflowLedger) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    best = PassAtN(n=8, score=0.75, standard_error=0.02)
    (plain,) = make_result(segment).evaluations
    ledger.commit(trial.key, make_result(segment, evaluations=(plain.model_copy(update={"pass_at_n": best}),)), [])
    run = run_of(ledger, trial)
    assert run.data.metrics["eval/score"] == pytest.approx(0.4)
    assert {name: value for name, value in run.data.metrics.items() if "pass_at" in name} == {
        "eval/pass_at_8": 0.75,
        "eval/pass_at_8_standard_error": 0.02,
    }
    (shown,) = ledger.client.get_metric_history(run.info.run_id, "eval/pass_at_8")
    assert shown.step == 4
    assert "Pass@8 is 0.750 ± 0.020." in run.data.tags["mlflow.note.content"]


def test_an_infeasible_trial_is_told_apart(ledger: MlflowLedger) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    result = make_result(
        segment, outcome=Outcome.INFEASIBLE, end_step=0, checkpoint=None, evaluations=(),
        failure=FailureKind.OUT_OF_MEMORY, message="no memory left",
    )  # fmt: skip
    ledger.commit(trial.key, result, [])
    run = run_of(ledger, trial)
    assert (run.info.status, run.data.tags["jfhpo.state"]) == ("FAILED", "infeasible")
    assert run.data.tags["jfhpo.failure"] == "out-of-memory: no memory left"


def test_what_people_see_of_a_study(ledger: MlflowLedger, tmp_path: Path) -> None:
    for number, model in enumerate(["large", "small", "large"]):
        trial, segment = make_trial(number, model), make_segment(0, 0, TOTAL_STEPS)
        ledger.begin(trial, segment)
        ledger.commit(trial.key, make_result(segment), make_records(0, 2))
    (tmp_path / "report.html").write_text("<p>fine</p>")
    ledger.summarize({"score": 0.75, "recommended": "lr=3e-4"}, [tmp_path / "report.html"])
    assert "3 trials so far" in ledger.client.get_run(ledger.study_run_id).data.tags["mlflow.note.content"]
    ledger.end(StudyState.FINISHED)
    run = ledger.client.get_run(ledger.study_run_id)
    assert (run.info.run_name, run.info.status) == ("conformance", "FINISHED")
    assert run.data.tags["jfhpo.state"] == "finished"
    assert len(run.inputs.dataset_inputs) == 2
    assert run.data.params["target"] == "large"
    assert run.data.params["fidelity.horizon_prompts"] == "960"
    assert run.data.metrics["study/best_target_score"] == pytest.approx(1.2)
    spent = ledger.client.get_metric_history(run.info.run_id, "study/spent_seconds")
    assert [(metric.step, metric.value) for metric in spent] == [(1, 2.5), (2, 5.0), (3, 7.5)]
    files = {file.path for file in ledger.client.list_artifacts(run.info.run_id)}
    assert files == {"study.yaml", "environment.json", "report.html"}


@pytest.mark.slow
def test_an_outcome_is_shown(ledger: MlflowLedger, client: MlflowClient, tmp_path: Path) -> None:
    study = resolve(search_study(tmp_path))
    result = run_search(study, MlflowLedger(client), InlineDispatcher(2))
    mine = MlflowLedger(client)
    mine.open(study.spec)
    mine.present(result, write_plots(result, tmp_path / "plots"), {"importance/learning_rate": 0.9})
    run = client.get_run(mine.study_run_id)
    assert result.rows
    assert run.data.metrics["study/recommended_score"] == result.rows[0].score
    assert run.data.metrics["importance/learning_rate"] == 0.9
    assert "How sure" in run.data.tags["mlflow.note.content"]
    plots = client.list_artifacts(mine.study_run_id, "plots")
    assert {plot.path for plot in plots} == {f"plots/{name}.png" for name in ("bill", "learning-curves", "outcome")}


def test_an_interrupted_study_is_shown_as_killed_and_goes_on(ledger: MlflowLedger, client: MlflowClient) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.end(StudyState.INTERRUPTED)
    for run_id in (ledger.study_run_id, ledger.run_id(trial.key)):
        run = client.get_run(run_id)
        assert (run.info.status, run.data.tags["jfhpo.state"]) == ("KILLED", "interrupted")
    again = MlflowLedger(client)
    again.open(make_study())
    for run_id in (ledger.study_run_id, ledger.run_id(trial.key)):
        run = client.get_run(run_id)
        assert (run.info.status, run.data.tags["jfhpo.state"]) == ("RUNNING", "running")
    again.commit(trial.key, make_result(segment), make_records(0, 4))
    again.end(StudyState.FINISHED)
    assert client.get_run(ledger.study_run_id).info.status == "FINISHED"
    # Looking at a finished study again, by a process that trains nothing, changes nothing.
    MlflowLedger(client).open(make_study())
    assert client.get_run(ledger.study_run_id).info.status == "FINISHED"


def test_saved_views_name_what_the_runs_have(ledger: MlflowLedger, client: MlflowClient) -> None:
    trial, segment = make_trial(0, "large"), make_segment(0, 0, TOTAL_STEPS)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    tags = client.get_experiment(ledger.experiment_id).tags
    views = {json.loads(text)["name"]: json.loads(text) for name, text in tags.items() if "sharedViewState" in name}
    studies = views.pop("Studies")
    target = next(view for name, view in views.items() if name == "Full length on large (the target)")
    others = [views.pop(name) for name in list(views) if "on small" in name or "on medium" in name]
    assert set(views) == {"Trials", "Full length on large (the target)"}
    assert others
    data = run_of(ledger, trial).data
    known = {
        *(f"params.`{name}`" for name in data.params),
        *(f"metrics.`{name}`" for name in data.metrics),
        *(f"tags.`{name}`" for name in data.tags),
    }
    for view in views.values():
        state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
        # Widths count only for columns whose order is given.
        assert (
            list(state["columnWidths"]) == state["columnOrder"] == ["attributes.`Run Name`", *state["selectedColumns"]]
        )
        assert state["columnWidths"]["metrics.`spent/device_seconds`"] > 8 * len("spent/device_seconds")
        # These two are set once a trial was stopped or failed.
        assert set(state["selectedColumns"]) - {"tags.`jfhpo.stopped_by`", "tags.`jfhpo.failure`"} <= known
        found = client.search_runs(
            [ledger.experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} DESC"]
        )
        assert [run.info.run_id for run in found] == [ledger.run_id(trial.key)]
        parallel = [chart for chart in state["compareRunCharts"] if chart["type"] == "PARALLEL"]
        # Only where all runs are of one model and one length.
        assert len(parallel) == (view is target)
        assert all(set(chart["selectedParams"]) <= set(data.params) for chart in parallel)
    for view, expected in [(studies, [ledger.study_run_id]), *((view, []) for view in others)]:
        state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
        found = client.search_runs([ledger.experiment_id], state["searchFilter"])
        assert [run.info.run_id for run in found] == expected
    note = tags["mlflow.note.content"]
    lead, link, _ = note.partition(f"**[open the trials]({ledger.page()})**")
    assert link
    assert len(lead) > 40, "the list of experiments shows the beginning without rendering it"
    shown = tags[f"mlflow.sharedViewState.{ledger.page().partition('viewStateShareKey=')[2].partition('&')[0]}"]
    assert json.loads(shown)["name"] == "Trials"


def test_what_only_the_ledger_reads_is_hidden_and_studies_of_earlier_versions_are_read(
    ledger: MlflowLedger, client: MlflowClient
) -> None:
    trial, segment, later = make_trial(0), make_segment(0, 0, 4), make_segment(1, 4, 8)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    ledger.begin(trial, later)
    ledger.summarize({"complete": "false"})
    runs = [client.get_run(run_id) for run_id in (ledger.study_run_id, ledger.run_id(trial.key))]
    for run in runs:
        seen = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
        assert not [name for name, value in seen.items() if value[:1] in ("{", "[")]
    # Earlier versions did not hide them.
    for run in runs:
        for name, value in run.data.tags.items():
            if name.startswith("mlflow.jfhpo."):
                client.set_tag(run.info.run_id, name.removeprefix("mlflow."), value)
                client.delete_tag(run.info.run_id, name)
    again = MlflowLedger(client)
    again.open(make_study())
    assert again.trials() == ledger.trials()
    assert again.trials()[0].open_segment == later
    assert again.facts() == ledger.facts()
    again.commit(trial.key, make_result(later), make_records(4, 8))
    last = MlflowLedger(client)
    last.open(make_study())
    assert last.trials() == again.trials()


def test_recommended_values_are_columns_of_the_studys_run(ledger: MlflowLedger, client: MlflowClient) -> None:
    study = resolve(make_study())
    recommended = Recommendation(study.space.middle(), 0.7, 0.01)
    row = Comparison("recommended", recommended.configuration, 0.71, 0.01, 2, 10.0)
    result = SearchResult(study, (), recommended, None, (row,), 10.0, complete=True)
    ledger.present(result)
    data = client.get_run(ledger.study_run_id).data
    for name, value in recommended.configuration.items():
        assert f"recommended.{name}" in data.tags
        if isinstance(value, int | float):
            assert data.metrics[f"recommended/{name}"] == value


def test_a_changed_budget_renews_the_study_file(ledger: MlflowLedger, client: MlflowClient, tmp_path: Path) -> None:
    study = make_study(budget=make_study().budget.model_copy(update={"trial_seconds": 7.0}))
    MlflowLedger(client).open(study)
    path = client.download_artifacts(ledger.study_run_id, "study.yaml", str(tmp_path))
    assert Path(path).read_text() == study.to_yaml()


def test_what_may_change_in_the_space_does_not_lock_the_study(ledger: MlflowLedger, client: MlflowClient) -> None:
    before = client.get_run(ledger.study_run_id).data.params
    space = make_study().space
    rate = space["learning_rate"].model_copy(update={"expected": 1e-4})
    study = make_study(space=Space({**space.root, "learning_rate": rate}))
    again = MlflowLedger(client)
    again.open(study)
    assert client.get_run(again.study_run_id).data.params == before


def test_streamed_records_are_logged_once(ledger: MlflowLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_plugin.trial_runs.STREAM_SECONDS", 0.0)
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.stream(trial.key, make_records(0, 2))
    assert len(ledger.client.get_metric_history(ledger.run_id(trial.key), "train/reward")) == 2
    ledger.stream(trial.key, make_records(2, 3))
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    history = ledger.client.get_metric_history(ledger.run_id(trial.key), "train/reward")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_a_gap_stands_for_a_non_finite_signal(ledger: MlflowLedger) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), [make_record(1, kl=math.inf)])
    (metric,) = ledger.client.get_metric_history(ledger.run_id(trial.key), "train/kl")
    assert math.isnan(metric.value)


def test_checkpoints_can_be_searched(ledger: MlflowLedger) -> None:
    for number in range(3):
        trial = make_trial(number, learning_rate=10.0**-number)
        start = 0
        for index, stop in enumerate((4, 8)):
            segment = make_segment(index, start, stop)
            ledger.begin(trial if index == 0 else ledger.trials()[-1], segment)
            ledger.commit(trial.key, make_result(segment), make_records(start, stop))
            start = stop
    found = ledger.client.search_logged_models(
        [ledger.experiment_id], "tags.`jfhpo.step` = '8' AND params.learning_rate = '0.1'"
    )
    assert len(found) == 1
    assert found[0].source_run_id == ledger.run_id(ledger.trials()[1].key)
    assert found[0].tags["jfhpo.path"] == "key/step-00000008"
    assert found[0].tags["jfhpo.uri"].endswith("/conformance/checkpoints/key/step-00000008")
    late = "metrics.`saved/step` > 7 AND metrics.`saved/bytes` < 100"
    assert len(ledger.client.search_logged_models([ledger.experiment_id], late)) == 3
    scores = {metric.step: metric.value for metric in found[0].metrics if metric.key == "eval/score"}
    assert scores == {4: pytest.approx(0.4), 8: pytest.approx(0.8)}
    assert len(ledger.client.search_logged_models([ledger.experiment_id], "metrics.`eval/score` > 0.7")) == 3


def test_every_tag_fits(ledger: MlflowLedger) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4, "reason | " * 4000)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment, message="x" * 20_000), [])
    assert max(len(value) for value in run_of(ledger, trial).data.tags.values()) <= TAG_LIMIT


def test_a_run_that_a_person_nested_is_ignored(ledger: MlflowLedger, client: MlflowClient) -> None:
    client.create_run(ledger.experiment_id, tags={"mlflow.parentRunId": ledger.study_run_id})
    again = MlflowLedger(client)
    again.open(make_study())
    assert again.trials() == []


def test_a_trial_that_was_created_twice_counts_once(ledger: MlflowLedger, client: MlflowClient) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    tags = run_of(ledger, trial).data.tags
    client.create_run(ledger.experiment_id, tags={name: tags[name] for name in tags if name != "mlflow.runName"})
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    again = MlflowLedger(client)
    again.open(make_study())
    assert again.trials() == ledger.trials()


def test_a_study_that_was_created_twice_goes_on_where_it_was(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, created = client.create_run, []

    def create_twice(*arguments: Any, **keywords: Any) -> Run:
        created.extend(create(*arguments, **keywords) for _ in range(2))
        return created[-1]

    trial, segment = make_trial(0), make_segment(0, 0, 4)
    first = MlflowLedger(client)
    with monkeypatch.context() as patch:
        patch.setattr(client, "create_run", create_twice)
        first.open(make_study())
    first.begin(trial, segment)
    first.commit(trial.key, make_result(segment), make_records(0, 4))
    assert len(created) == 2
    (empty,) = {run.info.run_id for run in created} - {first.study_run_id}
    assert client.get_run(empty).info.lifecycle_stage == "deleted"
    again = MlflowLedger(client)
    again.open(make_study())
    assert again.trials() == first.trials()
    monkeypatch.setattr("mlflow_plugin.study_run.connect", lambda _: client)
    monkeypatch.setattr("mlflow_plugin.study_run.store_exists", lambda _: True)
    assert recorded_before(make_study(study="another")) == [make_study().study], "it is one study to learn from"


def test_a_study_stays_in_its_run_when_a_late_request_creates_an_older_one(
    ledger: MlflowLedger, client: MlflowClient
) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    tags = {"jfhpo.study": make_study().study, "jfhpo.identity": make_study().identity()}
    late = client.create_run(ledger.experiment_id, start_time=0, tags=tags).info.run_id
    again = MlflowLedger(client)
    again.open(make_study())
    assert again.trials() == ledger.trials()
    assert client.get_run(late).info.lifecycle_stage == "deleted"
    again.end(StudyState.FINISHED)
    client.delete_run(ledger.study_run_id)
    with pytest.raises(LedgerError, match=f"--run-id {ledger.study_run_id}"):
        MlflowLedger(client).open(make_study())


def test_only_empty_runs_of_a_study_are_removed(ledger: MlflowLedger, client: MlflowClient) -> None:
    tags = {"jfhpo.study": make_study().study, "jfhpo.identity": make_study().identity()}
    owned, parent = (
        client.create_run(ledger.experiment_id, tags={**tags, **more}).info.run_id
        for more in ({"mlflow.jfhpo.owner": ""}, {})
    )
    client.create_run(ledger.experiment_id, tags={"mlflow.parentRunId": parent})
    again = MlflowLedger(client)
    again.open(make_study())
    assert again.study_run_id == ledger.study_run_id
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in (owned, parent)} == {"active"}


def test_unreadable_content_is_explained(ledger: MlflowLedger, client: MlflowClient) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    again = MlflowLedger(client)
    again.open(make_study())
    shutil.rmtree(Path(run_of(ledger, trial).info.artifact_uri.removeprefix("file://")))
    with pytest.raises(LedgerError, match=r"lost its artifact records/segment-0000\.jsonl"):
        again.step_records(trial.key)
    client.set_tag(ledger.study_run_id, "mlflow.jfhpo.facts", "edited by hand")
    with pytest.raises(LedgerError, match="not JSON"):
        MlflowLedger(client).open(make_study())
    client.delete_tag(ledger.study_run_id, "mlflow.jfhpo.facts")
    client.set_tag(ledger.run_id(trial.key), "mlflow.jfhpo.segment.0000", json.dumps({"segment": 3}))
    with pytest.raises(LedgerError, match="SegmentResult that cannot be read"):
        MlflowLedger(client).open(make_study())


def test_records_that_do_not_come_are_no_lost_ones(
    ledger: MlflowLedger, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, segments = make_trial(0), (make_segment(0, 0, 4), make_segment(1, 4, 8))
    for segment in segments:
        ledger.begin(trial, segment)
        records = make_records(segment.start_step, segment.stop_step)
        ledger.commit(trial.key, make_result(segment), records)
    again = MlflowLedger(client)
    again.open(make_study())
    calls = iter((True, False))

    def falter(*arguments: Any, **options: Any) -> ArtifactRepository:
        if next(calls, True):
            return get_artifact_repository(*arguments, **options)
        raise MlflowException("Failed to download artifacts")

    monkeypatch.setattr("mlflow_plugin.runs.is_server", lambda _uri: True)
    monkeypatch.setattr("mlflow_plugin.runs.get_artifact_repository", falter)
    with pytest.raises(LedgerUnavailable, match="does not come"):
        again.step_records(trial.key)
    assert again.step_records(trial.key) == make_records(0, 8)


@pytest.mark.parametrize(
    ("error", "told"),
    [(HTTPError("503 Server Error"), LedgerError), (OSError("stale handle"), LedgerError), (TypeError(), TypeError)],
)
def test_only_errors_of_the_artifact_store_mean_a_lost_artifact(
    ledger: MlflowLedger, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[Exception]
) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    again = MlflowLedger(client)
    assert again.look(make_study())

    def fail(*_: Any, **__: Any) -> ArtifactRepository:
        raise error

    monkeypatch.setattr("mlflow_plugin.runs.get_artifact_repository", fail)
    with pytest.raises(told):
        again.step_records(trial.key)


def test_records_are_read_without_asking_the_database(ledger: MlflowLedger, client: MlflowClient) -> None:
    """A report reads those of all trials."""
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    ledger.begin(trial, segment)
    ledger.commit(trial.key, make_result(segment), make_records(0, 4))
    again = MlflowLedger(client)
    assert again.look(make_study())
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        assert again.step_records(trial.key) == make_records(0, 4)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert asked == []


def test_a_locked_database_is_away_and_not_a_fault(tracking_uri: str) -> None:
    ledger = MlflowLedger(MlflowClient(tracking_uri))
    ledger.open(make_study())
    trial, segment = make_trial(0), make_segment(0, 0, 4)

    def hurry(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        """Let MLflow wait for a tenth of a second where it would wait for twenty."""
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    event.listen(Engine, "before_cursor_execute", hurry, retval=True)
    try:
        with contextlib.closing(
            sqlite3.connect(tracking_uri.removeprefix("sqlite:///"), isolation_level=None)
        ) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(LedgerUnavailable, match="database is locked"):
                ledger.begin(trial, segment)
    finally:
        event.remove(Engine, "before_cursor_execute", hurry)
    ledger.begin(trial, segment)
    assert [known.key for known in ledger.trials()] == [trial.key]


def test_an_interrupt_waits_for_the_database(
    ledger: MlflowLedger, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, segment = make_trial(0), make_segment(0, 0, 4)
    log = client.log_batch
    finished: list[None] = []

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        finished.append(log(*arguments, **keywords))

    monkeypatch.setattr(client, "log_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.begin(trial, segment)
    assert finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_unopened_ledger_says_so() -> None:
    with pytest.raises(LedgerError, match="not open"):
        MlflowLedger().begin(make_trial(0), make_segment(0, 0, 4))


def test_a_deleted_experiment_is_explained(ledger: MlflowLedger, client: MlflowClient) -> None:
    client.delete_experiment(ledger.experiment_id)
    with pytest.raises(LedgerError, match="mlflow experiments restore"):
        MlflowLedger(client).open(make_study())


def test_a_server_that_does_not_answer_is_explained(free_port: int) -> None:
    study = make_study(tracking=TrackingSpec(uri=f"http://me:secret@127.0.0.1:{free_port}"))
    with pytest.raises(LedgerError, match="does not answer") as caught:
        MlflowLedger().open(study)
    assert "secret" not in str(caught.value)


def test_a_password_is_neither_shown_nor_logged(client: MlflowClient, tmp_path: Path) -> None:
    study = make_study(tracking=TrackingSpec(uri="http://me:secret@localhost:5000"))
    ledger = MlflowLedger(client)
    ledger.open(study)
    assert "secret" not in Path(client.download_artifacts(ledger.study_run_id, "study.yaml", str(tmp_path))).read_text()
    ledger._opened = MlflowClient(tracking_uri="http://me:secret@localhost:5000")
    assert ledger.tracking_uri == "http://me:***@localhost:5000"
    assert str(ledger.url()).startswith("http://localhost:5000/#/experiments/")


@pytest.mark.parametrize(
    "uri",
    ["postgres://me:secret@localhost/db", "mysql+nodriver://me:secret@localhost/db", "sqlite:////proc/no/such.db"],
)
def test_a_store_that_cannot_be_used_is_explained_without_its_password(uri: str) -> None:
    study = make_study(tracking=TrackingSpec(uri=uri))
    with pytest.raises(LedgerError, match=r"correct tracking\.uri") as caught:
        MlflowLedger().open(study)
    assert "secret" not in str(caught.value)


def test_an_error_of_mlflow_shows_no_password(ledger: MlflowLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("API request to http://me:secret@host/api failed", TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(ledger.client, "log_batch", away)
    with pytest.raises(LedgerUnavailable, match="host/api failed") as caught:
        ledger.summarize({"score": 0.5})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc"])
def test_a_remote_store_without_a_scheme_is_no_folder(uri: str) -> None:
    assert store_exists(make_study(tracking=TrackingSpec(uri=uri)))
    assert absolute_uri(uri) == uri


def test_hyperparameters_may_have_the_names_of_ours(ledger: MlflowLedger) -> None:
    trial = make_trial(0).model_copy(update={"configuration": {"learning_rate": 1e-3, "model": "resnet", "seed": 7}})
    ledger.begin(trial, make_segment(0, 0, 4))
    ledger.commit(trial.key, make_result(make_segment(0, 0, 4)), [])
    shown = run_of(ledger, trial).data.params
    assert (shown["model"], shown["seed"]) == ("resnet", "7")
    assert (shown["jfhpo.model"], shown["jfhpo.seed"]) == (trial.model, str(trial.seed))


def test_an_earlier_study_is_found_in_another_experiment(client: MlflowClient) -> None:
    """As nights are: each is a study of its own in the experiment of the study that is repeated."""
    night = make_study(study="demo-2026-11-23", tracking=TrackingSpec(experiment="jfhpo/demo"))
    MlflowLedger(client).open(night)
    other = make_study(study="other", tracking=TrackingSpec(experiment="jfhpo/third"))
    assert MlflowLedger(client).recall(other, "demo-2026-11-23").identity() == night.identity()
    with pytest.raises(LedgerError, match="holds no study 'never'"):
        MlflowLedger(client).recall(other, "never")


def test_the_default_store_lies_in_the_working_directory(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    ledger = MlflowLedger()
    ledger.open(make_study())
    assert ledger.tracking_uri == "sqlite:///mlflow.db"
    assert ledger.url() is None
    assert list((tmp_path / "mlruns").rglob("study.yaml"))


def test_the_environment_names_the_store(tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    ledger = MlflowLedger()
    ledger.open(make_study())
    assert ledger.tracking_uri == tracking_uri
    # Artifacts lie beside the database, not where the process happened to start.
    assert list((tmp_path / "mlruns").rglob("study.yaml"))
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
def test_a_search_gives_the_same_as_in_memory(client: MlflowClient, tmp_path: Path) -> None:
    ledgers = {"memory": MemoryLedger(), "mlflow": MlflowLedger(client)}
    in_memory, in_mlflow = (
        run_search(resolve(search_study(tmp_path / name)), ledger, InlineDispatcher(2))
        for name, ledger in ledgers.items()
    )
    assert len(in_mlflow.trials) > 3
    assert text(list(in_mlflow.trials)) == text(list(in_memory.trials))


def search_study(tmp_path: Path) -> StudySpec:
    study = make_study()
    return study.model_copy(
        update={
            "budget": study.budget.model_copy(update={"trial_seconds": 200.0}),
            "strategy": study.strategy.model_copy(update={"name": "random"}),
            "tracking": TrackingSpec(workspace=str(tmp_path / "workspace")),
        }
    )


class Watched:
    """A client that tells of each call before it is made.

    A process that dies then has died after the call before it, too; a kill in the midst of one is `kill -9`'s test.
    """

    def __init__(self, client: MlflowClient, tell: Callable[[], None]) -> None:
        self.client, self.tell = client, tell

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.client, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.tell()
            return value(*arguments, **keywords)

        return call


LIFE = [(0, 0, 0, 4), (1, 0, 0, TOTAL_STEPS), (0, 1, 4, TOTAL_STEPS)]
"""Trial, segment, first and last step, in the order in which they are trained."""


def live(ledger: Ledger) -> None:
    """A short study that goes on from whatever the ledger holds, as `run_search` does."""
    ledger.open(make_study())
    go_on(ledger)


def go_on(ledger: Ledger) -> None:
    """The rest of that study, in an open ledger."""
    for number, index, start, stop in LIFE:
        trial = next((trial for trial in ledger.trials() if trial.number == number), make_trial(number, "large"))
        if len(trial.segments) > index:
            continue
        segment = make_segment(index, start, stop, "long " * 1500)
        if trial.open_segment is None:
            ledger.begin(trial, segment)
        ledger.stream(trial.key, make_records(start, stop - 1))
        ledger.commit(trial.key, make_result(segment), make_records(start, stop))
    ledger.summarize({"done": 1.0})


def check_life(ledger: MlflowLedger) -> None:
    """A finished `live` leaves this, however often it was interrupted."""
    expected = MemoryLedger()
    live(expected)
    assert ledger.trials() == expected.trials()
    for trial in expected.trials():
        assert ledger.step_records(trial.key) == expected.step_records(trial.key)
        run = run_of(ledger, trial)
        assert run.info.status == "FINISHED"
        assert run.info.run_name.endswith(f"{trial.step}/12 steps")
        assert run.data.params["model"] == "large"
    assert ledger.facts() == expected.facts()
    index = ledger.client.search_logged_models([ledger.experiment_id])
    # A crash between creating an entry and reading its answer may leave a second entry, never a wrong one.
    newest = {model.source_run_id: model.tags["jfhpo.digest"] for model in index}
    assert newest == {
        ledger.run_id(trial.key): trial.checkpoint.digest for trial in expected.trials() if trial.checkpoint
    }


@pytest.mark.slow
def test_a_crash_between_any_two_calls_loses_nothing(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_plugin.owner.BEAT_SECONDS", 3600.0)  # no calls from another thread
    folder = tmp_path / "life"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    left: list[list[Trial]] = []

    def client(folder: Path) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")

    def die() -> None:
        """Keep what a process that dies now leaves in the store, and what it knew as committed."""
        shutil.copytree(folder, tmp_path / f"dead-{len(left)}")
        left.append([] if ledger._opened is None else ledger.trials())

    ledger = MlflowLedger(Watched(client(folder), die))  # type: ignore[arg-type]
    live(ledger)
    check_life(ledger)
    assert len(left) > 20
    for number, known in enumerate(left):
        dead = tmp_path / f"dead-{number}"
        # The database says where its artifacts are.
        shutil.rmtree(folder)
        shutil.copytree(dead, folder)
        after = MlflowLedger(client(dead))
        after.open(make_study())
        for trial in known:
            assert next(one for one in after.trials() if one.key == trial.key).segments[: len(trial.segments)] == (
                trial.segments
            )
        go_on(after)
        check_life(after)
        fresh = MlflowLedger(client(dead))
        fresh.open(make_study())
        check_life(fresh)
        shutil.rmtree(dead)


def _live_in(uri: str) -> None:
    live(MlflowLedger(MlflowClient(tracking_uri=uri)))


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(tracking_uri: str) -> None:
    # Forking saves the seconds that importing MLflow takes; this process has not opened the database yet.
    context = multiprocessing.get_context("fork")
    chance = random.Random(0)
    kills = 0
    for _ in range(200):
        process = context.Process(target=_live_in, args=(tracking_uri,))
        process.start()
        # Longer and longer, so that it gets somewhere on a slow machine, too.
        process.join(chance.uniform(0.05, 0.4 + 0.05 * kills))
        if process.exitcode == 0:
            break
        assert process.exitcode is None, "the process failed by itself"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills > 0
    ledger = MlflowLedger(MlflowClient(tracking_uri=tracking_uri))
    ledger.open(make_study())
    check_life(ledger)


class ServedLedger(MlflowLedger):
    """A ledger on the server that keeps the tests apart by experiment."""

    def __init__(self, url: str, experiment: str) -> None:
        super().__init__()
        self.tracking = TrackingSpec(uri=url, experiment=experiment)

    def open(self, study: StudySpec) -> None:
        super().open(study.model_copy(update={"tracking": self.tracking}))


@pytest.mark.slow
class TestMlflowServer(LedgerConformance):
    @pytest.fixture
    def reopen(self, server: str, request: pytest.FixtureRequest) -> Callable[[], Ledger]:
        return lambda: ServedLedger(server, request.node.name)

    def test_the_url_is_the_study_in_the_ui(self, server: str, reopen: Callable[[], ServedLedger]) -> None:
        ledger = reopen()
        ledger.open(make_study())
        run = f"{server}/#/experiments/{ledger.experiment_id}/runs/{ledger.study_run_id}"
        assert ledger.url() == f"{run}?workflowType=machine_learning"


# --- what may change when a study is continued --------------------------------------------------------------------


def own_study(folder: Path, **changes: Any) -> StudySpec:
    """A study with files of its own in a folder."""
    for name, content in (
        ("train.jsonl", '{"prompt": "a"}\n'),
        ("heldout.jsonl", '{"prompt": "b"}\n'),
        ("reward.py", ""),
    ):
        if not (folder / name).exists():
            (folder / name).write_text(content)
    files = (("prompts", "train.jsonl"), ("heldout", "heldout.jsonl"), ("reward", "reward.py"))
    task = {field: str(folder / name) for field, name in files}
    return StudySpec.model_validate({**make_study().model_dump(mode="json"), "task": task, **changes})


def test_changed_files_are_refused_until_the_change_is_accepted(client: MlflowClient, tmp_path: Path) -> None:
    study = own_study(tmp_path)
    ledger = MlflowLedger(client)
    ledger.open(study)
    before, interrupted = make_trial(0, "small"), make_trial(1, "small", learning_rate=2e-4)
    ledger.begin(before, make_segment(0, 0, 4))
    ledger.commit(before.key, make_result(make_segment(0, 0, 4)), make_records(0, 4))
    ledger.begin(interrupted, make_segment(0, 0, 4))
    (tmp_path / "reward.py").write_text("def reward(completions, **_): return [1.0 for _ in completions]\n")

    with pytest.raises(LedgerError, match=r"other contents of task\.reward.*new name.*--accept-changed-data"):
        MlflowLedger(client).open(study)
    reader = MlflowLedger(client)
    assert reader.look(study)
    with pytest.raises(LedgerError, match=r"task\.reward"):
        reader.refuse_changes()

    accepted = MlflowLedger(client, accept_changes=True)
    accepted.open(study)
    assert accepted.changed == ("task.reward",)
    assert [trial.changed for trial in accepted.trials()] == [(), ("task.reward",)]
    assert run_of(accepted, interrupted).data.tags["jfhpo.changed"] == "task.reward"
    again = MlflowLedger(client)
    again.open(study)
    again.refuse_changes()
    assert again.changed == ("task.reward",)
    assert again.trials() == accepted.trials()


def test_operational_fields_may_change(client: MlflowClient) -> None:
    study = make_study()
    devices = [model.model_copy(update={"devices": 4}) for model in study.family.models]
    moved = study.model_copy(
        update={
            "family": study.family.model_copy(update={"models": devices}),
            "trainer": study.trainer.model_copy(update={"settings": {"real_seconds_per_step": 0.5}}),
        }
    )
    MlflowLedger(client).open(study)
    MlflowLedger(client).open(moved)


def test_a_refusal_names_the_fields(client: MlflowClient) -> None:
    study = make_study()
    MlflowLedger(client).open(study)
    other = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"temperature": 0.5})})
    with pytest.raises(LedgerError, match=r"other values of evaluation\.temperature"):
        MlflowLedger(client).open(other)


def test_a_study_of_jfhpo_0_1_is_continued(client: MlflowClient, tmp_path: Path) -> None:
    """Its identity had all fields of the trainer and the devices, and it noted no contents."""
    study = own_study(tmp_path)
    ledger = MlflowLedger(client)
    ledger.open(study)
    trial = make_trial(0, "small")
    ledger.begin(trial, make_segment(0, 0, 4))
    ledger.commit(trial.key, make_result(make_segment(0, 0, 4)), make_records(0, 4))
    run_id = ledger.study_run_id
    client.set_tag(run_id, "jfhpo.identity", "0123456789abcdef")
    client.delete_tag(run_id, "mlflow.jfhpo.contents")
    for tag in ledger.client.get_run(ledger.run_id(trial.key)).data.tags:
        if tag.startswith("mlflow.jfhpo.segment."):
            segment = json.loads(client.get_run(ledger.run_id(trial.key)).data.tags[tag])
            del segment["segment"]["changed"]
            client.set_tag(ledger.run_id(trial.key), tag, json.dumps(segment))

    reader = MlflowLedger(client)
    assert reader.look(study)
    reader.refuse_changes()
    old = MlflowLedger(client)
    old.open(study)
    assert old.trials() == ledger.trials()
    old.begin(old.trials()[0], make_segment(1, 4, TOTAL_STEPS))
    # From now on, changes are noticed.
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "c"}\n')
    with pytest.raises(LedgerError, match=r"task\.heldout"):
        MlflowLedger(client).open(study)
