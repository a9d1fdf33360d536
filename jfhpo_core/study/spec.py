"""The study file: what to tune, on what, with what, for how much. One schema for file, Prefect form and docs."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jfhpo_core.embedded import NAMES as SHIPPED
from jfhpo_core.errors import SpecError
from jfhpo_core.plugins import TRAINERS, load_plugin
from jfhpo_core.study.hardware import gpus
from jfhpo_core.study.hyperparameters import DEFAULT_PROMPTS_PER_STEP, default_spaces
from jfhpo_core.study.metrics import METRICS, Direction, Limit
from jfhpo_core.study.operational import OPERATIONAL, operational_fields
from jfhpo_core.study.space import ChoiceParameter, Space
from jfhpo_core.study.trial import Configuration, canonical_json
from jfhpo_core.study.yaml_text import write_yaml

DEFAULT_PARALLEL = 2
"""Trials at the same time where neither the study nor a number of devices says."""

AUTO = "auto"
"""Value of `warm_start` that stands for the earlier studies that fit."""

RESERVED_NAMES = {"recommended", "random_search"}
"""Rows of the final table, in MLflow `score.NAME`, that are no baselines."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of studies, models and baselines: they become folder names, so no separators and no leading dot."""


MODEL_NAME = re.compile(r"[^/:'\"%\s](?:[^/:'\"%]{0,198}[^/:'\"%\s])?")
"""Names of registered models: MLflow rejects '/' and ':', and cannot search for quotes and '%'."""

LARGEST_INTEGER = 2**63 - 1
"""Ledgers and databases store integers in 64 bits."""

MOST_SECONDS = 1e12
"""Largest budget in device-seconds: 30,000 device-years."""

MOST_RUNGS = 1000


ABSENT = object()
"""Stands for the value of a field that is not there."""


def _check_name(value: Any) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError("YAML reads this as a truth value, a number or nothing; put the name in quotes")  # noqa: TRY004
    if not NAME.fullmatch(str(value)):
        raise ValueError("use letters, digits, '.', '_' and '-' (at most 64, starting with a letter or digit)")
    return str(value)


Name = Annotated[str, BeforeValidator(_check_name)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(_Section):
    """One model of the family."""

    name: Name
    path: str = Field(description="Folder of a transformers checkpoint, or its name on the Hugging Face hub.")
    parameters: int | None = Field(
        default=None, ge=1, le=10**15, description="Parameter count; None reads it from the checkpoint's files."
    )
    devices: int = Field(
        default=1,
        ge=1,
        le=10**5,
        json_schema_extra=OPERATIONAL,
        description="Devices (GPUs, or CPU slots without a GPU) a trial holds.",
    )


def _family(value: Any) -> Any:
    if isinstance(value, str):
        return {"embedded": value}
    if isinstance(value, list):
        return {"models": value}
    return value


class FamilySpec(_Section):
    """The target's model family. In YAML either the name of an embedded family or a list of models."""

    embedded: str | None = Field(default=None, description=f"A family shipped with jfhpo: {', '.join(SHIPPED)}.")
    models: list[ModelSpec] = Field(default_factory=list, description="Your own checkpoints, in any order.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.embedded is None) == (not self.models):
            raise ValueError("name one embedded family, or list your own models (name and path), not both")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"model names must differ from each other, got {names}")
        return self


def _task(value: Any) -> Any:
    return {"embedded": value} if isinstance(value, str) else value


class HubData(_Section):
    """Rows that Hugging Face `datasets` loads by name."""

    hub: str = Field(description="Name on the Hugging Face hub, or a folder that `datasets.load_dataset` reads.")
    name: str | None = Field(default=None, description="Configuration of the data set; None: its only one.")
    split: str = Field(default="train", description="Split, or a slice of one: 'train[:1000]'.")
    revision: str | None = Field(default=None, description="Commit, tag or branch; None: the newest.")


DataSource = str | HubData


class RewardSpec(_Section):
    """One of several reward functions."""

    function: str = Field(description="'file.py' or 'file.py:function'.")
    weight: float = Field(default=1.0, description="Factor of its rewards in the sum.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of every call; of a class: of its construction."
    )

    @property
    def file(self) -> str:
        """The file that it stands in."""
        return self.function.partition(":")[0]


def _reward(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class TaskSpec(_Section):
    """What the model shall learn. In YAML either the name of an embedded task or your own data and reward."""

    embedded: str | None = Field(default=None, description=f"A task shipped with jfhpo: {', '.join(SHIPPED)}.")
    prompts: DataSource | None = Field(
        default=None,
        description="Training rows: a JSON, JSONL, CSV or Parquet file (also .gz), or {hub: NAME, split: train}. "
        "'prompt' is a text or a list of chat messages; the other columns go to the reward.",
    )
    heldout: DataSource | None = Field(
        default=None, description="Held-out rows with the same columns; none of their prompts may occur in prompts."
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Columns under other names: {prompt: question, label: reward_model.ground_truth}. Dots reach into "
        "mappings; null drops a column. Columns not named stay as they are.",
    )
    reward: Annotated[str | list[RewardSpec], BeforeValidator(_reward)] | None = Field(
        default=None,
        description="'file.py' or 'file.py:function' (by default 'reward'), or a list of {function, weight, kwargs}, "
        "whose weighted sum counts. The function has the signature of TRL, verl or OpenRLHF.",
    )
    reward_timeout_seconds: float = Field(
        default=10.0, gt=0, description="Longest time for scoring one completion; see reward_timeout_score."
    )
    reward_timeout_score: float = Field(
        default=0.0, description="Reward of a completion whose scoring takes longer; it is counted."
    )
    max_completion_tokens: int = Field(default=8, ge=1, le=10**7, description="Length limit of a completion.")
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Length limit of a prompt; None: what the context of every model leaves beside a completion.",
    )
    overlong_prompts: Literal["refuse", "drop"] = Field(
        default="refuse", description="What becomes of longer prompts: the study is refused, or goes without them."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        files = (self.prompts, self.heldout, self.reward)
        if self.embedded is None and None in files:
            raise ValueError("name an embedded task, or give all three: prompts, heldout and reward")
        if self.embedded is not None and any(files):
            raise ValueError("name an embedded task or your own files, not both")
        if isinstance(self.reward, list) and not self.reward:
            raise ValueError("the list of rewards is empty; give at least one {function: file.py}")
        return self

    @property
    def title(self) -> str:
        """What people call it: the embedded task, or where its prompts are from."""
        if self.embedded is not None:
            return self.embedded
        return self.prompts.hub if isinstance(self.prompts, HubData) else str(self.prompts)

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The reward functions; none for an embedded task."""
        if self.reward is None:
            return ()
        return (RewardSpec(function=self.reward),) if isinstance(self.reward, str) else tuple(self.reward)


def _trainer(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TrainerSpec(_Section):
    """Which trainer runs the trials, and what it keeps fixed."""

    name: str = Field(default="trl", description="'trl', 'simulated', or an entry point of group 'jfhpo.trainers'.")
    fixed: Configuration = Field(default_factory=dict, description="Hyperparameters held at a value in every trial.")
    settings: dict[str, Any] = Field(default_factory=dict, description="The trainer's own settings, e.g. LoRA.")


def _space(value: Any) -> Any:
    if isinstance(value, str):
        spaces = default_spaces()
        if value not in spaces:
            raise ValueError(f"no default space {value!r}; there are {', '.join(sorted(spaces))}, or spell one out")
        return spaces[value]
    return value


class FidelitySpec(_Section):
    """How long a full trial is and where it may be cut. Counted in prompts: batch size changes what a step is."""

    horizon_prompts: int = Field(default=960, ge=1, le=10**9, description="Training prompts of a full trial.")
    rungs: int | list[int] = Field(
        default=5, description="Number of equal rungs, or ascending prompt counts that end at the horizon."
    )
    proxies: list[Name] | None = Field(
        default=None, description="Models below the target that may be used; None means all smaller ones."
    )

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if (count := self.rungs if isinstance(self.rungs, int) else len(self.rungs)) > MOST_RUNGS:
            raise ValueError(f"{count} rungs are too many (limit {MOST_RUNGS}); each is an evaluation and a checkpoint")
        if self.proxies is not None and len(set(self.proxies)) < len(self.proxies):
            raise ValueError(f"proxies must differ from each other, got {self.proxies}")
        if isinstance(self.rungs, int):
            if self.rungs < 1 or self.horizon_prompts % self.rungs:
                raise ValueError(f"horizon_prompts={self.horizon_prompts} cannot be cut into {self.rungs} equal rungs")
        elif not self.rungs or sorted(set(self.rungs)) != self.rungs or self.rungs[-1] != self.horizon_prompts:
            raise ValueError(f"rungs must ascend and end at the horizon ({self.horizon_prompts}), got {self.rungs}")
        elif self.rungs[0] < 1:
            raise ValueError(f"rungs must be positive, got {self.rungs}")
        return self

    @property
    def levels(self) -> tuple[int, ...]:
        """Prompt counts at which a trial is evaluated and may be paused, ascending; the last is the horizon."""
        if isinstance(self.rungs, int):
            return tuple(self.horizon_prompts * (i + 1) // self.rungs for i in range(self.rungs))
        return tuple(self.rungs)


class EvaluationSpec(_Section):
    """How a score is measured on the held-out set."""

    prompts: int | None = Field(default=512, ge=2, le=10**9, description="Held-out prompts scored; None means all.")
    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        le=10**4,
        description="Completions sampled per prompt; with 2 or more, pass@n is recorded as well.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of the evaluation.")


class BudgetSpec(_Section):
    """What the search may spend. The comparison with the baselines is charged apart and is forecast by `plan`."""

    trial_seconds: float | None = Field(
        default=None, gt=0, le=MOST_SECONDS, description="Sum of the trials' device-seconds."
    )
    gpu_hours: float | None = Field(default=None, gt=0, le=MOST_SECONDS / 3600, description="The same in device-hours.")
    wall_seconds: float | None = Field(
        default=None,
        gt=0,
        le=MOST_SECONDS,
        description="Wall-clock limit of one `jfhpo search` call. What is running then has been saved and goes on in "
        "the next call; the report and the model's registration come after it.",
    )
    max_parallel: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="At most so many trials are trained at the same time; None: as many as there are devices for, or "
        f"{DEFAULT_PARALLEL} where devices are not counted (CPUs).",
    )
    initial_share: float = Field(
        default=0.25, gt=0, lt=1, description="At most this share of the budget goes into the initial design."
    )
    validation_share: float = Field(
        default=0.35, ge=0, lt=1, description="Share held back for full-length trials on the target."
    )
    top_k: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="At most so many configurations that rank above all complete ones are brought to full length on "
        "the target before one is recommended.",
    )

    hourly_cost: float | None = Field(
        default=None, ge=0, le=1e6, description="Price of a device-hour; with it every bill is given in money, too."
    )
    currency: str = Field(default="USD", min_length=1, max_length=8, description="Currency of hourly_cost.")

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.trial_seconds is None) == (self.gpu_hours is None):
            raise ValueError("give the budget once: either trial_seconds or gpu_hours")
        return self

    @property
    def device_seconds(self) -> float:
        """The search budget in device-seconds."""
        return self.trial_seconds if self.trial_seconds is not None else 3600.0 * (self.gpu_hours or 0.0)

    def in_money(self, device_seconds: float) -> str:
        """What device time costs: ', 6.50 USD'; empty without `hourly_cost`."""
        if self.hourly_cost is None:
            return ""
        return f", {device_seconds / 3600 * self.hourly_cost:,.2f} {self.currency}"


class BaselineSpec(_Section):
    """A configuration to beat, trained on the target at full length."""

    name: Name
    configuration: Configuration = Field(description="Hyperparameters; those not named keep the trainer's defaults.")


def _limit(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"say which side of {value:g} is allowed, in quotes: '<= {value:g}'")  # noqa: TRY004
    return value


class SecondObjectiveSpec(_Section):
    """A metric that is traded against the score: the front of the two is shown, and half of the search looks for it."""

    metric: str = Field(description=f"One of {', '.join(METRICS)}, as in `constraints`.")
    direction: Direction = "minimize"

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}; name one of {', '.join(METRICS)}")
        return name


def _second_objective(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


class StoppingSpec(_Section):
    """Stopping rules: the name of a set, and changes to single rules.

    A rule set to false is off; a mapping changes its parameters. See `jfhpo rules` for names and defaults.
    """

    rules: Literal["default", "extended", "paper", "none"] = "default"
    override: dict[str, Literal[False] | dict[str, float]] = Field(default_factory=dict)


class StrategySpec(_Section):
    """Who chooses the next trial."""

    name: str = Field(
        default="jfhpo",
        description="'jfhpo', 'paper', 'random', 'gp', 'fastbo'; with the extra `peers` also 'tpe', 'asha', 'bohb', "
        "'successive-halving', 'hyperband', 'smac3', 'dehb'; or an entry point of group 'jfhpo.strategies'.",
    )
    settings: dict[str, Any] = Field(default_factory=dict)


def _strategy(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class SeedSpec(_Section):
    """Random seeds."""

    search: int = Field(default=0, ge=0, lt=2**32, description="Seed of the optimizer.")
    training: list[int] = Field(
        default_factory=lambda: [0, 1],
        min_length=1,
        max_length=1000,
        description="Training seeds: the search uses the first, the final comparison all of them.",
    )

    @field_validator("training")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(f"training seeds must differ and lie between 0 and 2**32 - 1, got {seeds}")
        return seeds


class ClusterSpec(_Section):
    """Where trials run."""

    address: str = Field(
        default="auto",
        description="'local' for a private Ray instance, 'inline' for this very process, a Ray address, or 'auto': "
        "RAY_ADDRESS if set, else 'local'.",
    )
    cpus_per_device: float = Field(default=1.0, gt=0, le=10**5)
    gpus_per_device: float = Field(default=0.0, ge=0, le=10**5, description="Set to 1 on a GPU cluster.")
    gpu: str | None = Field(
        default=None,
        description="Kind of GPU, for prices before anything is timed: 'H100-80GB', 'A100-80GB', 'L4' and others; "
        "None assumes an A100-80GB.",
    )
    devices: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="Devices that the study may use at a time. None: with GPUs, all that Ray's nodes have, and a trial "
        "stays on one node; on CPUs they are not counted. Give it where the cluster grows on demand, is shared, or "
        "trials are Ray jobs of their own.",
    )
    segment_retries: int = Field(default=2, ge=0, le=1000, description="New attempts after an infrastructure failure.")
    local_folder: str | None = Field(
        default=None,
        min_length=1,
        description="Folder on a disk that each node has to itself, e.g. '/scratch' or '$TMPDIR' (a node's own "
        "variables). Checkpoints are written there, and copied to the workspace once the GPUs were given to the next "
        "trial. None: they are written to the workspace at once.",
    )

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, name: str | None) -> str | None:
        if name is not None and name not in gpus():
            raise ValueError(f"no figures of this GPU; there are {', '.join(gpus())}; name the one most like it")
        return name


class TrackingSpec(_Section):
    """Where results are written."""

    uri: str | None = Field(
        default=None, description="MLflow tracking URI; None: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=500,
        description="MLflow experiment; None: 'jfhpo/' and the study's name.",
    )
    registered_model: str | None = Field(
        default=None, description="Name in the model registry; None: the study's name; '' registers nothing."
    )
    workspace: str = Field(default=".jfhpo", min_length=1, description="Folder for checkpoints and reports.")
    completions: bool = Field(
        default=True,
        description="Keep the first completions of each evaluation, cut to 300 characters, with their prompts, to be "
        "read in MLflow and in the report; false for private data.",
    )

    @field_validator("registered_model")
    @classmethod
    def _registrable(cls, name: str | None) -> str | None:
        if name and not MODEL_NAME.fullmatch(name):
            raise ValueError(
                "the model registry takes no '/', ':', '%' or quotes in a name; use letters, digits, '.', '_', '-'"
            )
        return name


def _fault(field: str, message: str) -> PydanticCustomError:
    """A fault between sections, told at the field where it is best mended."""
    return PydanticCustomError("study", "{message}", {"message": message, "field": field})


def _check_plain(value: Any, field: str = "") -> None:
    """Reject values that no ledger can store: non-finite numbers, integers beyond 64 bits, text that is not Unicode."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(name, field)
            _check_plain(item, f"{field}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{field}.{position}".lstrip("."))
    elif isinstance(value, float) and not math.isfinite(value):
        raise _fault(field, f"{value} is not a finite number; give a number, or leave the field out")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise _fault(field, f"{str(value)[:20]}... is beyond 64 bits and cannot be stored; give a smaller number")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _fault(field, f"{value[error.start]!a} is half a character (a lone surrogate); remove it") from None


class StudySpec(_Section):
    """A study: find good hyperparameters for reinforcement learning of the target model on the task."""

    study: Name = Field(description="Name of the study; the same name continues it.")
    description: str = Field(default="", json_schema_extra=OPERATIONAL)
    family: Annotated[FamilySpec, BeforeValidator(_family)]
    target: Name = Field(description="The model of the family to be tuned.")
    task: Annotated[TaskSpec, BeforeValidator(_task)]
    trainer: Annotated[TrainerSpec, BeforeValidator(_trainer)] = TrainerSpec()
    space: Annotated[Space, BeforeValidator(_space)] = Field(
        description="Hyperparameters to search, or the name of a default space, 'llm' or 'tiny', which leaves out what "
        "trainer.fixed holds."
    )
    fidelity: FidelitySpec = FidelitySpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    budget: BudgetSpec = Field(json_schema_extra=OPERATIONAL)
    baselines: list[BaselineSpec] = Field(
        default_factory=list, json_schema_extra=OPERATIONAL, description="Recipes to beat."
    )
    constraints: dict[str, Annotated[str, BeforeValidator(_limit)]] = Field(
        default_factory=dict,
        json_schema_extra=OPERATIONAL,
        description="Limits that a recommended configuration respects, {kl: '<= 0.2'}: means over the training steps "
        f"of the last rung of its full runs on the target. Metrics: {', '.join(METRICS)}.",
    )
    second_objective: Annotated[SecondObjectiveSpec | None, BeforeValidator(_second_objective)] = Field(
        default=None,
        json_schema_extra=OPERATIONAL,
        description="Traded against the score, e.g. {metric: completion_tokens, direction: minimize}: report, MLflow "
        "and `jfhpo show` have the Pareto front of full runs. What is recommended is still the best score.",
    )
    random_search: bool = Field(
        default=False,
        json_schema_extra=OPERATIONAL,
        description="Also run random search on the target at the search's cost, for comparison.",
    )
    stopping: StoppingSpec = StoppingSpec()
    strategy: Annotated[StrategySpec, BeforeValidator(_strategy)] = Field(
        default=StrategySpec(), json_schema_extra=OPERATIONAL
    )
    warm_start: list[Name] | Literal["auto"] = Field(
        default_factory=list,
        json_schema_extra=OPERATIONAL,
        description="Earlier studies in the same ledger that the strategy `jfhpo` learns from, as far as they agree; "
        "'auto' finds those that fit: same trainer, at least half of the hyperparameters.",
    )
    seeds: SeedSpec = Field(default=SeedSpec(), json_schema_extra=OPERATIONAL)
    cluster: ClusterSpec = Field(default=ClusterSpec(), json_schema_extra=OPERATIONAL)
    tracking: TrackingSpec = Field(default=TrackingSpec(), json_schema_extra=OPERATIONAL)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        _check_plain(data)
        return data

    @model_validator(mode="before")
    @classmethod
    def _without_fixed(cls, data: Any) -> Any:
        """A default space leaves out what is fixed; one that is spelled out must not search it."""
        named = (
            default_spaces().get(data["space"])
            if isinstance(data, dict) and isinstance(data.get("space"), str)
            else None
        )
        trainer = data.get("trainer") if named is not None else None
        fixed = trainer.get("fixed") if isinstance(trainer, dict) else None
        if named is None or not isinstance(fixed, dict):
            return data
        return {**data, "space": {name: parameter for name, parameter in named.items() if name not in fixed}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [model.name for model in self.family.models]
        if names:
            for field, wanted in (("target", [self.target]), ("fidelity.proxies", self.fidelity.proxies or [])):
                for name in wanted:
                    if name not in names:
                        raise _fault(field, f"{name!r} is not in the family ({', '.join(names)})")
        if self.warm_start != AUTO and self.study in self.warm_start:
            raise _fault("warm_start", f"{self.study!r} is this study itself; name earlier ones")
        baselines = [baseline.name for baseline in self.baselines]
        if len(set(baselines)) < len(baselines):
            raise _fault("baselines", f"baseline names must differ from each other, got {baselines}")
        for name in set(baselines) & RESERVED_NAMES:
            raise _fault("baselines", f"{name!r} names a row of the final table itself; give the baseline another name")
        for name in self.space:
            if name in self.trainer.fixed:
                raise _fault(
                    f"trainer.fixed.{name}", f"the space searches it, so it cannot be fixed; remove it, or space.{name}"
                )
        for limit in self.limits:
            self._check_attainable(limit)
        for batch in self._batches():
            for level in self.fidelity.levels:
                if level % batch:
                    raise _fault(
                        "fidelity",
                        f"a rung at {level} prompts is not a whole number of steps of {batch} prompts "
                        "(prompts_per_step); choose horizon_prompts and rungs as multiples of it",
                    )
        return self

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The constraints."""
        found = []
        for name, text in self.constraints.items():
            try:
                found.append(Limit.parse(name, text))
            except ValueError as error:
                raise _fault(f"constraints.{name}", str(error)) from None
        return tuple(found)

    @property
    def secondary_metrics(self) -> tuple[str, ...]:
        """Metrics that the constraints and the second objective name, the latter first."""
        second = [] if self.second_objective is None else [self.second_objective.metric]
        return tuple(dict.fromkeys([*second, *self.constraints]))

    def _check_attainable(self, limit: Limit) -> None:
        """Refuse a length that no completion can miss, or none can reach."""
        own_task = self.task.embedded == self.trainer.name
        longest = self.task.max_completion_tokens
        if limit.metric == "completion_tokens" and not own_task and limit.bound >= longest:
            always = "always met" if limit.at_most else "hardly ever met"
            raise _fault(
                f"constraints.{limit.metric}",
                f"'{limit}' is {always}, as completions end at task.max_completion_tokens = {longest}; give a bound "
                "below it",
            )

    @property
    def slots(self) -> int | None:
        """Trials that may run at the same time; None: as many as there are devices for."""
        counted = self.cluster.devices is not None or self.cluster.gpus_per_device > 0
        return self.budget.max_parallel or (None if counted else DEFAULT_PARALLEL)

    def _batches(self) -> list[int]:
        if "prompts_per_step" in set(self.space):
            parameter = self.space["prompts_per_step"]
            if not isinstance(parameter, ChoiceParameter):
                raise _fault(
                    "space.prompts_per_step", "it must be a choice, so that every rung is a whole number of steps"
                )
            values = [*parameter.values, *([DEFAULT_PROMPTS_PER_STEP] if parameter.when else [])]
        else:
            values = [self.trainer.fixed.get("prompts_per_step", DEFAULT_PROMPTS_PER_STEP)]
        values += [b.configuration["prompts_per_step"] for b in self.baselines if "prompts_per_step" in b.configuration]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _fault("study", f"prompts_per_step must be a whole number of at least 1, got {value!r}")
        return [int(value) for value in values]

    def meaning(self) -> dict[str, Any]:
        """The fields that give a trial its meaning, as JSON data; operational ones are left out.

        Files and models count by the last part of their path, so that a study may move to another folder.
        """
        meaning: dict[str, Any] = _meaning(self)
        task = meaning["task"]
        for part in (*meaning["family"]["models"], task, *(task["reward"] if isinstance(task["reward"], list) else ())):
            for field in ("path", "prompts", "heldout", "reward", "function"):
                if isinstance(part.get(field), str):
                    part[field] = Path(part[field]).name
        settings = meaning["trainer"]["settings"]
        for name in _operational_settings(self.trainer.name) & set(settings):
            del settings[name]
        return meaning

    def identity(self) -> str:
        """Hash of `meaning` (16 hex digits)."""
        meaning = self.meaning()
        # Studies of earlier versions keep their identity. It lacked these fields, and it had the number of devices.
        for field, default in _LATER_TASK_FIELDS.items():
            if meaning["task"][field] == default:
                del meaning["task"][field]
        for model in meaning["family"]["models"]:
            model["devices"] = 1
        return hashlib.sha256(canonical_json(meaning).encode()).hexdigest()[:16]

    def changes(self, other: Self) -> list[str]:
        """Dotted names of the fields that give `other` another meaning, in order."""
        here, there = (dict(_leaves(spec.meaning())) for spec in (self, other))
        return [name for name in {**here, **there} if here.get(name, ABSENT) != there.get(name, ABSENT)]

    def to_data(self) -> dict[str, Any]:
        """The complete study, defaults included, as JSON data of a study file, which has no empty conditions."""
        data = self.model_dump(mode="json")
        for parameter in data["space"].values():
            if not parameter["when"]:
                del parameter["when"]
        return data

    def to_yaml(self) -> str:
        """The complete study, defaults included, as YAML that `load_study` reads back to an equal study."""
        return write_yaml(self.to_data())


_LATER_TASK_FIELDS = {
    name: TaskSpec.model_fields[name].get_default(call_default_factory=True)
    for name in ("columns", "reward_timeout_seconds", "reward_timeout_score", "max_prompt_tokens", "overlong_prompts")
}


def _meaning(value: Any) -> Any:
    """A part of a study as JSON data, without its operational fields."""
    if isinstance(value, RootModel):
        return _meaning(value.root)
    if isinstance(value, BaseModel):
        operational = operational_fields(type(value))
        return {name: _meaning(getattr(value, name)) for name in type(value).model_fields if name not in operational}
    if isinstance(value, dict):
        return {name: _meaning(item) for name, item in value.items()}
    return [_meaning(item) for item in value] if isinstance(value, list | tuple) else value


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the values within JSON data, and the values; lists count as values unless they hold mappings."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = ((str(item.get("name", number)), item) for number, item in enumerate(value))
    elif name:
        yield name, value
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}".lstrip("."))


def _operational_settings(trainer: str) -> frozenset[str]:
    """Settings that the trainer declares as operational; none if it is not installed, or declares no settings."""
    try:
        kind = getattr(load_plugin(TRAINERS, trainer, "trainer.name"), "settings", None)
    except SpecError:
        kind = None
    return operational_fields(kind) if kind is not None else frozenset()


def study_schema() -> dict[str, Any]:
    """JSON schema of the study file."""
    return StudySpec.model_json_schema()
