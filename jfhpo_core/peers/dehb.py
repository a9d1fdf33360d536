"""The strategy `dehb`: differential evolution in Hyperband's brackets (arXiv 2105.09821), by its authors' library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dehb import DEHB
from loguru import logger

from jfhpo_core.errors import SpecError
from jfhpo_core.peers.base import ladder, rung_of, top_budget
from jfhpo_core.peers.replay import Library, ReplayedPeer, Request
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import Space


@dataclass(frozen=True)
class Dehb(ReplayedPeer):
    """Evolves points of the unit cube of the space; what a point stands for is trained.

    A stopped trial counts with its last score, an infeasible or lost one with the worst score seen. Only the first
    brackets promote configurations; later ones evolve new ones at every rung, as published.
    """

    name: ClassVar[str] = "dehb"

    def check(self, study: Study) -> None:
        """See `Checked.check`; a single rung is refused."""
        super().check(study)
        if len(ladder(study.spec.fidelity.levels, self.eta)) < 2:
            raise SpecError(
                f"fidelity.rungs: strategy 'dehb' needs at least two rungs that lie a factor of {self.eta} apart, and "
                f"the study has {list(study.spec.fidelity.levels)}; add earlier rungs, or choose another strategy"
            )

    def library(self, study: Study, rungs: int) -> Library:
        """See `ReplayedPeer.library`."""
        return _Evolution(study, rungs, self.eta)


class _Quiet(DEHB):  # type: ignore[misc]  # the package has no types
    """DEHB without its log file, which starts a thread for every object."""

    def _setup_logger(self, *_: Any) -> None:
        self.output_path = Path()
        self.logger = logger


class _Evolution:
    """DEHB in the unit cube; its fidelities are the powers of eta."""

    def __init__(self, study: Study, rungs: int, eta: int) -> None:
        self._space: Space = study.space
        self._eta = eta
        self._dehb = _Quiet(
            dimensions=study.space.dimension,
            min_fidelity=1.0,
            max_fidelity=top_budget(rungs, eta),
            eta=eta,
            seed=study.spec.seeds.search,
            n_workers=1,
            save_freq="end",  # that is: never, because DEHB's own loop does not run
        )

    def ask(self) -> Request:
        """See `Library.ask`; DEHB always has a further one."""
        job = self._dehb.ask()
        return Request(self._space.decode(job["config"]), rung_of(job["fidelity"], self._eta), job)

    def tell(self, request: Request, score: float, failed: bool) -> None:
        """See `Library.tell`; DEHB minimizes and knows no failures."""
        self._dehb.tell(request.ticket, {"fitness": -score, "cost": 0.0})
