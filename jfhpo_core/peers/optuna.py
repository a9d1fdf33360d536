"""Peers by Optuna: TPE, ASHA (stopping variant), and Hyperband with TPE, the combination known as BOHB.

Every call rebuilds Optuna's study from the trials: all are begun in order of creation and report in the order in which
their segments were committed, so that a pruner decides as it would have decided then. Its decision is taken once, when
a trial reports at a rung: a trial that it does not prune is continued, a pruned one never.

A trial that a rule stopped is told as pruned, with its last score; an infeasible or lost one as failed, which Optuna's
samplers leave out. Running trials are Optuna's running ones.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial as Handle
from optuna.trial import TrialState as Told

from jfhpo_core.optimizer.strategy import Positive, Reduction
from jfhpo_core.peers.base import (
    Choice,
    Peer,
    ladder,
    last_score,
    new_configuration,
    score_at,
)
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Space
from jfhpo_core.study.trial import Configuration, Outcome, Trial, TrialState

optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces every rebuilt study


@dataclass(frozen=True)
class OptunaPeer(Peer):
    """A sampler and a pruner of Optuna."""

    def rungs(self, study: Study) -> tuple[int, ...]:
        """Prompt counts at which a trial reports, ascending."""
        return (study.spec.fidelity.horizon_prompts,)

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """Chooses new configurations."""

    def pruner(self, rungs: Sequence[int]) -> BasePruner:
        """Decides at each rung whether a trial is continued."""
        return NopPruner()

    def resource(self, rung: int) -> int:
        """Resource that the pruner is told for a rung's position."""
        return 1 + rung

    def choose(self, study: Study, mine: Sequence[Trial], seed: int) -> Choice | None:
        """See `Peer.choose`."""
        rungs = self.rungs(study)
        library, promoted = self._replay(study, mine, rungs)
        for trial, level in promoted:
            if trial.state is TrialState.PAUSED:
                return Choice(trial.configuration, level, f"promoted to {level} of {rungs[-1]} prompts")
        library.sampler = self.sampler(seed)
        handles: list[Handle] = []

        def draw() -> Configuration:
            handles.append(library.ask())
            return _suggested(handles[-1], study.space)

        drawn = new_configuration(study, mine, draw, seed)
        return Choice(drawn[0], rungs[self._first_decision(handles[0], len(rungs))], drawn[1]) if drawn else None

    def _first_decision(self, handle: Handle, count: int) -> int:
        """Position of the first rung at which a new trial may be pruned; Hyperband's later brackets begin late.

        A report of NaN is pruned wherever a decision is due. It stays in this copy of the study, which is not kept.
        """
        for rung in range(count - 1):
            handle.report(math.nan, self.resource(rung))
            if handle.should_prune():
                return rung
        return count - 1

    def _replay(
        self, study: Study, mine: Sequence[Trial], rungs: Sequence[int]
    ) -> tuple[optuna.Study, list[tuple[Trial, int]]]:
        """Optuna's study after all that happened, and the trials to be continued, each with its next rung."""
        library = optuna.create_study(
            study_name=study.spec.study,
            direction="maximize",
            sampler=RandomSampler(seed=study.spec.seeds.search),
            pruner=self.pruner(rungs),
        )
        runs = {}
        for trial in mine:
            values = {name: study.space[name].to_native(value) for name, value in trial.configuration.items()}
            library.enqueue_trial(values)
            handle = library.ask()
            _suggested(handle, study.space)
            runs[trial.key] = _Run(trial, handle)
        commits = [(run, index) for run in runs.values() for index in range(len(run.trial.segments))]
        commits.sort(key=lambda item: (item[0].trial.segments[item[1]].committed, item[0].trial.number, item[1]))
        for run, index in commits:
            self._report(library, run, index, rungs)
        ready = sorted((run for run in runs.values() if run.next_rung), key=lambda run: run.trial.number)
        return library, [(run.trial, rungs[run.next_rung]) for run in ready]

    def _report(self, library: optuna.Study, run: _Run, index: int, rungs: Sequence[int]) -> None:
        """Tell Optuna what a segment brought."""
        if run.told:
            return
        result = run.trial.segments[index]
        reached = result.end_step * run.trial.prompts_per_step
        while run.rung < len(rungs) and rungs[run.rung] <= reached and result.outcome in MEASURED:
            score = score_at(run.trial, rungs[run.rung])
            if score is None:
                break
            run.handle.report(score, self.resource(run.rung))
            run.rung += 1
            if run.rung == len(rungs):
                run.tell(library, Told.COMPLETE, score)
                return
            if run.handle.should_prune():
                run.tell(library, Told.PRUNED)
                return
        if result.outcome is Outcome.STOPPED:
            score = last_score(run.trial)
            if score is not None:
                run.handle.report(score, self.resource(run.rung))
            run.tell(library, Told.PRUNED)
        elif result.outcome is not Outcome.REACHED:
            run.tell(library, Told.FAIL)


MEASURED = (Outcome.REACHED, Outcome.STOPPED)


@dataclass
class _Run:
    """A trial while it is replayed.

    Attributes:
        rung: Position of the next rung that it has not reported at.
        told: Whether Optuna has been told its end.
    """

    trial: Trial
    handle: Handle
    rung: int = 0
    told: bool = field(default=False)

    @property
    def next_rung(self) -> int:
        """Position of the rung that the trial was promoted to; 0 if it was not."""
        return 0 if self.told else self.rung

    def tell(self, library: optuna.Study, state: Told, score: float | None = None) -> None:
        library.tell(self.handle, score, state)
        self.told = True


def _suggested(handle: Handle, space: Space) -> Configuration:
    """The configuration that Optuna's sampler chooses for a trial, hyperparameter by hyperparameter."""
    configuration: Configuration = {}
    for name in space:
        parameter = space[name]
        if not space.active(parameter, configuration):
            continue
        domain = parameter.domain
        if domain.kind == "real":
            number: float = handle.suggest_float(name, domain.low, domain.high)
        elif domain.kind == "integer":
            number = handle.suggest_int(name, domain.low, domain.high, log=domain.log)
        else:
            number = handle.suggest_categorical(name, range(domain.high + 1))
        configuration[name] = parameter.from_native(number)
    return configuration


@dataclass(frozen=True)
class Tpe(OptunaPeer):
    """The strategy `tpe`: Optuna's tree-structured Parzen estimator, every trial at full length.

    Attributes:
        startup_trials: Random trials before the estimator is asked.
    """

    name: ClassVar[str] = "tpe"
    startup_trials: Positive = 10

    def sampler(self, seed: int) -> BaseSampler:
        """See `OptunaPeer.sampler`."""
        return TPESampler(n_startup_trials=self.startup_trials, seed=seed)


@dataclass(frozen=True)
class Asha(OptunaPeer):
    """The strategy `asha`: asynchronous successive halving (arXiv 1810.05934) over random configurations.

    Attributes:
        eta: About one in `eta` trials is continued at each rung, and rungs lie about a factor of `eta` apart.
    """

    name: ClassVar[str] = "asha"
    eta: Reduction = 3

    def rungs(self, study: Study) -> tuple[int, ...]:
        """See `OptunaPeer.rungs`."""
        return ladder(study.spec.fidelity.levels, self.eta)

    def sampler(self, seed: int) -> BaseSampler:
        """See `OptunaPeer.sampler`."""
        return RandomSampler(seed=seed)

    def pruner(self, rungs: Sequence[int]) -> BasePruner:
        """See `OptunaPeer.pruner`."""
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=self.eta)

    def resource(self, rung: int) -> int:
        """See `OptunaPeer.resource`: Optuna's rungs lie at exact powers of `eta`."""
        return int(self.eta**rung)


@dataclass(frozen=True)
class Bohb(Asha):
    """The strategy `bohb`: Hyperband's brackets over configurations by TPE, fitted within each bracket.

    Attributes:
        startup_trials: Random trials of a bracket before the estimator is asked; Optuna's 10 would keep a search of
            forty trials in four brackets random.
    """

    name: ClassVar[str] = "bohb"
    startup_trials: Positive = 4

    def sampler(self, seed: int) -> BaseSampler:
        """See `OptunaPeer.sampler`."""
        return TPESampler(n_startup_trials=self.startup_trials, seed=seed)

    def pruner(self, rungs: Sequence[int]) -> BasePruner:
        """See `OptunaPeer.pruner`."""
        return HyperbandPruner(min_resource=1, max_resource=self.resource(len(rungs) - 1), reduction_factor=self.eta)
