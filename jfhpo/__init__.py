"""Hyperparameters for reinforcement learning of large language models, by joint-fidelity search.

    import jfhpo

    study = jfhpo.load_study("study.yaml")
    jfhpo.run(study)
    study.trials       # a pandas DataFrame
    study.recommended  # a complete configuration

For a training loop of your own: `jfhpo.Optimizer`, to ask what to train and to tell what came of it. Names are imported
when they are used: `import jfhpo` takes no time, and only what is used needs its packages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jfhpo.notebook import Study, load_study, run
    from jfhpo.session import StudyOutcome
    from jfhpo_core.errors import JfhpoError, SpecError
    from jfhpo_core.run.asktell import Assignment, Optimizer

_MODULES = {
    "Assignment": "jfhpo_core.run.asktell",
    "JfhpoError": "jfhpo_core.errors",
    "Optimizer": "jfhpo_core.run.asktell",
    "SpecError": "jfhpo_core.errors",
    "Study": "jfhpo.notebook",
    "StudyOutcome": "jfhpo.session",
    "load_study": "jfhpo.notebook",
    "run": "jfhpo.notebook",
}

__all__ = ["Assignment", "JfhpoError", "Optimizer", "SpecError", "Study", "StudyOutcome", "load_study", "run"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
