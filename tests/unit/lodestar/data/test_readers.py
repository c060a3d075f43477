"""Files that are damaged, of another kind, or no files at all: each is one line with its place and its remedy."""

from __future__ import annotations

import gzip
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from lodestar.data.lines import MAX_LINE_CHARACTERS
from lodestar.data.readers import Source, count_rows, find_sources, read_rows, repeated
from lodestar.errors import DataError
from tests import processes

ROW = b'{"query": "q", "pos": ["p"]}\n'
GZ = gzip.compress(ROW * 1000, mtime=0)
CONTENTS = [
    ("cut.jsonl", ROW + ROW[:12], "2: row: not valid JSON"),
    ("doubled.jsonl", ROW.strip() + ROW, "1: row: not valid JSON"),
    ("latin.jsonl", ROW * 4 + '{"query": "é"}\n'.encode("latin1"), "5: row: not valid UTF-8"),
    ("utf16.jsonl", ROW.decode().encode("utf-16"), "1: row: is UTF-16"),
    ("utf16le.jsonl", ROW.decode().encode("utf-16-le"), "1: row: holds a NUL byte"),
    ("plain.jsonl.gz", ROW, "1: row: is no gz file"),
    ("gz.jsonl", gzip.compress(ROW), "1: row: is a gz file"),
    ("gz.txt", gzip.compress(ROW), "1: row: is a gz file"),
    ("cut.jsonl.gz", GZ[:-20], "row: the gz file is cut or damaged"),
    ("flipped.jsonl.gz", GZ[:-6] + bytes([GZ[-6] ^ 1]) + GZ[-5:], "1001: row: the gz file is cut or damaged"),
    ("lower.jsonl", b'{"query": "\\ud800"}\n', "1: row: holds half a character"),
    ("upper.jsonl", b'{"query": "\\uD800"}\n', "1: row: holds half a character"),
    ("raw.jsonl", b'{"query": "\xed\xa0\x80"}\n', "1: row: not valid UTF-8"),
    ("nul.txt", b"a\nb\0\n", "2: row: holds a NUL byte"),
    ("digits.jsonl", b'{"query": ' + b"9" * 5000 + b"}\n", "1: row: holds a number of thousands of digits"),
    ("deep.jsonl", ROW + b"[" * 100_000 + b"\n", "2: row: nested too deeply"),
    ("list.json", b"[" + ROW.strip() + b"]", "1: row: must be an object, got list"),
    ("bad.parquet", b"PAR1" + bytes(100), "0: row: cannot be read"),
    ("empty.parquet", b"", "0: row: cannot be read"),
]


def refused(path: str) -> str:
    with pytest.raises(DataError) as told:
        for source in find_sources([path]):
            list(read_rows(source))
    assert str(told.value).endswith(")") and "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(("name", "content", "problem"), CONTENTS, ids=[name for name, *_ in CONTENTS])
def test_a_damaged_file_is_told_at_its_line(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    told = refused(str(tmp_path / name))
    assert told.startswith(f"{tmp_path / name}:") and problem in told


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_skipped(name: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + ROW + b"\r\n" + ROW
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (source,) = find_sources([str(tmp_path / name)])
    assert [where[-2:] for where, _ in read_rows(source)] == [":1", ":3"] and count_rows([source]) == 2


def test_what_is_no_file_is_never_read_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jsonl"))
    for name, target in (("dangling", tmp_path / "none"), ("device", "/dev/zero"), ("loop", tmp_path / "loop.jsonl")):
        (tmp_path / f"{name}.jsonl").symlink_to(target)
    start = time.monotonic()
    problems = {"fifo": "is a FIFO, not", "socket": "is a socket, not", "device": "is a device, not"}
    problems |= {"dangling": "is a link to nothing", "loop": "is a link to nothing"}
    for name, problem in problems.items():
        path = str(tmp_path / f"{name}.jsonl")
        assert refused(path).startswith(f"data.train: {path}: {problem}")
        with pytest.raises(DataError):  # also where it became one after it was found
            list(read_rows(Source("jsonl", path)))
        with pytest.raises(DataError):
            count_rows([Source("jsonl", path)])
    for pattern in (tmp_path, tmp_path / "*.jsonl"):
        assert "not a file" in refused(str(pattern)) or "link to nothing" in refused(str(pattern))
    for pattern in ("a\0b.jsonl", "x" * 5000, "/dev/stdin", str(tmp_path / "fifo.jsonl/a.jsonl")):
        refused(pattern)
    assert time.monotonic() - start < 5


READ = """
import sys
from pathlib import Path
from lodestar.data.readers import Source, read_rows
from lodestar.errors import DataError
try:
    list(read_rows(Source("jsonl", sys.argv[1])))
except DataError as error:
    print(error)
print(*[line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_line_of_600_mb_is_an_error_in_bounded_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else path.open("wb") as file:
        file.write(ROW)
        if name.endswith(".gz"):
            file.write(b"a" * 40_000_000)
        else:
            file.truncate(600_000_000)  # a sparse file, of NUL bytes
    command = [sys.executable, "-c", READ.replace("jsonl", name.split(".")[1]), str(path)]
    told, peak_kib = processes.run(command, dict(os.environ), limit_s=60).stdout.splitlines()
    assert (
        told
        == f"{path}:2: row: longer than {MAX_LINE_CHARACTERS:,} characters (one row on each line; split long texts)"
    )
    assert int(peak_kib) < 300_000


def test_a_file_that_is_named_twice_is_found_also_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert repeated(find_sources([str(tmp_path / "a.jsonl")])) == []
    assert repeated(find_sources([str(tmp_path)])) == [str(tmp_path / "a.jsonl")]


@pytest.mark.parametrize("size", [0, 1, 300, 1 << 20])
def test_the_sample_of_a_file_changes_with_each_byte_of_a_small_one(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    first = Source("jsonl", str(path)).sample_fingerprint
    assert Source("jsonl", str(path)).sample_fingerprint == first
    for place in {0, size // 2, size - 1} & set(range(size)):
        content[place] ^= 1
        path.write_bytes(content)
        assert Source("jsonl", str(path)).sample_fingerprint != first
        content[place] ^= 1
    path.write_bytes(content + b"a")
    assert Source("jsonl", str(path)).sample_fingerprint != first
