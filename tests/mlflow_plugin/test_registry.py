from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jfhpo_core.embedded import family_members
from jfhpo_core.errors import CheckpointError, LedgerError
from jfhpo_core.optimizer.strategy import RandomSearch
from jfhpo_core.run.outcome import SearchResult, conclude
from jfhpo_core.store.checkpoints import CheckpointStore
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.tasks import load_task
from jfhpo_core.study.trial import Checkpoint, Evaluation, Outcome, Purpose, Segment, SegmentResult, Suggestion, Trial
from mlflow_plugin.ledger import MlflowLedger
from mlflow_plugin.registry import _award, _card, _description, _measure, _tags, headline, promote, register_target
from tests.studies import evaluation, result, simulated_study

TARGET = "s"


@pytest.fixture
def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri)


@dataclass
class Finished:
    """A study whose target training is done, with whatever its checkpoint folder holds."""

    study: Study
    result: SearchResult
    ledger: MlflowLedger
    checkpoint: Path


def finish(
    client: MlflowClient, tmp_path: Path, source: Path | None, score: float, name: str = "first", **more: Any
) -> Finished:
    """A finished study; its checkpoint is a copy of `source`, or that of a trainer without weights."""
    study = resolve(
        StudySpec.model_validate(
            {
                "study": name,
                "family": "instruct",
                "target": TARGET,
                "task": "instruct",
                "space": "tiny",
                "budget": {"trial_seconds": 60},
                "tracking": {"workspace": str(tmp_path / "workspace"), "registered_model": "tuned", **more},
            }
        )
    )
    ledger = MlflowLedger(client)
    ledger.open(study.spec)
    trial = study.new_trial(0, {"learning_rate": 1e-3}, TARGET, 0)
    segment = Segment(
        index=0,
        start_step=0,
        stop_step=trial.total_steps,
        suggestion=Suggestion(source="test", explanation="to be registered"),
    )
    store = CheckpointStore(study.store)
    stage = store.stage(trial.key)
    if source is None:
        (stage / "state.json").write_text("{}")
    else:
        shutil.copytree(source, stage, dirs_exist_ok=True)
    checkpoint: Checkpoint = store.commit(trial.key, stage, trial.total_steps, 960)
    evaluation = Evaluation(
        step=trial.total_steps, prompts=960, score=score, standard_error=0.01, samples=512, seconds=1
    )
    done = SegmentResult(
        segment=segment, outcome=Outcome.REACHED, end_step=trial.total_steps, end_prompts=960,
        evaluations=(evaluation,), checkpoint=checkpoint, seconds=10,
    )  # fmt: skip
    ledger.begin(trial, segment)
    ledger.commit(trial.key, done, [])
    (trial,) = ledger.trials()
    result = SearchResult(
        study=study, trials=(trial,), recommended=None, target_trial=trial, rows=(), spent_seconds=10.0, complete=True
    )
    return Finished(study, result, ledger, study.store / checkpoint.path)


def perturbed(folder: Path) -> Path:
    """A training result: the embedded model with other weights, as the Trainer saves it."""
    base = family_members("instruct")[TARGET]
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    # As the checkpoints of instruction-tuned models have it.
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    model.save_pretrained(folder)
    return folder


def adapter(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    base = family_members("instruct")[TARGET]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("store", ["tracking_uri", "server"])
def test_the_registered_model_is_the_checkpoint_and_generates(
    store: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=request.getfixturevalue(store))
    done = finish(client, tmp_path, perturbed(tmp_path / "trained"), score=0.7)
    registration = register_target(done.study, done.result, done.ledger)
    assert (registration.name, registration.version, registration.alias) == ("tuned", "1", "champion")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    pipeline = mlflow.transformers.load_model("models:/tuned@champion")
    function = mlflow.pyfunc.load_model("models:/tuned@champion")
    weights = load_file(done.checkpoint / "model.safetensors")
    loaded = pipeline.model.state_dict()
    assert set(weights) <= set(loaded)
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name

    # Greedy generation equals that of the checkpoint with the base's tokenizer.
    tokenizer = AutoTokenizer.from_pretrained(done.study.ladder.target.path)
    prompt = load_task(done.study.spec.task).heldout[0]["prompt"]
    model = AutoModelForCausalLM.from_pretrained(done.checkpoint)
    ids = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    said = pipeline(prompt, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said == tokenizer.decode(expected, skip_special_tokens=True)
    # What it samples by is what the score was measured with.
    task = load_task(done.study.spec.task)
    own = pipeline.model.generation_config
    assert (own.do_sample, own.temperature, own.top_k, own.top_p) == (True, 1.0, 0, 1.0)
    assert (own.repetition_penalty, own.max_new_tokens) == (1.0, task.max_completion_tokens)
    answers = function.predict([prompt, prompt])
    assert len(answers) == 2
    assert all(isinstance(answer, str) and len(answer) <= 20 for answer in answers)

    version = client.get_model_version("tuned", "1")
    assert float(version.tags["jfhpo.score"]) == 0.7
    assert json.loads(version.tags["jfhpo.configuration"]) == {"learning_rate": 1e-3}
    assert version.run_id == done.ledger.run_id(done.result.trials[0].key)
    assert version.tags["jfhpo.interval_95"] == "0.6804 to 0.7196"
    assert "Held-out score 0.700" in version.description
    assert "`learning_rate` 0.001" in version.description

    # Signature and example came along, and the logged model leads to its version and has the score.
    information = mlflow.models.get_model_info("models:/tuned@champion")
    assert [column.type.name for column in information.signature.inputs.inputs] == ["string"]
    assert information.saved_input_example_info is not None
    (logged,) = client.search_logged_models([done.ledger.experiment_id], "attributes.model_type = 'jfhpo-target'")
    assert json.loads(logged.tags["mlflow.modelVersions"])[0]["name"] == "tuned"
    (score,) = [metric for metric in logged.metrics if metric.key == "eval/score"]
    assert (score.value, score.dataset_name) == (0.7, "instruct-heldout")


@pytest.mark.slow
def test_an_adapter_is_merged(client: MlflowClient, tmp_path: Path) -> None:
    from peft import PeftModel

    done = finish(client, tmp_path, adapter(tmp_path / "trained"), score=0.7)
    register_target(done.study, done.result, done.ledger)
    base = AutoModelForCausalLM.from_pretrained(done.study.ladder.target.path)
    tokens = torch.arange(3, 20)[None]
    untrained = base(tokens).logits.detach().clone()
    expected = PeftModel.from_pretrained(base, str(done.checkpoint))(tokens).logits
    loaded = mlflow_load(client)(tokens).logits
    torch.testing.assert_close(loaded, expected)
    assert not torch.allclose(untrained, loaded)


def mlflow_load(client: MlflowClient) -> Any:
    version = client.get_model_version_by_alias("tuned", "champion")
    folder = client.get_model_version_download_uri("tuned", version.version)
    return mlflow.transformers.load_model(folder).model


def test_scores_are_compared_on_the_same_heldout_set_only(tmp_path: Path) -> None:
    def measure(folder: str, heldout: str, **evaluation: float) -> str:
        (tmp_path / folder).mkdir()
        for name, text in {"train": "a", "heldout": heldout}.items():
            (tmp_path / folder / f"{name}.jsonl").write_text(json.dumps({"prompt": text}))
        (tmp_path / folder / "reward.py").write_text("def reward(prompts, completions): return [0.0] * len(prompts)")
        files = {"prompts": "train.jsonl", "heldout": "heldout.jsonl", "reward": "reward.py"}
        task = {name: str(tmp_path / folder / file) for name, file in files.items()}
        return _measure(simulated_study(tmp_path, task=task, evaluation=evaluation))

    first = measure("first", "b")
    assert measure("moved", "b") == first
    assert measure("other", "c") != first
    assert measure("cooler", "b", temperature=0.5) != first


@pytest.mark.slow
def test_registering_again_adds_nothing(client: MlflowClient, tmp_path: Path) -> None:
    done = finish(client, tmp_path, perturbed(tmp_path / "trained"), score=0.7)
    first = register_target(done.study, done.result, done.ledger)
    again = MlflowLedger(client)
    again.open(done.study.spec)
    assert register_target(done.study, done.result, again) == first
    assert len(client.search_model_versions("name = 'tuned'")) == 1


@pytest.mark.slow
def test_the_champion_falls_only_to_a_clear_winner(client: MlflowClient, tmp_path: Path) -> None:
    trained = perturbed(tmp_path / "trained")
    scores = {"first": 0.7, "alike": 0.72, "winner": 0.8}
    studies = [finish(client, tmp_path, trained, score, name) for name, score in scores.items()]
    outcomes = [register_target(done.study, done.result, done.ledger) for done in studies]
    assert [outcome.alias for outcome in outcomes] == ["champion", "challenger", "champion"]
    assert "0.720 against 0.700 of version 1; noise is 0.028" in outcomes[1].reason
    assert client.get_registered_model("tuned").aliases == {"champion": 3, "challenger": 2}
    # A rerun of an old study takes nothing away from the new champion.
    old = studies[0]
    assert "version 3 is served now" in register_target(old.study, old.result, old.ledger).note
    assert client.get_registered_model("tuned").aliases == {"champion": 3, "challenger": 2}


@pytest.mark.slow
def test_what_was_scored_in_the_chat_template_says_so_and_is_compared_with_its_like(
    client: MlflowClient, tmp_path: Path
) -> None:
    plain = finish(client, tmp_path, None, 0.5).study
    trainer = plain.spec.trainer.model_copy(update={"settings": {"chat_template": True}})
    chat = replace(plain, spec=plain.spec.model_copy(update={"trainer": trainer}))
    assert _measure(chat) != _measure(plain)
    assert "hand it messages" in _card(chat)
    assert "hand it messages" not in _card(plain)


def test_nothing_is_registered_without_weights(client: MlflowClient, tmp_path: Path) -> None:
    done = finish(client, tmp_path, None, score=0.7)
    registration = register_target(done.study, done.result, done.ledger)
    assert (registration.name, registration.uri) == (None, None)
    assert "no weights" in registration.reason
    unfinished = replace(done.result, target_trial=None)
    assert "has come to its end" in register_target(done.study, unfinished, done.ledger).reason
    silent = replace(
        done.study,
        spec=done.study.spec.model_copy(
            update={"tracking": done.study.spec.tracking.model_copy(update={"registered_model": ""})}
        ),
    )
    assert "registered_model is empty" in register_target(silent, done.result, done.ledger).reason
    assert client.search_registered_models() == []


def test_a_damaged_checkpoint_is_not_registered(client: MlflowClient, tmp_path: Path) -> None:
    done = finish(client, tmp_path, family_members("instruct")[TARGET], score=0.7)
    (done.checkpoint / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        register_target(done.study, done.result, done.ledger)
    assert client.search_registered_models() == []


# --- which run, which score, which version is served --------------------------------------------------------------


def concluded(workspace: Path, scores: dict[int, float], first: Purpose = "search") -> SearchResult:
    """A study that has trained its recommendation on the target with some seeds, the first of which it chose by."""
    configuration = {"learning_rate": 1e-3}
    baselines = [{"name": "recipe", "configuration": configuration}] if first == "baseline" else []
    study = simulated_study(workspace, baselines=baselines, seeds={"search": 0, "training": [0, 1, 2]})
    trials = []
    for seed, score in scores.items():
        trial = study.new_trial(seed, configuration, "large", seed, "confirmation" if seed else first)
        kept = Checkpoint(step=30, prompts=480, path=f"{trial.key}/step-00000030", digest=f"{seed}", size_bytes=1)
        done = result(0, 0, 30, evaluations=(evaluation(30, score),), checkpoint=kept)
        trials.append(trial.model_copy(update={"segments": (done,)}))
    return conclude(study, trials, RandomSearch(), complete=True)


def test_the_best_run_is_registered_and_judged_by_seeds_that_had_no_part_in_the_choice(tmp_path: Path) -> None:
    outcome = concluded(tmp_path, {0: 0.812, 1: 0.77, 2: 0.784})
    trial = outcome.target_trial
    assert trial is not None
    assert trial.final is not None
    assert (trial.seed, trial.final.score) == (0, 0.812)
    tags = _tags(outcome.study, outcome, trial, trial.final)
    assert (tags["jfhpo.seed"], tags["jfhpo.seed_score"]) == ("0", "0.812")
    assert (float(tags["jfhpo.score"]), tags["jfhpo.score_seeds"]) == (pytest.approx(0.777), "1, 2")
    text = _description(outcome.study, outcome, trial, trial.final)
    assert "Held-out score 0.777" in text
    assert "training seed 1, 2, which had no part in choosing the configuration" in text
    assert "trial 000, seed 0" in text
    assert "0.812 ± 0.020" in text


def test_a_confirmation_that_is_better_is_registered(tmp_path: Path) -> None:
    outcome = concluded(tmp_path, {0: 0.848, 1: 0.867})
    assert outcome.target_trial is not None
    assert (outcome.target_trial.seed, outcome.target_trial.purpose) == (1, "confirmation")


def test_a_recipe_that_is_recommended_is_registered(tmp_path: Path) -> None:
    """It is recommended with all searched hyperparameters, and its runs have those of the study file."""
    outcome = concluded(tmp_path, {0: 0.812, 1: 0.77}, "baseline")
    trial = outcome.target_trial
    assert trial is not None
    assert trial.final is not None
    assert trial.purpose == "baseline"
    tags = _tags(outcome.study, outcome, trial, trial.final)
    assert (float(tags["jfhpo.score"]), tags["jfhpo.score_seeds"]) == (pytest.approx(0.77), "1")


def test_a_score_of_the_seed_of_the_choice_says_so(tmp_path: Path) -> None:
    outcome = concluded(tmp_path, {0: 0.8})
    trial = outcome.target_trial
    assert outcome.confirmed is None
    assert trial is not None
    assert trial.final is not None
    assert "flatters" in _description(outcome.study, outcome, trial, trial.final)
    assert _tags(outcome.study, outcome, trial, trial.final)["jfhpo.score_seeds"].startswith("0 (the seed by which")


def versions(client: MlflowClient, *scores: float) -> list[Any]:
    """Versions of a registered model with these scores; their weights do not matter here."""
    client.create_registered_model("tuned")
    tags = {"jfhpo.standard_error": "0.02", "jfhpo.measure": "same", "jfhpo.score_seeds": "1"}
    return [
        client.create_model_version("tuned", source="/nowhere", tags={**tags, "jfhpo.score": str(score)})
        for score in scores
    ]


def test_a_challenger_says_what_is_served_and_is_promoted_by_hand(client: MlflowClient) -> None:
    first, second = versions(client, 0.70, 0.71)
    assert _award(client, "tuned", first).alias == "champion"
    told = _award(client, "tuned", second)
    assert told.alias == "challenger"
    assert "version 1 stays the one that is served, `jfhpo promote STUDY.yaml` would serve this one" in told.note

    promoted = promote(client, "tuned", "2", "demo")
    assert promoted.alias == "champion"
    assert "in place of version 1" in promoted.reason
    assert {name: int(number) for name, number in client.get_registered_model("tuned").aliases.items()} == {
        "champion": 2
    }
    fresh = [client.get_model_version("tuned", number) for number in ("1", "2")]
    assert "version 2 is served now" in _award(client, "tuned", fresh[0]).note
    assert _award(client, "tuned", fresh[1]) == promoted
    assert "already" in promote(client, "tuned", "2", "demo").reason
    with pytest.raises(LedgerError, match="did not promote"):
        promote(client, "tuned", "3", "demo")


def keep_rewards(client: MlflowClient, versions: list[Any], rewards: list[list[float]]) -> list[Any]:
    """The same versions, each with the mean rewards of the held-out prompts in a run of its own."""
    for number, (version, values) in enumerate(zip(versions, rewards, strict=True)):
        run = client.create_run("0")
        client.log_dict(run.info.run_id, {"by_prompt": values}, "heldout/rewards.json")
        tags = {**version.tags, "jfhpo.heldout_rewards": "heldout/rewards.json"}
        client.delete_model_version("tuned", version.version)
        versions[number] = client.create_model_version("tuned", "/nowhere", run.info.run_id, tags=tags)
    return versions


def test_champion_and_challenger_are_compared_prompt_by_prompt(client: MlflowClient) -> None:
    """The scores differ by less than two standard errors of either; the prompts tell them apart all the same."""
    hard, easy = [0.0] * 40, [1.0] * 60
    rewards = [
        [*hard, *easy],
        [1.0] * 9 + [0.0] * 31 + easy[:-1] + [0.0],
        [1.0] * 5 + [0.0] * 35 + easy[:-4] + [0.0] * 4,
    ]
    first, better, alike = keep_rewards(client, versions(client, 0.60, 0.68, 0.61), rewards)
    assert _award(client, "tuned", first).alias == "champion"
    unclear = _award(client, "tuned", alike)
    assert unclear.alias == "challenger"
    assert "better on 5 and worse on 4" in unclear.reason
    assert unclear.moved
    clear = _award(client, "tuned", better)
    assert clear.alias == "champion"
    assert "paired over 100 held-out prompts +0.080" in clear.reason
    assert "better on 9 and worse on 1" in clear.reason
    again = _award(client, "tuned", client.get_model_version("tuned", better.version))
    assert not again.moved


def test_prompts_do_not_outweigh_the_spread_between_seeds(client: MlflowClient) -> None:
    rewards = [[0.0] * 40 + [1.0] * 60, [1.0] * 9 + [0.0] * 31 + [1.0] * 60]
    first, better = keep_rewards(client, versions(client, 0.60, 0.69), rewards)
    client.set_model_version_tag("tuned", better.version, "jfhpo.standard_error_between_seeds", "0.06")
    _award(client, "tuned", first)
    told = _award(client, "tuned", client.get_model_version("tuned", better.version))
    assert told.alias == "challenger"
    assert "noise between seeds is 0.120" in told.reason


def test_a_version_is_judged_by_the_mean_reward_of_each_prompt_over_its_seeds(tmp_path: Path) -> None:
    outcome = concluded(tmp_path, {0: 0.812, 1: 0.5, 2: 1.0})
    told = {1: (0.0, 1.0), 2: (1.0, 1.0)}

    def with_rewards(trial: Trial) -> Trial:
        (done,) = trial.segments
        kept = tuple(one.model_copy(update={"by_prompt": told.get(trial.seed, ())}) for one in done.evaluations)
        return trial.model_copy(update={"segments": (done.model_copy(update={"evaluations": kept}),)})

    outcome = conclude(outcome.study, [with_rewards(trial) for trial in outcome.trials], RandomSearch(), complete=True)
    assert outcome.target_trial is not None
    judged = headline(outcome, outcome.target_trial)
    assert judged.by_prompt == (0.5, 1.0)
    assert judged.between_seeds == pytest.approx(0.25)


def test_a_flattered_score_in_a_comparison_is_named(client: MlflowClient) -> None:
    old, new = versions(client, 0.70, 0.71)
    client.delete_model_version_tag("tuned", old.version, "jfhpo.score_seeds")
    _award(client, "tuned", client.get_model_version("tuned", old.version))
    assert "that of version 1 is of the seed by which" in _award(client, "tuned", new).reason
