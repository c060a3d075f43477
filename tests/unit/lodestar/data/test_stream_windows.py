"""Windows of a stream: the same wherever one begins, written ahead by a process, and gone at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from lodestar.data import row_stream, stream_writer
from lodestar.data.readers import Row, find_sources
from lodestar.data.row_stream import Cursor
from lodestar.data.stream_windows import STARTED, StreamSampler, Windows, WindowStart, WindowStarts, window_batches
from lodestar.data.stream_writer import WindowWriter, stream_folder, written_ahead
from lodestar.errors import DataError
from tests import tiny

COUNTED = ("tokens", "truncated", "without_tokens")
FEATURES = datasets.Features(
    {
        "word": datasets.Value("string"),
        "part": datasets.Value("int32"),
        **dict.fromkeys(COUNTED, datasets.Value("int32")),
    }
)
TEXTS = ["a b c", "", "d", "-", "e f g h i j k", "l m", "n", "BAD"]
WORDS = [*"abcdefghijklmn"]


def tokenize(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """An example for each word: none for "-"."""
    words = [(word, part) for text in columns["text"] for part, word in enumerate(text.split()) if word != "-"]
    zeros = [0] * len(words)
    return {
        "word": [word for word, _ in words], "part": [part for _, part in words], "tokens": [1] * len(words),
        "truncated": zeros, "without_tokens": zeros,
    }  # fmt: skip


def check(where: str, row: Row) -> Row | None:
    if row["text"] == "BAD":
        raise DataError(f"{where}: text: bad (mend it)")
    return row if row["text"] else None


def writer(folder: Path, *, good: bool = True, starts: Mapping[int, WindowStart] | None = None) -> WindowWriter:
    """Of windows of 2 batches of 3 examples."""
    rows = [{"text": text} for text in (TEXTS[:-1] if good else TEXTS)]
    path = tiny.write_jsonl(folder / ("good.jsonl" if good else "bad.jsonl"), rows)
    windows = Windows(stream_folder(str(folder / "cache"), "run") / "0")
    saved = WindowStarts(folder / "stream.json", "a stream")
    return WindowWriter(
        windows, find_sources([str(path)]), check, tokenize, FEATURES, processes=1, batches=2, global_size=3,
        starts=saved.read() if starts is None else starts, add_start=saved.add,
    )  # fmt: skip


def words(writer: WindowWriter, start: int, total: int) -> list[list[str]]:
    """Of the window of each batch, in the order in which they were read."""

    def batches() -> Generator[list[str]]:
        for batch in range(start, total):
            yield list(writer.windows.table(batch // 2)["word"])

    return [*written_ahead(batches, [writer], start, total, lambda step: (0, step), lambda stream, window: None)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "CHUNK_ROWS", 2)


def test_windows_are_the_same_wherever_a_run_begins(tmp_path: Path) -> None:
    whole = words(writer(tmp_path), 0, 16)
    assert [word for window in whole[::2] for word in window] == (WORDS * 4)[:48]
    starts = WindowStarts(tmp_path / "stream.json", "a stream").read()
    assert {*range(1, 9)} <= starts.keys() and any(start.cursor.examples for start in starts.values())
    (tmp_path / "stream.json").unlink()
    for start in (1, 2, 7, 15):
        assert words(writer(tmp_path, starts=starts), start, 16) == whole[start:]
        assert words(writer(tmp_path, starts={}), start, 16) == whole[start:]
    assert words(writer(tmp_path, starts={3: starts[4]}), 6, 7) != whole[6:7]
    assert not [*(tmp_path / "cache").iterdir()]


def test_what_is_before_a_window_is_not_read(tmp_path: Path) -> None:
    whole, starts = words(writer(tmp_path), 0, 6), WindowStarts(tmp_path / "stream.json", "a stream").read()
    offset, resumed = starts[1].cursor.offset, writer(tmp_path, starts=starts)
    path = Path(resumed.sources[0].path)
    path.write_bytes(b"?" * offset + path.read_bytes()[offset:])
    assert offset > 10 and words(resumed, 2, 3) == whole[2:3]
    with pytest.raises(DataError, match=r"good\.jsonl:1: row: not valid JSON"):
        words(replace(resumed, starts={}), 2, 3)


def test_rows_are_counted_once_also_by_a_run_that_resumes(tmp_path: Path) -> None:
    words(writer(tmp_path), 0, 16)
    starts = WindowStarts(tmp_path / "stream.json", "a stream").read()
    expected = {"rows": 14, "tokens": 14, "truncated": 0, "dropped": 2, "without_tokens": 1}
    assert starts[8].counts == expected and starts[1].counts["rows"] < 14
    (tmp_path / "stream.json").unlink()
    words(writer(tmp_path, starts={1: starts[1]}), 2, 16)
    assert WindowStarts(tmp_path / "stream.json", "a stream").read()[8].counts == expected


def test_an_error_of_the_writer_is_the_readers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^.*bad\.jsonl:8: text: bad \(mend it\)$"):
        words(writer(tmp_path, good=False), 0, 16)
    assert not [*(tmp_path / "cache").iterdir()]


def test_texts_of_which_none_has_a_token_are_an_error(tmp_path: Path) -> None:
    empty = writer(tmp_path)
    tiny.write_jsonl(Path(empty.sources[0].path), [{"text": "-"}])
    with pytest.raises(DataError, match="the stream holds no text"):
        words(empty, 0, 2)


def test_a_killed_writer_is_told_and_its_folder_is_deleted_by_the_next_run(tmp_path: Path) -> None:
    def batches() -> Generator[int]:
        yield 0
        max(multiprocessing.active_children(), key=lambda process: process.pid or 0).kill()
        yield len(one.windows.table(10**6))

    one = writer(tmp_path)
    with pytest.raises(DataError, match=r"data\.streaming: the process that reads the stream was killed \("):
        list(written_ahead(batches, [one], 0, 2, lambda step: (0, step), lambda stream, window: None))
    abandoned, in_use = (stream_folder(str(tmp_path / "cache"), name) for name in ("killed", "running"))
    for folder, process_id in ((abandoned, 2**30), (in_use, os.getpid())):
        (folder / "0/00000001").mkdir(parents=True)
        (folder / "0" / STARTED).write_text(str(process_id))
    words(one, 0, 1)
    assert [*(tmp_path / "cache").iterdir()] == [in_use]


def test_windows_are_written_one_ahead_and_deleted_behind(tmp_path: Path) -> None:
    one = writer(tmp_path)

    def written() -> list[int]:
        return sorted(int(path.name) for path in one.windows.folder.glob("0*") if not path.suffix)

    with stream_writer.writing(one, 0) as batch:
        for window, expected in ((0, [0, 1]), (1, [0, 1, 2]), (3, [2, 3, 4])):
            batch.value = 2 * window
            deadline = time.monotonic() + 20
            while written() != expected:
                assert time.monotonic() < deadline, (window, written())
                time.sleep(0.02)
        time.sleep(0.2)
        assert written() == [2, 3, 4]


def test_a_window_is_shuffled_as_a_whole() -> None:
    sampler, batches = StreamSampler(global_size=100, seed=1), window_batches(100)
    for window in (0, 3):
        parts = [sampler.batch(window * batches + i, range(100)) for i in range(batches)]
        assert sorted(torch.cat([rows for _, rows in parts]).tolist()) == list(range(100 * batches))
        assert {int(epoch) for epochs, _ in parts for epoch in epochs} == {window}
    assert parts[0][1].tolist() != sampler.batch(0, range(100))[1].tolist()
    assert sampler.batch(7, range(30, 60))[1].tolist() == sampler.batch(7, range(100))[1].tolist()[30:60]
    assert [window_batches(size) for size in (32, 720, 32_768, 10**6)] == [64, 64, 8, 4]


def test_starts_are_remembered_for_their_stream_alone(tmp_path: Path) -> None:
    starts, a = WindowStarts(tmp_path / "stream.json", "a"), WindowStart(Cursor(0, 1, 2, 3, 4), {"rows": 5})
    assert starts.read() == {}
    starts.add(3, a)
    starts.add(4, WindowStart())
    assert WindowStarts(tmp_path / "stream.json", "a").read() == {3: a, 4: WindowStart()}
    assert WindowStarts(tmp_path / "stream.json", "b").read() == {}
    values = json.loads((tmp_path / "stream.json").read_text())
    values["values"]["starts"]["3"][0][3] = 2
    (tmp_path / "stream.json").write_text(json.dumps(values))
    assert starts.read() == {} and os.listdir(tmp_path) == ["stream.json"]
