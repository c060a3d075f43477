"""What the kinds of evaluation task measure, given embeddings.

Shape suffixes: Q queries, N texts, D embedding width, I items of a test set, E experiments, M texts of a training set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, v_measure_score
from sklearn.metrics.pairwise import paired_cosine_distances

from retrieval.embedding.exact_search import SearchResult, distributed_search
from retrieval.embedding.protocols import EmbedTexts
from retrieval.evaluation.beir import Beir
from retrieval.evaluation.bm25 import FUSION_DEPTH
from retrieval.evaluation.metrics import as_run, metrics_per_query, trec_order
from retrieval.evaluation.tasks import Pairs, RetrievalOutput, TaskResult


def search_and_measure(beir: Beir, embed: EmbedTexts, device: torch.device) -> TaskResult:
    query_QD, document_ND = embed(beir.queries, "query"), embed(beir.documents, "document")
    ranking = distributed_search(query_QD, document_ND, FUSION_DEPTH, device)
    return measure_ranking(beir, ranking)._replace(retrieval=RetrievalOutput(query_QD, document_ND, ranking))


def measure_ranking(beir: Beir, ranking: SearchResult) -> TaskResult:
    """The metrics of the first 100 documents, ordered as trec_eval would."""
    ranked = trec_order(as_run(beir, ranking.scores_QK[:, :100], ranking.index_QK[:, :100]))
    metric_Q = metrics_per_query(ranked, beir.relevant)
    return TaskResult({name: float(value_Q.mean()) for name, value_Q in metric_Q.items()}, metric_Q["ndcg_at_10"])


def classify(
    train_ND: np.ndarray,
    train_labels_N: np.ndarray,
    train_EM: np.ndarray,
    test_ID: np.ndarray,
    test_labels_I: np.ndarray,
    *,
    seed: int,
) -> TaskResult:
    """`accuracy` and `macro_f1`, means over experiments; per item the fraction of experiments that were right.

    As mteb's `AbsTaskClassification`: logistic regression with at most 100 iterations.
    train_EM   rows of train_ND for each experiment
    """
    correct_EI, f1_E = [], []
    for rows_M in train_EM:
        model = LogisticRegression(max_iter=100, random_state=seed).fit(train_ND[rows_M], train_labels_N[rows_M])
        predicted_I = model.predict(test_ID)
        correct_EI.append(predicted_I == test_labels_I)
        f1_E.append(f1_score(test_labels_I, predicted_I, average="macro"))
    accuracy_I = np.mean(correct_EI, axis=0)
    return TaskResult({"accuracy": float(accuracy_I.mean()), "macro_f1": float(np.mean(f1_E))}, accuracy_I)


def cluster(text_ND: np.ndarray, labels: Sequence[str], *, seed: int) -> TaskResult:
    """`v_measure` of all texts together: no mean over items. As mteb's `ClusteringEvaluator`: batches of 500."""
    means = MiniBatchKMeans(len(set(labels)), batch_size=500, n_init="auto", random_state=seed)
    return TaskResult({"v_measure": float(v_measure_score(labels, means.fit_predict(text_ND)))})


def pair_cosines(embed: EmbedTexts, pairs: Pairs) -> np.ndarray:
    """(I,) of the two texts of each pair."""
    first_ID, second_ID = np.split(embed(pairs.first + pairs.second, "text").numpy(), 2)
    return 1 - paired_cosine_distances(first_ID, second_ID)


def spearman(cosine_I: np.ndarray, score_I: np.ndarray) -> TaskResult:
    """`spearman` of all pairs together: no mean over items. As `cosine_spearman` of mteb's `AbsTaskSTS`."""
    return TaskResult({"spearman": float(spearmanr(score_I, cosine_I)[0])})  # type: ignore[arg-type]


def pair_classification_scores(cosine_I: np.ndarray, label_I: np.ndarray) -> TaskResult:
    """`average_precision`, and `best_f1` over thresholds, of all pairs together: no mean over items.

    As `cosine_ap` and `cosine_f1` of mteb's `AbsTaskPairClassification`, which skips the threshold that accepts every
    pair.
    """
    precision, recall, _ = precision_recall_curve(label_I, cosine_I)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return TaskResult(
        {"average_precision": float(average_precision_score(label_I, cosine_I)), "best_f1": float(f1[1:].max())}
    )
