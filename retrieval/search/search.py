"""Searching documents with a trained model: in embeddings in memory, or in a vector database.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sentence_transformers import SentenceTransformer

from lodestar.distributed.runtime import choose_device
from lodestar.errors import ConfigError
from retrieval.embedding.cache import load_or_compute
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.embedder import Embedder, check_devices
from retrieval.embedding.exact_search import search
from retrieval.evaluation.beir import Document
from retrieval.search.checked_store import CheckedStore
from retrieval.search.config import IndexRecipe
from retrieval.search.corpus import check_where
from retrieval.search.store_record import IndexedTable, find_table, open_store


@dataclass(frozen=True)
class Hit:
    score: float
    """Cosine of query and document, where the model normalises."""
    document: Document


class Searcher:
    """A model and the embeddings of its documents, read from `cache` if it holds them already."""

    def __init__(
        self,
        model: SentenceTransformer,
        documents: Iterable[Document],
        *,
        cache: Path | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        """cache   a safetensors file of (N, D) fp32, named by `search_cache_file`; written if it does not exist"""
        self.model, self.documents = model, list(documents)
        texts = [document.full for document in self.documents]
        self.document_ND = load_or_compute(
            cache,
            len(texts),
            lambda: embed(model, texts, "document", batch_tokens=batch_tokens, progress=progress),
        )

    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The k nearest documents, best first."""
        scores_1K, rows_1K = search(embed(self.model, [query], "query"), self.document_ND, k)
        results = zip(scores_1K[0].tolist(), rows_1K[0].tolist(), strict=True)
        return [Hit(score, self.documents[row]) for score, row in results]


class StoreSearcher:
    """A vector database and the model that embedded its documents; also a context manager."""

    def __init__(self, embedder: Embedder, store: CheckedStore, where: Mapping[str, object] | None = None) -> None:
        """where   only documents with these values, as {"lang": "en"}; ConfigError for what cannot be a field"""
        self.embedder, self.store, self.where = embedder, store, check_where(where or {})

    def search(self, query: str, k: int = 5) -> list[Hit]:
        """The k nearest documents, best first."""
        hits = self.store.search(self.embedder.encode_queries([query])[0], k, self.where)
        return [Hit(score, Document(row["id"], row["title"], row["text"])) for score, row in hits]

    def __enter__(self) -> StoreSearcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()


def open_searcher(
    source: IndexRecipe | Mapping[str, object] | str | Path,
    *,
    model: str | None = None,
    where: Mapping[str, object] | None = None,
    device: str | None = None,
) -> StoreSearcher:
    """source  the folder that `lodestar index` filled, or its recipe: a YAML file, values or an object
    model   where the model is now, if it was moved
    where   only documents with these values, as {"lang": "en"}
    device  of the model, as "cuda:1"; none: the first GPU, or the CPU
    Raises ConfigError, also if the model is not the one that embedded the documents.
    """
    where = check_where(where or {})
    return table_searcher(find_table(source, model), where, device)


def table_searcher(
    table: IndexedTable, where: Mapping[str, object] | None = None, device: str | None = None
) -> StoreSearcher:
    """As `open_searcher`, for a table that was found before."""
    record, device = table.record, device or str(choose_device(0))
    check_devices([device], "device")
    store = open_store(table.store, record)  # before the model: it takes longer
    if not store.count():
        store.close()
        raise ConfigError(f"{table.store.place}: {table.store.table}: holds no document (lodestar index fills it)")
    embedder = Embedder(
        table.model, [device], precision=table.precision, width=record.dimension, prompts=record.prompts
    )
    return StoreSearcher(embedder, store, where)
