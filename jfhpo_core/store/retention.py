"""Which checkpoints are worth their space: those that the search may still continue, and the one it recommends.

A checkpoint's value is what it may save or give: a paused trial is continued from it, the recommended run is
registered from it. Everything else only costs space. `jfhpo gc` shows the judgement and, when asked to, carries it out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jfhpo_core.store.checkpoints import STEP, CheckpointStore
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Trial, TrialState, configuration_key


@dataclass(frozen=True)
class Judgement:
    """Whether a checkpoint is kept.

    Attributes:
        folder: Where it lies.
        trial: Its trial; None if the ledger knows none.
        keep: Whether it is worth its space.
        why: The reason, for people.
        size_bytes: Of its files; those that it shares with other checkpoints count here, too.
    """

    folder: Path
    trial: Trial | None
    keep: bool
    why: str
    size_bytes: int

    @property
    def step(self) -> int | None:
        """Training step of the checkpoint; None if it was never finished."""
        found = STEP.search(self.folder.name)
        return None if found is None else int(found[1])


def judge(
    study: Study,
    trials: Sequence[Trial],
    recommended: Trial | None,
    ranked: Sequence[Configuration],
    complete: bool,
    limit_bytes: int | None = None,
) -> list[Judgement]:
    """A judgement on every checkpoint in the study's store, by trial and step, and on unfinished ones.

    Args:
        study: The study.
        trials: Its trials.
        recommended: The run whose weights are, or will be, registered.
        ranked: Configurations by expected score, best first.
        complete: Whether the study is done, so that only a larger budget would continue a trial.
        limit_bytes: Most that may be kept; the paused trials of the least promising configurations go first.
    """
    by_key = {trial.key: trial for trial in trials}
    judgements = []
    for folder in CheckpointStore(study.store).folders():
        trial = by_key.get(folder.parent.name)
        keep, why = _value(study, trial, _step(folder), recommended, complete)
        judgements.append(Judgement(folder, trial, keep, why, size_bytes([folder])))
    for folder in CheckpointStore(study.store).quarantined():
        trial = by_key.get(folder.name.partition("-")[0])
        judgements.append(Judgement(folder, trial, False, "it was found damaged", size_bytes([folder])))
    for folder in CheckpointStore(study.store).unfinished():
        trial = by_key.get(folder.name.partition("-")[0])
        keep = trial is not None and trial.open_segment is not None
        why = "its trial is being trained" if keep else "it was never finished"
        judgements.append(Judgement(folder, trial, keep, why, size_bytes([folder])))
    return judgements if limit_bytes is None else _within(judgements, ranked, limit_bytes)


def size_bytes(folders: Sequence[Path], without: Sequence[Path] = ()) -> int:
    """Space of folders: files that share their content count once, and not at all if one of `without` has them too."""
    spared = {(stat.st_dev, stat.st_ino) for folder in without for stat in _stats(folder)}
    sizes = {(stat.st_dev, stat.st_ino): stat.st_size for folder in folders for stat in _stats(folder)}
    return sum(size for inode, size in sizes.items() if inode not in spared)


def _step(folder: Path) -> int:
    found = STEP.search(folder.name)
    assert found is not None
    return int(found[1])


def _stats(folder: Path) -> list[os.stat_result]:
    return [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _value(study: Study, trial: Trial | None, step: int, recommended: Trial | None, complete: bool) -> tuple[bool, str]:
    if trial is None:
        return False, "the ledger knows no such trial"
    if trial.open_segment is not None:
        return True, "its trial is being trained"
    if recommended is not None and trial.key == recommended.key:
        newest = trial.checkpoint is not None and trial.checkpoint.step == step
        return newest, "the recommended run" if newest else "an earlier one of the recommended run"
    if _may_go_on(study, trial):
        if complete:
            return False, "the study is complete: only a larger budget would continue its trial"
        newest = trial.checkpoint is not None and trial.checkpoint.step == step
        return True, "the search may continue its trial" if newest else "serves if the newer one is damaged"
    if trial.state is TrialState.COMPLETED:
        if not complete and trial.model == study.ladder.target.name:
            return True, "its run may be recommended"
        return False, "its run is complete and not recommended"
    return False, f"its run was {trial.state.value}" if trial.segments else "nothing of its trial is committed"


def _may_go_on(study: Study, trial: Trial) -> bool:
    """Whether the search may continue a trial; one that was lost twice is continued on the target only, to validate."""
    lost_on_target = trial.state is TrialState.LOST and trial.model == study.ladder.target.name
    return trial.checkpoint is not None and (trial.is_extendable or lost_on_target)


def _within(judgements: Sequence[Judgement], ranked: Sequence[Configuration], limit_bytes: int) -> list[Judgement]:
    """Give up the checkpoints of the least promising paused trials until the rest fits."""
    ranks = {configuration_key(configuration): rank for rank, configuration in enumerate(ranked)}
    kept = {judgement.folder: judgement for judgement in judgements}
    paused = [
        one
        for one in judgements
        if one.keep and one.trial is not None and one.trial.state in (TrialState.PAUSED, TrialState.LOST)
    ]

    def promise(one: Judgement) -> tuple[int, int]:
        assert one.trial is not None
        return ranks.get(configuration_key(one.trial.configuration), len(ranks)), -(one.step or 0)

    for one in sorted(paused, key=promise, reverse=True):
        if size_bytes([judgement.folder for judgement in kept.values() if judgement.keep]) <= limit_bytes:
            break
        kept[one.folder] = replace(one, keep=False, why="beyond the limit, and the least promising of those kept")
    return list(kept.values())
