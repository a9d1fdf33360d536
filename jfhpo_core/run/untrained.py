"""What the models of a family can do before any training: sampled completions, and scores on the held-out set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jfhpo_core.study.data import Prompt, Row
from jfhpo_core.study.models import Model
from jfhpo_core.study.prompting import Prompting
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.tasks import Task
from jfhpo_core.study.trial import Evaluation

BATCH = 64
"""Completions sampled at once."""

CLEAR = 2.0
"""Two scores differ clearly if they are this many standard errors apart."""


@dataclass(frozen=True)
class Untrained:
    """What an untrained model scores.

    Attributes:
        model: Its name.
        evaluation: On the held-out set, with examples.
        other: The same with a beginning-of-text token where there was none, and without where there was one; None if
            that makes no difference to its prompts.
        with_bos: Whether prompts of `evaluation` begin with that token.
    """

    model: str
    evaluation: Evaluation
    other: Evaluation | None
    with_bos: bool

    @property
    def warning(self) -> str | None:
        """What to say if the beginning-of-text token makes much of a difference."""
        if self.other is None:
            return None
        mine, theirs = self.evaluation, self.other
        noise = (mine.standard_error**2 + theirs.standard_error**2) ** 0.5
        if theirs.score - mine.score <= CLEAR * noise:
            return None
        now, then = ("with", "without") if self.with_bos else ("without", "with")
        return (
            f"untrained {self.model} scores {mine.score:.3f} {now} a beginning-of-text token before the prompt and "
            f"{theirs.score:.3f} {then} it: set trainer.settings.bos: {'never' if self.with_bos else 'always'}"
        )


def sample(model: Model, prompts: Sequence[Prompt], prompting: Prompting, max_tokens: int) -> list[str]:
    """Completions of an untrained model, at temperature 1 and with a fixed seed.

    Raises:
        OSError, ValueError: The model cannot be loaded; and whatever else its loaders raise.
    """
    from jfhpo_core.trainers.trl_rollout import EVALUATION_SEED, own_randomness

    module, sampler = _open(model, prompting, max_tokens)
    with own_randomness(EVALUATION_SEED):
        texts: list[str] = sampler.decode(sampler.sample(module, sampler.encode(prompts), temperature=1.0))
    return texts


def measure(study: Study, task: Task, model: Model, prompting: Prompting) -> Untrained:
    """Score an untrained model as its runs' evaluations will, with and without a beginning-of-text token.

    Raises:
        TrialFailure: The reward failed.
        OSError, ValueError: As `sample`.
    """
    from jfhpo_core.trainers.trl_rollout import evaluate

    spec = study.spec.evaluation
    module, sampler = _open(model, prompting, task.max_completion_tokens)
    rows: Sequence[Row] = task.heldout[: spec.prompts]
    prompts = [row["prompt"] for row in rows[:1]]

    def scored(sampler: Any) -> Evaluation:
        return evaluate(module, sampler, task, rows, spec.samples_per_prompt, spec.temperature, 0, 0)

    bos = sampler.tokenizer.bos_token_id
    with_bos = bos is not None and sampler.encode(prompts)[0][:1] == [bos]
    changed = replace(sampler, prompting=replace(prompting, bos="never" if with_bos else "always"))
    differs = changed.encode(prompts) != sampler.encode(prompts)
    return Untrained(model.name, scored(sampler), scored(changed) if differs else None, with_bos)


def _open(model: Model, prompting: Prompting, max_tokens: int) -> tuple[Any, Any]:
    """A model, where there is one on the GPU, and its sampler."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jfhpo_core.trainers.trl_rollout import build_sampler

    tokenizer = AutoTokenizer.from_pretrained(model.path, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).to(device)
    return module, build_sampler(module, tokenizer, max_tokens, BATCH, prompting)
