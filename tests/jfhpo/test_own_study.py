"""A family, a task and a reward that the project has never seen, brought by a study file alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jfhpo_core.study.study_file import load_study
from mlflow_plugin.ledger import MlflowLedger

WORDS = ["<pad>", "</s>", "<unk>", "red", "green", "blue", "one", "two", "three", "sky", "grass", "rose", "is", "?"]
SIZES = {"tiny": 16, "small": 24, "large": 32}

STUDY = """
study: colours
family:
  - {name: tiny, path: models/tiny}
  - {name: small, path: models/small}
  - {name: large, path: models/large}
target: large
task:
  prompts: train.jsonl
  heldout: heldout.jsonl
  reward: score.py:names_the_colour
  max_completion_tokens: 3
trainer: {name: trl, fixed: {prompts_per_step: 4, n_samples: 4}}
space:
  learning_rate: {type: float, low: 1e-3, high: 3e-2, log: true, shifts_with_size: true}
  scheduler: {type: choice, values: [constant, cosine]}
fidelity: {horizon_prompts: 32, rungs: 2}
evaluation: {prompts: 16, samples_per_prompt: 2}
budget: {trial_seconds: 8, max_parallel: 1}
baselines:
  - {name: recipe, configuration: {learning_rate: 1e-5}}
strategy: {name: jfhpo, settings: {initial_trials: 2}}
seeds: {training: [3]}
cluster: {address: inline}
"""

REWARD = '''
def names_the_colour(prompts, completions, *, colour, **columns):
    """Half a point for the right colour anywhere, the rest for nothing else."""
    return [0.5 * (c in text) + 0.5 * (text.strip() == c) for text, c in zip(completions, colour)]
'''


def make_model(folder: Path, hidden: int) -> None:
    """An untrained Llama with a word tokenizer: another architecture than the embedded families have."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(hidden)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name, hidden in SIZES.items():
        make_model(tmp_path / "models" / name, hidden)
    colours = {"sky": "blue", "grass": "green", "rose": "red"}
    rows = [
        {"prompt": f"{count} {thing} is ?", "colour": colour}
        for count in ("one", "two", "three")
        for thing, colour in colours.items()
    ]
    heldout = [{"prompt": f"{thing} is ?", "colour": colour} for thing, colour in colours.items()]
    for name, part in (("train", rows), ("heldout", heldout)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (tmp_path / "score.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    return tmp_path / "study.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_uri")
def test_an_unknown_family_and_task_run_from_a_study_file(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [str(Path(sys.executable).with_name("jfhpo")), "search", "study.yaml", "--plain"]
    ended = subprocess.run(command, cwd=study.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "models:/colours/1, champion: it is the first one" in " ".join(ended.stdout.split())

    spec = load_study(study)
    uri = f"sqlite:///{study.parent}/mlflow.db"
    ledger = MlflowLedger()
    assert ledger.look(spec.model_copy(update={"tracking": spec.tracking.model_copy(update={"uri": uri})}))
    trials = ledger.trials()
    # How many trainings fit depends on the machine: the budget is in seconds.
    assert {"tiny", "large"} <= {trial.model for trial in trials if trial.purpose == "search"} <= set(SIZES)
    assert all(trial.evaluations for trial in trials)

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    pipeline = mlflow.transformers.load_model("models:/colours@champion")
    text = pipeline("one sky is ?", max_new_tokens=3)[0]["generated_text"]
    assert text.startswith("one sky is ?")
