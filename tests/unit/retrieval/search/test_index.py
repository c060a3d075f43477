"""A corpus goes into each database whole, once, and only with the embeddings of one model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lodestar.config.loader import load
from lodestar.errors import ConfigError, DataError
from retrieval.embedding import embedder
from retrieval.embedding.embedder import Embedder
from retrieval.search.config import IndexRecipe, StoreConfig
from retrieval.search.index import index
from retrieval.search.search import open_searcher
from tests import tiny


def test_an_interrupted_run_embeds_only_what_is_missing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_recipe, work = load(IndexRecipe, recipe, ["encode.shard_rows=2"]), tmp_path / "work"
    embedded, real_encode_texts = [], embedder.encode_texts

    def until(count: int) -> None:
        def encode_texts(*args: Any, **kwargs: Any) -> embedder.Encoded:
            if len(embedded) == count:
                raise KeyboardInterrupt
            embedded.append(args)
            return real_encode_texts(*args, **kwargs)

        monkeypatch.setattr(embedder, "encode_texts", encode_texts)

    until(4)
    with pytest.raises(KeyboardInterrupt):
        index(index_recipe)
    existing = len(list(work.glob("shard-*")))
    assert 2 <= existing <= 4
    embedded.clear()
    until(100)
    assert index(index_recipe).documents == 12
    assert len(embedded) == 6 - existing and not work.exists()


def test_a_row_that_cannot_be_stored_is_told_before_any_is_embedded(recipe: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"_id": 10', '"ID": 10'))
    with pytest.raises(DataError, match=r"corpus.jsonl:11: id: must be"):
        index(load(IndexRecipe, recipe, ["encode.shard_rows=2"]))
    assert not (tmp_path / "db").exists() and not (tmp_path / "work").exists()


def test_prompts_of_a_recipe_replace_the_models_own_and_are_recorded_with_the_table(recipe: Path, model: Path) -> None:
    index(recipe, "prompts.query=the vector of ")
    expected = Embedder(model, prompts={"query": "the vector of "}).encode_queries("a mask")
    with open_searcher(recipe) as searcher:
        actual = searcher.embedder.encode_queries("a mask")
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert not np.allclose(actual, Embedder(model).encode_queries("a mask"), atol=1e-3)
    with pytest.raises(ConfigError, match="embedded by"):
        index(recipe)


@pytest.mark.slow
def test_several_devices_fill_the_table_as_one_does(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    rows = [{"_id": i, "text": text} for i, text in enumerate(tiny.texts(12, seed=11))]
    values = {"model": model, "corpus": tiny.write_jsonl(tmp_path / "corpus.jsonl", rows)}
    results = []
    for devices in ("[cpu]", "[cpu, cpu]"):
        store = {"kind": "faiss", "path": tmp_path / devices}
        recipe = values | {"store": store, "encode": {"shard_rows": 3}}
        assert index(recipe, f"encode.devices={devices}").documents == 12
        with open_searcher(recipe, device="cpu") as searcher:
            results.append([(hit.document.id, pytest.approx(hit.score)) for hit in searcher.search("a mask", 12)])
    assert results[0] == results[1]


def test_a_table_is_searched_by_values_of_any_type_and_by_fields_alone(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    rows = [{"_id": i, "text": text, "year": 2000 + i} for i, text in enumerate(tiny.texts(3, seed=11))]
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", rows)
    recipe = IndexRecipe(
        model=str(model), corpus=str(corpus), store=StoreConfig(kind="faiss", path=str(tmp_path / "db"))
    )
    index(recipe)
    with open_searcher(recipe, where={"year": 2001}) as searcher:
        assert [hit.document.id for hit in searcher.search("a mask")] == ["1"]
    with pytest.raises(ConfigError, match=r"^where: a' OR '1: not the name of a field \(letters, digits and _\)$"):
        open_searcher(recipe, where={"a' OR '1": "x"})


def test_a_beir_folder_is_its_corpus_alone_and_of_equal_ids_the_last_row_stays(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    folder = tiny.beir_folder(tmp_path / "beir", count=30)
    plain = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").unlink()
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.write(plain + json.dumps({"_id": "d29", "text": "last"}) + "\n")
    store = StoreConfig(kind="faiss", path=str(tmp_path / "db"))
    summary = index(IndexRecipe(model=str(model), corpus=str(folder), store=store))
    assert (summary.rows, summary.documents) == (31, 30)
    with open_searcher(store.path, where={"id": "d29"}) as searcher:
        assert [hit.document.text for hit in searcher.search("x")] == ["last"]
