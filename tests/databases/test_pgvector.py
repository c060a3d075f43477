"""The SQL of docs/search.md on a real Postgres with pgvector."""

from __future__ import annotations

import pytest

from tests import pages


def test_the_sql_of_the_page_finds_the_nearest_documents_and_inserts_once(expected: list[str], postgres: None) -> None:
    import psycopg

    for _ in range(2):
        assert pages.execute("search.md", None, "Postgres with pgvector")["found"] == expected
    with psycopg.connect("dbname=search") as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT lang) FROM documents").fetchone() == (200, 2)
        with pytest.raises(psycopg.errors.DataException, match="expected 32 dimensions, not 2"):
            connection.execute("UPDATE documents SET embedding = '[1, 2]'")
