"""Rows of files, checked and tokenized once into an Arrow cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.arrow_writer import ArrowWriter

from lodestar.data.findings import Finding, Findings
from lodestar.data.readers import Row, Source, read_rows
from lodestar.errors import DataError
from lodestar.files import damage, sync, write_manifest

ABANDONED_SECONDS = 7 * 24 * 3600
"""Age at which the unfinished cache of a killed run is deleted."""

Columns = Mapping[str, list[Any]]
Tokenize = Callable[[Columns], Columns]
Check = Callable[[str, Row, Findings], Row | None]


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
    row_features: datasets.Features,
    features: datasets.Features,
    processes: int,
    version: int = 1,
    strict: bool = False,
    first_on_node: bool = True,
) -> TokenizedDataset:
    """The sources' rows, checked and tokenized; from the cache if it has the same content with the same settings.

    settings       everything besides the content that determines the result
    check          (where, row, findings) -> the columns to keep, none to drop the row; raises DataError
    row_features   types of those columns, so that they do not depend on the first rows of a file
    tokenize       a batch of columns -> columns of `features`, where `tokens` and `truncated` are counts for each row,
                   `part`, if there, numbers the rows of one text from 0, and `without_tokens`, if there, is a bool
    version        of `tokenize`: a cache that another version built is not read. It is no part of the fingerprint, so
                   that a run resumes from a checkpoint that an earlier version wrote
    strict         raise DataError for the first finding
    first_on_node  this process checks every byte of the cache, and rebuilds a damaged one
    """
    fingerprints = [source.fingerprint for source in sources]
    cache_key = json.dumps([fingerprints, dict(settings)], sort_keys=True)
    fingerprint = hashlib.blake2b(cache_key.encode(), digest_size=12).hexdigest()
    folder = cache_dir / (fingerprint if version == 1 else f"{fingerprint}-{version}")
    if first_on_node and folder.exists() and (problem := damage(folder, ("facts.json", "rows/state.json"))):
        print(f"warning: data.cache_dir: {folder}: {problem}; rebuilt", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    if not folder.exists() or (stats := _read_stats(folder)) is None:
        if first_on_node:
            shutil.rmtree(folder, ignore_errors=True)  # of another version
        _build(folder, sources, fingerprints, tokenize, check, row_features, features, processes, Findings(strict))
        stats = cast(DatasetStats, _read_stats(folder))
    Findings(strict).merge(stats.findings)
    return TokenizedDataset(cast(datasets.Dataset, datasets.load_from_disk(str(folder / "rows"))), stats)


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


def _build(
    folder: Path,
    sources: Sequence[Source],
    fingerprints: Sequence[str],
    tokenize: Tokenize,
    check: Check,
    row_features: datasets.Features,
    features: datasets.Features,
    processes: int,
    findings: Findings,
) -> None:
    """Write the cache beside `folder`, then rename it; nothing is left after an error."""
    tmp, num_read = _new_tmp(folder), 0

    def checked_rows() -> Iterator[Row]:
        nonlocal num_read
        for source, fingerprint in zip(sources, fingerprints, strict=True):
            before = num_read
            for where, row in read_rows(source):
                num_read += 1
                if (checked_row := check(where, row, findings)) is not None:
                    yield checked_row
            if num_read == before:
                findings.add_empty(source)
            if source.fingerprint != fingerprint:
                raise DataError(
                    f"{source.field}: {source.path}: changed while it was read (start again when it is complete)"
                )

    try:
        shards = list(_write_shards(checked_rows(), row_features, tmp / "raw"))
        if not shards:
            raise _no_row_left(sources)
        raw = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])
        table = raw.map(
            tokenize,
            batched=True,
            remove_columns=raw.column_names,
            num_proc=processes if processes > 1 and len(raw) > 2000 else None,
            features=features,
            cache_file_name=str(tmp / "mapped.arrow"),
            desc="tokenizing",
        )
        if not len(table):
            raise _no_row_left(sources)
        totals = _totals(table)
        without_tokens = totals["without_tokens"] + len(raw) - totals["texts"]
        if without_tokens:
            problem, remedy = "a text holds no token but special ones", "drop such rows, or check the tokenizer"
            findings.add(sources[0].path, "row", problem, remedy, without_tokens)
        table.save_to_disk(str(tmp / "rows"))
        for path in (tmp / "raw", *tmp.glob("mapped*.arrow")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        fingerprint = folder.name.partition("-")[0]  # without the version
        stats = DatasetStats(
            fingerprint=fingerprint,
            rows=len(table),
            tokens=totals["tokens"],
            truncated=totals["truncated"],
            dropped=num_read - totals["texts"],
            without_tokens=without_tokens,
            findings=findings.by_problem,
        )
        (tmp / "facts.json").write_text(json.dumps(asdict(stats)))
        write_manifest(tmp)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    try:
        tmp.rename(folder)  # whole or absent
    except OSError:  # another run on this cache was faster
        shutil.rmtree(tmp)
    sync(folder.parent)


def _no_row_left(sources: Sequence[Source]) -> DataError:
    paths = ", ".join(source.path for source in sources)
    return DataError(f"{sources[0].field}: {paths}: no row is left to train on (name files with texts)")


def _totals(table: datasets.Dataset) -> dict[str, int]:
    """Sums of the columns that count, and the number of texts."""
    names = [name for name in ("tokens", "truncated", "without_tokens", "part") if name in table.column_names]
    totals = Counter[str](texts=0 if "part" in names else len(table))
    columns: Any = table.select_columns(names).with_format("numpy")
    for batch in columns.iter(100_000):
        if "part" in names:
            totals["texts"] += int((batch.pop("part") == 0).sum())
        totals.update({name: int(values.sum()) for name, values in batch.items()})
    return totals


def _new_tmp(folder: Path) -> Path:
    """A new folder for this process, because other runs and nodes may build the same cache; deletes abandoned ones."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for tmp in folder.parent.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - tmp.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(tmp)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))


def _write_shards(
    rows: Iterator[Row], features: datasets.Features, folder: Path, shard_rows: int = 200_000
) -> Iterator[Path]:
    """Write Arrow files of `shard_rows` rows, so that memory does not grow with the data set; yields their paths."""
    folder.mkdir()
    row = next(rows, None)
    while row is not None:
        path = folder / f"{len(list(folder.iterdir())):05d}.arrow"
        writer = ArrowWriter(path=str(path), features=features)
        for _ in range(shard_rows):
            writer.write(dict(row))
            row = next(rows, None)
            if row is None:
                break
        writer.finalize()
        yield path
