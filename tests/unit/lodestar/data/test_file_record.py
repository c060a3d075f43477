"""What is remembered of files: until they change, and never from a damaged record."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lodestar.data.file_record import RECORD, FileRecord


def old_file(path: Path, content: str = "content") -> Path:
    """That last changed an hour ago."""
    path.write_text(content)
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    return path


def length(folder: Path, path: Path, calls: list[Path]) -> int:
    """Of the file, by the record; `calls` gets it where it is read."""
    with FileRecord(folder) as record:
        return record.value(path, "length", lambda: calls.append(path) or len(path.read_text()))


def test_a_value_is_computed_again_only_when_the_file_has_another_size_or_time(tmp_path: Path) -> None:
    path, calls = old_file(tmp_path / "a"), list[Path]()
    for _ in range(3):
        assert length(tmp_path, path, calls) == 7
    assert len(calls) == 1
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert length(tmp_path, path, calls) == 7 and len(calls) == 2
    assert length(tmp_path, old_file(path, "more content"), calls) == 12 and len(calls) == 3


def test_a_file_that_changes_now_is_not_remembered(tmp_path: Path) -> None:
    path, calls = tmp_path / "a", list[Path]()
    path.write_text("content")
    for _ in range(2):
        length(tmp_path, path, calls)
    assert len(calls) == 2 and not (tmp_path / RECORD).exists()
    with FileRecord(tmp_path) as record:
        record.value(old_file(path), "length", lambda: len(old_file(path, "meanwhile").read_text()))
    assert not (tmp_path / RECORD).exists()


def test_a_damaged_record_is_ignored(tmp_path: Path) -> None:
    path, calls = old_file(tmp_path / "a"), list[Path]()
    length(tmp_path, path, calls)
    whole = (tmp_path / RECORD).read_bytes()
    wrong = whole.replace(b'"length": 7', b'"length": 8')
    foreign = json.dumps({"values": [], "format": 2}).encode()
    for number, damaged in enumerate((wrong, whole[:-9], b"", b"[" * 9999, b'{"values": {}}', foreign), 2):
        assert damaged != whole
        (tmp_path / RECORD).write_bytes(damaged)
        assert length(tmp_path, path, calls) == 7 and len(calls) == number
        assert (tmp_path / RECORD).read_bytes() == whole


def test_processes_add_to_one_record(tmp_path: Path) -> None:
    a, b, calls = old_file(tmp_path / "a"), old_file(tmp_path / "b"), list[Path]()
    with FileRecord(tmp_path) as record:
        length(tmp_path, a, calls)
        record.value(b, "length", lambda: 7)
    assert length(tmp_path, a, calls) == length(tmp_path, b, calls) == 7 and calls == [a]


def test_a_folder_that_cannot_be_written_to_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path, calls = old_file(tmp_path / "a"), list[Path]()
    for _ in range(2):
        assert length(tmp_path / "file", path, calls) == 7
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["\udcff", "a\nb"])
def test_any_name_of_a_file_will_do(name: str, tmp_path: Path) -> None:
    path, calls = old_file(tmp_path / name), list[Path]()
    for _ in range(2):
        assert length(tmp_path, path, calls) == 7
