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

from chassis.retrieval import Beir, top_k

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
    """(Q, K) scores and (Q, K) rows of the best documents, as `chassis.retrieval.search` gives them; K = min(k, N).

    A document that shares no term with the query is not found: its score is -inf.
    """
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(words(beir.documents), show_progress=False)
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
