"""Results of benchmark runs: one JSON line per strategy, landscape and seed, one file per strategy, in stable order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from jfhpo_core.files import replace_file

RESULTS = Path(__file__).parent / "results"
"""Where published results lie; a tuning run writes elsewhere."""

Key = tuple[str, int]
"""Landscape and seed."""


class Result(BaseModel):
    """One strategy on one landscape with one seed.

    The incumbent is, for every strategy, the configuration that it ranks first; before there is one, the trainer's
    defaults. It counts with its true score, from the cost on at which its full run on the target is paid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str = Field(description="Name under which it is reported: that of the strategy, or of a variant.")
    base_strategy: str = Field(description="Name of the strategy.")
    settings: dict[str, Any] = Field(description="Settings of the strategy.")
    changes: dict[str, dict[str, Any]] = Field(default_factory=dict, description="To the landscape's study.")
    landscape: str
    seed: int
    stamp: str = Field(description="Hash of the strategy's source, its settings and the landscape's true scores.")
    commit: str = Field(description="Commit that was checked out.")
    best_score: float = Field(description="Highest true score in the space.")
    budget_seconds: float = Field(description="Simulated device-seconds that the search might spend.")
    training_seconds: float = Field(description="Those of one full run of the target.")
    spent_seconds: float = Field(description="Those that it did spend, validation included.")
    trace: tuple[tuple[float, float], ...] = Field(
        description="(seconds, true score) of what would be delivered if the search ended: the configuration that the "
        "strategy ranks first, with the seconds that a full run of it on the target still lacks."
    )
    recommended_score: float = Field(description="True score of the final recommendation, or of the defaults.")
    segments: dict[str, int] = Field(description="Segments trained per model.")
    infeasible: int = Field(description="Segments that ended infeasible.")
    forecasts: tuple[tuple[float, float, float, float], ...] = Field(
        default=(),
        description="(share of the budget spent, low, median, high) of the forecast that is shown of the final score.",
    )
    suggestions: int = Field(description="Calls of the strategy's `suggest`.")
    cpu_seconds_per_suggestion: float = Field(description="CPU seconds in the strategy, per suggestion.")

    @property
    def key(self) -> Key:
        """Landscape and seed."""
        return self.landscape, self.seed

    @property
    def final_regret(self) -> float:
        """True score that the incumbent lacks when the budget is spent; a run that ends later does not count."""
        scores = [score for seconds, score in self.trace if seconds <= self.budget_seconds]
        return max(0.0, self.best_score - scores[-1])

    def regret_at(self, cost: float) -> float:
        """True score that the incumbent lacks after so many full runs of the target."""
        scores = [score for seconds, score in self.trace if seconds <= cost * self.training_seconds * (1 + 1e-9)]
        return max(0.0, self.best_score - scores[-1])

    @property
    def recommended_regret(self) -> float:
        """True score that the final recommendation lacks."""
        return max(0.0, self.best_score - self.recommended_score)

    @property
    def final_score(self) -> float:
        """True score of what is delivered when the budget is spent."""
        return self.best_score - self.final_regret

    @property
    def proxy_segments(self) -> int:
        """Segments trained on smaller models than the target, which stands last."""
        return sum(list(self.segments.values())[:-1])


def load(folder: Path, strategy: str) -> dict[Key, Result]:
    """All results of a strategy, by landscape and seed."""
    path = folder / f"{strategy}.jsonl"
    if not path.exists():
        return {}
    results = [Result.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {result.key: result for result in results}


def load_all(folder: Path) -> dict[str, dict[Key, Result]]:
    """All results of all strategies."""
    return {path.stem: load(folder, path.stem) for path in sorted(folder.glob("*.jsonl"))}


def save(folder: Path, result: Result) -> None:
    """Add a result, replacing the one with its key; several processes may do so at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.strategy}.jsonl"
    with FileLock(path.with_suffix(".lock")):
        results = {**load(folder, result.strategy), result.key: result}
        write(path, results)


def write(path: Path, results: Mapping[Key, Result]) -> None:
    """Replace a file at once, its lines sorted by landscape and seed."""
    replace_file(path, "".join(f"{results[key].model_dump_json()}\n" for key in sorted(results)))
