from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.store.retention import judge
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Outcome, Trial
from tests.studies import result, segment, simulated_study


@dataclass
class Shelf:
    """A study with trials whose checkpoints exist."""

    study: Study
    trials: list[Trial] = field(default_factory=list)

    def put(self, model: str, *steps: int, **last: object) -> Trial:
        """A trial with a checkpoint at each step; the changes go to the result of a further segment."""
        rate = 10.0 ** -(2 + len(self.trials))
        trial = self.study.new_trial(len(self.trials), {"learning_rate": rate}, model, 0)
        store = CheckpointStore(self.study.store)
        segments, start = [], 0
        for index, step in enumerate(steps):
            stage = store.stage(trial.key)
            (stage / "state").write_bytes(b"x" * 100)
            segments.append(result(index, start, step, checkpoint=store.commit(trial.key, stage, step, 16 * step)))
            start = step
        if last:
            segments.append(result(len(steps), start, start + 1, **last))
        trial = trial.model_copy(update={"segments": tuple(segments)})
        self.trials.append(trial)
        return trial

    def kept(
        self, recommended: Trial | None = None, limit: int | None = None, *, complete: bool
    ) -> set[tuple[int, int]]:
        """Trial number and step of what is kept."""
        ranked = [trial.configuration for trial in self.trials]
        judged = judge(self.study, self.trials, recommended, ranked, complete, limit)
        return {(one.trial.number, one.step) for one in judged if one.keep and one.trial is not None}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(simulated_study(tmp_path))


@pytest.mark.parametrize("complete", [True, False])
def test_what_was_never_finished_is_kept_only_while_its_trial_is_trained(shelf: Shelf, complete: bool) -> None:
    trained, over = shelf.put("small", 10), shelf.put("small", 20)
    store = CheckpointStore(shelf.study.store)
    for trial in (trained, over):
        (store.stage(trial.key) / "state").write_bytes(b"x" * 7)
    running = trained.model_copy(update={"open_segment": segment(1, 10, 20)})
    judged = judge(shelf.study, [running, over], None, [], complete)
    unfinished = {one.folder.name.partition("-")[0]: (one.keep, one.size_bytes) for one in judged if one.step is None}
    assert unfinished == {running.key: (True, 7), over.key: (False, 7)}
    for one in judged:
        if one.step is None and not one.keep:
            store.delete(one.folder)
    assert [folder.name.partition("-")[0] for folder in store.unfinished()] == [trained.key]


def test_a_running_search_keeps_what_it_may_use(shelf: Shelf) -> None:
    shelf.put("small", 10, 20)
    shelf.put("small", 30)  # its full length
    shelf.put("large", 30)
    shelf.put("small", 10, outcome=Outcome.STOPPED)
    shelf.put("small", 10, outcome=Outcome.LOST)  # is tried once more
    assert shelf.kept(complete=False) == {(0, 10), (0, 20), (2, 30), (4, 10)}
    assert shelf.kept(complete=True) == set()


def test_what_was_lost_twice_may_go_on_on_the_target_only(shelf: Shelf) -> None:
    for model in ("small", "large"):
        trial = shelf.put(model, 10, outcome=Outcome.LOST)
        again = result(2, 10, 11, outcome=Outcome.LOST)
        shelf.trials[-1] = trial.model_copy(update={"segments": (*trial.segments, again)})
    assert shelf.kept(complete=False) == {(1, 10)}
    assert shelf.kept(limit=0, complete=False) == set()


def test_a_complete_study_keeps_the_recommended_training(shelf: Shelf) -> None:
    shelf.put("small", 10, 20)
    shelf.put("large", 30)
    best = shelf.put("large", 20, 30)
    assert shelf.kept(best, complete=True) == {(2, 30)}


def test_a_trial_under_way_keeps_everything(shelf: Shelf) -> None:
    trial = shelf.put("small", 10, 20)
    shelf.trials = [trial.model_copy(update={"open_segment": segment(2, 20, 30)})]
    assert shelf.kept(complete=True) == {(0, 10), (0, 20)}


def test_what_the_ledger_does_not_know_goes(shelf: Shelf) -> None:
    shelf.put("small", 10)
    shelf.trials.clear()
    (judged,) = judge(shelf.study, [], None, [], complete=False)
    assert (judged.keep, judged.step) == (False, 10)


def test_a_damaged_one_goes(shelf: Shelf) -> None:
    trial = shelf.put("small", 10)
    assert trial.checkpoint is not None
    folder = shelf.study.store / trial.checkpoint.path
    folder.rename(shelf.study.store / "damaged")
    quarantine = shelf.study.store / "quarantine"
    quarantine.mkdir()
    (shelf.study.store / "damaged").rename(quarantine / f"{trial.key}-step-00000010-0123abcd")
    (judged,) = judge(shelf.study, shelf.trials, None, [], complete=False)
    assert (judged.keep, judged.step, judged.trial) == (False, 10, trial)
    CheckpointStore(shelf.study.store).delete(judged.folder)
    assert list(quarantine.iterdir()) == []


def test_a_limit_takes_the_least_promising_first(shelf: Shelf) -> None:
    for _ in range(4):
        shelf.put("small", 10)
    assert shelf.kept(complete=False) == {(0, 10), (1, 10), (2, 10), (3, 10)}
    size = max(one.size_bytes for one in judge(shelf.study, shelf.trials, None, [], complete=False))
    assert shelf.kept(limit=2 * size, complete=False) == {(0, 10), (1, 10)}
