"""Rows from any place on: the same as when one begins at the start, and nothing before is read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import datasets
import pytest

from lodestar.data import row_stream
from lodestar.data.lines import Place
from lodestar.data.readers import Row, Source, find_sources, read_rows, read_rows_from
from lodestar.data.row_stream import Chunk, Cursor, read_chunks
from lodestar.errors import DataError
from tests import tiny

TEXTS = ["naïve", "", "tensor", "größer", "语义检索", "rows", "a longer text", "x", "y", "z", "mask"]


def write(folder: Path, kind: str) -> Path:
    """TEXTS in a file of the kind; with a byte order mark, blank lines and two ends of lines where it has lines."""
    path = folder / f"a.{kind}"
    rows = [{"text": text} for text in TEXTS]
    lines = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + end for row, end in zip(rows, ENDS, strict=False))
    if kind == "jsonl":
        path.write_bytes(lines.encode())
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "txt":
        path.write_bytes("\n".join(TEXTS).encode())
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path, batch_size=3)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


ENDS = ["\n", "\r\n", "\n\n", "\n \n"] * 3


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "parquet", "saved"])
def test_rows_are_read_on_from_any_place(kind: str, tmp_path: Path) -> None:
    (source,) = find_sources([str(write(tmp_path, kind))])
    rows = [*read_rows_from(source, Place())]
    assert [(where, row) for _, where, row in rows] == [*read_rows(source)]
    assert [row["text"] for _, _, row in rows] == [text for text in TEXTS if text or kind != "txt"]
    for i, (place, _, _) in enumerate(rows, 1):
        assert [*read_rows_from(source, place)] == rows[i:]


def test_what_is_before_a_place_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    (source,) = find_sources([str(path)])
    rows = [*read_rows_from(source, Place())]
    place, _, _ = rows[4]
    path.write_bytes(b"?" * place.offset + path.read_bytes()[place.offset :])
    assert [*read_rows_from(source, place)] == rows[5:]
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_rows_from(source, rows[3][0]))


def check(where: str, row: Row) -> Row | None:
    return row if row["text"] else None


def chunks(sources: Sequence[Source], start: Cursor = Cursor(), number: int = 9) -> list[Chunk]:  # noqa: B008
    return [*islice(read_chunks(sources, check, start), number)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "parquet", "saved"])
def test_chunks_are_the_same_wherever_one_begins(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "CHUNK_ROWS", 4)
    tiny.write_jsonl(tmp_path / "0.jsonl", [{"text": "first"}])
    sources = find_sources([str(tmp_path / "0.jsonl"), str(write(tmp_path, kind))])
    kept = [{"text": text} for text in ("first", *TEXTS) if text]
    whole = chunks(sources)
    assert [row for chunk in whole for row in chunk.rows] == kept * 3  # 4, 4 and 3 rows of each epoch
    assert [chunk.dropped for chunk in whole[:3]] == ([0, 0, 0] if kind == "txt" else [1, 0, 0])
    for i, chunk in enumerate(whole):
        assert chunks(sources, chunk.start._replace(examples=3), 9 - i) == whole[i:]
    assert len({chunk.start for chunk in whole}) == 9
    assert chunks(sources, whole[1].start, 1) != whole[:1]


def test_a_stream_without_a_text_is_an_error_and_one_that_resumes_at_its_end_is_not(tmp_path: Path) -> None:
    (source,) = find_sources([str(tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": ""}]))])
    with pytest.raises(DataError, match=r"data\.train: the stream holds no text \("):
        chunks([source])
    (source,) = find_sources([str(tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}]))])
    (place, _, _), *_ = read_rows_from(source, Place())
    (chunk,) = chunks([source], Cursor(0, 0, *place), 1)
    assert chunk.rows == [{"text": "a"}] and chunk.start == Cursor(1)
