r"""The scale on which scores are modelled: differences among good configurations count, units and offsets do not.

Scores of one study, one model size and one run length form a group. Its reference is the best score there, or on
smaller models and in shorter runs, if that is better: what they can do, a longer run of a larger model can do as well.
With d, a score's distance to the reference of its group, what is modelled is

    v(d) = d / unit                for d >= 0,
    v(d) = -log(1 - d / unit)      for d < 0:

linear near the best, logarithmic far below it. The unit is a typical distance between the best and the upper quartile
of a group, so that a collapsed run is a few units away from the best one and not a hundred. Scores that are multiplied
by a positive number or shifted have the same values v; models of different size, and runs of different length, are
compared by what sets configurations apart there, not by their level.

References:
    Snoek et al. (2014), Input warping, and Eriksson and Poloczek (2021), SCBO (bilog), transform outputs for the same
    reason; the logarithm of a regret is customary where results are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np

from jfhpo_core.study.space import Vector

Group = tuple[float, float, float]
"""Study (0 is this one), size coordinate and share of the full horizon."""

QUANTILE = 0.75
"""The unit is the distance of a group's best score to this quantile."""

LARGE_GROUP = 4
"""Scores that a group needs for its own quantile to mean something."""

LOWEST = 700.0
"""Values below minus this stand for the same score: the exponential of more has no float."""

EQUAL = 1e-9
"""Scores that differ by less than this share of all differences count as equal."""


class Scale(Protocol):
    """From what was measured to what is modelled."""

    def value(self, group: Group, score: float) -> tuple[float, float]:
        """A measured value on the scale, and the slope there (value per score)."""
        ...


@dataclass(frozen=True)
class ScoreScale:
    """Maps scores to modelled values and back.

    Attributes:
        units: Score difference that counts as one, by study; positive.
        references: That of every group.
    """

    units: Mapping[float, float]
    references: Mapping[Group, float]

    @classmethod
    def of(cls, groups: Sequence[Group], scores: Sequence[float], errors: Sequence[float]) -> ScoreScale:
        """The scale that observations of several groups suggest.

        Args:
            groups: Of each score.
            scores: At least one.
            errors: Their standard errors: a unit is not smaller than what measurements can tell apart.
        """
        members: dict[Group, list[float]] = {}
        for group, score in zip(groups, scores, strict=True):
            members.setdefault(group, []).append(score)
        references = {
            group: max(
                score
                for (study, size, share), found in members.items()
                if study == group[0] and size <= group[1] and share <= group[2]
                for score in found
            )
            for group in members
        }
        noise: dict[float, list[float]] = {}
        for group, error in zip(groups, errors, strict=True):
            noise.setdefault(group[0], []).append(error)
        units = {
            study: max(
                _unit([found for group, found in members.items() if group[0] == study]) or 0.0,
                median(measured),
            )
            for study, measured in noise.items()
        }
        fallback = next((unit for unit in units.values() if unit > 0), 1.0)
        return cls({study: unit if unit > 0 else fallback for study, unit in units.items()}, references)

    def unit(self, study: float = 0.0) -> float:
        """Score difference that counts as one."""
        return self.units.get(study) or next(iter(self.units.values()), 1.0)

    def value(self, group: Group, score: float) -> tuple[float, float]:
        """A score on the scale, and the scale's slope there (value per score)."""
        unit = self.unit(group[0])
        distance = (score - self.reference(group)) / unit
        if distance >= 0:
            return distance, 1 / unit
        return -math.log1p(-distance), 1 / (unit * (1 - distance))

    def score(self, group: Group, values: Iterable[float]) -> Vector:
        """Scores of values, shape (n,).

        Args:
            group: If nothing was observed in it, the reference is that of the group of its study which comes nearest:
                largest model first, then longest run.
            values: On the scale.
        """
        found = np.asarray(list(values), dtype=float)
        distance = np.where(found >= 0, found, -np.expm1(-found.clip(-LOWEST, 0.0)))
        return self.reference(group) + self.unit(group[0]) * distance

    def median_and_deviation(self, group: Group, mean: float, deviation: float) -> tuple[float, float]:
        """Of the score whose value is normal with this mean and deviation: its median, and how far one deviation is up.

        Down it is further, without bound: far below the best the scale is logarithmic.
        """
        middle, high = self.score(group, [mean, mean + deviation])
        return float(middle), max(float(high - middle), math.ulp(0.0))

    def reference(self, group: Group) -> float:
        """That of a group, or of the one of its study that comes nearest."""
        if group in self.references:
            return self.references[group]
        known = [other for other in self.references if other[0] == group[0]] or list(self.references)
        return self.references[min(known, key=lambda other: (abs(other[1] - group[1]), abs(other[2] - group[2])))]


def _unit(groups: Sequence[Sequence[float]]) -> float | None:
    """Typical distance between the best and the upper quartile; None if all scores of every group are equal."""
    least = EQUAL * max(max(found) - min(found) for found in groups)
    large = [max(found) - float(np.quantile(found, QUANTILE)) for found in groups if len(found) >= LARGE_GROUP]
    distances = [distance for distance in large if distance > least]
    if distances:
        return median(distances)
    apart = [max(found) - score for found in groups for score in found if max(found) - score > least]
    return median(apart) if apart else None
