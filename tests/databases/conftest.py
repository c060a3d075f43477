"""What docs/search.md takes as given, and a Postgres with pgvector of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedding.embedder import Embedder
from retrieval.search.cli import index_main
from tests import pages, tiny
from tests.databases.postgres import running_postgres

MODEL = "runs/demo/finetune/model"
QUERY = "shuffle the rows of a tensor"


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server with an empty database `search`; libpq finds it by itself."""
    with running_postgres() as folder:
        for name, value in {"PGHOST": folder, "PGUSER": "postgres", "PGDATABASE": "postgres"}.items():
            monkeypatch.setenv(name, value)
        for name in ("PGPORT", "PGSERVICE", "PGPASSWORD"):
            monkeypatch.delenv(name, raising=False)
        import psycopg

        with psycopg.connect(autocommit=True) as connection:
            connection.execute("CREATE DATABASE search")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's names are true, and the recipe at its beginning has run."""
    pytest.importorskip("lancedb", reason="an optional library: lodestar-embeddings[databases]")
    root = tmp_path_factory.mktemp("databases")
    tiny.trained(root / MODEL, root / "plain", query_prompt="search the passage that answers this query: ")
    texts = enumerate(tiny.texts(200, seed=4, longest=10))
    rows = [{"_id": f"d{i}", "title": "T", "text": text, "lang": ["en", "zh"][i % 2]} for i, text in texts]
    tiny.write_jsonl(root / "corpus.jsonl", rows)
    (root / "index.yaml").write_text(pages.blocks("search.md", language="yaml")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert index_main(["--config", "index.yaml"]) == 0
    return root


@pytest.fixture
def expected(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The three nearest English documents, by numpy; leaves the test in the folder."""
    monkeypatch.chdir(place)
    embedder = Embedder(MODEL)
    documents_ND = embedder.encode_documents([f"T {text}" for text in tiny.texts(200, seed=4, longest=10)])
    by_query, by_document = (
        [f"d{i}" for i in np.argsort(-documents_ND @ encode([QUERY])[0]) if i % 2 == 0][:3]
        for encode in (embedder.encode_queries, embedder.encode_documents)
    )
    assert by_query != by_document  # or nobody would see that the query's prompt is missing
    return by_query
