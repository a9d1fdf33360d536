"""Rows of a task in the formats that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jfhpo_core.errors import SpecError
from jfhpo_core.study.data import messages_of, normalize_prompt, read_rows, refuse_leak
from jfhpo_core.study.spec import HubData

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 1+1?"}]
TEXT_ROWS: list[dict[str, Any]] = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
VERL_ROWS: list[dict[str, Any]] = [
    {
        "data_source": "mine",
        "prompt": CHAT,
        "reward_model": {"style": "rule", "ground_truth": str(number)},
        "extra_info": {"index": number},
    }
    for number in range(2)
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_csv(rows: list[dict[str, Any]]) -> str:
    return "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}x\n" for row in rows)


def test_prompts_that_differ_in_more_than_case_and_space_are_no_leak() -> None:
    refuse_leak([{"prompt": "1+1="}], [{"prompt": "1-1="}, {"prompt": "11+="}], "heldout")


def test_all_leaks_are_counted() -> None:
    with pytest.raises(SpecError, match="2 held-out prompts"):
        refuse_leak([{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "A"}, {"prompt": "c"}, {"prompt": "b "}], "heldout")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', 2, "not valid JSON"),
        ('{"prompt": "a"}\n\n["b"]\n', 3, "a row is an object with a 'prompt'"),
        ('{"question": "a"}\n', 1, "non-empty text 'prompt'"),
        ('{"prompt": ""}\n', 1, "non-empty text 'prompt'"),
        ('{"prompt": 7}\n', 1, "non-empty text 'prompt'"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b", "y": 1}\n', 2, "differ from the first row's"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b"}\n', 2, "differ from the first row's"),
        ('{"prompt": "a", "completions": 1}\n', 1, "reserved"),
        ('{"prompt": "a", "prompts": 1}\n', 1, "reserved"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=rf"rows\.jsonl, line {line}: .*{message}"):
        read_rows(str(path))


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b"}\n\n', encoding="utf-8")
    assert [row["prompt"] for row in read_rows(str(path))] == ["a", "b"]


def test_separators_inside_a_text_end_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}'.encode())
    assert [row["prompt"] for row in read_rows(str(path))] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n \n", "is empty"), (b'{"prompt": "\xff"}', "cannot be read")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(TEXT_ROWS).encode()),
        ("windows.jsonl", lines(TEXT_ROWS).replace("\n", "\r\n").encode() + b"\r\n\r\n"),
        ("list.json", json.dumps(TEXT_ROWS, indent=2).encode()),
        ("packed.jsonl.gz", gzip.compress(lines(TEXT_ROWS).encode(), mtime=0)),
    ],
)
def test_json_in_its_usual_shapes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_rows(str(tmp_path / name)) == TEXT_ROWS


def test_csv_and_tsv(tmp_path: Path) -> None:
    text = write_csv(TEXT_ROWS)
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.tsv").write_text(text.replace(",", "\t"))
    expected = [{"prompt": row["prompt"], "answer": f"{row['answer']}x"} for row in TEXT_ROWS]
    assert [read_rows(str(tmp_path / name)) for name in ("a.csv", "b.csv.gz", "c.tsv")] == [expected] * 3


def test_parquet_in_the_layout_of_verl(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", VERL_ROWS)
    assert read_rows(str(tmp_path / "train.parquet")) == VERL_ROWS


def test_a_data_set_by_name_and_split(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(lines(TEXT_ROWS))
    (tmp_path / "train.jsonl").write_text(lines(TEXT_ROWS[:1]))
    assert read_rows(HubData(hub=str(tmp_path), split="test")) == TEXT_ROWS
    with pytest.raises(SpecError, match=r"`datasets` cannot load it.*Unknown split"):
        read_rows(HubData(hub=str(tmp_path), split="dev"))


def test_a_name_of_the_hub_is_given_to_datasets_with_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*names: str, **options: str) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list(TEXT_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(HubData(hub="openai/gsm8k", name="main", split="test", revision="v2")) == TEXT_ROWS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": "v2"})]


def test_columns_get_our_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(VERL_ROWS))
    columns = {"prompt": "prompt", "answer": "reward_model.ground_truth", "extra_info": None, "reward_model": None}
    rows = read_rows(str(tmp_path / "a.jsonl"), columns)
    assert rows == [{"prompt": CHAT, "answer": str(number), "data_source": "mine"} for number in range(2)]


def test_the_layout_of_openrlhf(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1+1=", "answer": "2", "id": 7}\n')
    rows = read_rows(str(tmp_path / "a.jsonl"), {"prompt": "question", "label": "answer"})
    assert rows == [{"prompt": "1+1=", "label": "2", "id": 7}]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"question": "a"}], {}, r"its columns are \['question'\]: name one in task.columns"),
        ([{"question": "a"}], {"prompt": "q"}, r"task.columns names 'q', but the row has \['question'\]"),
        ([{"prompt": "a", "r": {"x": 1}}], {"answer": "r.y"}, "task.columns names 'r.y'"),
        ([{"prompt": []}], {}, "a list of chat messages with role and content"),
        ([{"prompt": [{"role": "user"}]}], {}, "a list of chat messages with role and content"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], {}, "a list of chat messages"),
        ([{"prompt": "a"}, {"prompt": CHAT}], {}, "some prompts are texts and some are lists of messages"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str | None], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(lines(rows))
    with pytest.raises(SpecError, match=message):
        read_rows(str(tmp_path / "a.jsonl"), columns)


def test_a_column_that_json_does_not_have_is_refused_or_dropped(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "image": b"\x89PNG"}])
    with pytest.raises(SpecError, match="column 'image' holds a bytes"):
        read_rows(str(tmp_path / "a.parquet"))
    assert read_rows(str(tmp_path / "a.parquet"), {"image": None}) == [{"prompt": "a"}]


def test_a_broken_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(SpecError, match=r"a\.parquet: `datasets` cannot load it"):
        read_rows(str(tmp_path / "a.parquet"))
    with pytest.raises(SpecError, match=r"b\.csv: the file cannot be read: there is no 'b\.csv'"):
        read_rows(str(tmp_path / "b.csv"))


def test_chats_are_compared_and_shown_like_texts() -> None:
    assert messages_of("a") == [{"role": "user", "content": "a"}]
    assert messages_of(CHAT) is CHAT
    assert normalize_prompt(CHAT) == "beshort.whatis1+1?"
    with pytest.raises(SpecError, match="1 held-out prompts"):
        refuse_leak([{"prompt": CHAT}], [{"prompt": CHAT}], "heldout")
