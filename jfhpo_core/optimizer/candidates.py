"""Segments that could be trained next: new configurations, known ones on other models, continuations, further seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.observations import earlier_configurations, full_length_inputs
from jfhpo_core.optimizer.surrogate import THIS_STUDY
from jfhpo_core.study.history import History
from jfhpo_core.study.models import progress
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import ChoiceParameter, Space, Vector
from jfhpo_core.study.trial import Configuration, TrialState, configuration_key

CANDIDATE_LEVELS = 4
"""Rungs at which each candidate is considered: its next ones thinned to this many, the full horizon among them."""


@dataclass(frozen=True)
class Candidate:
    """A segment that could be trained.

    Attributes:
        start_prompts: What the checkpoint to continue from has consumed; 0 for a new trial.
        trial: Number of the trial that it continues or would be.
        seed: Training seed; None: the first of the study's.
    """

    configuration: Configuration
    model: str
    start_prompts: int
    stop_prompts: int
    trial: int
    seed: int | None = None


def is_full_run(study: Study, candidate: Candidate) -> bool:
    """Whether a candidate's segment ends at the target's full length."""
    end = (study.ladder.target.name, study.spec.fidelity.horizon_prompts)
    return (candidate.model, candidate.stop_prompts) == end


@dataclass(frozen=True)
class CandidateSet:
    """How many candidates of each kind are looked at.

    Attributes:
        pool: New Sobol configurations from which candidates are picked by what the model expects of them.
        fresh: Candidates picked from the pool.
        local: Candidates picked from the neighbourhood of the best ones.
        known: Best known configurations that are candidates for models they have not seen.
        continued: Best known configurations whose paused runs are candidates for continuation.
        replicated: Of the best configurations, so many may get a further training seed on the target.
    """

    pool: int
    fresh: int
    local: int
    known: int
    continued: int
    replicated: int

    def segments(
        self,
        beliefs: Beliefs,
        ranked: Sequence[Configuration],
        expected: Sequence[Configuration],
        random: np.random.Generator,
    ) -> list[Candidate]:
        """Continuations of paused runs, known configurations on further models, and new configurations.

        Args:
            beliefs: What is known.
            ranked: Known configurations, best first.
            expected: Configurations that are expected to be good.
            random: Draws new ones.
        """
        history = beliefs.history
        study = history.study
        levels, number = study.spec.fidelity.levels, len(history.trials)
        promising = {configuration_key(item) for item in ranked[: self.continued]}
        found: list[Candidate] = []
        for trial in history.in_space:
            # A baseline is trained to its end by the study itself.
            if (
                trial.purpose == "search"
                and trial.is_extendable
                and configuration_key(trial.configuration) in promising
            ):
                done = trial.kept_prompts
                found += [
                    Candidate(trial.configuration, trial.model, done, level, trial.number, trial.seed)
                    for level in _spread([level for level in levels if level > done])
                ]
        seen = {(configuration_key(trial.configuration), trial.model) for trial in history.in_space}
        best = [*ranked[: self.known], *self._best_of_earlier(beliefs)]
        new = {configuration_key(item): item for item in (*self.new_configurations(beliefs, best, random), *expected)}
        for key, configuration in ({configuration_key(item): item for item in best} | new).items():
            found += [
                Candidate(configuration, model.name, 0, level, number)
                for model in study.ladder.models
                if (key, model.name) not in seen
                for level in _spread(levels)
            ]
        return found + self._replicates(history, ranked)

    def _best_of_earlier(self, beliefs: Beliefs) -> list[Configuration]:
        """What earlier studies have tried and this one has not, and the model expects most of."""
        found = by_value(beliefs, earlier_configurations(beliefs.history))
        untried = [
            item.configuration for item in found if configuration_key(item.configuration) not in beliefs.history.known
        ]
        return untried[: self.known]

    def _replicates(self, history: History, ranked: Sequence[Configuration]) -> list[Candidate]:
        """Another seed, on the target at full length, of the best configurations that have finished there.

        Their seeds begin above those of the final comparison, which must not be looked at before.
        """
        study = history.study
        target, horizon = study.ladder.target.name, study.spec.fidelity.horizon_prompts
        finished = {configuration_key(trial.configuration) for trial in history.finished}
        found = []
        for configuration in ranked[: self.replicated]:
            if configuration_key(configuration) in finished:
                # One that is still running has its seed, too.
                taken = [trial.seed for trial in history.on_target if trial.configuration == configuration]
                seed = max(*study.spec.seeds.training, *taken) + 1
                found.append(Candidate(configuration, target, 0, horizon, len(history.trials), seed))
        return found

    def new_configurations(
        self, beliefs: Beliefs, best: Sequence[Configuration], random: np.random.Generator
    ) -> list[Configuration]:
        """Untried configurations that the model finds promising at the target.

        Some of a Sobol sample and of the neighbourhood of the best known ones. Around what was found so far, the
        neighbourhood is searched in the same way, twice.
        """
        space = beliefs.history.study.space
        found = _promising(
            beliefs, space.snap(qmc.Sobol(space.dimension, rng=random).random(self.pool)), self.fresh, random
        )
        centres = np.array([space.encode(configuration) for configuration in best]).reshape(-1, space.dimension)
        near = centres
        for scales in ((-1.5, -0.5), (-2.0, -1.0)):
            around = np.concatenate([centres, near, found[: self.known]])
            moved = space.snap(_neighbours(around, self.pool // 2, scales, random))
            near = _promising(beliefs, moved, self.local, random)
        new: dict[str, Configuration] = {}
        for row in np.concatenate([found, near]):
            configuration = space.decode(row)
            key = configuration_key(configuration)
            if key not in beliefs.history.known:
                new.setdefault(key, configuration)
        return list(new.values())


@dataclass(frozen=True)
class Expectation:
    """What a configuration is expected to be worth at the target.

    Attributes:
        mean: Of its value on the scale, failures counted in.
        deviation: Of its value if it can be trained.
        worth: The mean where what breaks a constraint counts as untrained; the mean itself without constraints.
        respected: Probability that it respects all constraints; None without any.
    """

    configuration: Configuration
    mean: float
    deviation: float
    worth: float
    respected: float | None


def ranked_configurations(beliefs: Beliefs) -> list[Expectation]:
    """Configurations that the search has tried, with mean and deviation of their value at the target, best first.

    Those that a rule stopped or that failed on the target itself are left out.
    """
    history = beliefs.history
    ruined = (TrialState.STOPPED, TrialState.INFEASIBLE)
    tried = {
        configuration_key(trial.configuration): trial.configuration for trial in history.in_space if trial.evaluations
    }
    for trial in history.on_target:
        if trial.state in ruined:
            tried.pop(configuration_key(trial.configuration), None)
    return by_value(beliefs, list(tried.values()))


def by_value(beliefs: Beliefs, configurations: Sequence[Configuration]) -> list[Expectation]:
    """Configurations with what they are expected to be worth, best first."""
    if not configurations:
        return []
    inputs = beliefs.at_target(configurations)
    means, deviations = beliefs.expected(inputs)
    worth = beliefs.worth(inputs)
    respected = beliefs.respected(inputs).tolist() if beliefs.limits else [None] * len(inputs)
    order = torch.argsort(worth, descending=True, stable=True).tolist()
    return [
        Expectation(configurations[i], float(means[i]), float(deviations[i]), float(worth[i]), respected[i])
        for i in order
    ]


def expected_configuration(space: Space) -> Configuration | None:
    """What is expected to be best; None if the space has no `expected` values.

    Numbers of which nothing is expected are in the middle of their range.
    """
    expected = {name: item.expected for name, item in space.root.items() if item.expected is not None}
    return space.middle(**expected) if expected else None


def with_other_choices(space: Space, configuration: Configuration, most: int = 32) -> list[Configuration]:
    """A configuration with every combination of the space's choices: some of them are cheaper.

    Args:
        space: The search space.
        configuration: One of it.
        most: Combinations that are looked at, those with the first choices first.
    """
    choices = {name: item.values for name, item in space.root.items() if isinstance(item, ChoiceParameter)}
    found = {configuration_key(configuration): configuration}
    for values in islice(product(*choices.values()), most):
        other = space.middle(**{**configuration, **dict(zip(choices, values, strict=True))})
        found[configuration_key(other)] = other
    return list(found.values())


def _promising(beliefs: Beliefs, points: Vector, count: int, random: np.random.Generator) -> Vector:
    """At most `count` of the points: a third each by the expected value, an optimistic one, and one drawn.

    Args:
        beliefs: They tell the values.
        points: Snapped, shape (n, dimension).
        count: How many are wanted.
        random: Draws values.
    """
    inputs = full_length_inputs(points)
    means, deviations = (values.numpy() for values in beliefs.values(inputs))
    feasible, failed = beliefs.accepted(inputs).numpy(), beliefs.useless_value
    chosen: list[int] = []
    for weight in (np.zeros(len(points)), np.ones(len(points)), random.normal(size=len(points))):
        order = np.argsort(-feasible * (means + weight * deviations - failed), kind="stable")
        fresh = [int(index) for index in order[:count] if index not in chosen]
        chosen += fresh[: count // 3]
    return points[chosen]


def candidate_inputs(study: Study, candidates: Sequence[Candidate]) -> Tensor:
    """Surrogate inputs of candidates, shape (n, d + 4)."""
    encoded: dict[int, list[float]] = {}
    rows = []
    for item in candidates:
        x = encoded.get(id(item.configuration))
        if x is None:
            x = encoded[id(item.configuration)] = study.space.encode(item.configuration).tolist()
        size, share = study.ladder.size_coordinate(item.model), progress(study.spec, item.stop_prompts)
        rows.append([*x, size, share, float(item.trial), THIS_STUDY])
    return torch.tensor(rows, dtype=torch.double)


def _spread(levels: Sequence[int], count: int = CANDIDATE_LEVELS) -> list[int]:
    """At most `count` of the levels at about equal distances, the last one among them."""
    if len(levels) <= count:
        return list(levels)
    return [levels[round(place)] for place in np.linspace(len(levels) - 1, 0, count, endpoint=False)][::-1]


def _neighbours(centres: Vector, count: int, scales: tuple[float, float], random: np.random.Generator) -> Vector:
    """Points at random distances from the centres, a few coordinates changed at a time, shape (count, dimension).

    Args:
        centres: Shape (n, dimension).
        count: How many are wanted.
        random: Draws them.
        scales: Range of the decimal logarithm of the steps' standard deviation.
    """
    around = centres[np.arange(count) % len(centres)]
    size = 10 ** random.uniform(*scales, size=(count, 1))
    changed = random.random(around.shape) < max(0.3, 1.5 / around.shape[1])
    moved: Vector = np.clip(around + changed * random.normal(size=around.shape) * size, 0, 1)
    return moved
