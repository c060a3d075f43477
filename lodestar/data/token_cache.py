"""Rows of files, checked and tokenized once into an Arrow cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.arrow_writer import ArrowWriter

from lodestar.data.readers import Row, Source, read_rows
from lodestar.errors import DataError
from lodestar.files import damage, sync, write_manifest

ABANDONED_SECONDS = 7 * 24 * 3600
"""Age at which the unfinished cache of a killed run is deleted."""

Columns = Mapping[str, list[Any]]
Tokenize = Callable[[Columns], Columns]
Check = Callable[[str, Row], Row | None]


@dataclass(frozen=True)
class DatasetStats:
    """Counts of a data set, with every truncated text and every dropped row."""

    fingerprint: str
    rows: int
    tokens: int
    truncated: int
    dropped: int

    def counts(self) -> dict[str, int]:
        """By name."""
        return {name: value for name, value in vars(self).items() if name != "fingerprint"}


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
    first_on_node: bool = True,
) -> TokenizedDataset:
    """The sources' rows, checked and tokenized; from the cache if it has the same content with the same settings.

    settings       everything besides the content that determines the result
    check          (where, row) -> the columns to keep, none to drop the row; raises DataError
    row_features   types of those columns, so that they do not depend on the first rows of a file
    tokenize       a batch of columns -> columns of `features`, where `tokens` and `truncated` are counts for each row
    version        of `tokenize`: a cache that another version built is not read. It is no part of the fingerprint, so
                   that a run resumes from a checkpoint that an earlier version wrote
    first_on_node  this process checks every byte of the cache, and rebuilds a damaged one
    """
    fingerprints = [source.fingerprint for source in sources]
    cache_key = json.dumps([fingerprints, dict(settings)], sort_keys=True)
    fingerprint = hashlib.blake2b(cache_key.encode(), digest_size=12).hexdigest()
    folder = cache_dir.expanduser() / (fingerprint if version == 1 else f"{fingerprint}-{version}")
    if first_on_node and folder.exists() and (problem := damage(folder, ("facts.json", "rows/state.json"))):
        print(f"warning: data.cache_dir: {folder}: {problem}; rebuilt", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    if not folder.exists():
        _build(folder, sources, fingerprints, tokenize, check, row_features, features, processes)
    stats = DatasetStats(**json.loads((folder / "facts.json").read_text()))
    return TokenizedDataset(cast(datasets.Dataset, datasets.load_from_disk(str(folder / "rows"))), stats)


def _build(
    folder: Path,
    sources: Sequence[Source],
    fingerprints: Sequence[str],
    tokenize: Tokenize,
    check: Check,
    row_features: datasets.Features,
    features: datasets.Features,
    processes: int,
) -> None:
    """Write the cache beside `folder`, then rename it; nothing is left after an error."""
    tmp, num_read = _new_tmp(folder), 0

    def checked_rows() -> Iterator[Row]:
        nonlocal num_read
        for source, fingerprint in zip(sources, fingerprints, strict=True):
            for where, row in read_rows(source):
                num_read += 1
                if (checked_row := check(where, row)) is not None:
                    yield checked_row
            if source.fingerprint != fingerprint:
                raise DataError(
                    f"{source.field}: {source.path}: changed while it was read (start again when it is complete)"
                )

    try:
        shards = list(_write_shards(checked_rows(), row_features, tmp / "raw"))
        if not shards:
            raise DataError(f"data.train: {', '.join(s.path for s in sources)}: no row is left to train on")
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
        counts: Any = table.select_columns(["tokens", "truncated"]).with_format("numpy")
        tokens, truncated = (
            sum(int(batch[name].sum()) for batch in counts.iter(100_000)) for name in ("tokens", "truncated")
        )
        table.save_to_disk(str(tmp / "rows"))
        for path in (tmp / "raw", *tmp.glob("mapped*.arrow")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        fingerprint = folder.name.partition("-")[0]  # without the version
        stats = DatasetStats(fingerprint, len(table), tokens, truncated, num_read - len(raw))
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
