"""A corpus in a real Postgres with pgvector, by the command and by the SQL of docs/search.md."""

from __future__ import annotations

import pytest

from retrieval.search.cli import index_main
from tests import pages


def test_the_sql_of_the_page_finds_the_nearest_documents_and_inserts_once(
    expected: list[str], postgres: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setenv("DATABASE_URL", "postgresql:///search")
    overrides = ["store.kind=pgvector", "store.path=null", "store.url_env=DATABASE_URL"]
    for _ in range(2):
        assert index_main(["--config", "index.yaml", *overrides]) == 0
        assert pages.execute("search.md", None, "Postgres with pgvector")["found"] == expected
    with psycopg.connect("postgresql:///search") as connection:
        count = "SELECT count(*), count(DISTINCT metadata ->> 'lang') FROM documents"
        assert connection.execute(count).fetchone() == (200, 2)
        for statement in pages.blocks("search.md", "Postgres with pgvector", "sql")[0].split(";"):
            connection.execute(statement.encode())
