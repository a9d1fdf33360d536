"""What to say of a file or folder that is not there."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

MOST_SHOWN = 3
"""Names that stand beside a missing one and are told."""


def missing(path: str | Path, begin: str = "the study file's folder", *, folder: bool = False) -> str:
    """Which folder was looked into, which names there are like the missing one, and where relative paths begin.

    Args:
        path: Of the file.
        begin: Where relative paths begin, in words.
        folder: Whether it should be a folder.
    """
    path = Path(path)
    within = path.absolute().parent
    if not within.is_dir():
        return f"there is no folder {within}; correct the path (a relative one begins in {begin})"
    names = sorted(one.name for one in within.iterdir() if one.is_dir() == folder)
    close = get_close_matches(path.name, names, MOST_SHOWN) or [
        name for name in names if Path(name).suffix == path.suffix
    ]
    known = f"; there is {' and '.join(map(repr, close[:MOST_SHOWN]))}" if close else ""
    return f"there is no {path.name!r} in {within}{known}; correct the path (a relative one begins in {begin})"
