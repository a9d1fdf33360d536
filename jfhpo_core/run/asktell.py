"""Ask and tell: the search for people who bring their own training loop.

    optimizer = Optimizer("study.yaml")
    while (work := optimizer.ask()) is not None:
        score, standard_error, seconds = train(work.configuration, work.model, work.from_prompts, work.to_prompts)
        optimizer.tell(work, score, standard_error, seconds=seconds)

What to train is decided by the very functions that `jfhpo search` uses (`plan_next`, the study's strategy), on a ledger
in memory; only the run is the caller's. Whatever else the caller's loop knows (task, reward, checkpoints) stays
there: a study needs a family with parameter counts, a target, a space, a fidelity and a budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from jfhpo_core.errors import LedgerError, SpecError
from jfhpo_core.files import replace_file
from jfhpo_core.optimizer.strategy import Recommendation, load_strategy
from jfhpo_core.run.planning import Phase, plan_next
from jfhpo_core.run.standing import recommend
from jfhpo_core.stopping.rules import Unpromising
from jfhpo_core.store.ledger import MemoryLedger, mismatch_message
from jfhpo_core.study.metrics import METRICS
from jfhpo_core.study.models import build_ladder
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import read_text, validate_study
from jfhpo_core.study.trial import (
    Checkpoint,
    Configuration,
    Decision,
    Evaluation,
    FailureKind,
    Outcome,
    Purpose,
    Segment,
    SegmentResult,
    Trial,
)
from jfhpo_core.study.yaml_text import Document, read_yaml
from jfhpo_core.trainers.base import Job, Observer, TrainingResult

OWN_LOOP = "own-loop"
"""Stands in a study for the task, trainer and model paths that only the caller knows."""

Measured = tuple[int, float, float]
"""Prompts consumed, held-out score, standard error of the score."""


class AnyHyperparameters(BaseModel):
    """Hyperparameters that only the user's own program knows."""

    model_config = ConfigDict(frozen=True, extra="allow")

    prompts_per_step: int = Field(default=1, ge=1)


class _OwnLoop:
    """The trainer of an ask-and-tell study: it takes any hyperparameter and trains nothing."""

    name: ClassVar[str] = OWN_LOOP
    hyperparameters: ClassVar[type[BaseModel]] = AnyHyperparameters

    def check(self, study: StudySpec) -> None:
        """See `Trainer.check`; what the caller can train is not known here."""

    def warm_up(self) -> None:
        """See `Trainer.warm_up`."""

    def run(self, job: Job, start: Path | None, stage: Path, observe: Observer) -> TrainingResult:
        """Never called: the caller trains."""
        raise NotImplementedError


@dataclass(frozen=True)
class Assignment:
    """What to train next.

    Attributes:
        trial: Identity of the run: the same when it is continued later. A good name for its checkpoint folder.
        configuration: Values of the searched hyperparameters, those whose conditions hold.
        model: Name in the family.
        seed: Training seed.
        from_prompts: Where to begin: 0, or the prompts that this trial had consumed when it last reached its end.
        to_prompts: Where to end and to measure the held-out score; keep a checkpoint there.
        expected_cost_seconds: Device-seconds that this should take.
        why: The reason for it, in a sentence.
        purpose: 'search', or for the study's baselines and seeds 'baseline' and 'confirmation'.
        floors: Prompts consumed, and the held-out score there below which the run is not worth continuing (rule
            `unpromising`): end it and tell outcome 'stopped'. May be ignored.
    """

    trial: str
    configuration: Configuration
    model: str
    seed: int
    from_prompts: int
    to_prompts: int
    expected_cost_seconds: float
    why: str
    purpose: Purpose
    floors: tuple[tuple[int, float], ...] = ()


class Optimizer:
    """A study that is asked for work and told what came of it.

    Several assignments may be out at a time: those not told yet count as running. The same study and the same tells in
    the same order give the same assignments.

    Args:
        study: A study as data, or the path of a study file. `task`, `trainer` and the models' `path` may be left out
            (a trainer that is named is not loaded); models need `parameters`. Any hyperparameters may be searched.
            Without `prompts_per_step` in the space or among the fixed values every prompt counts as a step.

    Raises:
        SpecError: The study is not usable.
    """

    def __init__(self, study: Mapping[str, Any] | str | Path) -> None:
        spec = _own_loop_study(study)
        self.study = Study(spec, build_ladder(spec), _OwnLoop())
        for baseline in spec.baselines:
            self.study.complete(baseline.configuration)
        self._strategy = load_strategy(self.study)
        self._ledger = MemoryLedger()
        self._ledger.open(spec)

    @property
    def trials(self) -> list[Trial]:
        """Everything that was asked and told, in the order in which it was begun."""
        return self._ledger.trials()

    @property
    def pending(self) -> list[Assignment]:
        """Assignments that wait to be told: after a restart, what has to be trained again (or told as 'lost')."""
        return [self._assignment(trial, trial.open_segment) for trial in self.trials if trial.open_segment is not None]

    @property
    def done(self) -> bool:
        """Whether the study is finished: nothing is pending, and nothing is worth what is left of the budget."""
        return plan_next(self.study, self._strategy, self.trials).phase is Phase.DONE

    def ask(self) -> Assignment | None:
        """The next assignment; None if there is none now: the study is `done`, or it waits for what is `pending`."""
        step = plan_next(self.study, self._strategy, self.trials)
        if step.trial is None or step.segment is None:
            return None
        self._ledger.begin(step.trial, step.segment)
        return self._assignment(step.trial, step.segment)

    def tell(
        self,
        work: Assignment | str,
        score: float | None = None,
        standard_error: float | None = None,
        *,
        seconds: float,
        outcome: Outcome | str = Outcome.REACHED,
        prompts: int | None = None,
        evaluations: Sequence[Measured] = (),
        metrics: Mapping[str, float] | None = None,
        base_score: float | None = None,
        startup_seconds: float = 0.0,
        message: str | None = None,
    ) -> None:
        """Say what came of an assignment.

        Args:
            work: The assignment, or its trial's identity.
            score: Held-out score at the end; needed if the run reached it or was stopped.
            standard_error: Of the score; for the share p of n prompts solved, sqrt(p (1 - p) / n).
            seconds: What this assignment took; charged times the model's `devices`.
            outcome: 'reached'; 'stopped' if the run was ended early, because it went wrong or because it lay below
                the assignment's floor there; 'infeasible' if the configuration failed (out of memory, not finite,
                refused); 'lost' if something else failed.
            prompts: How far it came, if not to the end; needed if it was stopped.
            evaluations: Scores measured on the way, if any: the learning curve makes the forecasts sharper.
            metrics: What the study's constraints ask for, by name (`jfhpo_core.study.metrics.METRICS`): means over the
                training steps since the rung before the end.
            base_score: Held-out score of the untrained model, known from the first run of each model. What is
                learned is the gain over it, which is what models of different size have in common.
            startup_seconds: Of `seconds`, loading and set-up before the first step.
            message: Why it was stopped or failed.

        Raises:
            LedgerError: The assignment is not pending, or a figure is missing or makes no sense. Nothing is noted then.
        """
        trial, segment = self._open(work)
        outcome = _outcome(outcome)
        batch = trial.prompts_per_step
        end = segment.stop_step if outcome is Outcome.REACHED else segment.start_step
        if outcome is Outcome.REACHED and prompts not in (None, end * batch):
            raise LedgerError(f"prompts={prompts}, but the run reached {end * batch}: tell outcome='stopped'")
        if prompts is not None:
            end = _step(trial, segment, prompts)
        measured = [(_step(trial, segment, at), value, error) for at, value, error in evaluations]
        if outcome in (Outcome.REACHED, Outcome.STOPPED):
            if score is None or standard_error is None or end == segment.start_step:
                needed = "score and standard_error" + (" and prompts" if outcome is Outcome.STOPPED else "")
                raise LedgerError(
                    f"trial {trial.key} is told as {outcome.value!r}, which needs {needed}; "
                    "a run that ended without a score is outcome='infeasible'"
                )
            measured.append((end, score, standard_error))
        if base_score is not None:
            measured.append((0, base_score, standard_error or 0.0))
        samples = (self.study.spec.evaluation.prompts or 1) * self.study.spec.evaluation.samples_per_prompt
        taken = {
            step: Evaluation(
                step=step,
                prompts=step * batch,
                score=_finite("score", value),
                standard_error=_finite("standard_error", error, minimum=0.0),
                samples=samples,
                seconds=0.0,
                training=_metrics(metrics or {}) if step == end else {},
            )
            for step, value, error in measured
        }
        seconds = _finite("seconds", seconds, minimum=0.0)
        result = SegmentResult(
            segment=segment,
            outcome=outcome,
            end_step=end,
            end_prompts=end * batch,
            evaluations=tuple(taken[step] for step in sorted(taken)),
            # The caller keeps the files; the ledger has to know that there is something to continue from.
            checkpoint=_reference(trial, end) if outcome is Outcome.REACHED else None,
            seconds=seconds,
            startup_seconds=min(seconds, _finite("startup_seconds", startup_seconds, minimum=0.0)),
            devices=self.study.ladder[trial.model].devices,
            decision=_decision(segment, outcome, taken.get(end)),
            failure=FailureKind.REJECTED if outcome is Outcome.INFEASIBLE else None,
            message=message,
            committed=1 + sum(len(known.segments) for known in self.trials),
        )
        self._ledger.commit(trial.key, result, ())

    def recommend(self) -> Recommendation | None:
        """The best-ranked configuration among those trained to full length on the target; None if there is none."""
        return recommend(self.study, self._strategy, self.trials)

    def rank(self) -> list[Recommendation]:
        """Configurations with what they should score on the target at full length, best first.

        Some that no trial has may lead: they are expected to be better than all that were tried.
        """
        return self._strategy.rank(self.study, self.trials)

    def save(self, path: str | Path) -> None:
        """Write everything that was asked and told to a JSON file; one that exists is replaced in one go."""
        path = Path(path)
        content = {
            "study": self.study.spec.study,
            "identity": self.study.spec.identity(),
            "trials": [trial.model_dump(mode="json") for trial in self.trials],
        }
        replace_file(path, json.dumps(content, indent=1))

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote: the next assignment is the one that would have come then.

        Raises:
            LedgerError: The file cannot be read or is of another study, or this optimizer was already asked.
        """
        if self.trials:
            raise LedgerError(f"this optimizer has {len(self.trials)} trial(s) already; load {path} into a new one")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            trials = TypeAdapter(list[Trial]).validate_python(content["trials"])
            identity = content["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{path} cannot be read as an optimizer's state: {error}; give a file of `save`"
            ) from None
        if identity != self.study.spec.identity():
            raise LedgerError(f"{path}: {mismatch_message(self.study.spec.study)}")
        for trial in trials:
            for result in trial.segments:
                self._ledger.begin(trial, result.segment)
                self._ledger.commit(trial.key, result, ())
            if trial.open_segment is not None:
                self._ledger.begin(trial, trial.open_segment)

    def _assignment(self, trial: Trial, segment: Segment) -> Assignment:
        return Assignment(
            trial=trial.key,
            configuration=trial.configuration,
            model=trial.model,
            seed=trial.seed,
            from_prompts=segment.start_step * trial.prompts_per_step,
            to_prompts=segment.stop_step * trial.prompts_per_step,
            expected_cost_seconds=segment.suggestion.expected_cost_seconds or 0.0,
            why=segment.suggestion.explanation,
            purpose=trial.purpose,
            floors=tuple((floor.step * trial.prompts_per_step, floor.score) for floor in segment.floors),
        )

    def _open(self, work: Assignment | str) -> tuple[Trial, Segment]:
        """The trial of an assignment and its open segment."""
        key = work if isinstance(work, str) else work.trial
        trial = next((trial for trial in self.trials if trial.key == key), None)
        if trial is None:
            pending = ", ".join(item.trial for item in self.pending) or "none"
            raise LedgerError(f"trial {key!r} was never asked for; pending: {pending}")
        segment = trial.open_segment
        if segment is None or (isinstance(work, Assignment) and work != self._assignment(trial, segment)):
            raise LedgerError(
                f"trial {key} was told already up to {trial.step * trial.prompts_per_step} prompts; "
                "`ask` for the next assignment, and tell each one once"
            )
        return trial, segment


def _own_loop_study(study: Mapping[str, Any] | str | Path) -> StudySpec:
    """The study with what only the caller knows filled in by placeholders."""
    if isinstance(study, str | Path):
        source, data = str(study), read_yaml(read_text(Path(study)), str(study)).data
    else:
        source, data = "study", study
    if not isinstance(data, Mapping):
        raise SpecError("a study is a mapping with the fields study, family, target, space, fidelity and budget")
    data = {"task": OWN_LOOP, **data}
    if isinstance(data.get("family"), list):
        data["family"] = [_own_model(model) for model in data["family"]]
    trainer = data.get("trainer")
    fixed = dict(trainer.get("fixed", {})) if isinstance(trainer, Mapping) else {}
    if not isinstance(data.get("space"), Mapping) or "prompts_per_step" not in data["space"]:
        fixed.setdefault("prompts_per_step", 1)
    data["trainer"] = {"name": OWN_LOOP, "fixed": fixed}
    return validate_study(Document(data), source)


def _own_model(model: Any) -> Any:
    """A model of the family, whose path nobody will open if its size is given."""
    if not isinstance(model, Mapping) or "path" in model:
        return model
    if model.get("parameters") is None:
        raise SpecError(f"family: model {model.get('name')!r} lacks `parameters`, its parameter count; add it")
    return {"path": OWN_LOOP, **model}


def _decision(segment: Segment, outcome: Outcome, last: Evaluation | None) -> Decision | None:
    """That of the rule `unpromising`, if the caller stopped a run below its floor; others are not known."""
    floor = next((floor.score for floor in segment.floors if last is not None and floor.step == last.step), None)
    if outcome is not Outcome.STOPPED or last is None or floor is None or last.score >= floor:
        return None
    return Decision(
        stop=True, rule=Unpromising.name, signal="held-out score", value=last.score, threshold=floor, step=last.step
    )


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    for name in metrics:
        if name not in METRICS:
            raise LedgerError(f"metrics: there is no {name!r}; there are {', '.join(METRICS)}")
    return {name: _finite(f"metrics[{name!r}]", value, minimum=0.0) for name, value in metrics.items()}


def _outcome(outcome: Outcome | str) -> Outcome:
    if outcome not in tuple(Outcome):
        raise LedgerError(f"outcome={outcome!r} is none of {', '.join(Outcome)}")
    return Outcome(outcome)


def _step(trial: Trial, segment: Segment, prompts: int) -> int:
    """The step of a prompt count within an assignment."""
    step, rest = divmod(prompts, trial.prompts_per_step)
    if rest or not segment.start_step < step <= segment.stop_step:
        raise LedgerError(
            f"trial {trial.key}: prompts={prompts} is not in its assignment, which goes from "
            f"{segment.start_step * trial.prompts_per_step} (excluded) to {segment.stop_step * trial.prompts_per_step} "
            f"in steps of {trial.prompts_per_step}"
        )
    return int(step)


def _finite(name: str, value: float, minimum: float = -math.inf) -> float:
    number = float(value)
    if not math.isfinite(number) or number < minimum:
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise LedgerError(
            f"{name}={value!r} is not a finite number{bound}; a run that went wrong is outcome='infeasible', "
            "without a score"
        )
    return number


def _reference(trial: Trial, step: int) -> Checkpoint:
    return Checkpoint(step=step, prompts=step * trial.prompts_per_step, path=trial.key, digest="", size_bytes=0)
