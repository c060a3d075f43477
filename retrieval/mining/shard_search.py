"""Exact search over shards of embeddings that need not fit into memory together.

Shape suffixes: Q queries, N documents of a shard, K results of a query, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.embedding.shards import read_embeddings
from retrieval.mining.config import Mine

if TYPE_CHECKING:
    import numpy as np


def nearest(query_QD: np.ndarray, x_ND: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(Q, K) scores and rows of the K largest dot products, exactly: by faiss, or on a GPU by PyTorch."""
    if device.startswith("cuda"):
        import torch

        from retrieval.embedding.exact_search import search

        scores_QK, rows_QK = search(torch.from_numpy(query_QD).to(device), torch.from_numpy(x_ND).to(device), k)
        return scores_QK.cpu().numpy(), rows_QK.cpu().numpy()
    import faiss

    return faiss.knn(query_QD, x_ND, min(k, len(x_ND)), metric=faiss.METRIC_INNER_PRODUCT)


def search_shards(
    query_QD: np.ndarray,
    shards: Iterable[np.ndarray],
    *,
    candidates: int,
    k: int,
    pairs_2P: np.ndarray,
    device: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K nearest of the first `candidates` rows of all shards, and the scores of given pairs.

    pairs_2P   (2, P) int64: rows of query_QD, and rows of the corpus
    returns    (Q, K) scores, falling; (Q, K) rows of the corpus, -1 where there are none; (P,) scores
    """
    import faiss
    import numpy as np

    heap = faiss.ResultHeap(len(query_QD), k, keep_max=True)
    pair_scores_P, first = np.zeros(pairs_2P.shape[1], dtype=np.float32), 0
    for x_ND in shards:
        here = (pairs_2P[1] >= first) & (pairs_2P[1] < first + len(x_ND))
        for part in np.array_split(np.flatnonzero(here), 1 + here.sum() // 65_536):
            queries, rows = pairs_2P[:, part]
            pair_scores_P[part] = (query_QD[queries] * x_ND[rows - first]).sum(1)
        open_ND = x_ND[: max(0, candidates - first)]
        if len(open_ND):
            scores_QK, rows_QK = nearest(query_QD, open_ND, k, device)
            heap.add_result(scores_QK, rows_QK + first)
        first += len(x_ND)
    heap.finalize()
    return heap.D, heap.I, pair_scores_P


def choose(
    scores_K: np.ndarray, rows_K: np.ndarray, known: set[int], lowest_positive: float, section: Mine, keys_K: np.ndarray
) -> np.ndarray:
    """Places in rows_K of a query's negatives, the nearest first.

    known    rows that are answers, or the query's own text
    keys_K   random numbers that decide whom `pick: random` takes
    """
    import numpy as np

    places = np.flatnonzero([row >= 0 and row not in known for row in rows_K.tolist()])
    places = places[section.first_rank : section.last_rank]
    most = np.inf
    if section.margin is not None:
        most = lowest_positive - section.margin
    if section.relative_margin is not None:
        most = min(most, lowest_positive - (1 - section.relative_margin) * abs(lowest_positive))
    places = places[scores_K[places] <= most]
    if section.pick == "random":
        places = np.sort(places[np.argsort(keys_K[places], kind="stable")[: section.negatives]])
    return places[: section.negatives]


class _Rows:
    """Texts to their rows in the corpus."""

    def __init__(self, hashes_N: np.ndarray) -> None:
        import numpy as np

        self._order = np.argsort(hashes_N)
        self._sorted = hashes_N[self._order]

    def __getitem__(self, texts: Sequence[str]) -> list[Any]:
        """None for a text that is not there."""
        import numpy as np

        from lodestar.data.training_examples import content_hash

        wanted = np.array([content_hash(text) for text in texts], dtype=np.int64)
        at = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return [int(self._order[i]) if self._sorted[i] == each else None for i, each in zip(at, wanted, strict=True)]


def _vectors(folder: Path, first: int, count: int) -> np.ndarray:
    """Rows first to first + count of a folder of embeddings."""
    import numpy as np

    found, at = [], 0
    for _, vectors_ND in read_embeddings(folder):
        part_ND = vectors_ND[max(0, first - at) : max(0, first + count - at)]
        if len(part_ND):
            found.append(part_ND.copy())  # a view would keep its whole shard
        if (at := at + len(vectors_ND)) >= first + count:
            break
    return np.ascontiguousarray(np.concatenate(found))
