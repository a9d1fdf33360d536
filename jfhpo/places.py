"""Whether the places that a study writes to can be written to: workspace and, if it is a local file, tracking store."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jfhpo_core.errors import SpecError
from jfhpo_core.study.spec import StudySpec


def check_places(spec: StudySpec) -> None:
    """Try whether files can be created where the study will create them. Leaves nothing behind.

    Raises:
        SpecError: A folder cannot be made or written to.
    """
    from mlflow_plugin.tracking import local_store

    _check_folder(Path(spec.tracking.workspace).absolute(), "tracking.workspace")
    store = local_store(spec)
    if store is not None:
        _check_folder(store.absolute().parent, "tracking.uri" if spec.tracking.uri else "MLFLOW_TRACKING_URI")


def _check_folder(folder: Path, field: str) -> None:
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".jfhpo-check-"):
            pass
    except OSError as error:
        raise SpecError(
            f"{field}: {str(folder)!r} cannot be written to ({error.strerror}: {nearest}); name a folder that can be "
            "made, or change its permissions"
        ) from None
