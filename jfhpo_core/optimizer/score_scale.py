r"""The scale on which scores are modelled: differences among good configurations count, units and offsets do not.

Scores of one study, one model size and one run length form a group. Its reference is the best score there, or on
smaller models and in shorter runs, if that is better: what they can do, a longer run of a larger model can do as well.
With d, a score's distance to the reference of its group, what is modelled is

    v(d) = d / unit                for d >= 0,
    v(d) = -log(1 - d / unit)      for d < 0:

linear near the best, logarithmic far below it. The unit of a group is a typical distance between its best score and the
better half of the others, so that a collapsed run is a few units away from the best one and not a hundred; that of a
small group is taken more from all groups together. Scores that are multiplied by a positive number or shifted have the
same values v; models of different size, and runs of different length, are compared by what sets configurations apart
there, not by their level or spread.

References:
    Snoek et al. (2014), Input warping, and Eriksson and Poloczek (2021), SCBO (bilog), transform outputs for the same
    reason; the logarithm of a regret is customary where results are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Protocol

import numpy as np

from jfhpo_core.study.space import Vector

Group = tuple[float, float, float]
"""Study (0 is this one), size coordinate and share of the full horizon."""

TARGET: Group = (0.0, 0.0, 1.0)
"""Scores of this study's target at full length."""

LARGE_GROUP = 4
"""Scores that a group needs for its own typical distance to mean something."""

COMMON_SCORES = 4
"""The unit of all groups together counts like so many further scores of a group."""

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
        units: Score difference that counts as one, by group; positive.
        references: Of every group, what its scores are compared with.
    """

    units: Mapping[Group, float]
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
        noise: dict[Group, list[float]] = {}
        for group, error in zip(groups, errors, strict=True):
            noise.setdefault(group, []).append(error)
        common: dict[float, float] = {}
        for study in {group[0] for group in members}:
            mine = [group for group in members if group[0] == study]
            measured = median(error for group in mine for error in noise[group])
            common[study] = max(_typical_distance([members[group] for group in mine]), measured)
        fallback = next((unit for unit in common.values() if unit > 0), 1.0)
        units = {
            group: _unit(found, median(noise[group]), common[group[0]] or fallback) for group, found in members.items()
        }
        return cls(units, references)

    def unit(self, group: Group = TARGET) -> float:
        """Score difference that counts as one in a group, or in the one of its study that comes nearest."""
        return self.units[_nearest(group, self.units)]

    def value(self, group: Group, score: float) -> tuple[float, float]:
        """A score on the scale, and the scale's slope there (value per score)."""
        unit = self.unit(group)
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
        return self.reference(group) + self.unit(group) * distance

    def median_and_deviation(self, group: Group, mean: float, deviation: float) -> tuple[float, float]:
        """Of the score whose value is normal with this mean and deviation: its median, and how far one deviation is up.

        Down it is further, without bound: far below the best the scale is logarithmic.
        """
        middle, high = self.score(group, [mean, mean + deviation])
        return float(middle), max(float(high - middle), math.ulp(0.0))

    def reference(self, group: Group) -> float:
        """That of a group, or of the one of its study that comes nearest."""
        return self.references[_nearest(group, self.references)]


def _nearest(group: Group, known: Mapping[Group, float]) -> Group:
    """The known group that comes nearest: of the same study if there is one, then by size, then by length."""
    if group in known:
        return group
    return min(known, key=lambda other: (other[0] != group[0], abs(other[1] - group[1]), abs(other[2] - group[2])))


def _unit(scores: Sequence[float], error: float, common: float) -> float:
    """What counts as one in a group, given what does in all of its study.

    Args:
        scores: Of the group.
        error: Their standard error.
        common: Of all groups; positive.
    """
    own = max(_distance(scores), error)
    if own <= EQUAL * common:
        return common
    share = (len(scores) - 1) / (len(scores) - 1 + COMMON_SCORES)
    return math.exp(share * math.log(own) + (1 - share) * math.log(common))


def _typical_distance(groups: Sequence[Sequence[float]]) -> float:
    """Median over the groups, of large ones if there are any; 0 if all scores of every group are equal."""
    least = EQUAL * max(max(found) - min(found) for found in groups)
    for enough in (LARGE_GROUP, 2):
        distances = [_distance(found) for found in groups if len(found) >= enough]
        apart = [distance for distance in distances if distance > least]
        if apart:
            return median(apart)
    return 0.0


def _distance(scores: Sequence[float]) -> float:
    """How far the better half of the other scores is below the best one, on average; 0 for a single score."""
    best, *others = sorted(scores, reverse=True)
    return best - fmean(others[: max(1, len(others) // 2)]) if others else 0.0
