"""The hard negatives of one block of training examples.

Exact: every query against every candidate, shard of the corpus by shard, so that only one is in memory. Margins to the
positive's score: Moreira et al. 2024, "NV-Retriever", 3.2.
Shape suffixes: Q queries, K results of a query, P pairs, D width.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tqdm import tqdm

from lodestar import rng
from lodestar.data.training_examples import content_hash
from lodestar.distributed.runtime import Runtime
from retrieval.embedding.shards import read_embeddings
from retrieval.mining.config import MineRecipe
from retrieval.mining.cross_encoder import rescore
from retrieval.mining.shard_search import choose_negatives, read_vectors, search_shards
from retrieval.mining.texts import CORPUS, QUERIES, CorpusRows, MiningTexts, read_corpus_texts, read_examples

MIN_EXTRA_DEPTH = 64
"""Results beyond `last_rank` that every query asks for: its own answers among them must not shorten the window."""


class _Query(NamedTuple):
    number: int
    """Of its example in `data`; the random choice is a function of it."""
    positives: list[int]
    """Rows of the corpus."""
    answers: set[int]
    """Rows that answer it, in any example of `data`, and the row of its own text."""


class _Negatives(NamedTuple):
    """What the search gives for a query."""

    rows: list[int]
    """Of the corpus, the nearest first."""
    scores: list[float]
    positive_scores: list[float]


@dataclass(frozen=True)
class BlockMiner:
    recipe: MineRecipe
    runtime: Runtime
    texts: MiningTexts
    corpus_rows: CorpusRows
    cross_encoder: CrossEncoder | None

    def mine(self, block: Sequence[Mapping[str, Any]], first: int) -> Sequence[Mapping[str, Any]]:
        """The block's examples with their negatives and scores.

        first   the number of the block's first example in `data`
        """
        query_QD = read_vectors(self.texts.folder / QUERIES, first, len(block))
        negatives = self._search_by_depth(query_QD, self._queries(block, first))
        texts = read_corpus_texts(self.texts.folder, {row for result in negatives for row in result.rows})
        examples = [
            {
                **example,
                "neg": [texts[row] for row in result.rows],
                "pos_scores": result.positive_scores,
                "neg_scores": result.scores,
            }
            for example, result in zip(block, negatives, strict=True)
        ]
        return rescore(self.cross_encoder, examples, progress=self._progress) if self.cross_encoder else examples

    @property
    def _progress(self) -> bool:
        return self.runtime.is_main and sys.stderr.isatty()

    def _queries(self, block: Sequence[Mapping[str, Any]], first: int) -> list[_Query]:
        hashes = [content_hash(example["query"]) for example in block]
        answers: dict[int, set[int]] = {query_hash: set() for query_hash in hashes}
        for example in read_examples(self.recipe):  # several examples may have the same query
            if (query_hash := content_hash(example["query"])) in answers:
                answers[query_hash].update(self.corpus_rows.of(example["pos"]))
        for example, query_hash in zip(block, hashes, strict=True):
            if (row := self.corpus_rows.find(example["query"])) is not None:
                answers[query_hash].add(row)
        return [
            _Query(first + i, self.corpus_rows.of(example["pos"]), answers[query_hash])
            for i, (example, query_hash) in enumerate(zip(block, hashes, strict=True))
        ]

    def _search_by_depth(self, query_QD: np.ndarray, queries: Sequence[_Query]) -> list[_Negatives]:
        """A query with many answers needs a deep search, the others do not: each depth is a search of its own."""
        extra_Q = np.array([max(MIN_EXTRA_DEPTH, 1 << (len(query.answers) - 1).bit_length()) for query in queries])
        negatives: dict[int, _Negatives] = {}
        for extra in np.unique(extra_Q).tolist():
            indices = np.flatnonzero(extra_Q == extra).tolist()
            depth = self.recipe.mine.last_rank + extra
            results = self._search(query_QD[indices], [queries[i] for i in indices], depth)
            negatives.update(zip(indices, results, strict=True))
        return [negatives[i] for i in range(len(queries))]

    def _search(self, query_QD: np.ndarray, queries: Sequence[_Query], depth: int) -> list[_Negatives]:
        """depth   how many candidates of each query are looked at"""
        pairs = [(i, row) for i, query in enumerate(queries) for row in query.positives]
        shards = tqdm(
            (vectors_ND for _, vectors_ND in read_embeddings(self.texts.folder / CORPUS)),
            desc=f"searching for {len(queries):,} queries",
            unit="shard",
            leave=False,
            disable=not self._progress,
        )
        scores_QK, rows_QK, pair_scores_P = search_shards(
            query_QD,
            shards,
            candidates=self.texts.candidates,
            k=depth,
            pairs_2P=np.array(pairs, dtype=np.int64).T,
            device=str(self.runtime.device),
        )
        positive_scores = defaultdict[int, list[float]](list)
        for (i, _), score in zip(pairs, pair_scores_P.tolist(), strict=True):
            positive_scores[i].append(score)
        return [self._choose(query, scores_QK[i], rows_QK[i], positive_scores[i]) for i, query in enumerate(queries)]

    def _choose(
        self, query: _Query, scores_K: np.ndarray, rows_K: np.ndarray, positive_scores: list[float]
    ) -> _Negatives:
        config = self.recipe.mine
        key = torch.tensor(rng.key(config.seed, "mine", query.number))
        random_K = rng.hashed(key, torch.arange(len(rows_K))).numpy()
        chosen = choose_negatives(scores_K, rows_K, query.answers, min(positive_scores), config, random_K)
        return _Negatives(rows_K[chosen].tolist(), scores_K[chosen].tolist(), positive_scores)
