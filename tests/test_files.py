"""Files are replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from jfhpo_core.files import replace_file


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    replace_file(path, "old")
    replace_file(path, "größer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_bytes() == "größer".encode()


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    replace_file(path, "old")

    def full(part: Path, text: str, encoding: str) -> None:
        part.write_bytes(text[:3].encode(encoding))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, "something new")
    assert path.read_bytes() == b"old"
