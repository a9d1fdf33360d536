"""Libraries that keep a state: driven by ask and tell, and rebuilt from the trials by the same asks and tells.

What the library was asked and told follows from the trials: every segment notes the newest commit that was known when
it was chosen (`Suggestion.after_commit`), and commits are ranked. The object that was driven last stays in memory, and
is driven on if the trials continue its history; if they do not, a new one is. Both give the same proposals.

The library's answers are found again among the trials by configuration and rung. If it answers differently today
(another release, another seed), what it asks for anew is offered anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jfhpo_core.optimizer.strategy import Reduction, fresh_configurations
from jfhpo_core.peers.base import DRAWS, Choice, Peer, ladder
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration, Outcome, Trial, TrialState, configuration_key

ASK = "ask"
"""The event of a history in which the library is asked for a segment; all others are commits."""

WORST_SCORE = 0.0
"""Told for a failed trial as long as no trial has a score: later it is the worst score seen."""


@dataclass(frozen=True)
class Request:
    """What a library wants to know: the score of a configuration at a rung.

    Attributes:
        rung: Position among the rungs.
        ticket: What the library wants to have back with the answer.
    """

    configuration: Configuration
    rung: int
    ticket: Any


class Library(Protocol):
    """An object of a library, which answers the same asks and tells with the same requests."""

    def ask(self) -> Request | None:
        """The next request; None if the library knows no further one."""
        ...

    def tell(self, request: Request, score: float, failed: bool) -> None:
        """Answer a request.

        Args:
            request: A request of `ask`.
            score: The score, to be maximized; of a trial that was stopped before the rung its last one, of one that
                never got a score the worst score seen.
            failed: Whether the trial was infeasible or lost.
        """
        ...


@dataclass(frozen=True)
class Commit:
    """What the library can learn from a committed segment.

    Attributes:
        scores: Prompts and score of each evaluation.
    """

    key: str
    outcome: Outcome
    scores: tuple[tuple[int, float], ...]


Event = str | Commit


@dataclass
class Drive:
    """A library's object, and what it waits for.

    Attributes:
        scores: What has been measured, by configuration and prompts.
        ended: Configurations whose trial was stopped, failed or lost, by how.
        waiting: Requests without an answer, by configuration.
    """

    library: Library
    rungs: Sequence[int]
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    ended: dict[str, Outcome] = field(default_factory=dict)
    waiting: dict[str, list[Request]] = field(default_factory=dict)

    def ask(self) -> Request | None:
        """The library's next request that needs training; those that the trials answer already are answered here."""
        for _ in range(DRAWS):
            request = self.library.ask()
            if request is None:
                return None
            key = configuration_key(request.configuration)
            runs = key in self.waiting
            self.waiting.setdefault(key, []).append(request)
            if not runs:
                self._answer(key)
                if key in self.waiting:
                    return request
        return None

    def tell(self, commit: Commit) -> None:
        """Note a committed segment, and answer the requests that wait for it."""
        self.scores.setdefault(commit.key, {}).update(commit.scores)
        if commit.outcome is not Outcome.REACHED:
            self.ended[commit.key] = commit.outcome
        self._answer(commit.key)

    def _answer(self, key: str) -> None:
        """Answer what can be answered of the requests for a configuration."""
        measured, open_requests = self.scores.get(key, {}), []
        for request in self.waiting.pop(key, []):
            prompts = self.rungs[request.rung]
            if prompts in measured:
                self.library.tell(request, measured[prompts], failed=False)
            elif key in self.ended:
                failed = self.ended[key] is not Outcome.STOPPED
                score = measured[max(measured)] if measured and not failed else self._worst()
                self.library.tell(request, score, failed)
            else:
                open_requests.append(request)
        if open_requests:
            self.waiting[key] = open_requests

    def _worst(self) -> float:
        return min((score for scores in self.scores.values() for score in scores.values()), default=WORST_SCORE)


@dataclass
class _Live:
    """The object driven last: for which study, along which history, and what it then asked for."""

    identity: str
    history: list[Event]
    drive: Drive
    request: Request | None


_live: dict[str, _Live] = {}
"""By name of the strategy, the object driven last in this process. It saves replays and changes no proposal."""


@dataclass(frozen=True)
class ReplayedPeer(Peer):
    """A peer whose library is driven by ask and tell.

    Attributes:
        eta: One in `eta` trials is promoted at each rung, and rungs lie about a factor of `eta` apart.
    """

    eta: Reduction = 3

    @abstractmethod
    def library(self, study: Study, rungs: int) -> Library:
        """A new object of the library.

        Args:
            study: The study; all randomness comes from its search seed.
            rungs: Number of rungs.
        """

    def choose(self, study: Study, mine: Sequence[Trial], seed: int) -> Choice | None:
        """See `Peer.choose`."""
        rungs = ladder(study.spec.fidelity.levels, self.eta)
        live = self._driven(study, mine, rungs)
        running = {configuration_key(trial.configuration) for trial in mine if trial.state is TrialState.RUNNING}
        for key, requests in live.drive.waiting.items():
            unanswered = min(requests, key=lambda request: request.rung)
            if key not in running and unanswered is not live.request:
                return Choice(unanswered.configuration, rungs[unanswered.rung], "asked for earlier and not trained yet")
        if live.request is not None:
            level = rungs[live.request.rung]
            why = f"rung {live.request.rung + 1} of {len(rungs)}: {level} of {rungs[-1]} prompts"
            return Choice(live.request.configuration, level, why, after_commit=_newest(mine))
        fresh = fresh_configurations(study, mine, seed, 1)
        return Choice(fresh[0], rungs[-1], "Sobol configuration: the library has no new one") if fresh else None

    def _driven(self, study: Study, mine: Sequence[Trial], rungs: Sequence[int]) -> _Live:
        """The library's object after all that happened, asked for the next segment."""
        identity = f"{study.spec.identity()} {study.spec.seeds.search} {self}"
        history = events(self.name, mine)
        live = _live.pop(self.name, None)
        if live is not None and live.identity == identity and live.history == history:
            _live[self.name] = live
            return live
        if live is not None and live.identity == identity and history[: len(live.history) + 1] == [*live.history, ASK]:
            drive, rest = live.drive, history[len(live.history) + 1 :]
        else:
            drive, rest = Drive(self.library(study, len(rungs)), rungs), history
        for event in rest:
            if isinstance(event, Commit):
                drive.tell(event)
            else:
                drive.ask()
        _live[self.name] = _Live(identity, history, drive, drive.ask())
        return _live[self.name]


def forget() -> None:
    """Drop the objects in memory; the next proposals are made by replay."""
    _live.clear()


def events(name: str, mine: Sequence[Trial]) -> list[Event]:
    """What the library of a strategy was asked and told, in order.

    Args:
        name: The strategy; segments that others chose (a validation) were not asked for, but their scores are told.
        mine: Trials, running ones included.
    """
    asks = sorted(
        segment.suggestion.after_commit
        for trial in mine
        for segment in [
            *(done.segment for done in trial.segments),
            *([trial.open_segment] if trial.open_segment else []),
        ]
        if segment.suggestion.source == name and segment.suggestion.after_commit is not None
    )
    commits = sorted(
        (done.committed, trial.number, index, trial) for trial in mine for index, done in enumerate(trial.segments)
    )
    history: list[Event] = []
    for rank, _, index, trial in commits:
        while asks and asks[0] < rank:
            history.append(ASK)
            asks.pop(0)
        done = trial.segments[index]
        scores = tuple((item.prompts, item.score) for item in done.evaluations if item.step > 0)
        history.append(Commit(configuration_key(trial.configuration), done.outcome, scores))
    return [*history, *[ASK for _ in asks]]


def _newest(mine: Sequence[Trial]) -> int:
    return max((done.committed for trial in mine for done in trial.segments), default=0)
