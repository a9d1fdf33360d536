"""The worth of training a segment, by name. Further ones come by the entry-point group `jfhpo.acquisitions`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from jfhpo_core.optimizer.acquisition import TargetKnowledgeGradient
from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.observations import running_points
from jfhpo_core.plugins import load_plugin

ENTRY_POINT_GROUP = "jfhpo.acquisitions"

ACQUISITIONS = {"knowledge-gradient": "jfhpo_core.optimizer.acquisitions:target_knowledge_gradient"}
"""Where those of this package are, by name."""


class Acquisition(Protocol):
    """How much better the best configuration at the target becomes by what a segment shows."""

    def __call__(self, beliefs: Beliefs, inputs: Tensor, targets: Tensor) -> Tensor:
        """The expected gain of each candidate.

        Price, feasibility and constraints of the candidates are left out: the strategy takes them into account.

        Args:
            beliefs: What the trials so far say; `beliefs.history` has them, running ones included.
            inputs: Ends of the candidates' segments, shape (n, d + 4).
            targets: Configurations considered for the target, at its size and full length, shape (a, d + 4).

        Returns:
            Shape (n,), not negative, in values (see `Beliefs.scale`). Where one is not finite, the strategy takes
            expected improvement instead.
        """
        ...


def target_knowledge_gradient(beliefs: Beliefs, inputs: Tensor, targets: Tensor) -> Tensor:
    """The acquisition `knowledge-gradient`: see `jfhpo_core.optimizer.acquisition`."""
    acquisition = TargetKnowledgeGradient(
        beliefs.surrogate,
        targets,
        beliefs.measurement_variance,
        beliefs.accepted(targets),
        beliefs.useless_value,
        running_points(beliefs.history),
    )
    gains: Tensor = acquisition(inputs.unsqueeze(-2))
    return gains


def load_acquisition(name: str) -> Acquisition:
    """The acquisition of this name.

    Raises:
        SpecError: There is none, or it does not import.
    """
    acquisition: Acquisition = load_plugin(ENTRY_POINT_GROUP, name, "strategy.settings.acquisition", ACQUISITIONS)
    return acquisition
