"""Qdrant: a collection whose points carry the row as payload.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

import numpy as np
from qdrant_client import QdrantClient, models

from lodestar.errors import ConfigError
from retrieval.search.vector_stores import Row, SearchHit


class QdrantStore:
    def __init__(self, path: str, table: str, dimension: int) -> None:
        self._collection = table
        try:
            self._client = QdrantClient(path=path)
        except RuntimeError:
            raise ConfigError(f"{path}: another process has the database open (end it, or wait)") from None
        if not self._client.collection_exists(table):
            parameters = models.VectorParams(size=dimension, distance=models.Distance.DOT)
            self._client.create_collection(table, parameters)

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        # Qdrant takes no other text as id
        ids: list[models.ExtendedPointId] = [str(uuid.uuid5(uuid.NAMESPACE_OID, row["id"])) for row in rows]
        batch = models.Batch(ids=ids, vectors=vectors_ND.tolist(), payloads=[dict(row) for row in rows])
        self._client.upsert(self._collection, batch)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        conditions: list[models.Condition] = [
            models.FieldCondition(key=name, match=models.MatchValue(value=value)) for name, value in where.items()
        ]
        result = self._client.query_points(
            self._collection,
            vector_D.tolist(),
            limit=k,
            query_filter=models.Filter(must=conditions) if conditions else None,
        )
        return [SearchHit(point.score, point.payload or {}) for point in result.points]

    def count(self) -> int:
        return self._client.count(self._collection).count

    def close(self) -> None:
        self._client.close()
