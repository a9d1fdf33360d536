"""Rows of a task from the formats that the field has: JSON, JSONL, CSV and Parquet files, and data sets of the hub.

Every row has a 'prompt', which is a text or a list of chat messages ({role, content}), and further columns that go to
the reward.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jfhpo_core.errors import SpecError
from jfhpo_core.study.missing import missing
from jfhpo_core.study.spec import DataSource, HubData

Row = dict[str, Any]
Message = dict[str, str]
Prompt = str | list[Message]

RESERVED = ("prompts", "completions")
"""Names under which a reward gets what is no column."""

FORMATS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""File suffix to builder of `datasets`. JSON is read here, so that faults have line numbers."""

SHOWN = 80
"""Characters of a faulty row in a message."""


def read_rows(source: DataSource, columns: Mapping[str, str | None] | None = None) -> list[Row]:
    """Read and check rows.

    Args:
        source: A file, or a data set of the hub.
        columns: See `TaskSpec.columns`.

    Raises:
        SpecError: With source, row and remedy: unreadable, without rows, or a row without a usable prompt, with a
            reserved or other columns than the first, or with values that JSON does not have.
    """
    rows: list[Row] = []
    for where, content in _contents(source):
        if not isinstance(content, dict):
            raise SpecError(f"{where}: a row is an object with a 'prompt', got {str(content)[:SHOWN]!r}")
        row = _renamed(content, columns or {}, where)
        _check_prompt(row, where)
        for name in RESERVED:
            if name in row:
                raise SpecError(f"{where}: 'prompts' and 'completions' are reserved; rename the column (task.columns)")
        if rows and set(row) != set(rows[0]):
            raise SpecError(f"{where}: columns {sorted(row)} differ from the first row's {sorted(rows[0])}")
        rows.append(row)
    name = source.hub if isinstance(source, HubData) else source
    if not rows:
        raise SpecError(f"{name}: it is empty; a task needs rows")
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise SpecError(f"{name}: some prompts are texts and some are lists of messages; make them all alike")
    return rows


def _contents(source: DataSource) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row."""
    if isinstance(source, str) and Path(source.removesuffix(".gz")).suffix not in FORMATS:
        return _json_rows(Path(source))
    return _loaded_rows(source)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Of JSON Lines, or of a file that holds one JSON list."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"{path}: the file cannot be read: {missing(path)}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: the file cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{path}: not valid JSON: {error}; write a list, or one object per line") from None
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    # Not splitlines(): that would also cut at separators that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SpecError(f"{path}, line {number}: not valid JSON: {error}; write one object per line") from None
            yield f"{path}, line {number}", row


def _loaded_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    """What `datasets` loads. A file is not kept in its cache: it may change, and the home may be read-only."""
    import datasets

    datasets.disable_progress_bars()
    if isinstance(source, HubData):
        where = " ".join(part for part in (source.hub, source.name, source.split, source.revision) if part)
    else:
        where = source
        if not Path(source).is_file():
            raise SpecError(f"{source}: the file cannot be read: {missing(source)}")
    try:
        if isinstance(source, HubData):
            loaded = datasets.load_dataset(source.hub, source.name, split=source.split, revision=source.revision)
            rows = loaded.to_list()
        else:
            suffix = Path(source.removesuffix(".gz")).suffix
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            with tempfile.TemporaryDirectory(prefix="jfhpo-data-") as cache:
                loaded = datasets.load_dataset(
                    FORMATS[suffix], data_files=source, split="train", cache_dir=cache, keep_in_memory=True, **options
                )
                rows = loaded.to_list()
    except Exception as error:  # noqa: BLE001  it raises what its dozen dependencies raise
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        raise SpecError(
            f"{where}: `datasets` cannot load it ({type(error).__name__}: {cause}); correct name, split and revision, "
            "or convert it to JSONL"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{where}, row {number}", row


def _renamed(row: Row, columns: Mapping[str, str | None], where: str) -> Row:
    """A row under our names for its columns."""
    renamed = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    for ours, theirs in columns.items():
        if theirs is not None:
            renamed[ours] = _value(row, theirs, where)
    return renamed


def _value(row: Row, path: str, where: str) -> Any:
    """The value of a column, or below it: 'reward_model.ground_truth'."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise SpecError(f"{where}: task.columns names {path!r}, but the row has {sorted(row)}; correct it")
        value = value[part]
    return value


def _check_prompt(row: Row, where: str) -> None:
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        # `datasets` fills keys that other messages have with None.
        row["prompt"] = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    elif not isinstance(prompt, str) or not prompt:
        known = "" if "prompt" in row else f"; its columns are {sorted(row)}: name one in task.columns {{prompt: NAME}}"
        raise SpecError(
            f"{where}: a row needs a non-empty text 'prompt', or a list of chat messages with role and content, got "
            f"{str(prompt)[:SHOWN]!r}{known}"
        )
    bad = next((name for name, value in row.items() if not _is_json_value(value)), None)
    if bad is not None:
        raise SpecError(
            f"{where}: column {bad!r} holds a {type(row[bad]).__name__}, which JSON does not have; convert it, or drop "
            f"the column (task.columns {{{bad}: null}})"
        )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and bool(message["role"])
    )


def _is_json_value(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def messages_of(prompt: Prompt) -> list[Message]:
    """A prompt as a chat: a text is a user's message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def text_of(prompt: Prompt) -> str:
    """A prompt as a text to look at: the contents of its messages, one under the other."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def is_conversational(rows: Sequence[Row]) -> bool:
    """Whether prompts are lists of messages, which the model gets in its chat template."""
    return not isinstance(rows[0]["prompt"], str)


def normalize_prompt(prompt: Prompt) -> str:
    """Prompt text without case and white space, so that trivial variants count as the same prompt."""
    return "".join(text_of(prompt).split()).casefold()


def refuse_leak(train: Sequence[Row], heldout: Sequence[Row], source: str) -> None:
    """Raise if a held-out prompt occurs in the training set, up to case and white space.

    Raises:
        SpecError: With the number of leaking prompts and the first one.
    """
    trained = {normalize_prompt(row["prompt"]) for row in train}
    leaks = [row["prompt"] for row in heldout if normalize_prompt(row["prompt"]) in trained]
    if leaks:
        raise SpecError(
            f"{source}: {len(leaks)} held-out prompts also stand in the training file, first {leaks[0]!r}; "
            "remove them from one of the two, or scores will flatter"
        )


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows to columns, the prompt left out."""
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
