"""The vector databases: the protocol that each implements, and the registry of those that a recipe can name.

To add one, write a class with the four methods of `Store` in a file of its own and add a line to `STORES`. Scores are
dot products (cosines, where the model normalises); search is exact until a user builds an approximate index with the
database's own tools. Loads without torch and without the databases' client libraries.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol

from pydantic import AfterValidator

from lodestar.errors import require

if TYPE_CHECKING:
    import numpy as np

STORES = {
    "lancedb": "retrieval.search.lance_store:LanceStore",
    "qdrant": "retrieval.search.qdrant_store:QdrantStore",
    "faiss": "retrieval.search.faiss_store:FaissStore",
}
"""`store.kind` -> MODULE:CLASS. The module is imported when a store is opened, so it imports its client at the top."""

Row = Mapping[str, str]
"""`id`, `title`, `text` and metadata, all of it text; field names are letters, digits and _."""


class SearchHit(NamedTuple):
    score: float
    row: Row


class Store(Protocol):
    """One table of a database. The class is called with (path of the folder, name of the table, embedding width) and
    creates the table if it does not exist."""

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


def _check_kind(kind: str) -> str:
    if kind not in STORES:
        known = ", ".join(f"'{name}'" for name in STORES)
        raise ValueError(f"must be one of {known}, got {json.dumps(kind, ensure_ascii=False)}")
    return kind


StoreKind = Annotated[str, AfterValidator(_check_kind)]


def store_class(kind: str) -> Callable[[str, str, int], Store]:
    """The class of `STORES`; ConfigError if its client library is not installed."""
    module, _, name = STORES[kind].partition(":")
    return getattr(require(module, field="store.kind", extra="databases"), name)
