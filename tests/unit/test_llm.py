"""docs/deploy.md: LangChain, LlamaIndex and the example give a query its prompt, and a document none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.rag import build_prompt, main
from retrieval.embedding.embedder import Embedder
from tests import pages, tiny

PAGE = "deploy.md"
MODEL = "runs/demo/finetune/model"
TEXTS = tiny.texts(10, seed=8, longest=40)
QUESTION = "How are the rows of a tensor shuffled?"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's names are true."""
    root = tmp_path_factory.mktemp("llm")
    tiny.trained(root / MODEL, root / "plain")
    tiny.write_jsonl(root / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)])
    return root


@pytest.fixture
def embedder(place: Path, monkeypatch: pytest.MonkeyPatch) -> Embedder:
    monkeypatch.chdir(place)
    return Embedder(MODEL)


def nearest(embedder: Embedder, query: str, texts: list[str], k: int) -> list[str]:
    order = np.argsort(-embedder.encode_documents(texts) @ embedder.encode_queries([query])[0])
    return [texts[i] for i in order[:k]]


def check(embedder: Embedder, query_ND: list[list[float]], document_ND: list[list[float]], bare_ND: list[list[float]]):
    """bare_ND   queries without the page's arguments"""
    ours_ND = embedder.encode_queries(TEXTS)
    np.testing.assert_allclose(query_ND, ours_ND, atol=1e-6)
    np.testing.assert_allclose(document_ND, embedder.encode_documents(TEXTS), atol=1e-6)
    for other_ND in (document_ND, bare_ND):
        assert np.abs(np.array(other_ND) - ours_ND).max() > 1e-2


def test_langchain_embeds_as_we_do(embedder: Embedder) -> None:
    library = pytest.importorskip("langchain_huggingface", reason="an optional library: lodestar-embeddings[llm]")
    names = pages.execute(PAGE, None, "LangChain")
    theirs, bare = names["embeddings"], library.HuggingFaceEmbeddings(model_name=MODEL)
    queries, without = ([each.embed_query(text) for text in TEXTS] for each in (theirs, bare))
    check(embedder, queries, theirs.embed_documents(TEXTS), without)
    assert names["found"] == nearest(embedder, "shuffle the rows of a tensor", names["texts"], 2)


def test_llama_index_embeds_as_we_do(embedder: Embedder) -> None:
    library = pytest.importorskip(
        "llama_index.embeddings.huggingface", reason="an optional library: lodestar-embeddings[llm]"
    )
    names = pages.execute(PAGE, None, "LlamaIndex")
    theirs, bare = names["embeddings"], library.HuggingFaceEmbedding(MODEL)
    queries, without = ([each.get_query_embedding(text) for text in TEXTS] for each in (theirs, bare))
    check(embedder, queries, theirs.get_text_embedding_batch(TEXTS), without)
    assert names["found"] == nearest(embedder, "shuffle the rows of a tensor", names["texts"], 2)


def test_a_question_goes_to_the_llm_behind_the_nearest_documents(
    embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lancedb", reason="an optional library: lodestar-embeddings[databases]")
    assert main(["--model", MODEL, "--corpus", "corpus.jsonl", QUESTION]) == 0
    prompt = capsys.readouterr().out
    first, second, third = nearest(embedder, QUESTION, TEXTS, 3)
    assert f"[1] {first}\n\n[2] {second}\n\n[3] {third}\n\nQuestion: {QUESTION}\nAnswer:\n" in prompt
    assert "[4]" not in prompt
    said = pages.execute(PAGE, None, "Without a framework")["said"]
    assert said == f"(an LLM's answer to {len(prompt) - 1} characters)"
    assert main(["--model", MODEL, "--corpus", "absent.jsonl", QUESTION]) == 2
    assert "error: corpus: absent.jsonl: no such file" in capsys.readouterr().err


def test_braces_of_a_document_are_not_read_as_fields() -> None:
    from retrieval.evaluation.beir import Document
    from retrieval.search.search import Hit

    assert "[1] {x} y" in build_prompt("{q}?", [Hit(1.0, Document("d", "", "{x} y"))])
