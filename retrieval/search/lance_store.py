"""LanceDB: a table with a column for each field.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.query import LanceVectorQueryBuilder

from retrieval.search.vector_stores import Location, Row, SearchHit


class LanceStore:
    def __init__(self, location: Location, table: str, dimension: int) -> None:
        database = lancedb.connect(location.path)
        if table in database.list_tables(limit=1_000_000).tables:
            self._table = database.open_table(table)
        else:
            text, vector = pa.string(), pa.list_(pa.float32(), dimension)
            schema = pa.schema([("id", text), ("vector", vector), ("title", text), ("text", text)])
            self._table = database.create_table(table, schema=schema)
        self._changed = False

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        self._changed = True
        new_columns = {name for row in rows for name in row} - set(self._table.schema.names)
        if new_columns:
            self._table.add_columns([pa.field(name, pa.string()) for name in sorted(new_columns)])
        values = [{**row, "vector": vector_D} for row, vector_D in zip(rows, vectors_ND, strict=True)]
        arrow = pa.Table.from_pylist(values, schema=self._table.schema)
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(arrow)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        names = set(self._table.schema.names) - {"vector"}
        if where.keys() - names:
            return []
        query = cast(LanceVectorQueryBuilder, self._table.search(vector_D))
        query = query.distance_type("dot").select([*names, "_distance"]).limit(k)
        if where:
            quoted = {name: value.replace("'", "''") for name, value in where.items()}
            query = query.where(" AND ".join(f"`{name}` = '{value}'" for name, value in quoted.items()), prefilter=True)
        rows = [{name: value for name, value in row.items() if value is not None} for row in query.to_list()]
        return [SearchHit(1 - row.pop("_distance"), row) for row in rows]

    def count(self) -> int:
        return self._table.count_rows()

    def close(self) -> None:
        if self._changed:
            self._table.optimize()  # otherwise each upsert leaves a fragment
