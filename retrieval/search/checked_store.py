"""A database whose every failure is one line: its client may raise anything.

Loads without torch and without the databases' client libraries.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, cast

from lodestar.errors import ConfigError, LodestarError
from retrieval.search.vector_stores import Location, Row, SearchHit, ServerStore, Store, StoreKind, store_class

if TYPE_CHECKING:
    import numpy as np

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


class CheckedStore:
    """The table of a database; ConfigError for whatever its client raises."""

    def __init__(self, kind: StoreKind, location: Location, table: str, dimension: int) -> None:
        self._kind, self._location, self._table = kind, location, table
        database = store_class(kind)
        with self._one_line():
            self._store: Store = database(location, table, dimension)

    @staticmethod
    def read_record(kind: StoreKind, location: Location, table: str) -> str | None:
        """Of a server."""
        database = cast(type[ServerStore], store_class(kind))
        with _one_line(kind, location, table):
            return database.read_record(location, table)

    def write_record(self, record: str) -> None:
        """Of a server."""
        with self._one_line():
            cast(ServerStore, self._store).write_record(record)

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        with self._one_line():
            self._store.upsert(vectors_ND, rows)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        with self._one_line():
            return self._store.search(vector_D, k, where)

    def count(self) -> int:
        with self._one_line():
            return self._store.count()

    def close(self) -> None:
        with self._one_line():
            self._store.close()

    def _one_line(self) -> AbstractContextManager[None]:
        return _one_line(self._kind, self._location, self._table)


@contextmanager
def _one_line(kind: str, location: Location, table: str) -> Iterator[None]:
    try:
        yield
    except LodestarError:
        raise
    except Exception as error:
        # Not its message: it may be the library's own words, or hold the URL and with it a password.
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            problem, remedy = f"cannot be written to: {error.strerror}", "make room, or name another folder"
        elif isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            problem, remedy = "another process writes to it", "end it, or wait"
        elif isinstance(error, sqlite3.OperationalError) and ("full" in str(error) or "readonly" in str(error)):
            problem, remedy = f"cannot be written to: {error}", "make room, or name another folder"
        elif location.url:
            problem, remedy = f"{kind} failed: {type(error).__name__}", "check the URL, and the server's log"
        else:
            problem = f"is damaged, or not a table that this version of {kind} reads"
            remedy = "restore a copy, or delete it and index again"
        raise ConfigError(f"{location.name}: {table}: {problem} ({remedy})") from None
