"""Vector databases: one behaviour behind all clients, and a registry that takes more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lodestar.config.loader import load
from lodestar.errors import ConfigError
from retrieval.search.config import IndexRecipe, StoreConfig
from retrieval.search.store_record import StoreRecord, new_record, open_store
from retrieval.search.vector_stores import STORES, Location, Row, SearchHit, StoreType
from tests import tiny

LANGUAGES = ["en", "it's", "zh"]
rng = np.random.default_rng(0)
VECTORS = rng.standard_normal((40, 8)).astype(np.float32)  # not of length one: the score is the dot product
ROWS: list[Row] = [
    {"id": f"d{i}", "title": "", "text": text, "lang": LANGUAGES[i % 3]}
    for i, text in enumerate(tiny.texts(40, seed=2))
]


def record_of(config: StoreConfig) -> StoreRecord:
    return new_record(config, "a-hub/name", "a-hub/name", dimension=8)


def test_search_is_exact_filters_before_it_cuts_and_rows_with_an_existing_id_are_overwritten(
    store: StoreConfig,
) -> None:
    config = store
    with closing(open_store(config, record_of(config))) as store:
        assert store.search(VECTORS[0], 3, {}) == [] and store.count() == 0
        store.upsert(VECTORS[:25], ROWS[:25])
        store.upsert(VECTORS[::-1], ROWS)  # each document now has another's vector
        store.upsert(VECTORS, ROWS)
    with closing(open_store(config, record_of(config))) as store:
        assert store.count() == 40
        scores_N = VECTORS @ VECTORS[7]
        best = np.argsort(-scores_N)[:5]
        hits = store.search(VECTORS[7], 5, {})
        assert [hit.row for hit in hits] == [ROWS[i] for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores_N[best], rtol=1e-5)
        for where, matches in (
            ({"lang": "it's"}, lambda i: i % 3 == 1),
            ({"lang": "zh", "id": "d5"}, lambda i: i == 5),
            ({"lang": "absent"}, lambda i: False),
            ({"absent": "en"}, lambda i: False),
        ):
            expected = [f"d{i}" for i in np.argsort(-scores_N) if matches(i)]
            assert [hit.row["id"] for hit in store.search(VECTORS[7], 100, where)] == expected
        store.upsert(VECTORS[:1], [{"id": "d0", "title": "t", "text": "new", "year": "2026"}])
        assert store.count() == 40
        (hit,) = store.search(VECTORS[0], 9, {"year": "2026"})
        assert hit.row == {"id": "d0", "title": "t", "text": "new", "year": "2026"}  # without its language


def test_faiss_after_a_close_that_was_killed_between_its_two_files(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    from retrieval.search.faiss_store import FaissStore

    location = Location("db", path=str(tmp_path))
    with closing(FaissStore(location, "t", 8)) as store:
        store.upsert(VECTORS[:10], ROWS[:10])
    killed = FaissStore(location, "t", 8)
    killed.upsert(VECTORS, ROWS)
    killed._rows.rollback()  # the index was written, the rows were not
    killed.close()
    with closing(FaissStore(location, "t", 8)) as store:
        assert store.count() == len(store.search(VECTORS[30], 100, {})) == 10
        store.upsert(VECTORS, ROWS)
        assert store.search(VECTORS[30], 1, {})[0].row["id"] == "d30" and store.count() == 40


class ListStore:
    """A database of the user's own."""

    def __init__(self, location: Location, table: str, dimension: int) -> None:
        self.rows: list[Row] = []

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        self.rows += rows

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        return [SearchHit(1.0, row) for row in self.rows[:k]]

    def count(self) -> int:
        return len(self.rows)

    def close(self) -> None:
        self.rows.clear()


def test_a_database_is_added_by_a_class_and_a_line_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "index.yaml"
    recipe.write_text(f"model: a-hub/name\ncorpus: c.jsonl\nstore:\n  kind: list\n  path: {tmp_path}\n")
    with pytest.raises(ConfigError, match=r"index.yaml:4: store.kind: must be one of .*'qdrant'.*, got \"list\" \("):
        load(IndexRecipe, recipe)
    monkeypatch.setitem(STORES, "list", StoreType(f"{__name__}:ListStore"))
    config = load(IndexRecipe, recipe).store
    with closing(open_store(config, record_of(config))) as store:
        store.upsert(VECTORS, ROWS)
        assert [hit.row for hit in store.search(VECTORS[0], 2, {})] == ROWS[:2]


def test_a_client_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STORES, "faiss", StoreType("no_such_client:Store"))
    config = StoreConfig(kind="faiss", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"store\.kind: no_such_client is not installed \(pip install"):
        open_store(config, record_of(config))
