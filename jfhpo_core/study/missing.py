"""What to say of a file that is not there."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

MOST_SHOWN = 3
"""Names that stand beside a missing file and are told."""


def missing(path: str | Path, begin: str = "the study file's folder") -> str:
    """Which folder was looked into, which names there are like the missing one, and where relative paths begin.

    Args:
        path: Of the file.
        begin: Where relative paths begin, in words.
    """
    path = Path(path)
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {folder}; correct the path (a relative one begins in {begin})"
    names = sorted(one.name for one in folder.iterdir() if one.is_file())
    close = get_close_matches(path.name, names, MOST_SHOWN) or [
        name for name in names if Path(name).suffix == path.suffix
    ]
    known = f"; there is {' and '.join(map(repr, close[:MOST_SHOWN]))}" if close else ""
    return f"there is no {path.name!r} in {folder}{known}; correct the path (a relative one begins in {begin})"
