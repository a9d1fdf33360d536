"""Peers by SMAC3: its random forest with Hyperband, plain Hyperband, and successive halving (all synchronous).

SMAC's space is built of the coordinates in [0, 1] of floats, of ints, of the positions of ordered choices, and of
categorical positions of unordered ones, with the conditions of the study. A stopped trial counts with its last score,
an infeasible or lost one as crashed, with the worst score seen. Nothing of SMAC's stays on disk.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from ConfigSpace import (
    AndConjunction,
    Categorical,
    ConfigurationSpace,
    Float,
    InCondition,
    Integer,
)
from smac import HyperbandFacade, MultiFidelityFacade, RandomFacade, Scenario
from smac.acquisition.function import EI
from smac.acquisition.maximizer import LocalSearch
from smac.intensifier.successive_halving import SuccessiveHalving as Halving
from smac.main.config_selector import ConfigSelector
from smac.main.exceptions import ConfigurationSpaceExhaustedException
from smac.model.random_forest import RandomForest
from smac.runhistory import StatusType, TrialValue
from smac.runhistory.encoder import RunHistoryEncoder

from jfhpo_core.optimizer.strategy import Positive
from jfhpo_core.peers.base import rung_of, top_budget
from jfhpo_core.peers.replay import Library, ReplayedPeer, Request
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Domain, Space
from jfhpo_core.study.trial import Configuration

logging.getLogger("smac").setLevel(logging.ERROR)  # its warnings are about searches that it runs itself

ENDLESS = 10**6
"""Trials that SMAC may run; the study's budget ends the search."""

MAX_LEAVES = 2**12
"""Maximum number of leaves of a tree, more than a study has trials. A tree reserves memory for all of them: a second at
SMAC's own 2^20."""


@dataclass(frozen=True)
class SuccessiveHalving(ReplayedPeer):
    """The strategy `successive-halving`: rounds of random configurations, of which one in `eta` is promoted."""

    name: ClassVar[str] = "successive-halving"

    def library(self, study: Study, rungs: int) -> Library:
        """See `ReplayedPeer.library`."""
        with TemporaryDirectory() as folder:  # a new facade saves itself, and that cannot be turned off
            scenario = Scenario(
                configuration_space(study.space),
                deterministic=True,
                n_trials=ENDLESS,
                min_budget=1,
                max_budget=top_budget(rungs, self.eta),
                seed=study.spec.seeds.search,
                output_directory=Path(folder),
            )
            return _Smac(study.space, self.facade(scenario, study), self.eta)

    def facade(self, scenario: Scenario, study: Study) -> Any:
        """SMAC's optimizer."""
        return RandomFacade(scenario, intensifier=Halving(scenario, eta=self.eta), **QUIET)


QUIET: dict[str, Any] = {"overwrite": True, "logging_level": False}
"""No look for an earlier run on disk, no change of the logging set-up."""


@dataclass(frozen=True)
class Hyperband(SuccessiveHalving):
    """The strategy `hyperband`: Hyperband's brackets over the middle of the space, then random ones (arXiv 1603.06560).

    The middle comes first because SMAC's facade begins with it.
    """

    name: ClassVar[str] = "hyperband"

    def facade(self, scenario: Scenario, study: Study) -> Any:
        """See `SuccessiveHalving.facade`."""
        intensifier = HyperbandFacade.get_intensifier(scenario, eta=self.eta)
        return HyperbandFacade(scenario, intensifier=intensifier, **QUIET)


@dataclass(frozen=True)
class Smac3(SuccessiveHalving):
    """The strategy `smac3`: SMAC's multi-fidelity optimizer, Hyperband's brackets over a random forest's proposals.

    The forest and its expected improvement work on the score itself: SMAC's default takes the logarithm of a cost, and
    a reward may have either sign. Otherwise the forest is SMAC's for this facade, in a single thread.

    Attributes:
        initial_trials: Random configurations before the forest is asked, and the trials that a rung must have for the
            forest to be fitted there rather than below; None: one more than the space has coordinates.
    """

    name: ClassVar[str] = "smac3"
    initial_trials: Positive | None = None

    def facade(self, scenario: Scenario, study: Study) -> Any:
        """See `SuccessiveHalving.facade`."""
        initial = self.initial_trials if self.initial_trials is not None else study.space.dimension + 1
        maximizer = MultiFidelityFacade.get_acquisition_maximizer(scenario)
        maximizer._local_search = _OrderedLocalSearch(scenario.configspace, seed=scenario.seed)  # noqa: SLF001
        return MultiFidelityFacade(
            scenario,
            model=RandomForest(
                scenario.configspace,
                n_trees=10,
                ratio_features=1.0,
                min_samples_split=2,
                min_samples_leaf=1,
                max_leaf_nodes=MAX_LEAVES,
                log_y=False,
                instance_features=scenario.instance_features,
                n_jobs=1,
                seed=scenario.seed,
            ),
            acquisition_function=EI(log=False),
            acquisition_maximizer=maximizer,
            config_selector=ConfigSelector(scenario, min_trials=initial),
            initial_design=MultiFidelityFacade.get_initial_design(scenario, n_configs=initial),
            intensifier=MultiFidelityFacade.get_intensifier(scenario, eta=self.eta),
            runhistory_encoder=RunHistoryEncoder(scenario),
            **QUIET,
        )


class _OrderedLocalSearch(LocalSearch):  # type: ignore[misc]  # SMAC's types are not read
    """SMAC's local search, begun in a fixed order: SMAC keeps the start in a set, whose order differs by process."""

    def _search(self, start_points: list[Any]) -> list[tuple[float, Any]]:
        found: list[tuple[float, Any]] = super()._search(sorted(start_points, key=str))
        return found


class _Smac:
    """A facade of SMAC, driven by ask and tell."""

    def __init__(self, space: Space, facade: Any, eta: int) -> None:
        self._space = space
        self._facade = facade
        self._eta = eta

    def ask(self) -> Request | None:
        """See `Library.ask`."""
        try:
            info = self._facade.ask()
        except (StopIteration, ConfigurationSpaceExhaustedException):
            return None
        return Request(_configuration(self._space, info.config), rung_of(info.budget, self._eta), info)

    def tell(self, request: Request, score: float, failed: bool) -> None:
        """See `Library.tell`."""
        status = StatusType.CRASHED if failed else StatusType.SUCCESS
        self._facade.tell(request.ticket, TrialValue(cost=-score, status=status), save=False)


def configuration_space(space: Space) -> ConfigurationSpace:
    """The search space in ConfigSpace's terms."""
    result = ConfigurationSpace()
    for name in space:
        parameter = space[name]
        result.add(_hyperparameter(name, parameter.domain))
        conditions = [
            InCondition(result[name], result[parent], [space[parent].to_native(value) for value in values])
            for parent, values in parameter.when.items()
        ]
        if conditions:
            result.add(AndConjunction(*conditions) if len(conditions) > 1 else conditions[0])
    return result


def _hyperparameter(name: str, domain: Domain) -> Any:
    if domain.kind == "real":
        return Float(name, (float(domain.low), float(domain.high)))
    if domain.kind == "integer":
        return Integer(name, (domain.low, domain.high), log=domain.log)
    return Categorical(name, list(range(domain.high + 1)))


def _configuration(space: Space, chosen: Any) -> Configuration:
    return {name: space[name].from_native(chosen[name]) for name in space if name in chosen}
