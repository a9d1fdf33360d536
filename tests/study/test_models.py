from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jfhpo_core.errors import SpecError
from jfhpo_core.study.models import build_ladder, count_parameters, next_levels, progress, steps_at
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import parse_study
from tests.studies import result, simulated_study, study_data


def spec(tmp_path: Path, **changes: Any) -> StudySpec:
    return StudySpec.model_validate(study_data(tmp_path, **changes))


def model(name: str, parameters: int, **changes: Any) -> dict[str, Any]:
    return {"name": name, "path": "simulated", "parameters": parameters, **changes}


def test_models_are_ordered_by_size_and_the_target_is_last(tmp_path: Path) -> None:
    family = [model("c", 600), model("a", 100), model("b", 300, devices=2)]
    ladder = build_ladder(spec(tmp_path, family=family, target="c"))
    assert [item.name for item in ladder.models] == ["a", "b", "c"]
    assert ladder.target.name == "c"
    assert [item.name for item in ladder.proxies] == ["a", "b"]
    assert ladder["b"].devices == 2


def test_models_above_the_target_are_left_out(tmp_path: Path) -> None:
    ladder = build_ladder(spec(tmp_path, target="medium"))
    assert [item.name for item in ladder.models] == ["small", "medium"]


def test_a_target_alone_is_a_ladder(tmp_path: Path) -> None:
    ladder = build_ladder(spec(tmp_path, target="small"))
    assert ladder.proxies == ()
    assert ladder.target.name == "small"
    ladder = build_ladder(spec(tmp_path, fidelity={"horizon_prompts": 480, "rungs": 3, "proxies": []}))
    assert ladder.proxies == ()


def test_proxies_can_be_picked(tmp_path: Path) -> None:
    fidelity = {"horizon_prompts": 480, "rungs": 3, "proxies": ["medium"]}
    assert [item.name for item in build_ladder(spec(tmp_path, fidelity=fidelity)).proxies] == ["medium"]


def test_size_is_counted_in_decades_below_the_target(tmp_path: Path) -> None:
    ladder = build_ladder(spec(tmp_path))
    assert ladder.size_coordinate("large") == 0
    assert ladder.size_coordinate("small") == pytest.approx(-1)
    assert ladder.size_coordinate("medium") == pytest.approx(np.log10(0.3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fidelity": {"horizon_prompts": 480, "rungs": 3, "proxies": ["large"]}},
            "'large' is not smaller than the target 'large'",
        ),
        (
            {"target": "medium", "fidelity": {"horizon_prompts": 480, "rungs": 3, "proxies": ["large"]}},
            "'large' is not smaller than the target 'medium'",
        ),
        (
            {"family": [model("a", 100), model("b", 100), model("c", 200)], "target": "c"},
            r"two models of the family have the same size \(\[100, 100\]\)",
        ),
        ({"family": "instruct", "target": "huge"}, "model 'huge' is not in the family"),
        ({"family": "nonsense"}, "nonsense"),
    ],
)
def test_ladders_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_ladder(spec(tmp_path, **changes))


def test_parameters_are_counted_over_all_weight_files(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}, tmp_path / "model-1.safetensors")
    save_file({"c": np.zeros((2, 2, 2), np.float32)}, tmp_path / "model-2.safetensors")
    assert count_parameters(str(tmp_path)) == 3 * 4 + 5 + 2 * 2 * 2


def test_given_parameters_save_the_look_into_the_weights(tmp_path: Path) -> None:
    family = [model("a", 7, path=str(tmp_path / "gone")), model("b", 9, path=str(tmp_path / "gone-too"))]
    assert build_ladder(spec(tmp_path, family=family, target="b")).target.parameters == 9


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(SpecError, match="its weights cannot be read"):
        count_parameters(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["models/smal", "./smal", "../smal", "~/no-such-model", "/no/such/model", "a/b/c", "a b"]
)
def test_a_path_that_leads_nowhere_is_refused_without_asking_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jfhpo_core.study.models.ask_hub", lambda _: pytest.fail("the hub was asked"))
    (tmp_path / "models" / "small").mkdir(parents=True)
    family = [{"name": "a", "path": path}]
    written = study_data(tmp_path, family=family, target="a")
    read = parse_study(json.dumps(written), folder=tmp_path)
    with pytest.raises(SpecError, match=r"there is no .*; correct the path") as caught:
        build_ladder(read)
    assert ("'small'" in str(caught.value)) == (path == "models/smal")


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def away(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", away)
    with pytest.raises(SpecError, match=r"neither a folder .* nor a model of the hub .*no route"):
        count_parameters("org/no-such-model")
    assert len(asked) == 1


@pytest.mark.slow
def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="neither a folder with a transformers checkpoint nor a model of the hub"):
        count_parameters(str(tmp_path))


@pytest.mark.slow
def test_parameters_of_a_checkpoint_without_safetensors_come_from_its_config(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=1, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    assert count_parameters(str(tmp_path)) == GPT2LMHeadModel(config).num_parameters()


def test_steps_at_whole_steps_only() -> None:
    assert steps_at(480, 16) == 30
    with pytest.raises(ValueError, match="480 prompts are not a whole number of steps of 7 prompts"):
        steps_at(480, 7)


def test_progress_is_the_share_of_the_horizon(tmp_path: Path) -> None:
    study = spec(tmp_path)
    assert [progress(study, prompts) for prompts in (0, 160, 480)] == [0, pytest.approx(1 / 3), 1]


def test_next_levels_are_those_not_yet_reached(tmp_path: Path) -> None:
    study = simulated_study(tmp_path)
    trial = study.new_trial(0, {}, "small", 0)
    assert next_levels(study.spec, None) == (160, 320, 480)
    assert next_levels(study.spec, trial) == (160, 320, 480)
    paused = trial.model_copy(update={"segments": (result(0, 0, 20),)})
    assert next_levels(study.spec, paused) == (480,)
    done = trial.model_copy(update={"segments": (result(0, 0, 30),)})
    assert next_levels(study.spec, done) == ()
