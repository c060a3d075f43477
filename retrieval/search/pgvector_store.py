"""Postgres with pgvector: a table with the columns id, title, text, metadata and embedding.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb

from lodestar.errors import ConfigError, first_line
from retrieval.search.vector_stores import Location, Row, SearchHit

COLUMNS = ("id", "title", "text")
"""The other fields of a row are in `metadata`."""
RECORDS = sql.Identifier("lodestar_tables")
"""The table of records."""
_URL = re.compile(r"postgres(ql)?://([^:@/?#\s]*(:[^:@/?#\s]*)?@)?[^@/?#\s]*(/[^@?#\s]*)?(\?\S*)?")
"""libpq takes other text too, but its messages show what it does not understand, maybe a part of the password."""


class PgvectorStore:
    def __init__(self, location: Location, table: str, dimension: int) -> None:
        self._location, self._table_name, self._table = location, table, sql.Identifier(table)
        self._connection = _connect(location)
        with _one_line_errors(location):
            if _exists(self._connection, table):
                return  # a user who may only read can search
        with _one_line_errors(location, "install pgvector there; an administrator may have to create the extension"):
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        with _one_line_errors(location):
            self._connection.execute(
                sql.SQL(
                    """CREATE TABLE {} (id text PRIMARY KEY, title text NOT NULL, text text NOT NULL,
                       metadata jsonb NOT NULL, embedding vector({}) NOT NULL)"""
                ).format(self._table, sql.Literal(dimension))
            )

    @staticmethod
    def read_record(location: Location, table: str) -> str | None:
        with _one_line_errors(location), _connect(location) as connection:
            if not (_exists(connection, table) and _exists(connection, "lodestar_tables")):
                return None
            query = sql.SQL("SELECT record::text FROM {} WHERE name = %s").format(RECORDS)
            row = connection.execute(query, [table]).fetchone()
        return row[0] if row else None

    def write_record(self, record: str) -> None:
        with _one_line_errors(self._location):
            self._connection.execute(
                sql.SQL("CREATE TABLE IF NOT EXISTS {} (name text PRIMARY KEY, record jsonb NOT NULL)").format(RECORDS)
            )
            self._connection.execute(
                sql.SQL(
                    """INSERT INTO {} VALUES (%s, %s::jsonb)
                       ON CONFLICT (name) DO UPDATE SET record = excluded.record"""
                ).format(RECORDS),
                [self._table_name, record],
            )

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        statement = sql.SQL(
            """INSERT INTO {} (id, title, text, metadata, embedding) VALUES (%s, %s, %s, %s, %s::vector)
               ON CONFLICT (id) DO UPDATE SET title = excluded.title, text = excluded.text,
               metadata = excluded.metadata, embedding = excluded.embedding"""
        ).format(self._table)
        values = (
            [*(row[name] for name in COLUMNS), Jsonb(_metadata(row)), _as_vector(vector_D)]
            for row, vector_D in zip(rows, vectors_ND, strict=True)
        )
        with _one_line_errors(self._location), self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(statement, values)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        columns = [name for name in COLUMNS if name in where]
        conditions: list[sql.Composable] = [sql.SQL("{} = %s").format(sql.Identifier(name)) for name in columns]
        values: list[object] = [where[name] for name in columns]
        if metadata := _metadata(where):
            conditions.append(sql.SQL("metadata @> %s"))
            values.append(Jsonb(metadata))
        query = sql.SQL(
            """SELECT embedding <#> %s::vector AS distance, id, title, text, metadata FROM {}
               WHERE {} ORDER BY distance LIMIT %s"""
        ).format(self._table, sql.SQL(" AND ").join([sql.SQL("true"), *conditions]))
        with _one_line_errors(self._location):
            hits = self._connection.execute(query, [_as_vector(vector_D), *values, k]).fetchall()
        # <#> is the negative inner product, as Postgres sorts upwards
        return [
            SearchHit(-distance, {"id": document_id, "title": title, "text": text, **metadata})
            for distance, document_id, title, text, metadata in hits
        ]

    def count(self) -> int:
        with _one_line_errors(self._location):
            row = self._connection.execute(sql.SQL("SELECT count(*) FROM {}").format(self._table)).fetchone()
        return row[0] if row else 0

    def close(self) -> None:
        self._connection.close()


def _metadata(row: Row) -> dict[str, str]:
    return {name: value for name, value in row.items() if name not in COLUMNS}


def _as_vector(vector_D: np.ndarray) -> str:
    return str(vector_D.tolist())


def _connect(location: Location) -> psycopg.Connection:
    problem = f"{location.name}: not postgresql://USER:PASSWORD@HOST:PORT/DATABASE (other signs in it as %XX)"
    if not _URL.fullmatch(location.url):
        raise ConfigError(problem)
    try:
        parameters = {"connect_timeout": 10, **conninfo_to_dict(location.url)}
    except psycopg.ProgrammingError:
        raise ConfigError(problem) from None
    with _one_line_errors(location):
        return psycopg.connect(autocommit=True, **parameters)  # type: ignore[arg-type]


def _exists(connection: psycopg.Connection, table: str) -> bool:
    row = connection.execute("SELECT to_regclass(quote_ident(%s)) IS NOT NULL", [table]).fetchone()
    return bool(row and row[0])


@contextmanager
def _one_line_errors(location: Location, remedy: str = "check the URL, and the server's log") -> Iterator[None]:
    """ConfigError for what the server refuses, or for none that answers."""
    try:
        yield
    except psycopg.Error as error:
        raise ConfigError(f"{location.name}: {first_line(error)} ({remedy})") from None
