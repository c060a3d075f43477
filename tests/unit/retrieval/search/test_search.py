"""The searcher over embeddings in memory, and its cache."""

from __future__ import annotations

import pytest
import torch

from retrieval.embedding.cache import search_cache_file
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.load_model import load_model
from retrieval.evaluation.beir import Document
from retrieval.search.search import Searcher
from tests import tiny

CPU = torch.device("cpu")
DOCUMENTS = [Document(f"d{i}", f"title {i}", text) for i, text in enumerate(tiny.texts(9, seed=5))]
TEXTS = [document.full for document in DOCUMENTS]


def test_a_document_is_its_own_best_answer_and_scores_fall(model_folder):
    searcher = Searcher(load_model(model_folder, CPU), DOCUMENTS)
    for document in DOCUMENTS:
        hits = searcher.search(document.full, 4)
        assert hits[0].document == document
        assert hits[0].score == pytest.approx(1.0, abs=1e-5)
        scores = [hit.score for hit in hits]
        assert len(hits) == 4 and scores == sorted(scores, reverse=True) and scores[-1] < 0.999


def test_a_search_for_more_than_all_documents_returns_all(model_folder):
    assert len(Searcher(load_model(model_folder, CPU), DOCUMENTS).search("x", 100)) == len(DOCUMENTS)


def test_a_corpus_is_embedded_once_and_read_back_to_the_last_bit(model_folder):
    model = load_model(model_folder, CPU)
    cache = search_cache_file(model_folder, "", TEXTS)
    assert cache.parent == model_folder.parent / "search_cache"
    first = Searcher(model, DOCUMENTS, cache=cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # embedding again would give other vectors
    again = Searcher(model, DOCUMENTS, cache=cache)
    assert torch.equal(again.document_ND, first.document_ND)
    assert {path.name for path in cache.parent.iterdir()} == {cache.name, f".{cache.name}.sha256"}  # no temporary file


def test_a_damaged_cache_is_written_again(model_folder):
    model, cache = load_model(model_folder, CPU), search_cache_file(model_folder, "", TEXTS)
    expected = Searcher(model, DOCUMENTS, cache=cache).document_ND
    cache.write_bytes(cache.read_bytes()[:50])
    assert torch.equal(Searcher(model, DOCUMENTS, cache=cache).document_ND, expected)
    assert torch.equal(Searcher(model, DOCUMENTS, cache=cache).document_ND, embed(model, TEXTS, "document"))
