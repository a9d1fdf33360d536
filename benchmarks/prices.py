"""How far off prices are that come from parameters, tokens and hardware: published step times, and the recorded runs.

python -m benchmarks prices        writes docs/evidence/prices.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from benchmarks.report import EVIDENCE
from jfhpo_core.optimizer.price import ENGINES, ON_CPU, Setup, Work
from jfhpo_core.study.hardware import CPU_CORE, gpus

PAGE = "prices.md"

TABLE = Path(__file__).parent / "rl_table" / "data"

NEMO = (
    "https://github.com/NVIDIA-NeMo/RL/blob/06beed91bac98a2c39a19435f6bbbbe71aa45720/docs/about/performance-summary.md"
)
EASY = "https://github.com/hiyouga/EasyR1/blob/46c6c210fddc939f81cf638f7d41d180ffdb17b7/assets/baselines.md"

RECORDED_PROMPT_TOKENS = 8
RECORDED_LIMIT = 8


@dataclass(frozen=True)
class Published:
    """A step time that somebody else has published.

    Attributes:
        name: Model and framework.
        gpu, count: Hardware.
        work: One step. Where only the total number of tokens is published, prompts are assumed.
        seconds: Of the step.
    """

    name: str
    parameters: float
    gpu: str
    count: int
    work: Work
    seconds: float
    source: str

    @property
    def price(self) -> float:
        """What price.py says."""
        return Setup(self.parameters, gpus()[self.gpu], self.count, ENGINES["vllm"]).step_seconds(self.work)


def _math(mean: float) -> Work:
    """NeMo RL on OpenMathInstruct-2: 2,048 completions, 4,096 tokens with the prompt; prompts of 150 assumed."""
    return Work(2048, 150, mean - 150, 4096 - 150, updates=4, forward_passes=2)


def _geometry(tokens_per_second: float, seconds: float) -> Work:
    """EasyR1 on Geometry3k: 512 prompts of 5 completions on 8 GPUs; prompts with an image, 350 tokens assumed."""
    mean = tokens_per_second * 8 * seconds / 2560
    return Work(2560, 350, mean - 350, 2048, updates=4, forward_passes=2)


PUBLISHED = (
    Published("Llama-3.1-8B, NeMo RL", 8.03e9, "H100-80GB", 16, _math(1060), 97.7, NEMO),
    Published("Qwen3-32B, NeMo RL", 32.8e9, "H100-80GB", 32, _math(3206), 393, NEMO),
    Published("Qwen2.5-VL-3B, EasyR1 (verl)", 3.8e9, "H100-80GB", 8, _geometry(1200, 180), 180, EASY),
    Published("Qwen2.5-VL-7B, EasyR1 (verl)", 8.3e9, "H100-80GB", 8, _geometry(1200, 180), 180, EASY),
    Published("Qwen2.5-VL-7B, EasyR1 (verl)", 8.3e9, "L20", 8, _geometry(410, 580), 580, EASY),
    Published("Qwen2.5-VL-32B, EasyR1 (verl)", 33.5e9, "H100-80GB", 8, _geometry(360, 860), 860, EASY),
)


def recorded() -> list[float]:
    """Price over measured CPU seconds of a step, for each of the recorded runs."""
    key = ["task", "size", "configuration", "seed"]
    means = ("generation_seconds", "training_seconds", "completion_tokens")
    steps = pq.read_table(TABLE / "steps.parquet").group_by(key).aggregate([(name, "mean") for name in means])
    runs = pq.read_table(TABLE / "trainings.parquet").join(steps, key).to_pylist()
    ratios = []
    for run in runs:
        completions, passes = 16 * run["n_samples"], 1 + (run["kl_coefficient"] > 0)
        work = Work(
            completions,
            RECORDED_PROMPT_TOKENS,
            run["completion_tokens_mean"],
            RECORDED_LIMIT,
            updates=run["mini_batches"],
            forward_passes=passes,
        )
        measured = run["generation_seconds_mean"] + run["training_seconds_mean"]
        ratios.append(Setup(run["parameters"], CPU_CORE, 1, ON_CPU).step_seconds(work) / measured)
    return ratios


def deviation(ratios: list[float]) -> float:
    """Typical factor between price and truth: the exponential of the root mean square of the log ratios."""
    return math.exp(math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios)))


def write(folder: Path = EVIDENCE) -> None:
    """Write the page."""
    ratios, own = [item.price / item.seconds for item in PUBLISHED], sorted(recorded())
    rows = [
        [
            f"[{item.name}]({item.source})",
            f"{item.count} x {item.gpu}",
            f"{item.work.completions:g}",
            f"{item.work.prompt_tokens + item.work.mean_tokens:.0f}",
            f"{item.seconds:g} s",
            f"{item.price:.0f} s",
            f"{ratio:.2f}",
        ]
        for item, ratio in zip(PUBLISHED, ratios, strict=True)
    ]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (folder / PAGE).write_text(
        f"""# Prices before anything is timed

Made by `python -m benchmarks prices`.

Before its first segment is timed, a study's bill comes from parameters, tokens and hardware
(`jfhpo_core/optimizer/price.py`): operations of generation, forward and backward passes, memory traffic while decoding,
start-up, transfer of weights, checkpoints. The shares of peak throughput and bandwidth in it were set by hand on the
six published step times below, so these say how well one formula can fit different frameworks, and not how well it
predicts a seventh. Nothing was run on a GPU here.

| Model | GPUs | Completions | Tokens each | Published | Price | Price / published |
|---|---|---|---|---|---|---|
{lines}

The typical factor between price and published time is {deviation(ratios):.2f} (root mean square of the logarithms),
the largest {max(max(ratio, 1 / ratio) for ratio in ratios):.2f}. Images are priced as tokens, their encoder is not.

The {len(own)} recorded runs of tiny models on a CPU core (`benchmarks/rl_table`) were not used for these shares; the
overheads of the CPU are set on the same machine. Price over measured time of a step: median {median(own):.2f}, 90 %
between {own[len(own) // 20]:.2f} and {own[-len(own) // 20]:.2f}, typical factor {deviation(own):.2f}.

A forecast that rests on prices alone therefore has a 90 % interval of about a factor of three either way. Lengths are
the largest unknown: completions are taken to be half as long as the limit on average, prompts twice the limit and at
most 256 tokens. The first measured step corrects all of it, as do earlier studies named in `warm_start` with the same
trainer and GPU.
""",
        encoding="utf-8",
    )
