"""Tokenized rows in Arrow files that `datasets.load_from_disk` maps, written once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.utils import tqdm

from lodestar.data.parallel_tokenize import Tokenize, encoded
from lodestar.data.readers import Row

CHUNK_ROWS = 1000
"""Rows that a process tokenizes at once."""
BATCH_BYTES, SHARD_BYTES = 16 << 20, 1 << 30
"""Least sizes of a record batch, which loading parses one by one, and of a file, which stays open."""


def write_shards(
    rows: Iterable[Row], tokenize: Tokenize, features: datasets.Features, folder: Path, processes: int, title: str
) -> Counter[str]:
    """Tokenize the rows and write them to a new folder, in their order; returns the sums of `encoded`'s counts.

    title   of the progress bar
    """
    totals = Counter[str]()
    with (
        closing(encoded(_chunks(rows), tokenize, features, processes)) as tables,
        tqdm(desc=title, unit=" rows") as progress,
        ShardWriter(folder, features) as writer,
    ):
        for table, counts in tables:
            writer.write(table)
            totals.update(counts)
            progress.update(counts["rows"])
    return totals


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


class ShardWriter:
    """Appends tables to Arrow files of about SHARD_BYTES in a new folder, in the layout of `Dataset.save_to_disk`."""

    def __init__(self, folder: Path, features: datasets.Features) -> None:
        folder.mkdir()
        self._folder, self._features = folder, features
        self._names, self._tables = list[str](), list[pa.Table]()
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._batch_bytes = self._shard_bytes = 0

    def write(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._batch_bytes += table.nbytes
        if self._batch_bytes >= BATCH_BYTES:
            self._write_batch()
        if self._shard_bytes >= SHARD_BYTES:
            self._close()

    def _write_batch(self) -> None:
        if self._writer is None:
            self._names.append(f"data-{len(self._names):05d}.arrow")
            self._writer = pa.ipc.new_stream(str(self._folder / self._names[-1]), self._features.arrow_schema)
        self._writer.write_table(pa.concat_tables(self._tables).combine_chunks())
        self._shard_bytes += self._batch_bytes
        self._tables, self._batch_bytes = [], 0

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._shard_bytes = None, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            if self._tables:
                self._write_batch()
            write_index(self._folder, self._features, self._names)
        self._close()


def write_index(folder: Path, features: datasets.Features, names: Sequence[str]) -> None:
    """What `datasets.load_from_disk` reads of a folder of Arrow files: their names in the order of the rows."""
    state: dict[str, Any] = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    # The same for every process that joins the same parts: on a file system without locks two may write at once.
    fingerprint = hashlib.blake2b(json.dumps([str(folder), *names]).encode(), digest_size=8).hexdigest()
    state |= {"_fingerprint": fingerprint, "_format_kwargs": {}, "_output_all_columns": False}
    state["_data_files"] = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps(state))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
