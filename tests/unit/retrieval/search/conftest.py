"""A trained model, and the recipe of an index for each database whose client is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lodestar.config.loader import dump
from retrieval.search.config import IndexEncodeConfig, IndexRecipe, StoreConfig
from tests import tiny

CLIENTS = {"lancedb": "lancedb", "qdrant": "qdrant_client", "faiss": "faiss"}


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(CLIENTS[request.param], reason="an optional library: lodestar-embeddings[databases]")
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return tiny.trained(root / "model", root / "plain")


@pytest.fixture
def model_folder(tmp_path) -> Path:
    return tiny.trained(tmp_path / "run/model", tmp_path / "plain", query_prompt="")


@pytest.fixture
def recipe(kind: str, model: Path, tmp_path: Path) -> Path:
    """Over a corpus of twelve documents."""
    texts = enumerate(tiny.texts(12, seed=11))
    rows = [{"_id": i, "title": "A", "text": text, "metadata": {"year": 2000 + i % 2}} for i, text in texts]
    corpus = str(tiny.write_jsonl(tmp_path / "corpus.jsonl", rows))
    store = StoreConfig(kind=kind, path=str(tmp_path / "db"))
    path = tmp_path / "index.yaml"
    path.write_text(
        dump(IndexRecipe(model=str(model), corpus=corpus, store=store, encode=IndexEncodeConfig(shard_rows=5)))
    )
    return path
