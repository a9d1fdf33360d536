"""The recommended configuration as a function of model size: values with intervals, the law in words, or a refusal.

A recipe reads the size structure of the model that strategy `jfhpo` searches with, fitted to the trials of any
strategy: what all sizes have in common, how the best values move with size, and what a size has to itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field
from threadpoolctl import threadpool_limits

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.beliefs import NUMERICAL_ERRORS, Beliefs
from jfhpo_core.optimizer.best_values import DRAWS, Shift, best_values, range_of, shifts
from jfhpo_core.report.text import number, parameters, setting
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.study.history import History
from jfhpo_core.study.models import count_parameters
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import ChoiceParameter
from jfhpo_core.study.trial import Record, Trial, Value, configuration_key

FEWEST_ON_A_SIZE = 4
"""Configurations evaluated on a model before it counts as a size that was run."""

FARTHEST = 2.0
"""How far a size may lie outside the sizes that were run, in units of the distance (log parameters) that they span."""

SAME_SIZE = 0.05
"""Sizes count as equal if they differ by less, in factors of ten."""

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


class RecipeValue(Record):
    """One hyperparameter of a recipe."""

    name: str
    value: Value | None = Field(description="Recommended at this size; null: its condition does not hold there.")
    interval: tuple[Value, ...] | None = Field(
        description="Lowest and highest value of the 80 % interval of the best value; of a choice without an order, "
        "the fewest values that hold 80 %. Null: not active in half of the draws."
    )
    told: bool = Field(description="Whether the data tell: the interval takes at most half of the range or values.")


class Law(Record):
    """How the best value of a hyperparameter moves per factor of ten in parameters."""

    name: str
    value: float = Field(description="Factor per factor of ten (logarithmic scale), else difference; a median.")
    low: float = Field(description="Lower end of its 80 % interval.")
    high: float = Field(description="Upper end.")
    factor: bool = Field(description="Whether value, low and high are factors.")


class Recipe(Record):
    """What to use at a size, or why that cannot be told."""

    study: str
    parameters: int = Field(description="Of the model that the recipe is for.")
    sizes: dict[str, int] = Field(description="Parameters of the models that were run, by name, small to large.")
    refusal: str | None = Field(default=None, description="Why nothing can be told; null if something can.")
    values: tuple[RecipeValue, ...] = Field(default=(), description="In the order of the search space.")
    laws: tuple[Law, ...] = Field(default=(), description="Of hyperparameters that may move with size.")
    sentences: tuple[str, ...] = ()


def parse_size(text: str, study: Study) -> int:
    """Parameters from "72B", "494m" or "7616000000", a model of the study, or a folder with a checkpoint.

    Raises:
        SpecError: It is none of these.
    """
    for model in study.ladder.models:
        if text == model.name:
            return model.parameters
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbt]?)", text.strip().lower())
    if found is not None and (count := round(float(found[1]) * SUFFIXES[found[2]])) > 0:
        return count
    if Path(text).is_dir():
        return count_parameters(text)
    names = ", ".join(model.name for model in study.ladder.models)
    raise SpecError(
        f"--size: {text!r} is no number of parameters (72B, 494M), no folder with a checkpoint, and no model of the "
        f"study ({names})"
    )


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]  # on small matrices threads wait for each other
def recipe(result: SearchResult, count: int) -> Recipe:
    """The recipe of a study, finished or not, for a model of `count` parameters."""
    study = result.study
    history = History.of(study, result.trials)
    tried = _tried(study, history.in_space)
    sizes = {model.name: model.parameters for model in study.ladder.models if tried[model.name] >= FEWEST_ON_A_SIZE}
    page = Recipe(study=study.spec.study, parameters=count, sizes=sizes)
    if (refusal := _refusal(count, list(sizes.values()), tried)) is not None:
        return page.model_copy(update={"refusal": refusal, "sentences": (refusal,)})
    try:
        beliefs = Beliefs.form(history, DRAWS)
        assert beliefs is not None
        best = best_values(beliefs, math.log10(count / study.ladder.target.parameters))
    except NUMERICAL_ERRORS as error:
        refusal = f"No recipe: no model could be fitted to the trials ({error})."
        return page.model_copy(update={"refusal": refusal, "sentences": (refusal,)})
    values = []
    for name, coordinates in study.space.slices().items():
        found = range_of(study.space[name], best.points[:, coordinates])
        value = best.expected.get(name)
        values.append(
            RecipeValue(
                name=name,
                value=value,
                interval=None if found is None else found.values,
                told=found is not None and found.told and value is not None,
            )
        )
    laws = () if len(sizes) < 2 else tuple(_law(name, shift) for name, shift in shifts(beliefs).items())
    page = page.model_copy(update={"values": tuple(values), "laws": laws})
    return page.model_copy(update={"sentences": tuple(_sentences(study, page))})


def _law(name: str, shift: Shift) -> Law:
    return Law(name=name, value=shift.value, low=shift.low, high=shift.high, factor=shift.factor)


def _tried(study: Study, trials: Sequence[Trial]) -> dict[str, int]:
    """How many configurations have been evaluated or have failed, by model, small to large."""
    return {
        model.name: len(
            {configuration_key(trial.configuration) for trial in trials if trial.model == model.name and trial.segments}
        )
        for model in study.ladder.models
    }


def _refusal(count: int, sizes: Sequence[int], tried: Mapping[str, int]) -> str | None:
    """Why the sizes that were run do not tell about another one; None if they may."""
    counts = ", ".join(f"{number} on {name}" for name, number in tried.items())
    if not sizes:
        return (
            f"No recipe: no model has {FEWEST_ON_A_SIZE} configurations that were run ({counts}). Let the search go "
            "on, or raise its budget, then ask again."
        )
    outside = max(0.0, math.log10(count / max(sizes)), math.log10(min(sizes) / count))
    if outside <= SAME_SIZE:
        return None
    if len(sizes) < 2:
        return (
            f"No recipe for {parameters(count)} parameters: how the best values move with size is told by "
            f"{FEWEST_ON_A_SIZE} configurations or more on each of two sizes, and only one size has so many "
            f"({parameters(sizes[0])}): {counts} were run. {_way_on(tried)}"
        )
    span = math.log10(max(sizes) / min(sizes))
    if outside > FARTHEST * span:
        return (
            f"No recipe for {parameters(count)} parameters: the sizes that were run span a factor of "
            f"{10**span:.3g} ({parameters(min(sizes))} to {parameters(max(sizes))}), and this lies a factor of "
            f"{10**outside:.3g} outside. The data tell at most up to a factor of {10 ** (FARTHEST * span):.3g} "
            "outside; run a larger model first."
        )
    return None


def _way_on(tried: Mapping[str, int]) -> str:
    """How a second size gets its configurations."""
    short = {name: number for name, number in tried.items() if number < FEWEST_ON_A_SIZE}
    if not short:
        return "Name a model of another size in `family`, which makes a new study."
    name = max(short, key=lambda name: short[name])
    more = f"{FEWEST_ON_A_SIZE - short[name]} more on {name}"
    return f"Let the search go on, with a larger budget if it has ended: {more} do."


def _sentences(study: Study, page: Recipe) -> list[str]:
    known = list(page.sizes.values())
    where = f"{parameters(page.parameters)} parameters"
    inside = min(known) <= page.parameters <= max(known) or any(
        abs(math.log10(page.parameters / size)) <= SAME_SIZE for size in known
    )
    if inside:
        said = [f"For {where}, within the sizes that were run ({', '.join(map(parameters, known))}):"]
    else:
        ratio = page.parameters / max(known) if page.parameters > max(known) else min(known) / page.parameters
        edge = "largest" if page.parameters > max(known) else "smallest"
        sizes = ", ".join(map(parameters, known))
        said = [
            f"For {where}, a factor of {ratio:.3g} beyond the {edge} size that was run ({sizes}); no run was there:"
        ]
    said += [_value_sentence(study, item) for item in page.values if item.told]
    untold = [item.name for item in page.values if not item.told and item.interval is not None]
    if untold:
        said.append(
            f"Not told by the data: {', '.join(untold)}. The best value lies anywhere in more than half of the range "
            "(80 % interval)."
        )
    said += [law_sentence(law) for law in page.laws]
    fixed = [name for name in study.space if not study.space[name].shifts_with_size]
    if fixed and not inside:
        said.append(
            f"No trend with size is assumed of {', '.join(fixed)} (shifts_with_size is not set); their intervals widen "
            "by what sizes were seen to have to themselves."
        )
    return said


def _value_sentence(study: Study, item: RecipeValue) -> str:
    assert item.interval is not None
    assert item.value is not None
    parameter = study.space[item.name]
    if isinstance(parameter, ChoiceParameter) and not parameter.ordered:
        others = [setting(value) for value in item.interval if value != item.value]
        return f"{item.name} {setting(item.value)}" + (f" (or {' or '.join(others)})." if others else ".")
    low, high = (setting(value) for value in item.interval)
    bounds = f"80 % interval {low} to {high}" if low != high else "80 % interval: this value alone"
    return f"{item.name} {setting(item.value)} ({bounds})."


def law_sentence(law: Law) -> str:
    """The law in words.

    >>> law_sentence(Law(name="learning_rate", value=1 / 2.1, low=1 / 3.0, high=1 / 1.4, factor=True))
    'The best learning_rate falls by a factor of 2.1 [1.4, 3.0] per factor of ten in parameters (80 % interval).'
    """
    neutral = 1.0 if law.factor else 0.0
    tail = "per factor of ten in parameters (80 % interval)"
    if law.low <= neutral <= law.high:
        if law.factor:
            span = f"from a fall by {1 / law.low:.1f} to a rise by {law.high:.1f}"
        else:
            span = f"from {number(law.low)} to {number(law.high)}"
        return f"The data do not tell whether the best {law.name} moves with size: {span} {tail}."
    if law.factor:
        falls = law.value < 1
        value, low, high = (1 / law.value, 1 / law.high, 1 / law.low) if falls else (law.value, law.low, law.high)
        verb = "falls" if falls else "rises"
        return f"The best {law.name} {verb} by a factor of {value:.1f} [{low:.1f}, {high:.1f}] {tail}."
    falls = law.value < 0
    value, low, high = (-law.value, -law.high, -law.low) if falls else (law.value, law.low, law.high)
    verb = "falls" if falls else "rises"
    return f"The best {law.name} {verb} by {value:.3g} [{low:.3g}, {high:.3g}] {tail}."
