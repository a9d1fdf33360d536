from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from jfhpo_core.errors import SpecError
from jfhpo_core.study.hyperparameters import default_spaces
from jfhpo_core.study.operational import OPERATIONAL
from jfhpo_core.study.spec import StudySpec, TrainerSpec, study_schema
from jfhpo_core.study.study_file import load_study, parse_study
from jfhpo_core.study.yaml_text import write_yaml

STUDY = """\
# A comment, so that lines and fields differ.
study: demo
family:
  - {name: small, path: org/small, parameters: 100000}
  - {name: large, path: org/large, parameters: 600000}
target: large
task: instruct
trainer:
  name: simulated
  fixed:
    temperature: 0.9
space:
  learning_rate: {type: float, low: 1e-6, high: 1e-2, log: true}
  scheduler: {type: choice, values: [constant, cosine]}
fidelity:
  horizon_prompts: 480
  rungs: 3
budget:
  trial_seconds: 600
baselines:
  - name: recipe
    configuration: {learning_rate: 1e-6}
"""


def changed(old: str, new: str) -> str:
    assert STUDY.count(old) == 1
    return STUDY.replace(old, new)


# --- what is read -------------------------------------------------------------------------------------------------


def test_short_forms_mean_the_long_ones() -> None:
    short = parse_study("{study: s, family: f, target: m, task: t, trainer: simulated, space: tiny, strategy: random,"
                        " budget: {gpu_hours: 0.5}}")  # fmt: skip
    assert short.family.embedded == "f"
    assert short.task.embedded == "t"
    assert short.trainer.name == "simulated"
    assert short.strategy.name == "random"
    assert short.space.model_dump(exclude_defaults=True).keys() == default_spaces()["tiny"].keys()
    assert short.budget.device_seconds == 1800


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "+1e-6", "0.000001", "1.e-6"])
def test_scientific_notation_is_a_number(text: str) -> None:
    spec = parse_study(changed("configuration: {learning_rate: 1e-6}", f"configuration: {{learning_rate: {text}}}"))
    value = spec.baselines[0].configuration["learning_rate"]
    assert isinstance(value, float)
    assert value == 1e-6


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("8.0", 8.0), ("true", True), ('"8"', "8"), ("e5", "e5"), ("1e", "1e"), ("e-5", "e-5")],
)
def test_other_scalars_keep_their_type(text: str, value: object) -> None:
    spec = parse_study(changed("temperature: 0.9", f"temperature: {text}"))
    read = spec.trainer.fixed["temperature"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("fidelity", "levels"),
    [
        ("{horizon_prompts: 480, rungs: 3}", (160, 320, 480)),
        ("{horizon_prompts: 480, rungs: 1}", (480,)),
        ("{horizon_prompts: 480, rungs: [32, 96, 480]}", (32, 96, 480)),
    ],
)
def test_levels(fidelity: str, levels: tuple[int, ...]) -> None:
    data = yaml.safe_load(STUDY) | {"fidelity": yaml.safe_load(fidelity)}
    assert StudySpec.model_validate(data).fidelity.levels == levels


def test_a_study_written_as_yaml_reads_back_equal() -> None:
    spec = parse_study(STUDY)
    assert parse_study(spec.to_yaml()) == spec


@pytest.mark.parametrize("name", ["llm", "tiny"])
def test_a_default_space_leaves_out_what_is_fixed(name: str) -> None:
    fixed = {"prompts_per_step": 32, "mini_batches": 4, "temperature": 1.0}
    data = yaml.safe_load(STUDY) | {"space": name, "trainer": {"name": "simulated", "fixed": fixed}}
    spec = parse_study(json.dumps(data))
    assert list(spec.space) == [known for known in default_spaces()[name] if known not in fixed]


def test_an_empty_condition_is_refused_but_in_studies_that_a_ledger_has_kept() -> None:
    spec = parse_study(STUDY)
    kept = write_yaml(spec.model_dump(mode="json"))
    assert "when: {}" in kept
    with pytest.raises(SpecError, match=r"space\.\w+\.when = {}: .* remove it, or name a choice"):
        parse_study(kept)
    assert parse_study(kept, recorded=True) == spec


LINES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=30)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    LINES,
    st.sampled_from(
        ["1e-6", "1e5", "1.5", "true", "no", "null", "~", "", " x", "2026-11-22", "0x1f", "1_000", "12:30"]
    ),
)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.dictionaries(LINES, SCALARS, max_size=5),
    LINES,
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_any_value_survives_yaml(fixed: dict[str, Any], description: str, name: str) -> None:
    data = yaml.safe_load(STUDY) | {"description": description, "study": name}
    data["trainer"] = {"name": "simulated", "fixed": fixed, "settings": fixed}
    data["space"] = {"searched": {"type": "choice", "values": ["1e-3", 1e-3, True]}}
    spec = StudySpec.model_validate(data)
    back = parse_study(spec.to_yaml())
    assert back == spec
    assert back.to_yaml() == spec.to_yaml()
    assert back.identity() == spec.identity()


def test_the_examples_are_valid_studies() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    assert examples
    for path in examples:
        assert load_study(path).study


def test_the_schema_describes_every_section() -> None:
    schema = study_schema()
    assert schema["properties"].keys() == StudySpec.model_fields.keys()
    fields = [field for section in schema["$defs"].values() for field in section.get("properties", {}).items()]
    bounded = [name for name, field in fields if "minimum" in field or "exclusiveMinimum" in field]
    assert {"horizon_prompts", "segment_retries", "top_k"} <= set(bounded)


# --- what is refused ----------------------------------------------------------------------------------------------

BEFORE_SPACE, _ = STUDY.split("space:")

BAD = {
    "wrong type": (
        changed("trial_seconds: 600", "trial_seconds: lots"), 19, "budget.trial_seconds", '"lots"', "number",
    ),
    "out of bounds": (changed("trial_seconds: 600", "trial_seconds: -1"), 19, "budget.trial_seconds", "-1", "greater"),
    "infinite": (changed("trial_seconds: 600", "trial_seconds: .inf"), 19, "budget.trial_seconds", "inf", "finite"),
    "unknown field": (STUDY + "surprise: 1\n", 23, "surprise", "1", "remove it or correct its spelling"),
    "unknown field inside": (changed("rungs: 3", "rung: 3"), 17, "fidelity.rung", "3", "remove it or correct"),
    "missing field": (changed("target: large\n", ""), 2, "target", "", "add it"),
    "missing field inside": (changed("path: org/small, ", ""), 4, "family.0.path", "", "add it"),
    "repeated field": (STUDY + "target: small\n", 23, "target", "", "given twice; keep one"),
    "repeated field inside": (changed("rungs: 3", "rungs: 3\n  rungs: 5"), 18, "rungs", "", "given twice; keep one"),
    "both budgets": (changed("trial_seconds: 600", "trial_seconds: 600\n  gpu_hours: 1"), 18, "budget", "", "once"),
    "no budget": (changed("trial_seconds: 600", "max_parallel: 2"), 18, "budget", "", "trial_seconds or gpu_hours"),
    "rungs do not divide": (changed("rungs: 3", "rungs: 7"), 15, "fidelity", "7", "cannot be cut into 7 equal rungs"),
    "rungs not ascending": (changed("rungs: 3", "rungs: [480, 160]"), 15, "fidelity", "[480, 160]", "ascend"),
    "rungs end early": (changed("rungs: 3", "rungs: [160, 320]"), 15, "fidelity", "[160, 320]", "end at the horizon"),
    "rungs negative": (changed("rungs: 3", "rungs: [-16, 480]"), 15, "fidelity", "[-16, 480]", "positive"),
    "rungs a fraction": (changed("rungs: 3", "rungs: 2.5"), 17, "fidelity.rungs", "2.5", "valid integer"),
    "rung no whole step": (changed("rungs: 3", "rungs: [100, 480]"), 15, "fidelity", "100", "as multiples of it"),
    "batch does not divide": (
        changed("temperature: 0.9", "prompts_per_step: 7"), 15, "fidelity", "7", "not a whole number of steps",
    ),
    "batch only now and then": (
        changed(
            "  scheduler: {type: choice, values: [constant, cosine]}",
            "  scheduler: {type: choice, values: [constant, cosine]}\n"
            "  prompts_per_step: {type: choice, values: [3, 6], when: {scheduler: [cosine]}}",
        ).replace("horizon_prompts: 480", "horizon_prompts: 90"),
        16, "fidelity", "30", "not a whole number of steps of 16",
    ),
    "a baseline named like our rows": (
        changed("name: recipe", "name: recommended"), 20, "baselines", "recommended", "another name",
    ),
    "batch as a range": (
        changed(
            "  scheduler: {type: choice, values: [constant, cosine]}",
            "  prompts_per_step: {type: int, low: 8, high: 16}",
        ),
        14, "space.prompts_per_step", "", "it must be a choice",
    ),
    "batch no number": (changed("temperature: 0.9", "prompts_per_step: many"), 2, "study", "'many'", "whole number"),
    "target not in family": (changed("target: large", "target: huge"), 6, "target", "huge", "(small, large)"),
    "proxy not in family": (
        changed("rungs: 3", "proxies: [tiny]"), 17, "fidelity.proxies", "tiny", "not in the family (small, large)",
    ),
    "models of one name": (changed("name: small", "name: large"), 3, "family", "'large', 'large'", "differ"),
    "empty family": (changed("family:\n", "family: []\nx:\n"), 3, "family", "", "list your own models"),
    "name with slash": (changed("study: demo", "study: a/b"), 2, "study", '"a/b"', "use letters, digits"),
    "name with leading dot": (changed("study: demo", "study: .demo"), 2, "study", '".demo"', "use letters, digits"),
    "name too long": (changed("study: demo", "study: " + "x" * 65), 2, "study", "xxx", "at most 64"),
    "name read as a truth value": (changed("study: demo", "study: true"), 2, "study", "true", "in quotes"),
    "name read as a number": (changed("study: demo", "study: 1.10"), 2, "study", "1.1", "in quotes"),
    "empty space": (BEFORE_SPACE + "space: {}\nbudget: {gpu_hours: 1}\n", 12, "space", "", "name at least one"),
    "unknown default space": (BEFORE_SPACE + "space: huge\nbudget: {gpu_hours: 1}\n", 12, "space", "huge", "llm, tiny"),
    "no type": (changed("type: float, ", ""), 13, "space.learning_rate", "", "add `type: float`"),
    "unknown type": (
        changed("type: float", "type: real"), 13, "space.learning_rate", "real", "use type: float, int or",
    ),
    "bounds reversed": (changed("low: 1e-6", "low: 1.0"), 13, "space.learning_rate", "1.0", "low must be below high"),
    "condition on a non-choice": (
        changed("cosine]}", "cosine], when: {learning_rate: [1e-6]}}"),
        12, "space", "learning_rate", "must be a choice",
    ),
    "fixed and searched": (
        changed("temperature: 0.9", "learning_rate: 1e-4"),
        11, "trainer.fixed.learning_rate", "", "remove it, or space.learning_rate",
    ),
    "baselines of one name": (
        STUDY + "  - {name: recipe, configuration: {}}\n", 20, "baselines", "'recipe', 'recipe'", "differ",
    ),
    "baseline value a list": (
        changed("{learning_rate: 1e-6}", "{learning_rate: [1]}"),
        22, "baselines.0.configuration.learning_rate", "", "number",
    ),
    "task half given": (changed("task: instruct", "task: {prompts: a.jsonl}"), 7, "task", "", "give all three"),
    "task given twice": (
        changed("task: instruct", "task: {embedded: instruct, prompts: a}"), 7, "task", "", "not both",
    ),
    "section as a number": (STUDY + "seeds: 5\n", 23, "seeds", "5", "write its fields as"),
    "seeds equal": (STUDY + "seeds: {training: [1, 1]}\n", 23, "seeds.training", "[1, 1]", "must differ"),
    "unknown rule set": (STUDY + "stopping: {rules: strict}\n", 23, "stopping.rules", '"strict"', "'extended'"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "field", "value", "remedy"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_with_line_field_value_and_remedy(
    text: str, line: int, field: str, value: str, remedy: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        parse_study(text, source="study.yaml")
    message = next(part for part in str(refusal.value).splitlines() if field in part and remedy in part)
    assert message.startswith(f"study.yaml, line {line}: ")
    assert value in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is a mapping that begins with `study: NAME`"),
        ("# only a comment\n", "is a mapping that begins with"),
        ("- study: demo\n", "is a mapping that begins with"),
        ("demo", "is a mapping that begins with"),
        ("study: [demo\n", "line 2: this is not valid YAML: expected ',' or ']'"),
        ("study: demo\n\ttarget: x\n", "line 2: this is not valid YAML"),
        ("study: demo\nstudy: again\n", "line 2: 'study' is given twice"),
        ("study: a\n---\nstudy: b\n", "line 2: this is not valid YAML"),
        ("study: !!python/object/apply:os.getcwd []\n", "line 1: this is not valid YAML"),
        ("study: \x00\n", "this is not valid YAML"),
        ("study: 2026-13-45\n", "this is not valid YAML: month"),
        ("study: &a [*a]\n", "line 1: an alias refers to a value that contains it"),
        ("? [a, b]\n: 1\n", "line 1: a field's name must be a word"),
        ("1: 2\n", "line 1: a field's name must be a word; put '1' in quotes"),
    ],
)
def test_what_is_no_study_at_all_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        parse_study(text, source="study.yaml")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("study.yaml")


def test_every_fault_is_told_at_once() -> None:
    text = changed("rungs: 3", "rungs: 2.5").replace("trial_seconds: 600", "trial_seconds: lots") + "surprise: 1\n"
    with pytest.raises(SpecError) as refusal:
        parse_study(text)
    assert [line.split(": ")[0] for line in str(refusal.value).splitlines()] == [
        "study, line 17",
        "study, line 19",
        "study, line 23",
    ]


def test_aliases_are_allowed_where_they_make_sense() -> None:
    text = changed("configuration: {learning_rate: 1e-6}", "configuration: &c {learning_rate: 1e-6}")
    spec = parse_study(text + "  - {name: again, configuration: *c}\n")
    assert spec.baselines[0].configuration == spec.baselines[1].configuration


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\xff\xfe", b"study: \xff\xfe\n", None])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "study.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"study\.yaml: the study file cannot be read"):
        load_study(path)


def test_a_study_file_that_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").touch()
    with pytest.raises(SpecError, match=r"there is 'study\.yaml'; correct the path .* the folder you are in"):
        load_study(tmp_path / "sudy.yml")


def test_a_folder_is_no_study_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load_study(tmp_path)


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("study: demo", "study: other"),
        ("parameters: 100000", "parameters: 200000"),
        ("target: large", "target: small"),
        ("task: instruct", "task: arithmetic"),
        ("temperature: 0.9", "temperature: 0.8"),
        ("high: 1e-2", "high: 1e-3"),
        ("rungs: 3", "rungs: 5"),
        ("horizon_prompts: 480", "horizon_prompts: 960"),
        ("budget:", "evaluation: {prompts: 64}\nbudget:"),
        ("budget:", "stopping: {rules: paper}\nbudget:"),
    ],
)
def test_identity_changes_with_what_gives_trials_their_meaning(old: str, new: str) -> None:
    assert parse_study(changed(old, new)).identity() != parse_study(STUDY).identity()


def test_identity_stays_when_the_study_moves_to_another_folder(tmp_path: Path) -> None:
    text = changed("task: instruct", "task: {prompts: train.jsonl, heldout: test.jsonl, reward: reward.py:score}")
    here, there = (parse_study(text, folder=tmp_path / name) for name in ("here", "there"))
    assert here.task.prompts != there.task.prompts
    assert here.identity() == there.identity()
    assert parse_study(text.replace("reward.py:score", "reward.py:other")).identity() != here.identity()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("trial_seconds: 600", "gpu_hours: 5\n  max_parallel: 4"),
        ("study: demo", "study: demo\ndescription: the first one"),
        ("name: recipe", "name: other"),
        ("budget:", "seeds: {search: 3, training: [0, 1, 2]}\nbudget:"),
        ("budget:", "strategy: random\nbudget:"),
        ("budget:", "random_search: true\nbudget:"),
        ("budget:", "cluster: {address: inline}\nbudget:"),
        ("budget:", "tracking: {uri: 'sqlite:///other.db'}\nbudget:"),
        ("low: 1e-6", "low: 0.000001"),
        ("parameters: 100000", "parameters: 100000, devices: 4"),
    ],
)
def test_identity_stays_when_only_budget_comparison_or_place_change(old: str, new: str) -> None:
    assert parse_study(changed(old, new)).identity() == parse_study(STUDY).identity()


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        ("openrlhf", {"hang_seconds": 60, "python": "/opt/python", "jobs_address": "http://head:8265"}),
        ("openrlhf", {"environment": {"NCCL_DEBUG": "INFO"}, "tensor_parallel": 2}),
        ("verl", {"hang_seconds": 60, "gpus_per_node": 4}),
        ("trl", {"threads": 4, "device": "cuda"}),
    ],
)
def test_identity_stays_when_operational_settings_of_the_trainer_change(trainer: str, settings: dict[str, Any]) -> None:
    spec = parse_study(STUDY)
    plain, changed = (
        spec.model_copy(update={"trainer": TrainerSpec(name=trainer, settings={"chat_template": True, **more})})
        for more in ({}, settings)
    )
    assert plain.identity() == changed.identity()
    assert plain.changes(changed) == []
    other = changed.model_copy(update={"trainer": TrainerSpec(name=trainer, settings={"chat_template": False})})
    assert other.identity() != plain.identity()
    assert plain.changes(other) == ["trainer.settings.chat_template"]


def test_settings_of_a_trainer_of_another_package_count_unless_it_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Settings(BaseModel):
        rounds: int = 1
        patience_seconds: float = Field(default=1.0, json_schema_extra=OPERATIONAL)

    class Silent:
        name = "mine"

    class Telling(Silent):
        settings = Settings

    def identities(trainer: type, name: str) -> set[str]:
        monkeypatch.setattr("jfhpo_core.study.spec.load_plugin", lambda *_: trainer)
        specs = (
            parse_study(STUDY).model_copy(update={"trainer": TrainerSpec(name="mine", settings={name: value})})
            for value in (1, 2)
        )
        return {spec.identity() for spec in specs}

    assert len(identities(Silent, "patience_seconds")) == 2
    assert len(identities(Telling, "patience_seconds")) == 1
    assert len(identities(Telling, "rounds")) == 2


def test_every_top_level_field_says_whether_it_gives_trials_their_meaning() -> None:
    assert set(parse_study(STUDY).meaning()) == {
        "study", "family", "target", "task", "trainer", "space", "fidelity", "evaluation", "stopping",
    }  # fmt: skip
    assert study_schema()["properties"]["budget"]["operational"]


# --- paths --------------------------------------------------------------------------------------------------------

OWN_FILES = """\
study: own
family:
  - {name: small, path: models/small}
  - {name: large, path: org/hub-name}
target: large
task: {prompts: data/train.jsonl, heldout: ../heldout.jsonl, reward: "rewards.py:score"}
space: llm
budget: {gpu_hours: 1}
"""


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "studies"
    (folder / "models" / "small").mkdir(parents=True)
    (folder / "study.yaml").write_text(OWN_FILES)
    spec = load_study(folder / "study.yaml")
    assert spec.task.prompts == str(folder / "data" / "train.jsonl")
    assert spec.task.heldout == str(tmp_path / "heldout.jsonl")
    assert spec.task.reward == f"{folder / 'rewards.py'}:score"
    assert [model.path for model in spec.family.models] == [str(folder / "models" / "small"), "org/hub-name"]


def test_absolute_paths_and_embedded_names_stay(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(OWN_FILES.replace("../heldout.jsonl", "/data/heldout.jsonl"))
    assert load_study(path).task.heldout == "/data/heldout.jsonl"
    path.write_text(STUDY)
    assert load_study(path).task.embedded == "instruct"


def test_text_without_a_folder_keeps_its_paths() -> None:
    assert parse_study(OWN_FILES).task.prompts == "data/train.jsonl"
