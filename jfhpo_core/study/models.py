"""The two fidelities of a trial: size of the model and share of the full horizon."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from jfhpo_core.errors import SpecError
from jfhpo_core.study.missing import missing
from jfhpo_core.study.spec import ModelSpec, StudySpec
from jfhpo_core.study.trial import Trial

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""Name of a model on the Hugging Face hub: 'organization/name', or the name alone."""

HUB_SECONDS = 10.0
"""For the hub to answer."""


@dataclass(frozen=True)
class Model:
    """A model of the family with its parameter count."""

    name: str
    path: str
    parameters: int
    devices: int = 1


@dataclass(frozen=True)
class Ladder:
    """The models of a study, small to large; the last is the target."""

    models: tuple[Model, ...]

    @property
    def target(self) -> Model:
        """The model that is to be tuned."""
        return self.models[-1]

    @property
    def proxies(self) -> tuple[Model, ...]:
        """The smaller models, small to large."""
        return self.models[:-1]

    def __getitem__(self, name: str) -> Model:
        return next(model for model in self.models if model.name == name)

    def size_coordinate(self, name: str) -> float:
        """Log parameters relative to the target, in units of a factor of ten: 0 at the target, negative below."""
        return math.log10(self[name].parameters / self.target.parameters)


def steps_at(level_prompts: int, prompts_per_step: int) -> int:
    """Training steps after which a trial has consumed `level_prompts` prompts.

    Raises:
        ValueError: The level is not a whole number of steps.
    """
    if level_prompts % prompts_per_step:
        raise ValueError(f"{level_prompts} prompts are not a whole number of steps of {prompts_per_step} prompts")
    return level_prompts // prompts_per_step


def progress(spec: StudySpec, prompts: int) -> float:
    """Share of the full horizon, in [0, 1]."""
    return prompts / spec.fidelity.horizon_prompts


def next_levels(spec: StudySpec, trial: Trial | None) -> tuple[int, ...]:
    """Rungs (in prompts) that a trial has not reached yet; all of them for a new trial."""
    done = 0 if trial is None else trial.step * trial.prompts_per_step
    return tuple(level for level in spec.fidelity.levels if level > done)


def build_ladder(spec: StudySpec) -> Ladder:
    """Order the study's models by size, from the smallest proxy to the target.

    Parameter counts that the study does not give are read from the checkpoints.

    Raises:
        SpecError: A model is unknown, unreadable, not smaller than the target, or equal in size to another one.
    """
    if spec.family.embedded is not None:
        from jfhpo_core import embedded

        embedded.verify(spec.family.embedded)
        specs = [
            ModelSpec(name=name, path=str(folder))
            for name, folder in embedded.family_members(spec.family.embedded).items()
        ]
    else:
        specs = list(spec.family.models)
    names = [model.name for model in specs]
    wanted = [*(spec.fidelity.proxies if spec.fidelity.proxies is not None else names), spec.target]
    for name in wanted:
        if name not in names:
            raise SpecError(f"model {name!r} is not in the family ({', '.join(names)}); correct target or proxies")
    models = [
        Model(model.name, model.path, model.parameters or count_parameters(model.path), model.devices)
        for model in specs
        if model.name in wanted
    ]
    target = next(model for model in models if model.name == spec.target)
    smaller = sorted((model for model in models if model.parameters < target.parameters), key=lambda m: m.parameters)
    for name in spec.fidelity.proxies or ():
        if name not in [model.name for model in smaller]:
            raise SpecError(f"fidelity.proxies: {name!r} is not smaller than the target {target.name!r}; remove it")
    sizes = [model.parameters for model in smaller]
    if len(set(sizes)) < len(sizes):
        raise SpecError(f"two models of the family have the same size ({sizes}); keep one of them as a proxy")
    return Ladder((*smaller, target))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: some publishers add the same weights in other parts."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def is_at_hand(path: str) -> bool:
    """Whether a model is a folder, or a name of the hub that is in the local cache: looking costs no download then."""
    from huggingface_hub import try_to_load_from_cache

    return Path(path).is_dir() or isinstance(try_to_load_from_cache(path, "config.json"), str)


def local_fault(path: str) -> str | None:
    """What is wrong with the path of a model that cannot be a name on the hub; None if it is a folder or such a name.

    Study files are read so that what can only be a path is an absolute one (`jfhpo_core.study.study_file`).
    """
    if Path(path).is_dir() or HUB_NAME.fullmatch(path):
        return None
    if Path(path).exists():
        return "it is a file; name the folder of a transformers checkpoint"
    return f"{missing(path, folder=True)}, or give a name on the Hugging Face hub"


def ask_hub(name: str) -> None:
    """Ask the hub once for a model that is not at hand: transformers would ask six times before it gives up.

    Raises:
        Exception: Whatever the hub's client raises if the hub does not answer or has no such model.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if not is_at_hand(name):
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)


def count_parameters(path: str) -> int:
    """Parameter count of a transformers checkpoint, from its safetensors headers or (hub names) its config.

    Raises:
        SpecError: The checkpoint cannot be read.
    """
    folder = Path(path)
    files = weight_files(folder) if folder.is_dir() else []
    if files:
        from safetensors import SafetensorError, safe_open

        count = 0
        try:
            for file in files:
                with safe_open(file, framework="numpy") as tensors:
                    count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SpecError(f"{folder}: its weights cannot be read: {error}") from None
        return count
    if (fault := local_fault(path)) is not None:
        raise SpecError(f"{path}: {fault}")
    try:
        ask_hub(path)
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())
    except Exception as error:  # noqa: BLE001  the hub's client raises a dozen unrelated kinds
        raise SpecError(
            f"{path}: neither a folder with a transformers checkpoint nor a model of the hub that can be reached "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); correct the path, "
            "or give `parameters`"
        ) from None
