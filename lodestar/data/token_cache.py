"""Rows of files, checked and tokenized once into an Arrow cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets

from lodestar.data.cache_parts import Check, Corpus, build_parts, join_parts
from lodestar.data.file_record import FileRecord, FileState
from lodestar.data.findings import Finding, Findings
from lodestar.data.parallel_tokenize import Tokenize
from lodestar.data.readers import Source
from lodestar.errors import DataError
from lodestar.files import damage, locked, make_folder, sha256

_FIELD, _SHA256 = "data.cache_dir", "sha256"


@dataclass(frozen=True)
class DatasetStats:
    """Counts of a data set, with every truncated text and every dropped row."""

    fingerprint: str
    rows: int
    tokens: int
    truncated: int
    dropped: int
    """Rows that are not trained on: their text or query is blank, or holds no token."""
    without_tokens: int
    """Rows with a text of special tokens alone, dropped ones included."""
    findings: dict[str, Finding]
    """By what is wrong."""

    def counts(self) -> dict[str, int]:
        """By name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


@dataclass(frozen=True)
class TokenizedDataset:
    """Tokenized rows, memory-mapped, and their counts."""

    rows: datasets.Dataset
    stats: DatasetStats


def tokenized(
    sources: Sequence[Source],
    *,
    cache_dir: Path,
    settings: Mapping[str, Any],
    tokenize: Tokenize,
    check: Check,
    features: datasets.Features,
    processes: int,
    version: int = 1,
    strict: bool = False,
    first_on_node: bool = True,
) -> TokenizedDataset:
    """The sources' rows, checked and tokenized; from the cache if it has the same content with the same settings.

    Files whose size and time of change are those of an earlier run are not read. Runs and nodes that share the cache
    build it together, a part each.

    settings       everything besides the content that determines the result
    check          (where, row, findings) -> the columns to keep, none to drop the row; raises DataError
    tokenize       a batch of columns -> columns of `features`, where `tokens` and `truncated` are counts for each row,
                   `part`, if there, numbers the rows of one text from 0, and `without_tokens`, if there, is a bool
    version        of `tokenize`: a cache that another version built is not read. It is no part of the fingerprint, so
                   that a run resumes from a checkpoint that an earlier version wrote
    strict         raise DataError for the first finding
    first_on_node  this process checks the cache, and builds it where it is missing or damaged
    """
    states = [FileState.of(source.path) for source in sources]
    with FileRecord(cache_dir) as record:
        fingerprints = [source.known_fingerprint(record) for source in sources]
    cache_key = json.dumps([fingerprints, dict(settings)], sort_keys=True)
    fingerprint = hashlib.blake2b(cache_key.encode(), digest_size=12).hexdigest()
    folder = cache_dir / (fingerprint if version == 1 else f"{fingerprint}-{version}")
    corpus = Corpus(sources, states, tokenize, check, features, processes, strict)
    if not folder.exists() or (first_on_node and _damage(folder, lambda path: str(record.get(path, _SHA256)))):
        _check_or_build(folder, corpus, fingerprint)
    stats = cast(DatasetStats, _read_stats(folder))
    Findings(strict).merge(stats.findings)
    return TokenizedDataset(cast(datasets.Dataset, datasets.load_from_disk(str(folder / "rows"))), stats)


def _check_or_build(folder: Path, corpus: Corpus, fingerprint: str) -> None:
    """Read every byte of the cache, or build it together with other processes that need it."""
    cache_dir = folder.parent
    if not folder.exists():
        make_folder(cache_dir, _FIELD)
        build_parts(folder, corpus)
    is_writable = os.access(cache_dir, os.W_OK)
    with locked(cache_dir, _FIELD, f".{folder.name}.lock", wait=True) if is_writable else nullcontext():
        existed = folder.exists()  # on a file system without locks another run may join its parts from here on
        with FileRecord(cache_dir) as record:  # read again: the process that had the lock has added to it
            problem = _damage(folder, lambda path: record.value(path, _SHA256, lambda: sha256(path)))
        if problem is None:
            return
        make_folder(cache_dir, _FIELD)
        if existed:
            print(f"warning: {_FIELD}: {folder}: {problem}; rebuilt", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
        build_parts(folder, corpus)
        join_parts(folder, corpus, partial(_stats_of, corpus.sources, fingerprint))


def _damage(folder: Path, hash_of: Callable[[Path], str]) -> str | None:
    """What is wrong with a cache, in a few words."""
    if problem := damage(folder, ("facts.json", "rows/state.json"), hash_of):
        return problem
    return None if _read_stats(folder) else "facts.json: of another version"


def check_repeated(sources: Sequence[Source], *, strict: bool, tell: bool) -> None:
    """Warn of files that are named more than once; DataError where strict."""
    findings = Findings(strict)
    findings.add_repeated(sources)
    if tell:
        findings.print()


def print_findings(stats: Sequence[DatasetStats]) -> None:
    """One line for each kind of finding in all data sets."""
    findings = Findings()
    for one in stats:
        findings.merge(one.findings)
    findings.print()


def _read_stats(folder: Path) -> DatasetStats | None:
    """None for those of another version, which counted something else."""
    values = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return DatasetStats(**values) if values.keys() == {field.name for field in fields(DatasetStats)} else None


def _stats_of(
    sources: Sequence[Source], fingerprint: str, totals: Mapping[str, int], findings: Findings
) -> dict[str, Any]:
    """DataError where no row is left."""
    if not totals["examples"]:
        paths = ", ".join(source.path for source in sources)
        raise DataError(f"{sources[0].field}: {paths}: no row is left to train on (name files with texts)")
    stats = DatasetStats(
        fingerprint=fingerprint,
        rows=totals["examples"],
        tokens=totals["tokens"],
        truncated=totals["truncated"],
        dropped=totals["dropped"],
        without_tokens=totals["without_tokens"],
        findings=findings.by_problem,
    )
    return asdict(stats)
