"""The code of docs/search.md, as it stands there, on real databases."""

from __future__ import annotations

import pytest

from retrieval.search.cli import index_main
from tests import pages

PAGE = "search.md"
CLIENTS = {"LanceDB": "lancedb", "Qdrant": "qdrant_client", "faiss": "faiss"}


@pytest.mark.parametrize("heading", CLIENTS)
def test_the_page_finds_the_nearest_documents_in(heading: str, expected: list[str]) -> None:
    pytest.importorskip(CLIENTS[heading], reason="an optional library: lodestar-embeddings[databases]")
    name = heading.lower()
    assert index_main(["--config", "index.yaml", f"store.kind={name}", f"store.path=runs/index/{name}"]) == 0
    assert pages.execute(PAGE, None)["found"] == expected
    assert pages.execute(PAGE, None, heading)["found"] == expected
