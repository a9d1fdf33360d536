"""Surrogates on what a search would know: how well each one predicts the target at full length, and how honestly.

A design is trained on a simulated landscape (many configurations on the smallest model, the best of them on larger
ones), every surrogate is fitted to the same observations of it, and its predictions at (target, full horizon) are held
against the true scores of random configurations that it has not seen.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.gp_regression_fidelity import SingleTaskMultiFidelityGP
from gpytorch.mlls import ExactMarginalLogLikelihood
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm, spearmanr
from torch import Tensor

from benchmarks import runner
from benchmarks.landscapes import Problem, load_problem
from benchmarks.markdown import markdown_table
from benchmarks.report import FIRST_SEED, STYLE
from jfhpo_core.optimizer.calibration import inflation
from jfhpo_core.optimizer.observations import observe, target_base
from jfhpo_core.optimizer.strategy import fresh_configurations
from jfhpo_core.optimizer.surrogate import (
    ANY_SEED,
    DRAWS,
    FIDELITY_COLUMNS,
    JITTER,
    THIS_STUDY,
    JointStructure,
    JointSurrogate,
    Observations,
    fit_parameters,
)
from jfhpo_core.run.worker import run_job
from jfhpo_core.study.resolved import Study, base_evaluations
from jfhpo_core.study.space import Vector
from jfhpo_core.study.trial import Configuration, Outcome, Suggestion, Trial
from jfhpo_core.trainers.simulated import study_surface

LANDSCAPES = ("aligned", "shifted", "noisy", "unstable", "moderate", "misleading")
"""Those of the simulated trainer, whose true scores and boundaries are known everywhere."""

DESIGNS = {"24/4/3": (24, 4, 3), "12/2/1": (12, 2, 1)}
"""Trainings on the smallest, the middle and the target model. On proxies, every other one goes to half the horizon."""

QUESTIONS = 512
"""Feasible configurations at which predictions are held against the truth."""

SHORTLIST = 10
BEST_SHARE = 0.05
"""Of the configurations, by predicted mean: where the search looks, and where coverage is counted once more."""

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Nominal coverages of central intervals."""

SHOWN_LEVELS = (0.5, 0.8, 0.95)

FILE = "surrogates/fits.jsonl"
PAGE = "surrogates.md"
RELIABILITY = "surrogates-reliability.svg"
BECAUSE = Suggestion(source="design", explanation="part of a fixed design")

Key = tuple[str, str, str, int]
"""Surrogate, design, landscape, seed."""

OURS = "ours"
COLOURS = {
    OURS: "#d1242f",
    "ours, not calibrated": "#ffaba8",
    "ours, 8 members": "#82071e",
    "multi-fidelity, linear truncated": "#0969da",
    "multi-fidelity, downsampling": "#54aeff",
    "plain ARD": "#1a7f37",
}
"""Of the surrogates in the figure."""

INTRODUCTION = f"""\
A design a/b/c trains a Sobol configurations on the smallest model, the best b of them on the middle one and the best
c of these on the target; on proxies every other training goes to half the horizon only. Noise and stopping rules are
those of a search. Observed were four points of a curve, and stopped trainings as verdicts; since notes 10 and 14 it
is two points, and stopped trainings are observations. Every surrogate is fitted to the same observations with their
measured standard errors and predicts the noise-free score at (target, full horizon) of {QUESTIONS} random
configurations that are feasible there. Regret is what a choice lacks to the best of these; the decision counts more
than the error. Means and standard errors are over {{fits}} designs: seeds {{first}} to {{last}} of {{landscapes}}.

`ours` is the model of `jfhpo_core/optimizer/surrogate.py` with {DRAWS} members and the correction of
`jfhpo_core/optimizer/calibration.py`; its variants change one thing. `multi-fidelity` is BoTorch's
SingleTaskMultiFidelityGP (size as data fidelity, progress as iteration fidelity), `plain ARD` its SingleTaskGP over
hyperparameters, size and progress; both as they come, with known noise."""

COVERAGE = f"""\
Share of the true scores inside the central 50, 80 and 95 % intervals, over both designs; `best` are the
{BEST_SHARE:.0%} of the configurations with the highest predicted means."""

Predict = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mean and deviation of the gain, each of shape (m,), at inputs (m, d + 4) of the surrogate."""


class Fit(BaseModel):
    """One surrogate fitted to one design on one landscape.

    Scores and regrets are shares of right answers. Regrets are to the best of the configurations asked about.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    surrogate: str
    design: str
    landscape: str
    seed: int
    commit: str = Field(description="Commit that was checked out.")
    observations: int
    first_regret: float = Field(description="Of the configuration with the highest predicted mean.")
    shortlist_regret: float = Field(description="Of the best among those with the 10 highest predicted means.")
    rmse: float
    nll: float = Field(description="Mean negative log density of the true scores, taken as normal.")
    spearman: float
    coverage: tuple[float, ...] = Field(description="Of the central intervals of `LEVELS`.")
    best_coverage: tuple[float, ...] = Field(description="The same among the 5 % with the highest predicted means.")
    cpu_seconds: float = Field(description="Of fit and predictions.")

    @property
    def key(self) -> Key:
        """Surrogate, design, landscape, seed."""
        return self.surrogate, self.design, self.landscape, self.seed


def train(study: Study, counts: Sequence[int]) -> list[Trial]:
    """A design's trainings, with noise and stopping rules as in a search.

    Args:
        study: On the simulated trainer.
        counts: Trainings per model, from the smallest one.
    """
    trials: list[Trial] = []
    horizon = study.spec.fidelity.horizon_prompts
    chosen = fresh_configurations(study, (), study.spec.seeds.search, counts[0])
    for model, count in zip(study.ladder.models, counts, strict=True):
        if trials:
            chosen = _best(trials, count)
        for place, configuration in enumerate(chosen):
            short = place % 2 == 1 and model != study.ladder.target
            trial = study.new_trial(len(trials), configuration, model.name, study.spec.seeds.training[0])
            segment = study.next_segment(trial, horizon // 2 if short else horizon, BECAUSE)
            job = study.job(trial, segment, (), base_evaluations(trials).get(model.name))
            result = run_job(job, study.trainer, lambda _: None).model_copy(update={"committed": len(trials) + 1})
            trials.append(trial.model_copy(update={"segments": (result,)}))
    return trials


def _best(trials: Sequence[Trial], count: int) -> list[Configuration]:
    """Configurations of the highest last scores on the model of the last training, those that failed left out."""
    healthy = [
        trial
        for trial in trials
        if trial.model == trials[-1].model and trial.segments[-1].outcome is Outcome.REACHED and trial.evaluations
    ]
    healthy.sort(key=lambda trial: -trial.evaluations[-1].score)
    return [trial.configuration for trial in healthy[:count]]


def questions(problem: Problem, study: Study) -> tuple[Tensor, Vector]:
    """Random configurations whose training on the target neither collapses nor runs out of memory.

    Returns:
        Surrogate inputs at (target, full horizon), shape (QUESTIONS, d + 4), and true scores, shape (QUESTIONS,).
    """
    rows, scores = [], []
    for configuration in _feasible(study):
        rows.append([*study.space.encode(configuration), 0.0, 1.0, ANY_SEED, THIS_STUDY])
        scores.append(problem.true_score(configuration))
        if len(rows) == QUESTIONS:
            break
    return torch.tensor(np.array(rows), dtype=torch.double), np.array(scores)


def _feasible(study: Study) -> Iterator[Configuration]:
    surface = study_surface(study.spec)
    limit = surface.settings.memory_limit
    # Another sequence than the search's own.
    for configuration in fresh_configurations(study, (), study.spec.seeds.search + 1_000_000, 4 * QUESTIONS):
        complete = study.complete(configuration)
        completions = int(complete["prompts_per_step"]) * int(complete["n_samples"])
        if np.isinf(surface.curve(complete, 1.0).onset) and (limit is None or completions <= limit):
            yield configuration


@lru_cache(maxsize=2)
def load_task(landscape: str, seed: int, design: str) -> tuple[Study, Observations, float, Tensor, Vector]:
    """What all surrogates of a run share.

    Returns:
        Study, observations, what the untrained target is taken to score, and `questions`.
    """
    problem = load_problem(landscape, seed)
    with tempfile.TemporaryDirectory(
        prefix="jfhpo-surrogates-", dir=runner.MEMORY if runner.MEMORY.is_dir() else None
    ) as workspace:
        study = problem.study(Path(workspace))
        trials = train(study, DESIGNS[design])
    return study, observe(study, trials), target_base(study, trials), *questions(problem, study)


def _joint(
    study: Study,
    data: Observations,
    draws: int = DRAWS,
    shifts: bool = True,
    seeds: bool = True,
    calibrated: bool = True,
) -> Predict:
    """Ours, with parts left out.

    Args:
        study: The study.
        data: Its observations.
        draws: Members of the ensemble.
        shifts: Whether best values may move with size.
        seeds: Whether each training has a deviation of its own.
        calibrated: Whether deviations are corrected by `jfhpo_core.optimizer.calibration`.
    """
    if not seeds:
        inputs = data.inputs.clone()
        inputs[:, study.space.dimension + 2] = ANY_SEED
        data = replace(data, inputs=inputs)
    structure = JointStructure(study.space.dimension, study.space.shifting_coordinates if shifts else ())
    surrogate = JointSurrogate(data, structure, fit_parameters(structure, data, draws), data.spread)
    widened = _inflation(surrogate) if calibrated else 1.0

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        means, deviations = surrogate.moments().at(inputs).mixture()
        return means * surrogate.scale, deviations * surrogate.scale * widened

    return predict


def _inflation(surrogate: JointSurrogate) -> float:
    data, structure, parameters = surrogate.observations, surrogate.structure, surrogate.parameter_draws
    noise = torch.diag(data.variances / surrogate.scale**2 + JITTER)
    factor = torch.linalg.cholesky(structure.covariance(parameters, data.inputs, data.inputs) + noise)
    residuals = data.gains / surrogate.scale - structure.mean(parameters, data.inputs)
    return inflation(factor, residuals, data.inputs[:, -FIDELITY_COLUMNS:])


def _stock(study: Study, data: Observations, build: Callable[[Tensor, Tensor, Tensor], SingleTaskGP]) -> Predict:
    """A model of BoTorch over hyperparameters, size and progress, all in [0, 1] with 1 the target and its horizon."""
    d = study.space.dimension
    smallest = study.ladder.size_coordinate(study.ladder.models[0].name)

    def rows(inputs: Tensor) -> Tensor:
        size = 1 - inputs[:, d : d + 1] / smallest
        return torch.cat([inputs[:, :d], size, inputs[:, d + 1 : -FIDELITY_COLUMNS + 2]], dim=-1)

    model = build(rows(data.inputs), data.gains.unsqueeze(-1), data.variances.unsqueeze(-1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            posterior = model.posterior(rows(inputs))
        return posterior.mean.squeeze(-1), posterior.variance.squeeze(-1).sqrt()

    return predict


def _multi_fidelity(inputs: Tensor, gains: Tensor, variances: Tensor, linear_truncated: bool) -> SingleTaskGP:
    progress = inputs.shape[-1] - 1
    return SingleTaskMultiFidelityGP(
        inputs,
        gains,
        variances,
        data_fidelities=[progress - 1],
        iteration_fidelity=progress,
        linear_truncated=linear_truncated,
    )


SURROGATES: Mapping[str, Callable[[Study, Observations], Predict]] = {
    OURS: _joint,
    "ours, not calibrated": partial(_joint, calibrated=False),
    "ours, 8 members": partial(_joint, draws=8),
    "ours, mode only": partial(_joint, draws=1),
    "ours, no shift": partial(_joint, shifts=False),
    "ours, no seeds": partial(_joint, seeds=False),
    "multi-fidelity, linear truncated": partial(_stock, build=partial(_multi_fidelity, linear_truncated=True)),
    "multi-fidelity, downsampling": partial(_stock, build=partial(_multi_fidelity, linear_truncated=False)),
    "plain ARD": partial(_stock, build=SingleTaskGP),
}
"""What is compared, by the name under which it is reported."""


def fit_one(surrogate: str, design: str, landscape: str, seed: int) -> Fit:
    """Fit a surrogate to a design and hold its predictions against the truth."""
    torch.manual_seed(seed)
    study, data, base, inputs, truth = load_task(landscape, seed, design)
    began = time.process_time()
    means, deviations = (values.numpy() for values in SURROGATES[surrogate](study, data)(inputs))
    seconds = time.process_time() - began
    return Fit(
        surrogate=surrogate,
        design=design,
        landscape=landscape,
        seed=seed,
        commit=runner.commit(),
        observations=len(data),
        cpu_seconds=round(seconds, 3),
        **judge(base + means, deviations, truth),
    )


def judge(means: Vector, deviations: Vector, truth: Vector) -> dict[str, float | tuple[float, ...]]:
    """The figures of a `Fit`, from predicted and true scores, each of shape (m,)."""
    order = np.argsort(-means, kind="stable")
    best = order[: max(1, round(BEST_SHARE * len(order)))]
    standardized = (truth - means) / deviations
    bounds = norm.ppf((1 + np.array(LEVELS)) / 2)
    inside = np.abs(standardized)[:, None] <= bounds
    figures = {
        "first_regret": truth.max() - truth[order[0]],
        "shortlist_regret": truth.max() - truth[order[:SHORTLIST]].max(),
        "rmse": np.sqrt(np.mean((truth - means) ** 2)),
        "nll": -np.mean(norm.logpdf(standardized) - np.log(deviations)),
        "spearman": spearmanr(means, truth).statistic,
    }
    return {
        **{name: round(float(value), 5) for name, value in figures.items()},
        "coverage": tuple(np.round(inside.mean(0), 4).tolist()),
        "best_coverage": tuple(np.round(inside[best].mean(0), 4).tolist()),
    }


def load(path: Path) -> dict[Key, Fit]:
    """All fits so far, by surrogate, design, landscape and seed; the last one counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {fit.key: fit for fit in map(Fit.model_validate_json, lines)}


def run(
    path: Path, surrogates: Sequence[str], designs: Sequence[str], landscapes: Sequence[str], seeds: Sequence[int]
) -> None:
    """Do the fits that are missing, one by one, each appended to the file as it comes."""
    torch.set_num_threads(1)
    done = load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for landscape in landscapes:
            for design in designs:
                for surrogate in surrogates:
                    if (surrogate, design, landscape, seed) in done:
                        continue
                    fit = fit_one(surrogate, design, landscape, seed)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(f"{fit.model_dump_json()}\n")


def write(fits: Mapping[Key, Fit], folder: Path) -> None:
    """Write page and figure, from the published seeds that every surrogate has been fitted to."""
    published = [fit for fit in fits.values() if fit.seed >= FIRST_SEED]
    names = [name for name in SURROGATES if any(fit.surrogate == name for fit in published)]
    shared = set.intersection(*({fit.key[1:] for fit in published if fit.surrogate == name} for name in names))
    kept = [fit for fit in published if fit.key[1:] in shared]
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw(kept, [name for name in names if name in COLOURS])
        figure.savefig(folder / RELIABILITY, format="svg", metadata={"Date": None, "Creator": None})
    (folder / PAGE).write_text(page(kept, names), encoding="utf-8")


def draw(fits: Collection[Fit], names: Sequence[str]) -> Figure:
    """Coverage against nominal coverage, over all questions and over those that look best."""
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, attribute, title in (
        (left, "coverage", "all configurations"),
        (right, "best_coverage", f"the {BEST_SHARE:.0%} with the highest predicted means"),
    ):
        axis.plot([0, 1], [0, 1], color="#57606a", linewidth=0.8, linestyle=":", label="exact")
        for name in names:
            coverage = np.mean([getattr(fit, attribute) for fit in fits if fit.surrogate == name], axis=0)
            axis.plot(
                LEVELS, np.round(coverage, 4), label=name, linewidth=2.0 if name == OURS else 1.0,
                color=COLOURS[name], marker="o", markersize=2.5,
            )  # fmt: skip
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("nominal coverage of the interval")
    left.set_ylabel("share of true scores inside")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def page(fits: Collection[Fit], names: Sequence[str]) -> str:
    """The Markdown page."""
    seeds = sorted({fit.seed for fit in fits})
    designs = [name for name in DESIGNS if any(fit.design == name for fit in fits)]
    landscapes = [name for name in LANDSCAPES if any(fit.landscape == name for fit in fits)]
    sections = [
        "# Surrogates, compared",
        "Generated by `python -m benchmarks surrogates`; do not edit.",
        INTRODUCTION.format(
            landscapes=", ".join(landscapes), first=seeds[0], last=seeds[-1], fits=len({fit.key[1:] for fit in fits})
        ),
        *(
            f"## Design {design}\n\n{_figures([fit for fit in fits if fit.design == design], names)}"
            for design in designs
        ),
        "## Coverage",
        COVERAGE,
        _coverages(fits, names),
        f"![Coverage against nominal coverage]({RELIABILITY})",
        "## Each landscape",
        f"Regret of the first choice, and coverage of the {SHOWN_LEVELS[1]:.0%} interval, over both designs.",
        _landscapes(fits, names, landscapes),
    ]
    return "\n\n".join(sections) + "\n"


def _figures(fits: Collection[Fit], names: Sequence[str]) -> str:
    """One design: mean and standard error of each figure over landscapes and seeds."""
    columns = {
        "regret of the first": ("first_regret", 3),
        f"best of the first {SHORTLIST}": ("shortlist_regret", 3),
        "RMSE": ("rmse", 3),
        "negative log likelihood": ("nll", 2),
        "Spearman": ("spearman", 3),
        "CPU seconds": ("cpu_seconds", 2),
    }
    by_key = {fit.key: fit for fit in fits}
    rows = []
    for name in names:
        mine = [fit for fit in fits if fit.surrogate == name]
        cells = [_mean([getattr(fit, attribute) for fit in mine], digits) for attribute, digits in columns.values()]
        gaps = [fit.first_regret - by_key[OURS, *fit.key[1:]].first_regret for fit in mine]
        rows.append([name, *cells, _mean(gaps, 3) if name != OURS else "-"])
    return markdown_table(["", *columns, "regret of the first minus that of `ours`"], rows)


def _coverages(fits: Collection[Fit], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        row = [name]
        for attribute in ("coverage", "best_coverage"):
            values = np.array([getattr(fit, attribute) for fit in fits if fit.surrogate == name])
            row += [_mean(values[:, LEVELS.index(level)], 2) for level in SHOWN_LEVELS]
        rows.append(row)
    head = [f"{prefix}{level:.0%}" for prefix in ("", "best, ") for level in SHOWN_LEVELS]
    return markdown_table(["", *head], rows)


def _landscapes(fits: Collection[Fit], names: Sequence[str], landscapes: Sequence[str]) -> str:
    place = LEVELS.index(SHOWN_LEVELS[1])
    rows = []
    for name in names:
        row = [name]
        for landscape in landscapes:
            mine = [fit for fit in fits if fit.surrogate == name and fit.landscape == landscape]
            covered = float(np.mean([fit.coverage[place] for fit in mine]))
            row.append(f"{_mean([fit.first_regret for fit in mine], 3)}; {covered:.2f}")
        rows.append(row)
    return markdown_table(["", *landscapes], rows)


def _mean(values: Sequence[float] | Vector, digits: int) -> str:
    """Mean and standard error."""
    error = float(np.std(values, ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"
