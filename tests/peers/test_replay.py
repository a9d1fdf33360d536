from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jfhpo.testing.strategies import search
from jfhpo_core.optimizer.strategy import Proposal, load_strategy
from jfhpo_core.peers.dehb import Dehb
from jfhpo_core.peers.replay import ASK, Commit, Drive, Library, Request, events, forget
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import VALIDATION, Outcome, Suggestion, Trial, configuration_key
from tests.peers.test_peers import PEERS, peer_study
from tests.studies import evaluation, result, segment

A, B = {"learning_rate": 1e-3}, {"learning_rate": 1e-4}


class Scripted:
    """A library that asks for what it is given, and notes the answers."""

    def __init__(self, *requests: tuple[dict[str, Any], int]) -> None:
        self.requests = [Request(configuration, rung, None) for configuration, rung in requests]
        self.answers: list[tuple[float, int, float, bool]] = []

    def ask(self) -> Request | None:
        return self.requests.pop(0) if self.requests else None

    def tell(self, request: Request, score: float, failed: bool) -> None:
        self.answers.append((float(request.configuration["learning_rate"]), request.rung, score, failed))


def commit(configuration: dict[str, Any], *scores: tuple[int, float], outcome: Outcome = Outcome.REACHED) -> Commit:
    return Commit(configuration_key(configuration), outcome, scores)


def test_what_the_trials_answer_already_is_not_trained_again() -> None:
    library = Scripted((A, 1), (A, 0), (B, 0), (A, 1), (B, 1))
    drive = Drive(library, (48, 160, 480))
    assert drive.ask() == Request(A, 1, None)
    drive.tell(commit(A, (48, 0.2), (160, 0.4)))
    assert drive.ask() == Request(B, 0, None), "rung 0 of A was passed on the way to rung 1"
    assert library.answers == [(1e-3, 1, 0.4, False), (1e-3, 0, 0.2, False)]
    drive.tell(commit(B, (48, 0.3)))
    assert drive.ask() == Request(B, 1, None)
    assert library.answers[-2:] == [(1e-4, 0, 0.3, False), (1e-3, 1, 0.4, False)]
    assert drive.ask() is None


def test_a_request_for_a_running_trial_waits_for_it() -> None:
    library = Scripted((A, 1), (A, 0), (B, 0))
    drive = Drive(library, (48, 160))
    assert drive.ask() == Request(A, 1, None)
    assert drive.ask() == Request(B, 0, None)
    drive.tell(commit(A, (48, 0.2), (160, 0.4)))
    assert library.answers == [(1e-3, 1, 0.4, False), (1e-3, 0, 0.2, False)]


@pytest.mark.parametrize(
    ("outcome", "answer"),
    [
        (Outcome.STOPPED, (1e-4, 1, 0.3, False)),
        (Outcome.INFEASIBLE, (1e-4, 1, 0.2, True)),
        (Outcome.LOST, (1e-4, 1, 0.2, True)),
    ],
)
def test_trials_that_ended_early_are_answered(outcome: Outcome, answer: tuple[float, int, float, bool]) -> None:
    library = Scripted((A, 0), (B, 1), (B, 0))
    drive = Drive(library, (48, 160))
    drive.ask()
    drive.tell(commit(A, (48, 0.2)))
    drive.ask()
    drive.tell(commit(B, (96, 0.3), outcome=outcome))
    assert library.answers[-1] == answer


def test_asks_stand_between_the_commits_that_they_knew() -> None:
    def because(source: str, after: int | None) -> Suggestion:
        return Suggestion(source=source, explanation="", after_commit=after)

    def trial(number: int, ranks: dict[int, tuple[str, int | None]], running: int | None = None) -> Trial:
        done = tuple(
            result(
                index, index, index + 1, committed=rank, evaluations=(evaluation(index + 1, 0.1 * rank),)
            ).model_copy(
                update={"segment": segment(index, index, index + 1).model_copy(update={"suggestion": because(*why)})}
            )
            for index, (rank, why) in enumerate(ranks.items())
        )
        opened = segment(len(done), len(done), 30).model_copy(update={"suggestion": because("dehb", running)})
        return Trial(
            key=str(number), number=number, configuration={"learning_rate": number}, model="large", seed=0,
            total_steps=30, prompts_per_step=16, segments=done, open_segment=None if running is None else opened,
        )  # fmt: skip

    trials = [
        trial(0, {2: ("dehb", 0), 5: ("dehb", 4)}),
        trial(1, {4: ("dehb", 0), 6: ("validation", None)}),
        trial(2, {}, running=5),
    ]

    def told(number: int, step: int, rank: int) -> Commit:
        return commit({"learning_rate": number}, (16 * step, 0.1 * rank))

    assert events("dehb", trials) == [
        ASK, ASK, told(0, 1, 2), told(1, 1, 4), ASK, told(0, 2, 5), ASK, told(1, 2, 6),
    ]  # fmt: skip


@pytest.mark.parametrize("slots", [1, 3])
def test_a_running_search_drives_one_object(tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = Dehb.library

    def counted(self: Dehb, study: Study, rungs: int) -> Library:
        built.append(rungs)
        return build(self, study, rungs)

    monkeypatch.setattr(Dehb, "library", counted)
    forget()
    outcome, recorded = search(peer_study(tmp_path, "dehb", slots=slots), slots)
    begun = [
        segment.segment
        for trial in outcome.trials
        for segment in trial.segments
        if segment.segment.suggestion.source != VALIDATION
    ]
    withheld = len(recorded.calls) - len(begun)
    assert len(recorded.calls) > 15
    assert len(built) <= 1 + withheld, "only a proposal that was withheld makes the object useless"


def test_another_seed_starts_the_library_over(tmp_path: Path) -> None:
    study = peer_study(tmp_path, "dehb")
    _, recorded = search(study)
    trials, remaining, seed, _ = recorded.calls[10]
    other = peer_study(tmp_path, "dehb", seeds={"search": 4, "training": [0]})
    proposal = load_strategy(other).suggest(other, trials, remaining, seed)
    assert proposal is not None
    assert configuration_key(proposal.configuration) not in {configuration_key(trial.configuration) for trial in trials}


PROGRAM = """
import json, sys
from pathlib import Path
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.study.trial import Trial
from tests.peers.test_peers import peer_study

for line in Path(sys.argv[1]).read_text().splitlines():
    call = json.loads(line)
    study = peer_study(Path(sys.argv[2]), call["name"], slots=3)
    trials = [Trial.model_validate(trial) for trial in call["trials"]]
    proposal = load_strategy(study).suggest(study, trials, call["remaining"], call["seed"])
    print(json.dumps([proposal.configuration, proposal.stop_prompts]))
"""


@pytest.mark.slow
def test_another_process_proposes_the_same(tmp_path: Path) -> None:
    """Hashes of texts, and with them the order of sets, differ between processes."""
    expected: list[Proposal] = []
    lines = []
    for name in PEERS:
        _, recorded = search(peer_study(tmp_path, name, slots=3), 3)
        trials, remaining, seed, proposal = [call for call in recorded.calls if call[3] is not None][-1]
        assert proposal is not None
        expected.append(proposal)
        plain = [trial.model_dump(mode="json") for trial in trials]
        lines.append(json.dumps({"name": name, "trials": plain, "remaining": remaining, "seed": seed}))
    calls = tmp_path / "calls.jsonl"
    calls.write_text("\n".join(lines))
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(calls), str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert answers == [[proposal.configuration, proposal.stop_prompts] for proposal in expected]
