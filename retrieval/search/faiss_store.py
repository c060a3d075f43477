"""faiss: TABLE.faiss holds the vectors by number, TABLE.sqlite the rows by the same numbers; `close` writes both.

Behind faiss's own bytes, which faiss reads alone, TABLE.faiss has their hash: a flipped bit in a vector is no valid
file, and would only move its document in the results. Hashing takes 0.7 s per GiB, when the table is opened.

Shape suffixes: N documents, D embedding width, K results.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import faiss
import numpy as np

from lodestar.errors import ConfigError
from lodestar.files import replacing_file
from retrieval.search.vector_stores import Location, Row, SearchHit

LOCK_SECONDS = 5.0
"""How long to wait for another process that writes."""
_HASH_FOLLOWS = b"sha256:"
"""Before the hash. Files of earlier versions have neither."""
_HASH_BYTES = len(_HASH_FOLLOWS) + hashlib.sha256().digest_size


def _append_hash(path: Path) -> None:
    digest = hashlib.sha256(np.memmap(path, np.uint8, "r").data).digest()
    with open(path, "ab") as file:
        file.write(_HASH_FOLLOWS + digest)


def _check_hash(path: Path) -> None:
    content = np.memmap(path, np.uint8, "r")
    digest = content[-_HASH_BYTES:].tobytes()
    if digest.startswith(_HASH_FOLLOWS):
        expected = _HASH_FOLLOWS + hashlib.sha256(content[:-_HASH_BYTES].data).digest()
        if digest != expected:
            remedy = "restore a copy, or delete both files and index again"
            raise ConfigError(f"{path}: is damaged: its hash is another ({remedy})")


def _gone(absent: Path, present: Path) -> ConfigError:
    return ConfigError(f"{absent}: is gone, but {present.name} is there (restore it, or delete both and index again)")


class FaissStore:
    def __init__(self, location: Location, table: str, dimension: int) -> None:
        self._path = Path(location.path) / f"{table}.faiss"
        rows_path = self._path.with_suffix(".sqlite")
        if self._path.exists() and not rows_path.exists():
            raise _gone(rows_path, self._path)
        self._rows = sqlite3.connect(rows_path, LOCK_SECONDS)
        self._rows.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, id TEXT UNIQUE, row TEXT)")
        if self._path.is_file():
            _check_hash(self._path)
            self._index = faiss.read_index(str(self._path))
            # A kill between the two files of a close leaves vectors without rows.
            with_row = faiss.IDSelectorBatch(self._numbers("SELECT number FROM rows"))
            self._index.remove_ids(faiss.IDSelectorNot(with_row))
            if self._index.d != dimension or self._index.ntotal != self.count():
                vectors = f"{self._index.ntotal:,} vectors of width {self._index.d}"
                problem = f"has {vectors} for {self.count():,} rows of width {dimension}"
                raise ConfigError(f"{self._path}: {problem} (restore a copy, or delete both files and index again)")
        elif self.count():
            raise _gone(self._path, rows_path)
        else:
            self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._changed = False

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        self._changed = True
        put = """INSERT INTO rows (id, row) VALUES (?, ?)
                 ON CONFLICT (id) DO UPDATE SET row = excluded.row RETURNING number"""
        numbers = [
            self._rows.execute(put, (row["id"], json.dumps(dict(row), ensure_ascii=False))).fetchone()[0]
            for row in rows
        ]
        numbers_N = np.array(numbers, np.int64)
        self._index.remove_ids(numbers_N)  # type: ignore[arg-type]
        self._index.add_with_ids(np.ascontiguousarray(vectors_ND, np.float32), numbers_N)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        params = None
        if where:
            conditions = " AND ".join(f"json_extract(row, '$.{name}') = ?" for name in where)
            numbers_N = self._numbers(f"SELECT number FROM rows WHERE {conditions}", *where.values())
            params = faiss.SearchParameters(sel=faiss.IDSelectorBatch(numbers_N))  # type: ignore[call-arg]
        scores_1K, numbers_1K = self._index.search(vector_D[None], k, params=params)
        get = "SELECT row FROM rows WHERE number = ?"
        return [
            SearchHit(score, json.loads(self._rows.execute(get, (number,)).fetchone()[0]))
            for score, number in zip(scores_1K[0].tolist(), numbers_1K[0].tolist(), strict=True)
            if number >= 0  # -1: there are fewer than k
        ]

    def count(self) -> int:
        return self._rows.execute("SELECT count(*) FROM rows").fetchone()[0]

    def close(self) -> None:
        if self._changed:
            with replacing_file(self._path) as tmp:
                faiss.write_index(self._index, str(tmp))
                _append_hash(tmp)
            self._rows.commit()  # last: search would never return rows without a vector
        self._rows.close()

    def _numbers(self, select: str, *values: str) -> np.ndarray:
        return np.array([number for (number,) in self._rows.execute(select, values)], np.int64)
