"""Whatever a study file holds, it is either a usable study or refused with a message: no traceback, no hang."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.forecast import forecast
from jfhpo_core.optimizer.strategy import load_strategy
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.study_file import parse_study, validate_study
from jfhpo_core.study.yaml_text import Document, read_yaml, write_yaml
from tests.studies import study_data

ROOT = Path(__file__).parents[2]

FULL = write_yaml(
    parse_study(
        write_yaml(
            study_data(
                Path("workspace"),
                space={
                    "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "expected": 1e-4},
                    "kl_coefficient": {"type": "float", "low": 1e-4, "high": 0.1, "log": True, "zero": True},
                    "scheduler": {"type": "choice", "values": ["constant", "cosine"]},
                    "warmup_ratio": {"type": "float", "low": 0.0, "high": 0.2, "when": {"scheduler": ["cosine"]}},
                    "n_samples": {"type": "int", "low": 2, "high": 16, "log": True},
                },
                stopping={"rules": "default", "override": {"kl_growth": {"floor": 0.5}}},
            )
        )
    ).to_data()
)
"""A study of the simulated trainer in which every field is written out."""

TEXTS = [FULL, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").rglob("*.yaml")))]
GOOD = [read_yaml(text, "good").data for text in TEXTS]

HOSTILE = st.one_of(
    st.sampled_from(
        [
            None, True, False, 0, -1, 1, 0.5, -0.0, 10**9, 10**18, 10**19, 10**400, 1e-320, 1e300, 1e308,
            float("inf"), float("nan"), "", " ", ".", "..", "/", "a/b", "~", "\x07", "\ud800", "é" * 70, "x" * 10_000,
            "1:30", "1e-6", "null", [], {}, [[]], [{}], {"": 1}, {"a": {}}, [0, 0], list(range(2000)),
            {"type": "int", "low": 0, "high": 1}, {"type": "choice", "values": [1, True]}, "local",
            "simulated", "large",
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-5, 500), max_size=5),
)  # fmt: skip

TOKENS = st.sampled_from(
    ["\n", "  ", ":", ": ", "- ", "[", "]", "{", "}", ",", "&a ", "*a", "!!", "!", "'", '"', "#", "|", ">", "%", "@",
     "\t", "<<: ", "? ", "---\n", "...", "0", "9" * 30, "1e999", ".nan", "\x00", "\ufeff", "\u2028", "\\ud800"]
)  # fmt: skip


def containers(data: Any) -> list[dict[str, Any] | list[Any]]:
    found: list[dict[str, Any] | list[Any]] = []
    if isinstance(data, dict | list):
        if data:
            found.append(data)
        for item in data.values() if isinstance(data, dict) else data:
            found += containers(item)
    return found


@st.composite
def mutated_values(draw: st.DrawFn) -> Any:
    """A good file in which up to three values or fields are replaced, removed, renamed, doubled or moved."""
    data = copy.deepcopy(draw(st.one_of(st.just(GOOD[0]), st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(1, 3))):
        places = containers(data)
        place = draw(st.sampled_from(places))
        key: Any = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "double", "move"]))
        if change == "remove":
            del place[key]
        elif change == "rename" and isinstance(place, dict):
            place[draw(st.one_of(st.text(max_size=8), st.sampled_from(sorted(data))))] = place.pop(key)
        elif change == "double" and isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        elif change == "move":
            place[key] = copy.deepcopy(draw(st.sampled_from(places)))
        else:
            place[key] = copy.deepcopy(draw(HOSTILE))  # else a value could come to hold itself
        if not data:
            break
    return data


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """A good file with stretches cut out and pieces of YAML put in."""
    text = draw(st.one_of(st.just(TEXTS[0]), st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(TOKENS) + text[start + draw(st.integers(0, 12)) :]
    return text


FILES = st.one_of(mutated_values(), mutated_texts())


def is_judged(study: Any) -> None:
    """Read a file, or take its content as Prefect's form gives it; check it and forecast its bill, if it is usable."""
    try:
        spec = parse_study(study) if isinstance(study, str) else validate_study(Document(study), "study")
        if spec.trainer.name == "simulated":  # the others load models
            resolved = resolve(spec)
            load_strategy(resolved)
            forecast(resolved, [])
    except SpecError:
        pass


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(FILES)
def test_a_mutated_file_is_usable_or_refused(study: Any) -> None:
    is_judged(study)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES)
def test_two_thousand_mutated_files_are_usable_or_refused(study: Any) -> None:
    is_judged(study)
