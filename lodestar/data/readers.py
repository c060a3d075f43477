"""Rows of text from files, folders and the hub; every error names FILE:LINE. Loads without torch."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from lodestar.data.file_record import FileRecord
from lodestar.data.lines import OnError, Place, fail, is_encodable, read_lines, read_lines_from
from lodestar.errors import DataError, first_line, shown
from lodestar.files import NO_SUCH_FILE, file_problem, open_regular

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz")

ROWS = "rows"
"""In a FileRecord: the number of rows of a file."""
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 20


@dataclass(frozen=True)
class Source:
    """A file, a folder saved by `datasets`, or a data set of the hub."""

    kind: str
    path: str
    field: str = "data.train"
    """The recipe's key that names it."""

    @property
    def fingerprint(self) -> str:
        """Changes with the content."""
        if not self.is_file:
            return str(_open(self)._fingerprint)
        digest = hashlib.blake2b(digest_size=16)
        with open_regular(self.path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def known_fingerprint(self, record: FileRecord) -> str:
        """`fingerprint`; a file that has not changed since it was recorded is not read."""
        if self.is_file:
            return record.value(self.path, "blake2b", lambda: self.fingerprint)
        return self.fingerprint

    @property
    def is_file(self) -> bool:
        """Not a folder saved by `datasets` or a data set of the hub."""
        return self.kind not in ("saved", "hub")

    @property
    def sample_fingerprint(self) -> str | None:
        """Of a file: changes with its size and with the content of 256 places over the whole, all of one of 256 MiB.

        For streams, of which all would take too long to hash. None for others than files.
        """
        if (size := self.size_bytes) is None:
            return None
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        with open_regular(self.path) as file:
            for i in range(_SAMPLES):
                file.seek(max(i * size // _SAMPLES, 0))
                digest.update(file.read(min(_SAMPLE_BYTES, -(-size // _SAMPLES))))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
        return digest.hexdigest()

    def known_sample(self, record: FileRecord) -> str | None:
        """`sample_fingerprint`; a file that has not changed since it was recorded is not read."""
        return record.value(self.path, "sample", lambda: str(self.sample_fingerprint)) if self.is_file else None

    @property
    def size_bytes(self) -> int | None:
        """Of a file; none otherwise."""
        if not self.is_file:
            return None
        with open_regular(self.path) as file:
            return os.fstat(file.fileno()).st_size


def find_sources(patterns: Sequence[str], field: str = "data.train") -> list[Source]:
    """Files, globs, folders and hub names as sources, in a stable order; DataError where one does not exist."""
    sources: list[Source] = []
    for pattern in patterns:
        problem = file_problem(pattern)
        if problem is None:
            sources.append(_file(pattern, field))
        elif os.path.isfile(os.path.join(pattern, "state.json")):
            sources.append(Source("saved", pattern, field))
        elif os.path.isdir(pattern):
            files = sorted(str(p) for p in Path(pattern).rglob("*") if p.name.endswith(SUFFIXES) and not p.is_dir())
            if not files:
                raise DataError(f"{field}: {pattern}: holds no file of texts (known: {', '.join(SUFFIXES)})")
            sources += [_file(name, field) for name in files]
        elif problem == NO_SUCH_FILE and (files := sorted(glob.glob(pattern, recursive=True))):
            sources += [_file(name, field) for name in files]
        elif problem == NO_SUCH_FILE and _may_be_hub_name(pattern):
            sources.append(Source("hub", pattern, field))
        else:
            problem = "no such file or folder" if problem == NO_SUCH_FILE else problem
            raise DataError(f"{field}: {pattern}: {problem} (check the path; globs and folders work too)")
    return sources


def _may_be_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(SUFFIXES)


def _file(name: str, field: str) -> Source:
    if problem := file_problem(name):
        raise DataError(f"{field}: {name}: {problem} (name files of rows)")
    if not name.endswith(SUFFIXES):
        raise DataError(f"{field}: {name}: unknown kind of file (known: {', '.join(SUFFIXES)})")
    return Source(name.removesuffix(".gz").rpartition(".")[2], name, field)


def repeated(sources: Sequence[Source]) -> list[str]:
    """Paths of files that are named more than once, also by a link."""
    counts = Counter(os.path.realpath(source.path) for source in sources if source.kind != "hub")
    return [path for path, count in counts.items() if count > 1]


def read_rows(source: Source, on_error: OnError = fail) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row of a source; `where` is FILE:LINE, for error messages. Raises DataError."""
    return ((where, row) for _, where, row in read_rows_from(source, Place(), on_error))


def read_rows_from(source: Source, start: Place, on_error: OnError = fail) -> Iterator[tuple[Place, str, Row]]:
    """As `read_rows` from a place that an earlier call gave: (place after the row, where, row)."""
    if source.kind in ("jsonl", "json"):
        yield from _json_rows(source.path, start, on_error)
    elif source.kind == "txt":
        for place, line in read_lines_from(source.path, start, on_error):
            yield place, f"{source.path}:{place.line}", {"text": line.strip()}
    elif source.kind == "parquet":
        yield from _numbered(source, _parquet_rows(source.path, start.line), start.line)
    else:
        table = _open(source)
        rows = iter(table.select(range(start.line, len(table))) if start.line < len(table) else ())
        yield from _numbered(source, rows, start.line)


def _numbered(source: Source, rows: Iterator[Any], start: int) -> Iterator[tuple[Place, str, Row]]:
    """Rows of a table, from `start` on; DataError names the row that cannot be read."""
    number = start
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (DataError, KeyboardInterrupt):
            raise
        except Exception as error:  # Arrow, its decoders, and `datasets` have no common class
            raise DataError(
                f"{source.path}:{number}: row: cannot be read: {first_line(error)} (fetch it again)"
            ) from None
        yield Place(number + 1), f"{source.path}:{number}", row
        number += 1


def _parquet_rows(path: str, start: int) -> Iterator[Row]:
    """From row `start` on; row groups before it are not read."""
    with open_regular(path), parquet.ParquetFile(path) as file:
        group = 0
        while group < file.num_row_groups and start >= file.metadata.row_group(group).num_rows:
            start -= file.metadata.row_group(group).num_rows
            group += 1
        for batch in file.iter_batches(1000, row_groups=[*range(group, file.num_row_groups)]):
            yield from batch[start:].to_pylist()
            start = max(0, start - len(batch))


def read_json(path: str | Path, on_error: OnError = fail) -> Iterator[tuple[str, Row]]:
    """(FILE:LINE, object) for each line of a JSONL file, gz or not; DataError for a line that is none."""
    return ((where, row) for _, where, row in _json_rows(path, Place(), on_error))


def _json_rows(path: str | Path, start: Place, on_error: OnError) -> Iterator[tuple[Place, str, Row]]:
    for place, line in read_lines_from(path, start, on_error):
        where = f"{path}:{place.line}"
        try:
            row = _parse(line)
        except ValueError as error:
            on_error(DataError(f"{where}: row: {error}"))
        else:
            yield place, where, row


def _parse(line: str) -> Row:
    """The object on a line; ValueError says what is wrong, and the remedy."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (one object on each line)") from None
    except RecursionError:
        raise ValueError("nested too deeply (flatten or drop the row)") from None
    except ValueError:  # Python's limit
        raise ValueError("holds a number of thousands of digits (drop the row)") from None
    if ("\\ud" in line or "\\uD" in line) and not _has_whole_characters(row):
        raise ValueError("holds half a character (a lone surrogate; fix or drop the row)")
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {type(row).__name__} (one object on each line)")
    return row


def _has_whole_characters(row: object) -> bool:
    return is_encodable(json.dumps(row, ensure_ascii=False))


def row_id(where: str, field: str, value: object) -> str:
    """The id of a row as text; DataError for one that is neither text nor a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {field}: must be text or a whole number, got {shown(value)} (give each row an id)")
    return str(value)


def _open(source: Source, *, streaming: bool = False) -> Any:
    import datasets

    try:
        if source.kind == "saved":
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, split="train", streaming=streaming)
    except Exception as error:  # `datasets` has no common class for its errors
        raise DataError(
            f"{source.field}: {source.path}: cannot be opened: {first_line(error)} (check the name)"
        ) from None
    return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded


def stream_rows(source: Source, start: Place) -> Iterator[tuple[Place, str, Row]]:
    """As `read_rows_from`; a data set of the hub is never stored on the disk."""
    if source.kind == "hub":
        return _numbered(source, iter(_open(source, streaming=True).skip(start.line)), start.line)
    return read_rows_from(source, start)


def count_rows(sources: Sequence[Source], record: FileRecord | None = None) -> int | None:
    """Rows of the sources, from the record or by counting lines; none where that would take long."""
    total, budget_bytes = 0, 1 << 27
    for source in sources:
        size_bytes = source.size_bytes
        if record is not None and source.is_file and (rows := record.get(source.path, ROWS)) is not None:
            total += rows
            continue
        if size_bytes is None or source.kind == "parquet":
            return None
        budget_bytes -= size_bytes * (4 if source.path.endswith(".gz") else 1)
        if budget_bytes < 0:
            return None
        total += sum(1 for _ in read_lines(source.path))
    return total
