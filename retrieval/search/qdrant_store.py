"""Qdrant: a collection whose points carry the row as payload, in a folder or on a server.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException

from lodestar.errors import ConfigError
from retrieval.search.vector_stores import Location, Row, SearchHit

RECORD = "lodestar"
"""The key of a collection's metadata."""
BATCH_ROWS = 128
"""Of one request: a server takes no more than 32 MB at once."""
TIMEOUT_SECONDS = 60
"""Of one request; the client's own 5 are too few for an exact search in a large collection."""


class QdrantStore:
    def __init__(self, location: Location, table: str, dimension: int) -> None:
        self._location, self._collection = location, table
        self._client = _connect(location)
        with _one_line_errors(location):
            if not self._client.collection_exists(table):
                parameters = models.VectorParams(size=dimension, distance=models.Distance.DOT)
                exact = models.HnswConfigDiff(m=0)  # no graph: a server would build one by itself
                self._client.create_collection(table, parameters, hnsw_config=exact)

    @staticmethod
    def read_record(location: Location, table: str) -> str | None:
        client = _connect(location)
        with _one_line_errors(location):
            metadata = client.get_collection(table).config.metadata if client.collection_exists(table) else None
        client.close()
        return (metadata or {}).get(RECORD)

    def write_record(self, record: str) -> None:
        with _one_line_errors(self._location):
            self._client.update_collection(self._collection, metadata={RECORD: record})
            metadata = self._client.get_collection(self._collection).config.metadata
        if not metadata:
            raise ConfigError(f"{self._location.name}: keeps no metadata of collections (take Qdrant 1.16 or newer)")

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        with _one_line_errors(self._location):
            for start in range(0, len(rows), BATCH_ROWS):
                part = rows[start : start + BATCH_ROWS]
                # Qdrant takes no other text as id
                ids: list[models.ExtendedPointId] = [str(uuid.uuid5(uuid.NAMESPACE_OID, row["id"])) for row in part]
                vectors = vectors_ND[start : start + BATCH_ROWS].tolist()
                self._client.upsert(
                    self._collection, models.Batch(ids=ids, vectors=vectors, payloads=[dict(row) for row in part])
                )

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        conditions: list[models.Condition] = [
            models.FieldCondition(key=name, match=models.MatchValue(value=value)) for name, value in where.items()
        ]
        with _one_line_errors(self._location):
            result = self._client.query_points(
                self._collection,
                vector_D.tolist(),
                limit=k,
                query_filter=models.Filter(must=conditions) if conditions else None,
            )
        return [SearchHit(point.score, point.payload or {}) for point in result.points]

    def count(self) -> int:
        with _one_line_errors(self._location):
            return self._client.count(self._collection).count

    def close(self) -> None:
        self._client.close()


def _connect(location: Location) -> QdrantClient:
    if location.url:
        return QdrantClient(
            url=location.url, api_key=location.api_key, timeout=TIMEOUT_SECONDS, check_compatibility=False
        )
    try:
        return QdrantClient(path=location.path)
    except RuntimeError:
        raise ConfigError(f"{location.name}: another process has the database open (end it, or wait)") from None


@contextmanager
def _one_line_errors(location: Location) -> Iterator[None]:
    """ConfigError for what a server answers, or for none that answers."""
    try:
        yield
    except (ApiException, QdrantException) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{location.name}: {problem} (check the URL, the API key and the server's log)") from None
