"""The metrics of retrieval, as trec_eval defines them.

Shape suffixes: Q queries, N documents, D embedding width, K ranks (depth of a ranking), C ranks up to a cutoff.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from retrieval.evaluation.beir import Beir, Relevant

Run = Mapping[str, Mapping[str, float]]
"""For each query the scores of its ranked documents, as trec_eval takes it."""


def as_run(beir: Beir, scores_QK: Tensor, index_QK: Tensor) -> dict[str, dict[str, float]]:
    """A `SearchResult` with ids in place of rows; a score of -inf stands for no document."""
    ids = beir.document_ids
    rows = zip(beir.query_ids, scores_QK.tolist(), index_QK.tolist(), strict=True)
    return {
        query: {ids[i]: score for score, i in zip(scores, index, strict=True) if score != float("-inf")}
        for query, scores, index in rows
    }


def trec_order(run: Run) -> dict[str, list[str]]:
    """Each query's documents as trec_eval ranks them: by score in fp32; of equal scores the larger id first."""
    ranked = {}
    for query, scores in run.items():
        rounded = np.fromiter(scores.values(), np.float32, len(scores)).tolist()
        ranked[query] = [document for _, document in sorted(zip(rounded, scores, strict=True), reverse=True)]
    return ranked


def metrics(ranked: Mapping[str, Sequence[str]], relevant: Relevant, at: Sequence[int] = (10, 100)) -> dict[str, float]:
    """`ndcg_at_10`, `mrr_at_10`, `recall_at_10`, `precision_at_10`, `map_at_10`, and the same for each cutoff of `at`.

    Definitions are trec_eval's: nDCG uses the grade itself as gain and log2(rank + 1) as discount; for the other
    metrics a document is relevant if its grade is 1 or more. The mean is over all queries with a relevant document; a
    query that `ranked` lacks counts as 0. The order of `ranked` stays as it is: `trec_order` breaks ties as trec_eval
    does.
    """
    return {name: float(value_Q.mean()) for name, value_Q in metrics_per_query(ranked, relevant, at).items()}


def metrics_per_query(
    ranked: Mapping[str, Sequence[str]], relevant: Relevant, at: Sequence[int] = (10, 100)
) -> dict[str, np.ndarray]:
    """The values behind the means of `metrics`: (Q,) float64 for each metric, in the order of `relevant`."""
    queries = [query for query, grades in relevant.items() if any(grade > 0 for grade in grades.values())]
    if not queries:
        raise ValueError("no query has a relevant document")
    deepest = max(at)
    gain_QK, ideal_QK, relevant_Q = np.zeros((len(queries), deepest)), np.zeros((len(queries), deepest)), []
    for q, query in enumerate(queries):
        grades, documents = relevant[query], ranked.get(query, ())[:deepest]
        if len(set(documents)) != len(documents):
            raise ValueError(f"query {query!r}: a document is ranked twice")
        gain_QK[q, : len(documents)] = [max(0, grades.get(document, 0)) for document in documents]
        ideal_gains = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
        ideal_QK[q, : len(ideal_gains)] = ideal_gains[:deepest]
        relevant_Q.append(len(ideal_gains))

    ranks_K = np.arange(1, deepest + 1)
    hit_QK, relevant_Q = gain_QK > 0, np.array(relevant_Q)
    precision_QK = hit_QK.cumsum(1) / ranks_K
    discount_K = 1 / np.log2(ranks_K + 1)
    results: dict[str, np.ndarray] = {}
    for cutoff in at:
        hit_QC, discount_C = hit_QK[:, :cutoff], discount_K[:cutoff]
        per_query = {
            "ndcg": (gain_QK[:, :cutoff] @ discount_C) / (ideal_QK[:, :cutoff] @ discount_C),
            "mrr": (hit_QC / ranks_K[:cutoff]).max(1),
            "recall": hit_QC.sum(1) / relevant_Q,
            "precision": precision_QK[:, cutoff - 1],
            "map": (hit_QC * precision_QK[:, :cutoff]).sum(1) / relevant_Q,
        }
        results |= {f"{name}_at_{cutoff}": value_Q for name, value_Q in per_query.items()}
    return results


def evaluate_run(beir: Beir, scores_QK: Tensor, index_QK: Tensor, at: Sequence[int] = (10, 100)) -> dict[str, float]:
    """The metrics of a `SearchResult`, ordered as trec_eval would."""
    return metrics(trec_order(as_run(beir, scores_QK, index_QK)), beir.relevant, at)
