"""The model registry: the tuned target model, ready to be loaded, with the figures that speak for it.

Of the runs of the recommended configuration at full length, the one that scored best is registered, and the version
says which seed that was. Its own score flatters it, and so does any on the seed by which the configuration was chosen.
So a version is judged by the mean over the seeds that had no part in the choice (`jfhpo.score`), where there are any.

A version whose runs break a constraint of the study says so and never gets the alias by itself; `promote` gives it.

A version gets the alias `champion` if there is none yet or if it beats the present one beyond noise, else
`challenger`; so `models:/NAME@champion` never becomes worse by chance. Where the rewards of each held-out prompt are
known, the two are compared prompt by prompt (`jfhpo_core.report.paired`). `promote` gives the alias by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from jfhpo_core.errors import LedgerError, LedgerUnavailable
from jfhpo_core.report.findings import broken_text, interval, verdict
from jfhpo_core.report.paired import Paired, compare_paired
from jfhpo_core.report.text import duration, number
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.store.checkpoints import CheckpointStore, file_digest
from jfhpo_core.study.data import text_of
from jfhpo_core.study.history import History
from jfhpo_core.study.metrics import broken
from jfhpo_core.study.resolved import Study
from jfhpo_core.study.spec import TaskSpec
from jfhpo_core.study.tasks import load_reward, load_task
from jfhpo_core.study.trial import Checkpoint, Evaluation, Trial, canonical_json
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.presentation import configuration_text, score_metrics
from mlflow_plugin.provenance import task_data

CHAMPION = "champion"
CHALLENGER = "challenger"
BEYOND_NOISE = 2.0
"""A score beats another one if it is better by this many standard errors of the difference."""
MODEL_TYPE = "jfhpo-target"
VERSIONS = "mlflow.modelVersions"
"""Tag of a logged model by which MLflow links it to its versions in the registry."""
CHAT_NOTE = (
    "\nIt was trained and scored on prompts in the chat template: hand it messages, "
    '`[{"role": "user", "content": prompt}]`, not plain text.\n'
)
ADAPTER = "adapter_model.safetensors"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Names that transformers gives to whole weights: in one file, and the index of several."""

# Tags of a version.
SCORE = "jfhpo.score"
ERROR = "jfhpo.standard_error"
MEASURE = "jfhpo.measure"
SEEDS = "jfhpo.score_seeds"
"""Seeds that the score is the mean of. Early versions lack it, and have the score of the seed of the choice."""
CHOSEN_BY = "the seed by which the configuration was chosen"
BETWEEN = "jfhpo.standard_error_between_seeds"
HELDOUT = "jfhpo.heldout_rewards"
"""Artifact of the version's run with the mean reward of each held-out prompt, for paired comparisons."""
DIGEST = "jfhpo.checkpoint_digest"
CONSTRAINTS = "jfhpo.constraints"
BREAKS = "jfhpo.breaks"
"""Constraints that the runs of the configuration, or the registered one, do not respect; absent if there are none."""
DECIDED = "jfhpo.alias"
REASON = "jfhpo.alias_reason"


@dataclass(frozen=True)
class Registration:
    """What came of registering a study's target model.

    Attributes:
        name: Name in the registry; None if nothing was registered.
        version: Version in the registry; None if nothing was registered.
        alias: The alias that the version was given.
        reason: Why it got this alias, or why nothing was registered; for people.
        moved: Whether this call has given it the alias.
    """

    name: str | None
    version: str | None
    alias: str | None
    reason: str
    moved: bool = field(default=False, compare=False)

    @property
    def uri(self) -> str | None:
        """Where `mlflow.transformers.load_model` and `mlflow.pyfunc.load_model` find it."""
        return None if self.name is None else f"models:/{self.name}/{self.version}"

    @property
    def note(self) -> str:
        """Alias and reason in a sentence."""
        return self.reason if self.alias is None else f"{self.alias}: {self.reason}"


@dataclass(frozen=True)
class Headline:
    """What a version is judged by.

    Attributes:
        score: Mean held-out score.
        standard_error: Of the score.
        seeds: Training seeds that it is the mean of, for people.
        clean: Whether none of these seeds had a part in choosing the configuration.
        by_prompt: Mean reward of each held-out prompt over these seeds; empty where the trainer does not tell.
        between_seeds: Standard error of the score by the spread between these seeds; None with one.
    """

    score: float
    standard_error: float
    seeds: str
    clean: bool
    by_prompt: tuple[float, ...]
    between_seeds: float | None


def headline(result: SearchResult, trial: Trial) -> Headline:
    """The score on seeds that had no part in choosing the configuration; without one, that of the trial itself."""
    if result.confirmed is not None:
        row, history = result.confirmed, History.of(result.study, result.trials)
        judges = [
            one for one in history.of_configuration(row.configuration) if one.final is not None and history.judges(one)
        ]
        seeds = ", ".join(str(seed) for seed in sorted(one.seed for one in judges))
        finals = [one.final for one in judges if one.final is not None]
        between = stdev(final.score for final in finals) / len(finals) ** 0.5 if len(finals) > 1 else None
        return Headline(row.score, row.standard_error, seeds, True, _means([one.by_prompt for one in finals]), between)
    final = trial.final
    assert final is not None
    return Headline(final.score, final.standard_error, str(trial.seed), False, final.by_prompt, None)


def _means(runs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Mean reward of each prompt over runs; empty unless all have them."""
    known = [run for run in runs if run]
    return tuple(map(fmean, zip(*known, strict=True))) if len(known) == len(runs) else ()


def register_target(study: Study, result: SearchResult, ledger: MlflowLedger) -> Registration:
    """Register the weights of the study's target trial, once: a rerun finds the version that is there.

    The weights come from the trial's last checkpoint, which is verified; adapters (LoRA) are merged into their base.
    The model is logged into the trial's run.

    Args:
        study: A resolved study.
        result: Its outcome.
        ledger: The ledger that holds it, open.

    Raises:
        CheckpointError: The checkpoint is damaged or gone.
        LedgerError: The registry refuses.
    """
    name = study.spec.tracking.registered_model
    name = study.spec.study if name is None else name
    trial = result.target_trial
    if not name:
        return _nothing("tracking.registered_model is empty in the study file")
    if trial is None or trial.final is None or trial.checkpoint is None:
        return _nothing("no run of a recommended configuration on the target has come to its end")
    folder = CheckpointStore(study.store).verify(trial.checkpoint)
    if not _has_weights(folder):
        return _nothing(f"the checkpoint of trainer {study.spec.trainer.name!r} holds no weights of transformers")
    try:
        version = _find(ledger, name, trial, trial.checkpoint)
        if version is None:
            version = _create(study, result, ledger, name, trial, folder)
        return _award(ledger.client, name, version)
    except MlflowException as error:
        if isinstance(told := ledger.explain(error), LedgerUnavailable):
            raise told from error
        raise LedgerError(
            f"the model registry did not take {name!r}: {error.message}; check tracking.registered_model and run the "
            "study again: nothing is trained twice"
        ) from error


def _nothing(reason: str) -> Registration:
    return Registration(None, None, None, reason)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*WEIGHTS, ADAPTER))


def _find(ledger: MlflowLedger, name: str, trial: Trial, checkpoint: Checkpoint) -> ModelVersion | None:
    """The version that holds this very checkpoint."""
    versions = ledger.client.search_model_versions(f"run_id = '{ledger.run_id(trial.key)}'")
    return next((one for one in versions if one.name == name and one.tags.get(DIGEST) == checkpoint.digest), None)


def _create(
    study: Study, result: SearchResult, ledger: MlflowLedger, name: str, trial: Trial, folder: Path
) -> ModelVersion:
    client, run_id = ledger.client, ledger.run_id(trial.key)
    assert trial.final is not None
    tags = _tags(study, result, trial, trial.final)
    model = client.create_logged_model(
        ledger.experiment_id,
        name=f"{study.spec.study}-{study.ladder.target.name}",
        source_run_id=run_id,
        tags=tags,
        params={parameter: str(value) for parameter, value in trial.configuration.items()},
        model_type=MODEL_TYPE,
    )
    with tempfile.TemporaryDirectory(prefix="jfhpo-") as scratch:
        saved = Path(scratch) / "model"
        _save(study, folder, saved, run_id, model)
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, "READY")
    if HELDOUT in tags:
        client.log_dict(run_id, {"by_prompt": headline(result, trial).by_prompt}, tags[HELDOUT])
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, trial.step)])
    client.log_batch(run_id, _metrics(study, trial, trial.final, model.model_id))
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=study.spec.description or None)
    # Not models:/ID, which MLflow would look up in the tracking store of the process instead of the client's.
    version = client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=run_id,
        tags=tags,
        description=_description(study, result, trial, trial.final),
        model_id=model.model_id,
    )
    client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps([{"name": name, "version": version.version}])})
    return version


def _metrics(study: Study, trial: Trial, final: Evaluation, model_id: str) -> list[Metric]:
    """The final evaluation, for the page of the logged model."""
    heldout = task_data(study.spec.task).heldout
    named = {} if heldout is None else {"dataset_name": heldout.name, "dataset_digest": heldout.digest}
    now = int(time.time() * 1000)
    return [
        Metric(name, value, now, trial.step, model_id=model_id, **named) for name, value in score_metrics(final).items()
    ]


def _description(study: Study, result: SearchResult, trial: Trial, final: Evaluation) -> str:
    """What a reader of the registry wants to know about a version, in Markdown."""
    judged = headline(result, trial)
    low, high = interval(judged.score, judged.standard_error)
    basis = (
        f"the mean of the runs with training seed {judged.seeds}, which had no part in choosing the configuration"
        if judged.clean
        else f"measured on {CHOSEN_BY}, which flatters it"
    )
    return "\n\n".join(
        [
            (
                f"**Held-out score {number(judged.score)}**, 95 % interval {number(low)} to {number(high)}: {basis}. "
                f"Study `{study.spec.study}`."
            ),
            (
                f"These weights are of trial {trial.number:03d}, seed {trial.seed}: of the recommended configuration's "
                f"runs at full length the one that scored best, {number(final.score)} ± {number(final.standard_error)} "
                f"over {final.samples} completions."
            ),
            *([verdict(result)] if result.recommended is not None else []),
            *_constraint_note(study, result, final),
            f"Configuration: {configuration_text(trial.configuration)}",
            *([CHAT_NOTE.strip()] if _is_chat(study) else []),
            (
                f"Training took {duration(trial.charge_seconds)} of device-time, the search before it "
                f"{duration(result.spent_seconds)}."
            ),
        ]
    )


def _constraint_note(study: Study, result: SearchResult, final: Evaluation) -> list[str]:
    """How the weights keep to the constraints; empty without any."""
    limits = study.spec.limits
    if not limits:
        return []
    lead = f"**It breaks {breaks}.**" if (breaks := _breaks(study, result, final)) else "It respects all constraints."
    means = (
        f"{broken_text(limits, final.training)} in this run, {broken_text(limits, result.rows[0].measured)} over all"
    )
    return [f"{lead} Means over the last rung of training: {means}."]


def _breaks(study: Study, result: SearchResult, final: Evaluation) -> str:
    """Constraints that the registered run, or all runs of its configuration together, do not respect; empty if none."""
    row, lacking = result.rows[0], broken(study.spec.limits, final.training)
    parts = [f"{broken_text(lacking, final.training)} in the registered run"] if lacking else []
    parts += [f"{broken_text(row.broken, row.measured)} over all runs"] if row.broken else []
    return ", ".join(parts)


def _tags(study: Study, result: SearchResult, trial: Trial, final: Evaluation) -> dict[str, str]:
    assert trial.checkpoint is not None
    judged = headline(result, trial)
    more = {HELDOUT: f"heldout/{trial.checkpoint.digest[:16]}.json"} if judged.by_prompt else {}
    if judged.between_seeds is not None:
        more[BETWEEN] = repr(judged.between_seeds)
    if study.spec.limits:
        more[CONSTRAINTS] = broken_text(study.spec.limits, result.rows[0].measured)
        if breaks := _breaks(study, result, final):
            more[BREAKS] = breaks
    return more | {
        "jfhpo.study": study.spec.study,
        "jfhpo.trial_key": trial.key,
        "jfhpo.target": study.ladder.target.name,
        "jfhpo.configuration": canonical_json(trial.configuration),
        "jfhpo.seed": str(trial.seed),
        "jfhpo.seed_score": repr(final.score),
        SCORE: repr(judged.score),
        ERROR: repr(judged.standard_error),
        SEEDS: judged.seeds if judged.clean else f"{judged.seeds} ({CHOSEN_BY})",
        "jfhpo.interval_95": "{:.4f} to {:.4f}".format(*interval(judged.score, judged.standard_error)),
        MEASURE: _measure(study),
        DIGEST: trial.checkpoint.digest,
        "jfhpo.training_seconds": repr(trial.charge_seconds),
        "jfhpo.search_seconds": repr(result.spent_seconds),
    }


def _measure(study: Study) -> str:
    """Identity of held-out set, reward and the way of evaluating: only scores of one measure can be compared.

    Files count by their content, not by where they lie.
    """
    evaluation = study.spec.evaluation.model_dump(mode="json")
    wrapped = ["chat template"] if _is_chat(study) else []
    meaning = [evaluation, study.spec.task.max_completion_tokens, *(_digests(study.spec.task)), *wrapped]
    return hashlib.sha256(canonical_json(meaning).encode()).hexdigest()[:16]


def _is_chat(study: Study) -> bool:
    """Whether prompts were wrapped as a user's message by the tokenizer's chat template."""
    trainer = study.spec.trainer
    return trainer.name == "verl" or bool(trainer.settings.get("chat_template"))


def _digests(task: TaskSpec) -> list[str]:
    heldout = task_data(task).heldout
    rewards = [
        part
        for one in load_reward(task).functions
        for part in (one.function.rpartition(".py")[2].removeprefix(":"), file_digest(Path(one.file)))
    ]
    return [heldout.digest if heldout is not None else "", *rewards]


def _save(study: Study, checkpoint: Path, path: Path, run_id: str, model: Any) -> None:
    """Write the model with its tokenizer in MLflow's format."""
    import mlflow.transformers
    import torch
    from huggingface_hub import ModelCard
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    base = study.ladder.target.path
    if (checkpoint / ADAPTER).is_file():
        from peft import PeftModel

        # The trainer holds the frozen base in float32, too.
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        weights = PeftModel.from_pretrained(whole, str(checkpoint)).merge_and_unload()
    else:
        weights = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    task = load_task(study.spec.task)
    # Generate as the score was measured, whatever the base model's own settings are.
    sampling = {
        "max_new_tokens": task.max_completion_tokens,
        "do_sample": True,
        "temperature": study.spec.evaluation.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    own = weights.generation_config
    weights.generation_config = GenerationConfig(
        **sampling, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    text = Schema([ColSpec("string")])
    mlflow.transformers.save_model(
        {"model": weights, "tokenizer": tokenizer},
        path=str(path),
        task="text-generation",
        mlflow_model=Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        ),
        signature=ModelSignature(inputs=text, outputs=text),
        input_example=[text_of(task.heldout[0]["prompt"])],
        model_card=ModelCard(_card(study)),
        model_config={**sampling, "return_full_text": False},
        # Named here, because MLflow would load the model in a further process to find them out.
        pip_requirements=[
            f"{package}=={installed(package).partition('+')[0]}" for package in ("torch", "transformers")
        ],
    )


def _card(study: Study) -> str:
    """What the model is. Its licence is that of the base model, which only the user knows."""
    spec = study.spec
    task = Path(spec.task.title).name
    return (
        f"---\nbase_model: {spec.target}\npipeline_tag: text-generation\n---\n"
        f"# {spec.study}\n\n{spec.description}\n\n`{spec.target}`, fine-tuned by reinforcement learning on {task} with "
        "hyperparameters found by jfhpo. Configuration, score and cost are tags of its version in the registry.\n"
        f"{CHAT_NOTE if _is_chat(study) else ''}"
    )


def promote(client: MlflowClient, name: str, version: str, study: str) -> Registration:
    """Serve a version as the champion, whatever its score.

    Args:
        client: Talks to the registry.
        name: Name of the registered model.
        version: Which version.
        study: The study that registered it, for the reason.

    Raises:
        LedgerError: The registry does not have it.
    """
    try:
        chosen = client.get_model_version(name, version)
        holder = _holder(client, name, CHAMPION)
        if holder == version:
            return Registration(name, version, CHAMPION, f"version {version} is served already")
        client.set_registered_model_alias(name, CHAMPION, version)
        if _holder(client, name, CHALLENGER) == version:
            client.delete_registered_model_alias(name, CHALLENGER)
        before = f", in place of version {holder}" if holder is not None else ""
        reason = f"version {version} is served: study {study!r} was promoted by hand{before}"
        _note_decision(client, chosen, CHAMPION, reason)
    except MlflowException as error:
        raise LedgerError(f"the model registry did not promote {name!r}, version {version}: {error.message}") from error
    return Registration(name, version, CHAMPION, reason)


def _award(client: MlflowClient, name: str, version: ModelVersion) -> Registration:
    """Give a version its alias. The decision is kept with the version, so that a rerun does not take it again."""
    number = str(version.version)
    if DECIDED in version.tags:
        alias, reason = version.tags[DECIDED], version.tags[REASON]
        holder = _holder(client, name, CHAMPION)
        if alias == CHAMPION and holder != number:
            return Registration(name, number, None, f"it was the champion; version {holder} is served now")
        return Registration(name, number, alias, reason)
    holder = _holder(client, name, CHAMPION)
    champion = client.get_model_version(name, holder) if holder is not None else None
    paired = _paired(client, version, champion) if champion is not None else None
    alias, reason = _compare(version, champion, paired)
    client.set_registered_model_alias(name, alias, number)
    _note_decision(client, version, alias, reason)
    return Registration(name, number, alias, reason, moved=True)


def _holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that has an alias."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def _note_decision(client: MlflowClient, version: ModelVersion, alias: str, reason: str) -> None:
    client.set_model_version_tag(version.name, version.version, REASON, reason)
    client.set_model_version_tag(version.name, version.version, DECIDED, alias)


def _paired(client: MlflowClient, version: ModelVersion, champion: ModelVersion) -> Paired | None:
    """The two over the same prompts; None if one of them did not keep the rewards, or has lost them."""
    if HELDOUT not in version.tags or HELDOUT not in champion.tags:
        return None
    rewards = []
    with tempfile.TemporaryDirectory(prefix="jfhpo-") as folder:
        for one in (version, champion):
            try:
                path = client.download_artifacts(one.run_id, one.tags[HELDOUT], folder)
            except (MlflowException, OSError):
                return None
            rewards.append(json.loads(Path(path).read_text(encoding="utf-8"))["by_prompt"])
    return compare_paired(*rewards)


def _compare(version: ModelVersion, champion: ModelVersion | None, paired: Paired | None) -> tuple[str, str]:
    """Alias and reason, which says what is served.

    With the rewards of each prompt a challenger wins if the paired test finds it better and, where several seeds tell
    how much training runs differ, by more than that; else it has to be ahead by more than the noise of both scores.
    """
    if BREAKS in version.tags:
        return (
            CHALLENGER,
            f"it breaks {version.tags[BREAKS]}; `jfhpo promote STUDY.yaml` would serve it all the same",
        )
    if champion is None:
        return CHAMPION, "it is the first one"
    if str(champion.version) == str(version.version):
        return CHAMPION, "it is the champion already"
    stays = f"version {champion.version} stays the one that is served, `jfhpo promote STUDY.yaml` would serve this one"
    if champion.tags.get(MEASURE) != version.tags[MEASURE]:
        return CHALLENGER, f"version {champion.version} was scored on other held-out rows or in another way; {stays}"
    score, error = float(version.tags[SCORE]), float(version.tags[ERROR])
    held, held_error = float(champion.tags[SCORE]), float(champion.tags[ERROR])
    errors = (error, held_error) if paired is None else (_between(version), _between(champion))
    noise = BEYOND_NOISE * math.hypot(*errors)
    wins = score - held > noise and (paired is None or (paired.is_clear and paired.difference > 0))
    figures = f"{score:.3f} against {held:.3f} of version {champion.version}; "
    if paired is None:
        figures += f"noise is {noise:.3f}"
    else:
        figures += f"{paired}; " + (f"noise between seeds is {noise:.3f}" if noise else "one training seed each")
    for one in (version, champion):
        if CHOSEN_BY in one.tags.get(SEEDS, CHOSEN_BY):
            figures += f"; that of version {one.version} is of {CHOSEN_BY}, which flatters it"
    if wins:
        return CHAMPION, f"it beats the champion before it: {figures}"
    return CHALLENGER, f"it does not beat the champion beyond noise: {figures}; {stays}"


def _between(version: ModelVersion) -> float:
    """Standard error of a version's score by the spread between seeds; 0 if it is not known."""
    return float(version.tags.get(BETWEEN, 0.0))
