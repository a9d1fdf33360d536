"""What strategies are measured on: families of problems with a known optimum, a fresh one for every seed.

Tuning may use seeds 0 to 99; what is published uses seeds from 1000 on, which nobody has looked at while tuning.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc, spearmanr

from benchmarks import functions
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import EarlierStudy, Study
from jfhpo_core.study.space import Vector
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.trial import Configuration
from jfhpo_core.trainers import Trainer
from jfhpo_core.trainers.simulated import SimulatedTrainer, study_surface, true_score

FAMILY = [
    {"name": "0.5b", "path": "simulated", "parameters": 494_000_000},
    {"name": "1.5b", "path": "simulated", "parameters": 1_544_000_000},
    {"name": "7b", "path": "simulated", "parameters": 7_616_000_000},
]
"""Sizes of Qwen2.5 0.5B, 1.5B and 7B."""

DISTANT_FAMILY = [
    {"name": "0.1b", "path": "simulated", "parameters": 110_000_000},
    {"name": "0.6b", "path": "simulated", "parameters": 630_000_000},
    FAMILY[-1],
]
"""Proxies 70 and 12 times smaller than the target."""

TARGET = "7b"
HORIZON_PROMPTS = 1024
RUNGS = 8
PROMPTS_PER_STEP = 16

TRAININGS = 20
"""Budget of a run, in full runs of the target with a typical configuration, unless it is said otherwise."""

FEW_TRAININGS = 8

COSTS = {"seconds_per_step": 60.0, "size_exponent": 0.9, "startup_seconds": 120.0, "evaluation_seconds": 60.0}
"""Of the target; start-up costs the same on every model."""

TRAINING_SECONDS = (
    COSTS["startup_seconds"]
    + HORIZON_PROMPTS / PROMPTS_PER_STEP * COSTS["seconds_per_step"]
    + RUNGS * COSTS["evaluation_seconds"]
)
"""A full run of the target with 8 completions per prompt, evaluations included."""


RECIPE_AWARE = ("jfhpo",)
"""Strategies that make use of a study's baselines."""


@dataclass(frozen=True)
class Problem:
    """One landscape with one seed.

    Attributes:
        name: Of the landscape.
        seed: Which of its instances.
        data: Study file as data; strategy, budget and workspace are added by `study`.
        trainer: Runs the trials; it need not be registered.
        score: Noise-free score of a complete configuration, trained on a model of that name over the full horizon.
        training_seconds: Simulated seconds of such a run of a typical configuration.
        known_best: The highest true score in the space; None: it is found numerically.
        trainings: Budget of a search, in such trainings.
        earlier: Studies that the search starts from.
    """

    name: str
    seed: int
    data: Mapping[str, Any]
    trainer: Trainer
    score: Callable[[Study, Configuration, str], float]
    training_seconds: float = TRAINING_SECONDS
    known_best: float | None = None
    trainings: int = TRAININGS
    earlier: tuple[EarlierStudy, ...] = ()

    def study(
        self,
        workspace: Path,
        strategy: str = "random",
        settings: Mapping[str, Any] | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Study:
        """The problem as a study for one strategy.

        Strategies of `RECIPE_AWARE` are told what a search has to beat as a baseline, and pay for running it.

        Args:
            workspace: Folder for its checkpoints.
            strategy: Its name.
            settings: Its settings.
            changes: Fields of the study's sections that are other than usual, by section.
        """
        changed = {section: {**self.data.get(section, {}), **fields} for section, fields in (changes or {}).items()}
        told = strategy in RECIPE_AWARE
        spec = StudySpec.model_validate(
            {
                **self.data,
                **changed,
                "study": f"{self.name}-{self.seed}",
                "baselines": [{"name": "recipe", "configuration": self.default}] if told else [],
                "strategy": {"name": strategy, "settings": dict(settings or {})},
                "budget": {
                    "trial_seconds": (self.trainings - told) * self.training_seconds,
                    "max_parallel": 1,
                    **changed.get("budget", {}),
                },
                "seeds": {"search": self.seed, "training": [self.seed]},
                "tracking": {"workspace": str(workspace)},
            }
        )
        return Study(spec, build_ladder(spec), self.trainer, self.earlier)

    @cached_property
    def _reference(self) -> Study:
        return self.study(Path("unused"))

    def true_score(self, configuration: Configuration, model: str | None = None) -> float:
        """Noise-free score of a searched configuration at full length on a model, by default the target."""
        study = self._reference
        return self.score(study, study.complete(configuration), model or study.ladder.target.name)

    def agreement(self, count: int = 256) -> dict[str, float]:
        """Rank correlation of each proxy with the target over random configurations, collapsed runs included."""
        study = self._reference
        configurations = fresh_configurations(study, (), 0, count)
        target = [self.true_score(item) for item in configurations]
        return {
            proxy.name: float(
                spearmanr([self.true_score(item, proxy.name) for item in configurations], target).statistic
            )
            for proxy in study.ladder.proxies
        }

    def proxy_regret(self, count: int = 1024) -> dict[str, float]:
        """What is lost on the target by the configuration that is truly the best of random ones on each proxy.

        No search that looks at the proxy alone can be expected to lose less, however much it trains there.
        """
        study = self._reference
        configurations = fresh_configurations(study, (), 0, count)
        return {
            proxy.name: self.best_score
            - self.true_score(max(configurations, key=lambda item: self.true_score(item, proxy.name)))
            for proxy in study.ladder.proxies
        }

    @property
    def default(self) -> Configuration:
        """What is used before a search has finished anything: the trainer's defaults."""
        return self._reference.space.restrict(self._reference.complete({}))

    @cached_property
    def best_score(self) -> float:
        """The highest true score in the space."""
        if self.known_best is not None:
            return self.known_best
        space = self._reference.space
        return maximize(lambda point: self.true_score(space.decode(point)), space.dimension)


def maximize(value: Callable[[Vector], float], dimension: int, starts: int = 8) -> float:
    """Highest value over the unit cube: a Sobol sample, then shrinking random steps from its best points.

    Args:
        value: Of a point of shape (dimension,).
        dimension: Of the cube.
        starts: Points of the sample that are improved.
    """
    random = np.random.default_rng(0)
    sample = qmc.Sobol(dimension, rng=random).random(1024)
    values = np.array([value(point) for point in sample])
    best = -np.inf
    for index in np.argsort(-values)[:starts]:
        point, reached = sample[index], values[index]
        for scale in np.geomspace(0.2, 0.002, 12):
            for _ in range(40):
                moved = random.random(dimension) < max(0.3, 1 / dimension)
                trial = np.clip(point + moved * random.normal(0, scale, dimension), 0, 1)
                if (gained := value(trial)) > reached:
                    point, reached = trial, gained
        best = max(best, reached)
    return float(best)


def language_model(name: str, seed: int, evaluation_prompts: int = 512, **settings: float) -> Problem:
    """RL of a language model on a synthetic surface, its optima and random surfaces drawn from name and seed."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = {
        "base_score": 0.3,
        "ceiling": 0.8,
        "best_learning_rate": float(10 ** random.uniform(-6.5, -5.8)),
        "best_clip_high": float(random.uniform(0.15, 0.35)),
        "best_kl_coefficient": float(10 ** random.uniform(-4.5, -2.0)),
        "best_max_grad_norm": float(10 ** random.uniform(-0.8, 0.2)),
        "best_n_samples": int(random.choice([4, 8, 16])),
        "best_temperature": float(random.uniform(0.7, 1.1)),
        "best_scheduler": str(random.choice(["constant", "cosine"])),
        "instance": int(random.integers(2**31)),
        "width": 0.5,
        "weak_effect": 0.4,
        "roughness": 0.2,
        "boundary": 0.7,
        "seed_noise": 0.01,
        **COSTS,
    }
    data = {
        "family": FAMILY,
        "target": TARGET,
        "task": "instruct",
        "trainer": {"name": SimulatedTrainer.name, "settings": {**drawn, **settings}},
        "space": "llm",
        "fidelity": {"horizon_prompts": HORIZON_PROMPTS, "rungs": RUNGS},
        "evaluation": {"prompts": evaluation_prompts},
    }
    return Problem(name, seed, data, SimulatedTrainer(), _simulated_score)


def _simulated_score(study: Study, configuration: Configuration, model: str) -> float:
    return true_score(study_surface(study.spec), configuration, _size_ratio(study, model), 1.0)


def _size_ratio(study: Study, model: str) -> float:
    return study.ladder[model].parameters / study.ladder.target.parameters


def _aligned(seed: int) -> Problem:
    """Proxies rank almost as the target does."""
    return language_model("aligned", seed, agreement=0.9, size_shift=-0.1)


def _shifted(seed: int) -> Problem:
    """The best learning rate falls by four, the best clip range by a third of its range, from smallest to largest."""
    return language_model("shifted", seed, size_shift=-0.45, clip_shift=-0.08)


def _noisy(seed: int) -> Problem:
    """Standard errors of 0.06 per evaluation and 0.04 between seeds, more at high learning rates."""
    return language_model(
        "noisy", seed, evaluation_prompts=64, size_shift=-0.2, agreement=0.9, seed_noise=0.04, noise_growth=0.5
    )


def _unstable(seed: int) -> Problem:
    """Learning rates a little above the best collapse or diverge; large groups do not fit in the target's memory."""
    return language_model(
        "unstable", seed, size_shift=-0.15, boundary=0.25, boundary_shift=-0.1, divergence=0.4, memory_limit=200.0
    )


def _moderate(seed: int) -> Problem:
    """Proxies correlate with the target by 0.5."""
    return language_model("moderate", seed, agreement=0.5, size_shift=-0.2)


def _misleading(seed: int) -> Problem:
    """Proxies say nothing about the target; runs do not collapse, so that not even that is learned from them."""
    return language_model("misleading", seed, agreement=0.0, size_shift=-0.2, boundary=4.0)


def _distant(seed: int) -> Problem:
    """Proxies 70 and 12 times smaller, few runs; what is best on the smallest makes the target collapse."""
    problem = language_model("distant", seed, size_shift=-0.3, agreement=0.7, boundary=0.5, seed_noise=0.03)
    return replace(problem, data={**problem.data, "family": DISTANT_FAMILY}, trainings=FEW_TRAININGS)


def _function(name: str, seed: int) -> Problem:
    """An analytic function of BoTorch in which model size and progress are the fidelities.

    Its steps are its rungs, each as long as all steps between two rungs elsewhere.
    """
    function = functions.make(name, seed)
    steps = {**COSTS, "seconds_per_step": COSTS["seconds_per_step"] * HORIZON_PROMPTS / PROMPTS_PER_STEP / RUNGS}
    trainer = functions.FunctionTrainer(function, noise=0.02, **steps)
    data = {
        "family": FAMILY,
        "target": TARGET,
        "task": "instruct",
        "trainer": trainer.name,
        "space": {f"x{index}": {"type": "float", "low": 0.0, "high": 1.0} for index in range(function.dimension)},
        "fidelity": {"horizon_prompts": RUNGS * PROMPTS_PER_STEP, "rungs": RUNGS},
        "stopping": {"rules": "none", "override": {"unpromising": {}}},
    }

    def score(study: Study, inputs: Configuration, model: str) -> float:
        return function.score(inputs, functions.size_fidelity(_size_ratio(study, model)), 1.0)

    return Problem(name, seed, data, trainer, score, known_best=1.0)


TABLE = Path(__file__).parent / "rl_table" / "data"
"""Recorded runs of tiny language models, see its README.md."""


def _table(task: str, seed: int) -> Problem:
    """A smooth model fitted to recorded RL runs; the seed draws only the noise."""
    from jfhpo_core.trainers.replay import ReplayTrainer
    from jfhpo_core.trainers.replay_surrogate import fitted
    from jfhpo_core.trainers.replay_table import SPACE, read_table

    table = read_table(str(TABLE), task)
    target = max(table.sizes, key=lambda size: table.sizes[size])
    reference = next(item for item in table.of_size(target) if item.completed)
    seconds = (
        reference.startup_seconds
        + sum(record.generation_seconds + record.training_seconds for record in reference.steps)
        + sum(evaluation.seconds for evaluation in reference.evaluations)
    )
    data = {
        "family": [{"name": name, "path": "recorded", "parameters": count} for name, count in table.sizes.items()],
        "target": target,
        "task": task,
        "trainer": {"name": ReplayTrainer.name, "settings": {"table": str(TABLE), "task": task, "mode": "surrogate"}},
        "space": "tiny",
        "fidelity": {"horizon_prompts": table.total_steps * table.prompts_per_step, "rungs": RUNGS},
    }

    def score(_: Study, configuration: Configuration, model: str) -> float:
        point = SPACE.encode(SPACE.restrict(configuration))
        return fitted(str(TABLE), task).score(model, point, table.total_steps)

    return Problem(f"table-{task}", seed, data, ReplayTrainer(), score, seconds)


LANDSCAPES: dict[str, Callable[[int], Problem]] = {
    "aligned": _aligned,
    "shifted": _shifted,
    "noisy": _noisy,
    "unstable": _unstable,
    "moderate": _moderate,
    "misleading": _misleading,
    "distant": _distant,
    "branin": partial(_function, "branin"),
    "hartmann": partial(_function, "hartmann"),
    "rosenbrock": partial(_function, "rosenbrock"),
    "table-instruct": partial(_table, "instruct"),
    "table-arithmetic": partial(_table, "arithmetic"),
    "table-countdown": partial(_table, "countdown"),
}
"""Every landscape by name."""


@lru_cache(maxsize=32)
def load_problem(landscape: str, seed: int) -> Problem:
    """A landscape's instance, remembered in this process: to find its best score takes a second.

    Args:
        landscape: Name in `LANDSCAPES`, 'NAME@BUDGET' of the foreign benchmark, or 'NAME@BUDGET:START:FIRST' of
            `warm_start`.
        seed: Which of its instances.
    """
    if ":" in landscape:
        from benchmarks import warm_start

        return warm_start.problem(landscape, seed)
    if "@" in landscape:
        from benchmarks.foreign.settings import problem

        return problem(landscape, seed)
    return LANDSCAPES[landscape](seed)
