"""The settings: which target, which proxies, and which of them may be looked at while the optimizer is changed.

They come in pairs of the same kind. One of each pair is for tuning; the other is untouched: `jfhpo` runs on it only for
the final measurement. Sizes, lengths and recipes were fixed before any search had run on them, except for `llm-278m`.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from functools import cache

from benchmarks.foreign import tables
from benchmarks.foreign.surface import RUN_SECONDS, Setting, Surface, SurfaceTrainer
from benchmarks.landscapes import LANDSCAPES, Problem
from jfhpo_core.errors import JfhpoError
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.trial import Configuration

VOCABULARY = 50_277
"""Tokens that the language models of the table choose from."""


def _llm(name: str, purpose: str, sizes: tuple[float, ...], tokens: float, rungs: int, rate: float) -> Setting:
    """Language models.

    The recipe is that of GPT-3 (Brown et al. 2020) with its learning rate for the nearest size, and a cool-down over
    the last fifth (Hägele et al. 2024).
    """
    recipe = {"learning_rate": rate, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "cooldown": 0.2}
    models = tuple((size,) for size in sizes)
    return Setting(name, "llm", purpose, models, tokens, rungs, recipe, math.log(VOCABULARY))


TOWERS = {32: (0.26e6, 1.74e6), 64: (0.82e6, 3.79e6), 128: (2.83e6, 8.76e6), 192: (6.01e6, 14.91e6),
          384: (22.64e6, 40.44e6), 448: (30.54e6, 51.31e6), 512: (39.63e6, 63.36e6)}  # fmt: skip
"""Parameters of the vision and of the text tower by their width."""


def _vlm(name: str, purpose: str, widths: tuple[int, ...], samples: float, rungs: int, warmup: float) -> Setting:
    """OpenCLIP models.

    The recipe is that of DataComp's small and medium scale (Gadre et al. 2023), with its 500 steps of warm-up as a
    share of the run.
    """
    recipe = {
        "learning_rate": 5e-4, "weight_decay": 0.2, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-6, "warmup": warmup,
    }  # fmt: skip
    models = tuple(TOWERS[width] for width in widths)
    return Setting(name, "vlm", purpose, models, samples, rungs, recipe, 5.0)  # the level of collapsed runs


def _tabpfn(name: str, purpose: str, sizes: tuple[float, ...], cells: float) -> Setting:
    """Tabular foundation models, which classify into up to ten classes.

    The recipe is the larger example of scan-bench's README.
    """
    recipe = {"learning_rate": 1e-3, "batch_size": 64, "max_features": 64, "max_datapoints": 256}
    models = tuple((size,) for size in sizes)
    return Setting(name, "tabpfn", purpose, models, cells, 1, recipe, math.log(10))


PAIRS: dict[str, tuple[Setting, Setting]] = {
    "curves": (
        _llm("llm-278m", "proxies of 1/15 and 1/5", (18e6, 57e6, 278e6), 5e9, 4, 3e-4),
        _llm("llm-757m", "proxies of 1/13, 1/5.5 and 1/2.7", (57e6, 138e6, 278e6, 757e6), 20e9, 4, 2.5e-4),
    ),
    "final losses": (
        _llm("llm-138m", "proxies of 1/5 and 1/3, no curves", (28e6, 46e6, 138e6), 2e9, 1, 6e-4),
        _llm("llm-420m", "proxies of 1/7 and 1/3, no curves", (60e6, 140e6, 420e6), 8e9, 1, 3e-4),
    ),
    "misleading smallest proxy": (
        _llm("llm-497m", "proxies of 1/25, which misleads, and 1/5", (20e6, 100e6, 497e6), 10e9, 4, 3e-4),
        _llm("llm-900m", "proxies of 1/25, which misleads, and 1/5", (36e6, 180e6, 900e6), 30e9, 4, 2.5e-4),
    ),
    "divergence": (
        _vlm("vlm-63m", "proxies of 1/14 and 1/3, runs diverge", (64, 192, 384), 30e6, 4, 0.07),
        _vlm("vlm-103m", "proxies of 1/22 and 1/5, runs diverge", (64, 192, 512), 80e6, 4, 0.05),
    ),
    "divergence, final losses": (
        _vlm("vlm-21m", "one proxy of 1/5, no curves, runs diverge", (64, 192), 10e6, 1, 0.1),
        _vlm("vlm-82m", "one proxy of 1/4, no curves, runs diverge", (192, 448), 60e6, 1, 0.03),
    ),
    "ordered choices, final losses": (
        _tabpfn("tabpfn-286k", "proxies of 1/15 and 1/4, no curves", (19_402, 73_610, 286_474), 2**28),
        _tabpfn("tabpfn-553k", "proxies of 1/15 and 1/4, no curves", (37_002, 152_970, 553_482), 2**30),
    ),
}
"""Settings by kind, two of each."""

SEEN = ("llm-278m",)
"""Settings on which `jfhpo` had been measured before the pairs were divided."""


def _is_for_tuning(pair: tuple[Setting, Setting], setting: Setting) -> bool:
    """A hash of the pair's names decides, unless one of them has been seen."""
    chosen = next((item for item in pair if item.name in SEEN), None)
    return setting is (chosen or pair[zlib.crc32("/".join(item.name for item in pair).encode()) % 2])


SETTINGS = {setting.name: setting for pair in PAIRS.values() for setting in pair}
TUNING = tuple(item.name for pair in PAIRS.values() for item in pair if _is_for_tuning(pair, item))
"""Settings that may be looked at at any time."""

UNTOUCHED = tuple(name for name in SETTINGS if name not in TUNING)
"""Settings on which `jfhpo` runs only for the final measurement."""

RECORDED = ("table-arithmetic", "table-instruct", "table-countdown")
"""Recorded RL runs. The optimizer has been tuned on the first two for long; on the third one it has not."""

BUDGETS = (3, 6, 10, 20)
"""In full runs of the target."""


@cache
def surface(name: str) -> Surface:
    """A setting's surface; fitted once in a process."""
    setting = SETTINGS[name]
    return Surface(setting, tables.load(setting.table), tables.interpolated(setting.table))


def foreign_problem(surface: Surface, seed: int, *, optimum: bool = True) -> Problem:
    """A setting as a landscape; the seed draws the noise. Its best score takes seconds: without `optimum`, if asked."""
    setting = surface.setting
    prompts = 16 * setting.rungs
    data = {
        "family": [
            {"name": name, "path": "recorded", "parameters": count} for name, count in setting.parameters.items()
        ],
        "target": setting.target,
        "task": "instruct",
        "trainer": SurfaceTrainer.name,
        "space": surface.space.model_dump(mode="json"),
        "fidelity": {"horizon_prompts": prompts, "rungs": setting.rungs},
        "stopping": {"rules": "none", "override": {"unpromising": {}}},
    }

    def score(_: Study, configuration: Configuration, model: str) -> float:
        return surface.score(model, configuration)

    return Problem(
        setting.name,
        seed,
        data,
        surface.trainer(),
        score,
        RUN_SECONDS,
        known_best=surface.best_score if optimum else None,
    )


def problem(landscape: str, seed: int) -> Problem:
    """A landscape of this benchmark, named 'NAME@BUDGET'.

    Raises:
        JfhpoError: No setting has this name.
    """
    name, _, budget = landscape.partition("@")
    if name in SETTINGS:
        found = foreign_problem(surface(name), seed)
    elif name in RECORDED:
        found = LANDSCAPES[name](seed)
    else:
        raise JfhpoError(f"no setting {name!r}; there are {', '.join((*SETTINGS, *RECORDED))}")
    return replace(found, trainings=int(budget))
