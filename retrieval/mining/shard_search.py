"""Exact search over shards of embeddings that need not fit into memory together.

Shape suffixes: Q queries, N documents of a shard, K results of a query, P pairs, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import torch

from retrieval.embedding.exact_search import search
from retrieval.embedding.shards import read_embeddings
from retrieval.mining.config import MineConfig

PAIRS_AT_ONCE = 65_536
"""Scores of given pairs computed at once, to bound memory."""


def nearest(query_QD: np.ndarray, x_ND: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(Q, K) scores and rows of the K largest dot products, exactly: by faiss, or on a GPU by PyTorch."""
    if device.startswith("cuda"):
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

    heap = faiss.ResultHeap(len(query_QD), k, keep_max=True)
    pair_scores_P, first = np.zeros(pairs_2P.shape[1], dtype=np.float32), 0
    for x_ND in shards:
        in_shard_P = (pairs_2P[1] >= first) & (pairs_2P[1] < first + len(x_ND))
        for pairs in np.array_split(np.flatnonzero(in_shard_P), 1 + in_shard_P.sum() // PAIRS_AT_ONCE):
            queries, rows = pairs_2P[:, pairs]
            pair_scores_P[pairs] = (query_QD[queries] * x_ND[rows - first]).sum(1)
        candidate_ND = x_ND[: max(0, candidates - first)]
        if len(candidate_ND):
            scores_QK, rows_QK = nearest(query_QD, candidate_ND, k, device)
            heap.add_result(scores_QK, rows_QK + first)
        first += len(x_ND)
    heap.finalize()
    return heap.D, heap.I, pair_scores_P


def choose_negatives(
    scores_K: np.ndarray,
    rows_K: np.ndarray,
    answers: Collection[int],
    lowest_positive: float,
    config: MineConfig,
    random_K: np.ndarray,
) -> np.ndarray:
    """Indices into rows_K of a query's negatives, the nearest first.

    answers    rows that answer the query, or are its own text
    random_K   numbers whose order decides for `pick: random`
    """
    indices = np.flatnonzero([row >= 0 and row not in answers for row in rows_K.tolist()])
    indices = indices[config.first_rank : config.last_rank]
    highest = np.inf
    if config.margin is not None:
        highest = lowest_positive - config.margin
    if config.relative_margin is not None:
        highest = min(highest, lowest_positive - (1 - config.relative_margin) * abs(lowest_positive))
    indices = indices[scores_K[indices] <= highest]
    if config.pick == "random":
        indices = np.sort(indices[np.argsort(random_K[indices], kind="stable")[: config.negatives]])
    return indices[: config.negatives]


def read_vectors(folder: Path, first: int, count: int) -> np.ndarray:
    """Rows first to first + count of a folder of embeddings."""
    parts, start = [], 0
    for _, vectors_ND in read_embeddings(folder):
        part_ND = vectors_ND[max(0, first - start) : max(0, first + count - start)]
        if len(part_ND):
            parts.append(part_ND.copy())  # a view would keep its whole shard in memory
        start += len(vectors_ND)
        if start >= first + count:
            break
    return np.ascontiguousarray(np.concatenate(parts))
