"""Parts of a token cache: processes on several nodes that share its folder build one at a time until all are there.

A part holds the rows of a few files, tokenized. It is built under a lock of its own and renamed once it is on the disk:
another process builds again what a killed one had in hand, and a later run keeps the parts of an earlier one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets

from lodestar.data.file_record import FileRecord, FileState
from lodestar.data.findings import Findings
from lodestar.data.parallel_tokenize import Tokenize
from lodestar.data.readers import ROWS, Row, Source, read_rows
from lodestar.data.tokenized_shards import write_index, write_shards
from lodestar.errors import DataError
from lodestar.files import MANIFEST, InUseError, locked, manifest_hashes, read_object, sha256, sync, write_manifest

PART_BYTES = 1 << 28
"""Of a part's files, at least, but for the last part; a larger file is not cut."""
ABANDONED_SECONDS = 7 * 24 * 3600
"""Age at which unfinished parts of killed runs are deleted."""

_FIELD, _STATS = "data.cache_dir", "part.json"
Check = Callable[[str, Row, Findings], Row | None]


@dataclass(frozen=True)
class Corpus:
    """What a cache is built from."""

    sources: Sequence[Source]
    states: Sequence[FileState]
    """Of the sources' files, before they were hashed."""
    tokenize: Tokenize
    check: Check
    features: datasets.Features
    processes: int
    strict: bool

    def parts(self) -> list[Corpus]:
        """Of files next to each other; what is no file is a part of its own."""
        parts, start, num_bytes = list[Corpus](), 0, 0
        for stop, (source, state) in enumerate(zip(self.sources, self.states, strict=True), 1):
            num_bytes += state.size_bytes if source.is_file else PART_BYTES
            if num_bytes >= PART_BYTES or stop == len(self.sources):
                parts.append(replace(self, sources=self.sources[start:stop], states=self.states[start:stop]))
                start, num_bytes = stop, 0
        return parts


def build_parts(folder: Path, corpus: Corpus) -> None:
    """Build the parts of the cache `folder` that no other process builds, and wait for the others."""
    _delete_abandoned(folder.parent)
    parts = corpus.parts()
    missing = [*range(len(parts))]
    with FileRecord(folder.parent) as record:
        while missing:
            for number in missing.copy():  # from the first on: an error there is soon met by all
                if _is_built(folder, number):
                    missing.remove(number)
                    continue
                with suppress(InUseError), locked(folder.parent, _FIELD, _lock(folder, number)):
                    if not _is_built(folder, number):
                        title = "tokenizing" if len(parts) == 1 else f"tokenizing, part {number + 1} of {len(parts)}"
                        _build_part(folder, number, parts[number], record, title)
                    missing.remove(number)
                    break
            else:
                if missing:
                    with locked(folder.parent, _FIELD, _lock(folder, missing[0]), wait=True):
                        pass  # built, or left by a process that was killed


def join_parts(
    folder: Path, corpus: Corpus, stats_of: Callable[[Mapping[str, int], Findings], Mapping[str, Any]]
) -> None:
    """Make all parts the cache `folder`, whole or not at all; DataError where one is damaged, which is deleted.

    stats_of   (counts, findings) of all rows -> the content of facts.json; after its DataError no part is left
    """
    tmp, numbers = _parts_folder(folder), range(len(corpus.parts()))
    totals, findings, names, hashes = Counter[str](), Findings(corpus.strict), list[str](), dict[Path, str]()
    for part in (_part(folder, number) for number in numbers):
        try:
            hashes |= {part / name: digest for name, digest in manifest_hashes(part).items()}
            if sha256(part / _STATS) != hashes.get(part / _STATS):
                raise ValueError(f"{_STATS}: damaged")
            stats = read_object(part / _STATS)
        except (ValueError, OSError) as error:
            if folder.exists():  # another run was faster, on a file system without locks
                return
            shutil.rmtree(part, ignore_errors=True)
            raise DataError(f"{_FIELD}: {part}: {error} (start again: it is built anew)") from None
        totals.update(stats["totals"])
        findings.merge(stats["findings"])
        names += [f"{part.name}/{path.name}" for path in sorted(part.glob("*.arrow"))]
    try:
        all_stats = stats_of(totals, findings)
    except DataError:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    try:
        write_index(tmp / "rows", corpus.features, names)
        (tmp / "facts.json").write_text(json.dumps(all_stats))
        write_manifest(tmp, hash_of=lambda path: hashes.get(path) or sha256(path))
        tmp.rename(folder)
    except OSError:  # as above, or a full disk: the parts stay
        if not folder.exists():
            raise
        shutil.rmtree(tmp, ignore_errors=True)
    sync(folder.parent)
    for number in numbers:
        (folder.parent / _lock(folder, number)).unlink(missing_ok=True)


def _parts_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.parts.tmp")


def _part(folder: Path, number: int) -> Path:
    return _parts_folder(folder) / "rows" / f"{number:05d}"


def _lock(folder: Path, number: int) -> str:
    return f".{folder.name}.{number:05d}.lock"


def _is_built(folder: Path, number: int) -> bool:
    return (_part(folder, number) / MANIFEST).exists() or folder.exists()  # in this order: all move at once


def _build_part(folder: Path, number: int, part: Corpus, record: FileRecord, title: str) -> None:
    """Nothing of it is left after an error."""
    tmp, built = folder.with_name(f".{folder.name}.{number:05d}.{uuid4().hex[:8]}.tmp"), _part(folder, number)
    findings, num_read = Findings(part.strict), Counter[str]()
    try:
        rows = _checked_rows(part, findings, record, num_read)
        totals = write_shards(rows, part.tokenize, part.features, tmp, part.processes, title)
        without_tokens = totals["without_tokens"] + totals["rows"] - totals["texts"]
        if without_tokens:
            problem, remedy = "a text holds no token but special ones", "drop such rows, or check the tokenizer"
            findings.add(part.sources[0].path, "row", problem, remedy, without_tokens)
        totals["dropped"] = num_read.total() - totals["texts"]
        totals["without_tokens"] = without_tokens
        (tmp / _STATS).write_text(json.dumps({"totals": totals, "findings": findings.by_problem}), encoding="utf-8")
        write_manifest(tmp)
        built.parent.mkdir(parents=True, exist_ok=True)
        os.utime(_parts_folder(folder))  # not abandoned
        try:
            tmp.rename(built)
        except OSError:  # as in `join_parts`
            if not _is_built(folder, number):
                raise
        else:
            sync(built.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _checked_rows(part: Corpus, findings: Findings, record: FileRecord, num_read: Counter[str]) -> Iterator[Row]:
    """The rows that are not dropped. Counts the rows of each file, also in the record."""
    for source, state in zip(part.sources, part.states, strict=True):
        count = 0
        for where, row in read_rows(source):
            count += 1
            if (checked_row := part.check(where, row, findings)) is not None:
                yield checked_row
        if not count:
            findings.add_empty(source)
        if FileState.of(source.path) != state:
            raise DataError(
                f"{source.field}: {source.path}: changed while it was read (start again when it is complete)"
            )
        num_read[source.path] += count
        record.remember(source.path, state, ROWS, count)


def _delete_abandoned(cache_dir: Path) -> None:
    for tmp in cache_dir.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - tmp.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(tmp)
