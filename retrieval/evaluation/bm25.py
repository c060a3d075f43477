"""BM25, the reference that needs no training, and its mix with a dense ranking.

Shape suffixes: Q queries, N documents, K ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import torch
from bm25s.stopwords import STOPWORDS_EN
from torch import Tensor

from retrieval.embedding.exact_search import top_k
from retrieval.evaluation.beir import Beir

POOL = 1000
"""Documents of each ranking that a mix looks at."""

_WORDS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+|[^\W\u3400-\u9fff\uf900-\ufaff]+")
_STOP_WORDS = frozenset(STOPWORDS_EN)


def words(texts: Sequence[str]) -> list[list[str]]:
    """The terms of each text: English words without stop words, as Porter stems; Chinese characters and their pairs."""
    import Stemmer

    stem = Stemmer.Stemmer("porter").stemWord
    stems: dict[str, str] = {}
    terms = []
    for text in texts:
        found: list[str] = []
        for word in _WORDS.findall(text.lower()):
            if "\u3400" <= word[0] <= "\u9fff" or "\uf900" <= word[0] <= "\ufaff":
                found += [*word, *(word[i : i + 2] for i in range(len(word) - 1))]
            elif word not in _STOP_WORDS:
                found.append(stems.get(word) or stems.setdefault(word, stem(word)))
        terms.append(found)
    return terms


def rank_bm25(beir: Beir, k: int, *, k1: float = 1.2, b: float = 0.75) -> tuple[Tensor, Tensor]:
    """(Q, K) scores and (Q, K) rows of the best documents, as `exact_search.search` gives them; K = min(k, N).

    A document that shares no term with the query is not found: its score is -inf.
    """
    terms = words(beir.documents)
    if not any(terms):
        shape = len(beir.queries), min(k, len(terms))
        return torch.full(shape, -torch.inf), torch.arange(shape[1]).expand(shape).contiguous()
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(terms, show_progress=False)
    rows = max(1, (1 << 25) // len(beir.documents))  # queries at once: 128 MB of scores
    queries = words(beir.queries)
    scores, found = [], []
    for start in range(0, len(queries), rows):
        ids = [index.get_tokens_ids(terms) for terms in queries[start : start + rows]]
        part_qN = torch.stack([torch.from_numpy(index.get_scores_from_ids(those)) for those in ids])
        part_qK, index_qK = top_k(part_qN.masked_fill(part_qN <= 0, -torch.inf), k)
        scores.append(part_qK)
        found.append(index_qK)
    return torch.cat(scores), torch.cat(found)


def fuse(
    runs: Sequence[tuple[Tensor, Tensor]], k: int, *, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """One ranking from several: the weighted sum of each query's standardised scores.

    runs      (Q, K) scores and (Q, K) rows of each, best taken deep, as POOL; -inf where nothing was found
    weights   one for each run; none: equal. Nothing is tuned
    returns   (Q, K) scores and (Q, K) rows; -inf where no run found anything more

    Scores are z = (score - mean) / standard deviation over what the run found for the query, counted from the lowest:
    a document that a run did not find gets 0 from it. This keeps what ranks throw away, by how much the first leads.
    """
    weights = [1 / len(runs)] * len(runs) if weights is None else weights
    parts = [_above_lowest(scores) for scores, _ in runs]
    documents = 1 + max(int(index.max()) for _, index in runs)
    rows = max(1, (1 << 24) // documents)
    scores, found = [], []
    for start in range(0, len(parts[0]), rows):
        these = slice(start, start + rows)
        total_qN = torch.zeros(len(parts[0][these]), documents)
        seen_qN = torch.zeros_like(total_qN, dtype=torch.bool)
        for weight, part_QK, (score_QK, index_QK) in zip(weights, parts, runs, strict=True):
            hit_qK = score_QK[these] > -torch.inf
            total_qN.scatter_add_(1, index_QK[these], weight * part_QK[these])
            seen_qN.scatter_(1, index_QK[these], hit_qK | seen_qN.gather(1, index_QK[these]))
        best_qK, index_qK = top_k(total_qN.masked_fill(~seen_qN, -torch.inf), k)
        scores.append(best_qK)
        found.append(index_qK)
    return torch.cat(scores), torch.cat(found)


def _above_lowest(score_QK: Tensor) -> Tensor:
    """Standard deviations above the lowest score of the row; 0 where nothing was found."""
    hit_QK = score_QK > -torch.inf
    count_Q1 = hit_QK.sum(1, keepdim=True).clamp_min(1)
    score_QK = score_QK.float()
    lowest_Q1 = score_QK.masked_fill(~hit_QK, torch.inf).amin(1, keepdim=True)
    above_QK = (score_QK - lowest_Q1).masked_fill(~hit_QK, 0.0)
    mean_Q1 = above_QK.sum(1, keepdim=True) / count_Q1
    variance_Q1 = (above_QK - mean_Q1).square().masked_fill(~hit_QK, 0.0).sum(1, keepdim=True) / count_Q1
    return above_QK / variance_Q1.sqrt().clamp_min(1e-6)
