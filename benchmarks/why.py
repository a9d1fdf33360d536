"""Are the sentences of `jfhpo why` true? Asked on simulated landscapes, whose truth is known.

python -m benchmarks why        does the cases that are missing, and writes docs/evidence/why.md

A case is a landscape drawn at random, and full runs of Sobol configurations over its three sizes, of which a rule stops
those that collapse. Truth is computed from the noise-free landscape, on the scale that the model uses.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.stats import qmc

from benchmarks.landscapes import Problem, language_model
from benchmarks.markdown import markdown_table
from benchmarks.report import EVIDENCE
from benchmarks.store import RESULTS
from jfhpo_core.optimizer.beliefs import Beliefs
from jfhpo_core.optimizer.score_scale import TARGET, ScoreScale
from jfhpo_core.optimizer.strategy import RandomSearch, fresh_configurations
from jfhpo_core.report.why import Boundary, Why, why
from jfhpo_core.report.why_sentences import LITTLE, NOTABLE, leaders, stands_out
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.study.history import History
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.space import ChoiceParameter, Vector
from jfhpo_core.study.trial import Configuration, Decision, Evaluation, Outcome, SegmentResult, Suggestion, Trial
from jfhpo_core.trainers.simulated import study_surface

FILE = RESULTS / "why" / "cases.jsonl"
PAGE = "why.md"

SEEDS = range(8150, 8200)
"""Those from 1000 to 1024, 6000 to 6049 and 8000 to 8149 were looked at while the sentences were worked on."""

RUNS = 72
"""Full runs of a case, over the three sizes in turn."""

PROMPTS = 512
"""Held-out prompts of an evaluation."""

SAMPLE = 256
"""Points of the Sobol sequence from which true shares are computed."""

TOLERANCE = 0.1
"""How far a true share may lie outside the interval that is given for it."""

FACTOR = 1.5
"""Within which a boundary is right."""

CLEAR = 1.3
"""A hyperparameter counts among the three most important ones if its true share times this is at least the third's."""

ERRORS = 3.0
"""Standard errors that a value which is said to cost less than one may truly cost."""


@dataclass(frozen=True)
class Outcomes:
    """What a case came to.

    Attributes:
        seed: The landscape.
        judged: Sentences whose truth can be computed, by kind.
        false: Those that are false.
        top: Whether those named as the three most important hyperparameters are, ties aside; None: fewer than three
            matter.
        boundary: Whether the boundary on the target or over all models is right; None: none was named.
        blamed: Whether a boundary was named of a hyperparameter that has none.
        named: Hyperparameters that are said to be among the three, and how many of them are; none where fewer matter.
        passed: Of the three, those clearly above the fourth that are said not to be among them.
    """

    seed: int
    judged: dict[str, int]
    false: list[str]
    top: bool | None
    boundary: bool | None
    blamed: bool
    named: tuple[int, int]
    passed: int


def problem(seed: int) -> Problem:
    """A landscape in which high learning rates collapse, or, of an odd seed, several hyperparameters matter."""
    random = np.random.default_rng([11, seed])
    shift = float(random.uniform(-0.4, 0.0))
    if seed % 2:
        drawn = {"width": random.uniform(1.2, 3.0), "weak_effect": random.uniform(0.8, 0.95), "boundary": 4.0}
    else:
        drawn = {"width": random.uniform(0.5, 1.0), "weak_effect": random.uniform(0.5, 0.9)}
        drawn["boundary"] = random.uniform(0.5, 1.0)
    return language_model("why", seed, PROMPTS, agreement=0.9, size_shift=shift, roughness=0.0, **drawn)


def explained(seed: int, workspace: Path) -> tuple[Problem, SearchResult, Why]:
    """A landscape, its runs, and what is said of them."""
    found = problem(seed)
    study = found.study(workspace)
    surface, random, trials = study_surface(study.spec), np.random.default_rng(seed), []
    for number, configuration in enumerate(fresh_configurations(study, (), seed, RUNS)):
        model = study.ladder.models[number % len(study.ladder.models)]
        curve = surface.curve(study.complete(configuration), model.parameters / study.ladder.target.parameters)
        score = random.binomial(PROMPTS, curve.score(1.0)) / PROMPTS
        trials.append(_run(study, configuration, model.name, number, score, stopped=math.isfinite(curve.onset)))
    result = conclude(study, trials, RandomSearch(), complete=False)
    return found, result, why(result)


def _run(study: Study, configuration: Configuration, model: str, number: int, score: float, *, stopped: bool) -> Trial:
    trial = study.new_trial(number, configuration, model, 0)
    horizon = study.spec.fidelity.horizon_prompts
    error = math.sqrt(max(score * (1 - score), 0.25 / PROMPTS) / PROMPTS)
    last = Evaluation(
        step=trial.total_steps, prompts=horizon, score=score, standard_error=error, samples=PROMPTS, seconds=0.0
    )
    decision = Decision(
        stop=True, rule="reward_collapse", signal="reward", value=0.0, threshold=0.1, step=trial.total_steps
    )
    result = SegmentResult(
        segment=study.next_segment(trial, horizon, Suggestion(source="benchmark", explanation="at full length")),
        outcome=Outcome.STOPPED if stopped else Outcome.REACHED,
        decision=decision if stopped else None,
        end_step=trial.total_steps,
        end_prompts=horizon,
        seconds=60.0,
        evaluations=(last,),
        committed=number + 1,
    )
    return trial.model_copy(update={"segments": (result,)})


def measure(seed: int, workspace: Path) -> Outcomes:
    """Run one case: some 10 s of one core."""
    found, result, page = explained(seed, workspace)
    beliefs = Beliefs.form(History.of(result.study, result.trials))
    assert beliefs is not None
    truth = Truth(found, result.study, beliefs.scale)
    judged, false = judge(page, result, truth)
    ranked = sorted(truth.totals, key=lambda name: -truth.totals[name])
    third, fourth = (truth.totals[name] for name in ranked[2:4])
    matter = third >= NOTABLE
    top = all(CLEAR * truth.totals[item.name] >= third for item in page.importance[:3]) if matter else None
    named, possible = leaders(page.importance)
    right = sum(CLEAR * truth.totals[name] >= third for name in named)
    passed = {name for name in ranked[:3] if truth.totals[name] > CLEAR * fourth} - {*named, *possible}
    rates = [item for item in page.boundaries if item.name == "learning_rate" and item.side == "above"]
    return Outcomes(
        seed,
        dict(judged),
        false,
        top,
        truth.is_boundary(rates[0]) if rates else None,
        len(rates) < len(page.boundaries),
        (len(named), right) if matter else (0, 0),
        len(passed) if matter else 0,
    )


class Truth:
    """What is true of a landscape, on a scale.

    Args:
        found: The landscape.
        study: Its study.
        scale: Between scores and values.
    """

    def __init__(self, found: Problem, study: Study, scale: ScoreScale) -> None:
        self.problem, self.study = found, study
        self.settings = study_surface(study.spec).settings
        space, slices = study.space, study.space.slices()
        base, other = np.split(qmc.Sobol(2 * space.dimension, rng=np.random.default_rng(5)).random(SAMPLE), 2, axis=1)

        def values(names: Sequence[str]) -> Vector:
            points = base.copy()
            for name in names:
                points[:, slices[name]] = other[:, slices[name]]
            scores = [found.true_score(space.decode(point)) for point in points]
            return np.array([scale.value(TARGET, score)[0] for score in scores])

        plain, single = values(()), {name: values((name,)) for name in space}
        variance = float(np.var(np.concatenate([plain, *single.values()])))
        self.totals = {name: float(np.mean((plain - moved) ** 2)) / (2 * variance) for name, moved in single.items()}
        ranked = sorted(space, key=lambda name: -self.totals[name])[:4]
        self.pairs = {
            frozenset(pair): float(np.mean((plain - single[pair[0]] - single[pair[1]] + values(pair)) ** 2))
            / (4 * variance)
            for pair in combinations(ranked, 2)
        }

    def is_boundary(self, boundary: Boundary) -> bool:
        """Whether runs on the models of a boundary collapse from there on, within `FACTOR`."""
        if boundary.name != "learning_rate" or boundary.side != "above":
            return False
        sizes = [
            self.study.ladder.size_coordinate(model.name)
            for model in self.study.ladder.models
            if boundary.model in (None, model.name)
        ]
        limits = [
            self.settings.best_learning_rate * 10 ** (self.settings.size_shift * size + self.settings.boundary)
            for size in sizes
        ]
        low, high = boundary.between
        return low / FACTOR <= max(limits) and min(limits) <= high * FACTOR

    def cost(self, best: Configuration, name: str, value: bool | float | str) -> float:
        """What a value costs beside the best one, with nothing else changed."""
        return self.problem.true_score(best) - self.problem.true_score({**best, name: value})


def judge(page: Why, result: SearchResult, truth: Truth) -> tuple[Counter[str], list[str]]:
    """How many sentences were judged, by kind, and which are false."""
    judged: Counter[str] = Counter()
    false: list[str] = []

    def say(kind: str, text: str, *, true: bool) -> None:
        judged[kind] += 1
        if not true:
            false.append(f"{kind}: {text}")

    error = page.standard_error or 0.0
    best = result.recommended.configuration if result.recommended is not None else {}
    for index, item in enumerate(item for item in page.importance if item.total.low >= NOTABLE):
        share = truth.totals[item.name]
        inside = item.total.low - TOLERANCE <= share <= item.total.high + TOLERANCE
        most = index > 0 or not stands_out(page.importance) or share >= max(truth.totals.values()) - TOLERANCE
        text = f"{item.name} {item.total.low:.2f} to {item.total.high:.2f}, truly {share:.2f}"
        say("share of the variance", text, true=inside and most)
        if item.harmless is not None and best:
            ends = item.harmless
            costs = [truth.cost(best, item.name, value) for value in ends]
            if not isinstance(result.study.space[item.name], ChoiceParameter):
                costs = [truth.cost(best, item.name, value) for value in (ends[0], ends[-1])]
            say("values that cost little", f"{item.name} {ends}: {max(costs):.3f}", true=max(costs) <= ERRORS * error)
    for item in page.importance:
        if item.total.low < NOTABLE and item.total.high < LITTLE:
            share = truth.totals[item.name]
            say("little depends on it", f"{item.name}: {share:.2f}", true=share <= LITTLE + TOLERANCE)
    for pair in page.interactions:
        known = truth.pairs.get(frozenset(pair.names))
        if pair.share.low >= NOTABLE and known is not None:
            inside = pair.share.low - TOLERANCE <= known <= pair.share.high + TOLERANCE
            say("pairs", f"{pair.names} {pair.share.low:.2f} to {pair.share.high:.2f}, truly {known:.2f}", true=inside)
    for boundary in page.boundaries:
        say("boundaries", f"{boundary.name} {boundary.side} {boundary.between}", true=truth.is_boundary(boundary))
    if page.choice is not None and page.choice.difference.low > 0:
        better = truth.problem.true_score(best) - truth.problem.true_score(page.choice.second)
        say("better than the second", f"by {better:.3f}", true=better > -error)
    return judged, false


def load(file: Path = FILE) -> list[Outcomes]:
    """Cases that have been done."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Outcomes(**json.loads(line)) for line in lines]


def run(limit: int | None = None, file: Path = FILE) -> list[Outcomes]:
    """Do the cases that are missing, at most `limit` of them; returns all that have been done."""
    done = {item.seed for item in load(file)}
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in [seed for seed in SEEDS if seed not in done][:limit]:
        found = measure(seed, Path("unused"))
        print(f"{seed}: {sum(found.judged.values())} sentences, false: {found.false}; top {found.top}", flush=True)
        with file.open("a", encoding="utf-8") as sink:
            sink.write(f"{json.dumps(asdict(found))}\n")
    return load(file)


def write(found: Sequence[Outcomes], folder: Path = EVIDENCE) -> None:
    """Write the page of the docs."""
    judged: Counter[str] = Counter()
    for item in found:
        judged.update(item.judged)
    false = Counter(text.partition(":")[0] for item in found for text in item.false)
    rows = [[kind, str(count), str(false[kind])] for kind, count in judged.items()]
    rows.append(["all", str(sum(judged.values())), str(sum(false.values()))])
    top = [item.top for item in found if item.top is not None]
    named = [index < item.named[1] for item in found for index in range(item.named[0])]
    counts = Counter(item.named[0] for item in found if item.top is not None)
    bounds = [item.boundary for item in found if item.boundary is not None]
    aims: Mapping[str, tuple[list[bool], float]] = {
        "the three hyperparameters listed first are the most important ones": (top, 0.95),
        "a hyperparameter that is said to be among the three most important ones is one of them": (named, 0.95),
        f"the learning rate above which runs collapse is right within a factor of {FACTOR:g}": (bounds, 0.9),
    }
    asked = [
        [text, f"{sum(values)} of {len(values)} ({fmean(values):.0%})", f"{aim:.0%}",
         "met" if fmean(values) >= aim else "missed"]
        for text, (values, aim) in aims.items() if values
    ]  # fmt: skip
    listed = "\n".join(f"- {item.seed}: {text}" for item in found for text in item.false) or "None."
    (folder / PAGE).write_text(
        f"""# Are the sentences of `jfhpo why` true?

Made by `python -m benchmarks why` from {len(found)} of {len(SEEDS)} simulated landscapes with known truth: {RUNS} full
runs of Sobol configurations over three sizes, of which a rule stops those that collapse (no search: what is judged is
the explanation, not the choice of runs).

{markdown_table(["asked", "found", "aim", ""], asked)}

A hyperparameter counts among the three most important ones if {CLEAR:g} times its true share is at least the third's;
that is asked where three have a true share of {NOTABLE:g} or more ({len(top)} landscapes). Said to be among them are
all three on {counts[3]} of these, two on {counts[2]}, one on {counts[1]} and none on {counts[0]}: {RUNS} runs do not
tell more, and the page says which others may be the rest. Of those that truly are among the three, and clearly above
the fourth, it leaves out {sum(item.passed for item in found)}.
No boundary was named on {len(found) - len(bounds)} landscapes; one was blamed on a
hyperparameter that has none on {sum(item.blamed for item in found)}.

## Sentences

{markdown_table(["what is said", "sentences", "false"], rows)}

False is a share whose true value lies more than {TOLERANCE:g} outside of the interval given (or, of what matters
most, so much below the largest); a value said to cost less than one standard error that costs more than {ERRORS:g}; a
hyperparameter on which little is said to depend with a true share above {LITTLE + TOLERANCE:g}; a boundary further off
than a factor of {FACTOR:g}; a recommendation worse than the second by more than a standard error. Forecasts,
probabilities and counts are not judged here.

{listed}
""",
        encoding="utf-8",
    )
