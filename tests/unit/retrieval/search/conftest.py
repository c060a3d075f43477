"""A trained model, and the recipe of an index for each database whose client is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lodestar.config.loader import dump
from retrieval.search.config import IndexEncodeConfig, IndexRecipe, StoreConfig
from retrieval.search.vector_stores import STORES
from tests import tiny
from tests.databases.postgres import new_database, running_postgres

CLIENTS = {"lancedb": "lancedb", "qdrant": "qdrant_client", "faiss": "faiss", "pgvector": "psycopg"}
PLACES = [f"{kind} {key}" for kind, store_type in STORES.items() for key in store_type.keys]


@pytest.fixture(scope="session")
def postgres_folder() -> Iterator[str]:
    with running_postgres() as folder:
        yield folder


@pytest.fixture
def database_url(postgres_folder: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an empty database with pgvector; also in the environment, as DATABASE_URL."""
    url = new_database(postgres_folder)
    monkeypatch.setenv("DATABASE_URL", url)
    return url


@pytest.fixture(params=PLACES)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreConfig]:
    """An empty database of each kind in each place where it can be."""
    kind, key = request.param.split()
    pytest.importorskip(CLIENTS.get(kind, "numpy"), reason="an optional library: lodestar-embeddings[databases]")
    if key == "path":
        yield StoreConfig(kind=kind, path=str(tmp_path / "db"))
    elif kind == "pgvector":
        url = request.getfixturevalue("database_url")
        yield StoreConfig(kind=kind, url_env="DATABASE_URL") if key == "url_env" else StoreConfig(kind=kind, url=url)
    else:
        from tests.databases.qdrant_rest import running_qdrant

        monkeypatch.setenv("QDRANT_API_KEY", "a secret")
        with running_qdrant("a secret") as url:
            yield StoreConfig(kind=kind, url=url, api_key_env="QDRANT_API_KEY")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return tiny.trained(root / "model", root / "plain")


@pytest.fixture
def model_folder(tmp_path) -> Path:
    return tiny.trained(tmp_path / "run/model", tmp_path / "plain", query_prompt="")


@pytest.fixture
def recipe(store: StoreConfig, model: Path, tmp_path: Path) -> Path:
    """Over a corpus of twelve documents."""
    texts = enumerate(tiny.texts(12, seed=11))
    rows = [{"_id": i, "title": "A", "text": text, "metadata": {"year": 2000 + i % 2}} for i, text in texts]
    corpus = str(tiny.write_jsonl(tmp_path / "corpus.jsonl", rows))
    encode, work = IndexEncodeConfig(shard_rows=5), str(tmp_path / "work")
    path = tmp_path / "index.yaml"
    path.write_text(dump(IndexRecipe(model=str(model), corpus=corpus, store=store, encode=encode, work=work)))
    return path
