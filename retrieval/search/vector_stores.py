"""The vector databases: the protocol that each implements, and the registry of those that a recipe can name.

To add one, write a class with the four methods of `Store` (of `ServerStore`, if it has servers) in a file of its own
and add a line to `STORES`. Scores are dot products (cosines, where the model normalises); search is exact until a user
builds an approximate index with the database's own tools. Loads without torch and without the databases' client
libraries.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol

from pydantic import AfterValidator

from lodestar.errors import require, shown

if TYPE_CHECKING:
    import numpy as np


class StoreType(NamedTuple):
    """A database that a recipe can name."""

    place: str
    """MODULE:CLASS. The module is imported when a store is opened, so it imports its client at the top."""
    keys: tuple[str, ...] = ("path",)
    """Of the recipe, one of which says where the database is: path (a folder), url or url_env (a server)."""
    schemes: tuple[str, ...] = ()
    """What a server's URL may begin with."""
    has_api_key: bool = False


STORES = {
    "lancedb": StoreType("retrieval.search.lance_store:LanceStore"),
    "qdrant": StoreType(
        "retrieval.search.qdrant_store:QdrantStore", ("path", "url"), ("http", "https"), has_api_key=True
    ),
    "faiss": StoreType("retrieval.search.faiss_store:FaissStore"),
    "pgvector": StoreType(
        "retrieval.search.pgvector_store:PgvectorStore", ("url", "url_env"), ("postgresql", "postgres")
    ),
}
"""By `store.kind`."""

Row = Mapping[str, str]
"""`id`, `title`, `text` and metadata, all of it text; field names are letters, digits and _."""


@dataclass(frozen=True)
class Location:
    """Where a database is: a folder or a server. Its repr holds no secret."""

    name: str
    """For messages, without secrets."""
    path: str = ""
    url: str = field(default="", repr=False)
    api_key: str | None = field(default=None, repr=False)


class SearchHit(NamedTuple):
    score: float
    row: Row


class Store(Protocol):
    """One table of a database."""

    def __init__(self, location: Location, table: str, dimension: int) -> None:
        """Create the table if it does not exist; `dimension` is the embedding width."""
        ...

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        """Add rows with their float32 vectors. Rows with an existing id are overwritten; ids within `rows` differ."""
        ...

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        """The k best rows, best first, among those whose fields equal all of `where`."""
        ...

    def count(self) -> int:
        """Rows in the table."""
        ...

    def close(self) -> None:
        """Write what was upserted; rows may be lost before that."""
        ...


class ServerStore(Store, Protocol):
    """A server keeps the record of a table (store_record.py) itself, where a folder has a file."""

    @staticmethod
    def read_record(location: Location, table: str) -> str | None:
        """What `write_record` wrote; none if it did not, or if the table does not exist."""
        ...

    def write_record(self, record: str) -> None:
        """A JSON object."""
        ...


def _check_kind(kind: str) -> str:
    if kind not in STORES:
        known = ", ".join(f"'{name}'" for name in STORES)
        raise ValueError(f"must be one of {known}, got {shown(kind)} (take one of them)")
    return kind


StoreKind = Annotated[str, AfterValidator(_check_kind)]


def store_class(kind: str) -> type[Store]:
    """The class of `STORES`; ConfigError if its client library is not installed."""
    module, _, name = STORES[kind].place.partition(":")
    return getattr(require(module, field="store.kind", extra="databases"), name)
