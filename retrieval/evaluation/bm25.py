"""BM25, the reference that needs no training, and its fusion with a dense ranking.

Shape suffixes: Q queries, N documents, K ranks; q queries of one block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import Stemmer
import torch
from bm25s.stopwords import STOPWORDS_EN
from torch import Tensor

from retrieval.embedding.exact_search import SearchResult, top_k
from retrieval.evaluation.beir import Beir

FUSION_DEPTH = 1000
"""Documents of each ranking that a fusion uses."""

_WORDS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+|[^\W\u3400-\u9fff\uf900-\ufaff]+")
_STOP_WORDS = frozenset(STOPWORDS_EN)


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """The terms of each text: English words without stop words, as Porter stems; Chinese characters and bigrams."""
    stem = Stemmer.Stemmer("porter").stemWord
    stems: dict[str, str] = {}
    terms_of_texts = []
    for text in texts:
        terms: list[str] = []
        for word in _WORDS.findall(text.lower()):
            if "\u3400" <= word[0] <= "\u9fff" or "\uf900" <= word[0] <= "\ufaff":
                terms += [*word, *(word[i : i + 2] for i in range(len(word) - 1))]
            elif word not in _STOP_WORDS:
                terms.append(stems.get(word) or stems.setdefault(word, stem(word)))
        terms_of_texts.append(terms)
    return terms_of_texts


def rank_bm25(beir: Beir, k: int, *, k1: float = 1.2, b: float = 0.75) -> SearchResult:
    """The min(k, N) best documents of each query; a document that shares no term with the query has the score -inf."""
    document_terms = tokenize(beir.documents)
    if not any(document_terms):
        shape = len(beir.queries), min(k, len(document_terms))
        return SearchResult(torch.full(shape, -torch.inf), torch.arange(shape[1]).expand(shape).contiguous())
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(document_terms, show_progress=False)
    query_ids = [index.get_tokens_ids(terms) for terms in tokenize(beir.queries)]
    block_size = max(1, (1 << 25) // len(beir.documents))  # queries at once: 128 MB of scores
    blocks = []
    for start in range(0, len(query_ids), block_size):
        block_ids = query_ids[start : start + block_size]
        score_qN = torch.stack([torch.from_numpy(index.get_scores_from_ids(ids)) for ids in block_ids])
        blocks.append(top_k(score_qN.masked_fill(score_qN <= 0, -torch.inf), k))
    return SearchResult(*map(torch.cat, zip(*blocks, strict=True)))


def fuse(rankings: Sequence[SearchResult], k: int, *, weights: Sequence[float] | None = None) -> SearchResult:
    """One ranking from several: the weighted sum of each query's standardised scores.

    rankings  deep ones, as FUSION_DEPTH
    weights   one for each ranking; none: equal, without any tuning
    returns   -inf where no ranking has more documents

    Scores are z = (score - mean) / standard deviation over the documents of one ranking for one query, shifted so that
    the lowest is 0; a document that a ranking lacks gets 0 from it. Unlike a fusion of ranks this keeps by how much
    the first document leads.
    """
    weights = [1 / len(rankings)] * len(rankings) if weights is None else weights
    points = [weight * _standardise(x.scores_QK) for weight, x in zip(weights, rankings, strict=True)]
    return _add_up(rankings, points, k)


RRF_CONSTANT = 60


def fuse_ranks(rankings: Sequence[SearchResult], k: int) -> SearchResult:
    """Reciprocal rank fusion: the sum of 1 / (60 + rank), ranks from 1.

    Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods"; the convention of vector databases. A document that a ranking lacks gets 0 from it.
    """
    points = [1 / (RRF_CONSTANT + 1 + torch.arange(x.index_QK.shape[1]).expand_as(x.index_QK)) for x in rankings]
    return _add_up(rankings, points, k)


FUSIONS = {"scores": fuse, "rrf": fuse_ranks}


def _add_up(rankings: Sequence[SearchResult], points: Sequence[Tensor], k: int) -> SearchResult:
    """The k documents with the most points, (Q, K) for each ranking."""
    num_documents = 1 + max(int(ranking.index_QK.max()) for ranking in rankings)
    block_size = max(1, (1 << 24) // num_documents)
    blocks = []
    for start in range(0, len(points[0]), block_size):
        block = slice(start, start + block_size)
        total_qN = torch.zeros(len(points[0][block]), num_documents)
        ranked_qN = torch.zeros_like(total_qN, dtype=torch.bool)
        for points_QK, (score_QK, index_QK) in zip(points, rankings, strict=True):
            is_ranked_qK = score_QK[block] > -torch.inf
            total_qN.scatter_add_(1, index_QK[block], points_QK[block].masked_fill(~is_ranked_qK, 0.0))
            ranked_qN.scatter_(1, index_QK[block], is_ranked_qK | ranked_qN.gather(1, index_QK[block]))
        blocks.append(top_k(total_qN.masked_fill(~ranked_qN, -torch.inf), k))
    return SearchResult(*map(torch.cat, zip(*blocks, strict=True)))


def _standardise(score_QK: Tensor) -> Tensor:
    """Standard deviations above the lowest score of the row; 0 where there is no document."""
    is_ranked_QK = score_QK > -torch.inf
    count_Q1 = is_ranked_QK.sum(1, keepdim=True).clamp_min(1)
    score_QK = score_QK.float()
    lowest_Q1 = score_QK.masked_fill(~is_ranked_QK, torch.inf).amin(1, keepdim=True)
    above_QK = (score_QK - lowest_Q1).masked_fill(~is_ranked_QK, 0.0)
    mean_Q1 = above_QK.sum(1, keepdim=True) / count_Q1
    variance_Q1 = (above_QK - mean_Q1).square().masked_fill(~is_ranked_QK, 0.0).sum(1, keepdim=True) / count_Q1
    return above_QK / variance_Q1.sqrt().clamp_min(1e-6)
