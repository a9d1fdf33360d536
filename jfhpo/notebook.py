"""Studies in Python, for scripts and notebooks: load, run, and look at the trials as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jfhpo.overrides import read_study
from jfhpo.session import StudyOutcome, look, recorded, run_study
from jfhpo_core.report.findings import interval, verdict
from jfhpo_core.report.page import PLOTS, write_plots
from jfhpo_core.report.recipe import Recipe, parse_size, recipe
from jfhpo_core.report.why import Why, why
from jfhpo_core.run.outcome import SearchResult
from jfhpo_core.run.search import Progress
from jfhpo_core.study.resolved import resolve
from jfhpo_core.study.spec import StudySpec
from jfhpo_core.study.study_file import resolve_paths, validate_study
from jfhpo_core.study.trial import Configuration, Trial
from jfhpo_core.study.yaml_text import Document

if TYPE_CHECKING:
    import pandas as pd

PREFIX = "params_"
"""Stands before a hyperparameter's name in the columns of `Study.trials`, which has columns of its own."""


@dataclass(frozen=True)
class Study:
    """A study file and what its ledger holds. Everything is read from the ledger each time, also while a search runs.

    Attributes:
        spec: The content of the study file, defaults included.
    """

    spec: StudySpec

    @property
    def trials(self) -> pd.DataFrame:
        """All trials, one row each, in order of creation; empty before the first.

        Columns: `number` (the index), `purpose`, `label`, `model`, `seed`, `state`, `prompts` consumed, the newest
        held-out `score` and its `standard_error`, `device_seconds` charged, `stopped_by` (the rule), and `params_...`
        for each hyperparameter that a trial has.
        """
        import pandas as pd

        ledger = recorded(resolve(self.spec))
        rows = [_row(trial) for trial in (ledger.trials() if ledger is not None else [])]
        return pd.DataFrame(rows, columns=None if rows else list(_COLUMNS)).set_index("number")

    @property
    def result(self) -> SearchResult:
        """The outcome so far.

        Raises:
            LedgerError: Nothing has been recorded yet.
        """
        return look(self.spec)

    @property
    def recommended(self) -> Configuration | None:
        """The recommended configuration, fixed and default hyperparameters included; None if there is none yet.

        Raises:
            LedgerError: Nothing has been recorded yet.
        """
        result = self.result
        return result.study.complete(result.recommended.configuration) if result.recommended is not None else None

    @property
    def comparison(self) -> pd.DataFrame:
        """The final table: the recommendation and what it is measured against, on the target at full length.

        Columns: `label` (the index), `score`, the ends `low` and `high` of its 95 % interval, and `seeds`.

        Raises:
            LedgerError: Nothing has been recorded yet.
        """
        return _comparison(self.result)

    def plots(self, folder: str | Path | None = None) -> list[Path]:
        """Draw the figures of the report as PNG files.

        Args:
            folder: Where they go; None is the folder of the study.

        Raises:
            LedgerError: Nothing has been recorded yet.
        """
        result = self.result
        return write_plots(result, Path(folder) if folder is not None else result.study.folder / PLOTS)

    def recipe(self, size: str | int) -> Recipe:
        """What to use on a model of another size, as `jfhpo recipe` prints it.

        Args:
            size: Parameters (`72_000_000_000` or "72B"), a model of the study, or a folder with a checkpoint.

        Raises:
            LedgerError: Nothing has been recorded yet.
            SpecError: The size cannot be read.
        """
        result = self.result
        page: Recipe = recipe(result, parse_size(str(size), result.study))
        return page

    def why(self) -> Why:
        """What matters, where runs collapsed, and why this recommendation, as `jfhpo why` prints it.

        Raises:
            LedgerError: Nothing has been recorded yet.
        """
        page: Why = why(self.result)
        return page

    def _repr_html_(self) -> str:
        """What a notebook shows: the outcome in a sentence, the comparison, and the newest trials."""
        trials = self.trials
        title = f"<h4>Study {escape(self.spec.study)}: {len(trials)} trials</h4>"
        if trials.empty:
            return f"{title}<p>Nothing has been recorded yet: <code>jfhpo.run(study)</code> begins it.</p>"
        result = self.result
        table = _comparison(result).to_html(float_format="{:.3f}".format) if result.rows else ""
        newest = trials.tail(SHOWN_TRIALS).to_html(float_format="{:.4g}".format, na_rep="")
        return f"{title}<p>{escape(verdict(result))}</p>{table}{newest}"


SHOWN_TRIALS = 10
"""Trials that a notebook shows of a study."""


def load_study(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Study:
    """Read and check a study.

    Args:
        source: A study file, or its content as data; paths in data are relative to the current folder.
        overrides: Changes to a file as on the command line: `["budget.gpu_hours=5"]`.

    Raises:
        SpecError: The study or an override is refused.
    """
    if isinstance(source, str | Path):
        return Study(read_study(Path(source), overrides))
    return Study(resolve_paths(validate_study(Document(dict(source)), "study"), Path.cwd()))


def run(study: Study | str | Path, on_progress: Callable[[Progress], None] | None = None) -> StudyOutcome:
    """Run a study, or continue it; one that is finished gives the same outcome again without training.

    Args:
        study: The study, or the path of its file.
        on_progress: Called after every event of the search.

    Raises:
        SpecError: The study is not usable; nothing has been started then.
        LedgerError: Another process runs the study, or the ledger holds a different one of its name.
    """
    chosen = study if isinstance(study, Study) else load_study(study)
    return run_study(chosen.spec, on_progress)


_COLUMNS = (
    "number", "purpose", "label", "model", "seed", "state", "prompts", "score", "standard_error", "device_seconds",
    "stopped_by",
)  # fmt: skip


def _row(trial: Trial) -> dict[str, Any]:
    last = trial.evaluations[-1] if trial.evaluations else None
    values = (
        trial.number, trial.purpose, trial.label, trial.model, trial.seed, str(trial.state),
        trial.step * trial.prompts_per_step, last.score if last else None, last.standard_error if last else None,
        trial.charge_seconds, trial.decision.rule if trial.decision else None,
    )  # fmt: skip
    hyperparameters = {f"{PREFIX}{name}": value for name, value in trial.configuration.items()}
    return dict(zip(_COLUMNS, values, strict=True)) | hyperparameters


def _comparison(result: SearchResult) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for row in result.rows:
        low, high = interval(row.score, row.standard_error)
        rows.append({"label": row.label, "score": row.score, "low": low, "high": high, "seeds": row.seeds})
    return pd.DataFrame(rows, columns=["label", "score", "low", "high", "seeds"]).set_index("label")
