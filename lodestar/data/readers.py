"""Rows of text from files, folders and the hub; every error names FILE:LINE. Loads without torch."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet

from lodestar.errors import DataError, first_line

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz")


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
        if self.kind in ("saved", "hub"):
            return str(_open(self)._fingerprint)
        digest = hashlib.blake2b(digest_size=16)
        with open(self.path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    @property
    def size_bytes(self) -> int | None:
        """Of a file; none otherwise."""
        return None if self.kind in ("saved", "hub") else Path(self.path).stat().st_size


def find_sources(patterns: Sequence[str], field: str = "data.train") -> list[Source]:
    """Files, globs, folders and hub names as sources, in a stable order; DataError where one does not exist."""
    sources: list[Source] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir() and (path / "state.json").exists():
            sources.append(Source("saved", pattern, field))
        elif path.is_dir():
            files = sorted(str(p) for p in path.rglob("*") if p.name.endswith(SUFFIXES))
            if not files:
                raise DataError(f"{field}: {pattern}: holds no file of texts (known: {', '.join(SUFFIXES)})")
            sources += [_file(name, field) for name in files]
        elif path.is_file():
            sources.append(_file(pattern, field))
        elif files := sorted(glob.glob(pattern, recursive=True)):
            sources += [_file(name, field) for name in files]
        elif pattern.count("/") <= 1 and not pattern.startswith((".", "/", "~")) and not pattern.endswith(SUFFIXES):
            sources.append(Source("hub", pattern, field))
        else:
            raise DataError(f"{field}: {pattern}: no such file or folder (check the path; globs and folders work too)")
    return sources


def _file(name: str, field: str) -> Source:
    if not name.endswith(SUFFIXES):
        raise DataError(f"{field}: {name}: unknown kind of file (known: {', '.join(SUFFIXES)})")
    return Source(name.removesuffix(".gz").rpartition(".")[2], name, field)


def read_rows(source: Source) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row of a source; `where` is FILE:LINE, for error messages. Raises DataError."""
    if source.kind in ("jsonl", "json"):
        yield from read_json(source.path)
    elif source.kind == "txt":
        for number, line in read_lines(source.path):
            yield f"{source.path}:{number}", {"text": line.strip()}
    elif source.kind == "parquet":
        yield from _read_parquet(source)
    else:
        for number, row in enumerate(_open(source)):
            yield f"{source.path}:{number}", row  # type: ignore[misc]


def _read_parquet(source: Source) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    yield f"{source.path}:{number}", row
                    number += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"{source.path}:{number}: row: cannot be read: {first_line(error)} (fetch it again)") from None


def read_json(path: str | Path) -> Iterator[tuple[str, Row]]:
    """(FILE:LINE, object) for each line of a JSONL file, gz or not; DataError for a line that is none."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: row: not valid JSON: {error.msg} (one object on each line)") from None
        if "\\ud" in line and not _encodable(row):
            raise DataError(f"{path}:{number}: row: holds half a character (a lone surrogate; fix or drop the row)")
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number}: row: must be an object, got {type(row).__name__} (one object on each line)"
            )
        yield f"{path}:{number}", row


def _encodable(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) for each line that is not blank, gz or not; DataError where the file cannot be read."""
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: row: not valid UTF-8 (convert the file)") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}:{number + 1}: row: cannot be read: {error} (fetch the file again)") from None


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


def stream_rows(sources: Sequence[Source]) -> Iterator[tuple[str, Row]]:
    """As `read_rows`, of one source after the other; data sets of the hub are never stored on the disk."""
    for source in sources:
        if source.kind == "hub":
            for number, row in enumerate(_open(source, streaming=True)):
                yield f"{source.path}:{number}", row
        else:
            yield from read_rows(source)


def count_rows(sources: Sequence[Source]) -> int | None:
    """Rows of the sources, by counting lines; none where that would take long."""
    total, budget_bytes = 0, 1 << 27
    for source in sources:
        if source.kind not in ("jsonl", "json", "txt"):
            return None
        budget_bytes -= Path(source.path).stat().st_size * (4 if source.path.endswith(".gz") else 1)
        if budget_bytes < 0:
            return None
        opener = gzip.open if source.path.endswith(".gz") else open
        with opener(source.path, "rb") as file:
            total += sum(1 for line in file if not line.isspace())
    return total
