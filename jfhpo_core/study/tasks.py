"""A task: training prompts, a held-out set that shares none of them, and rewards in plain Python files.

Reward functions have the signature of TRL's, which works with every trainer,

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]

or of verl's or OpenRLHF's; see `jfhpo_core.study.scoring`. `columns` holds the further columns of the rows, one entry
per completion. Prompts and completions are lists of chat messages where the rows have such prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jfhpo_core.errors import SpecError, TrialFailure
from jfhpo_core.study.data import Prompt, Row, read_rows, refuse_leak
from jfhpo_core.study.missing import missing
from jfhpo_core.study.scoring import Pool, RewardError, Scores
from jfhpo_core.study.spec import DataSource, HubData, RewardSpec, TaskSpec
from jfhpo_core.study.trial import FailureKind


class Reward:
    """A task's reward: scores completions in processes of its own, which start when they are first needed.

    A context manager that ends the processes.

    Args:
        functions: The reward functions; files by absolute path.
        limit_seconds: Longest time for one completion.
        timeout_score: Reward of a completion that takes longer.
        log: File that takes what rewards print; None: standard error.

    Raises:
        SpecError: A file is missing.
    """

    def __init__(
        self,
        functions: Sequence[RewardSpec],
        limit_seconds: float = 10.0,
        timeout_score: float = 0.0,
        log: Path | None = None,
    ) -> None:
        for function in functions:
            if not Path(function.file).is_file():
                raise SpecError(
                    f"{function.file}: there is no reward file here: {missing(function.file)}; `task.reward` is "
                    "'file.py' or 'file.py:function'"
                )
        self.functions = tuple(functions)
        self.limit_seconds = limit_seconds
        self.timeout_score = timeout_score
        self._pool = Pool(self.plan(), limit_seconds, timeout_score, log)

    def plan(self) -> list[dict[str, Any]]:
        """The reward functions as `Pool` takes them, for trainers that score elsewhere."""
        return [{"reference": one.function, "weight": one.weight, "constants": one.kwargs} for one in self.functions]

    def logging_to(self, log: Path) -> Reward:
        """The same reward with processes of its own that print to a file."""
        return Reward(self.functions, self.limit_seconds, self.timeout_score, log)

    def start(self) -> None:
        """Load the functions.

        Raises:
            SpecError: They do not load.
        """
        try:
            self._pool.start()
        except RewardError as error:
            raise SpecError(str(error)) from None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: list[Any]) -> Scores:
        """Score completions.

        Args:
            prompts: One per completion.
            completions: Their texts.
            columns: Further columns of the rows, one value per completion.

        Raises:
            TrialFailure: Of kind 'reward': a function raised, returned anything but one finite number per completion,
                or takes too long again and again.
        """
        try:
            return self._pool.score(prompts, completions, columns)
        except RewardError as error:
            raise TrialFailure(FailureKind.REWARD, f"the reward failed: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()


@dataclass(frozen=True)
class Task:
    """A task, read and checked.

    Attributes:
        train: Training rows, each with 'prompt' and the same further columns.
        heldout: Held-out rows with the same columns.
        reward: Scores completions.
        max_completion_tokens: Length limit of a completion.
    """

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    reward: Reward
    max_completion_tokens: int


def check_heldout(task: Task) -> None:
    """Refuse a held-out set whose mean score has no standard error.

    Raises:
        SpecError: It has too few rows.
    """
    if len(task.heldout) < 2:
        raise SpecError(f"task.heldout: {len(task.heldout)} row gives no standard error; give at least 2")


def load_task(spec: TaskSpec) -> Task:
    """Read a task's data. The reward functions are not imported yet.

    Raises:
        SpecError: Data or reward files are missing or malformed, columns differ, or a training prompt stands in the
            held-out set.
    """
    train, heldout = data_sources(spec)
    train_rows, heldout_rows = read_rows(train, spec.columns), read_rows(heldout, spec.columns)
    if set(train_rows[0]) != set(heldout_rows[0]):
        raise SpecError(
            f"{_name(heldout)}: its columns {sorted(heldout_rows[0])} differ from those of {_name(train)} "
            f"{sorted(train_rows[0])}; give both the same columns"
        )
    refuse_leak(train_rows, heldout_rows, _name(heldout))
    return Task(tuple(train_rows), tuple(heldout_rows), load_reward(spec), spec.max_completion_tokens)


def data_sources(spec: TaskSpec) -> tuple[DataSource, DataSource]:
    """Where a task's training and held-out rows are."""
    if spec.embedded is not None:
        from jfhpo_core import embedded

        embedded.verify(spec.embedded)
        folder = embedded.task_folder(spec.embedded)
        return str(folder / "train.jsonl"), str(folder / "heldout.jsonl")
    assert spec.prompts is not None
    assert spec.heldout is not None
    return spec.prompts, spec.heldout


def _name(source: DataSource) -> str:
    return source.hub if isinstance(source, HubData) else source


def load_reward(spec: TaskSpec) -> Reward:
    """A task's reward.

    Raises:
        SpecError: A file is missing.
    """
    functions = spec.rewards
    if spec.embedded is not None:
        from jfhpo_core import embedded

        functions = (RewardSpec(function=str(embedded.task_folder(spec.embedded) / "reward.py")),)
    return Reward(functions, spec.reward_timeout_seconds, spec.reward_timeout_score)
