"""What a model is measured by: retrieval, classification, clustering, STS and pair classification.

Protocols are MTEB's (Muennighoff et al., 2023) as the package `mteb` has them in 2.26: same draws, same numbers.
The query instruction goes on queries of retrieval, the passage instruction on its documents; all other texts go bare.

Shape suffixes: N texts, D embedding width, I items of a test set, E experiments, M texts of a training set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from lodestar.config.loader import Section
from lodestar.config.schema import Count
from lodestar.data.readers import find_sources, read_rows
from lodestar.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from retrieval.embedding.config import Role
    from retrieval.evaluation.beir import Beir

    Embed = Callable[[Sequence[str], Role], Tensor]
    """A model: texts in a role -> (N, D) fp32 on the CPU, of any length."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Run = tuple["Tensor", "Tensor"]
"""(Q, K) scores and rows, as `retrieval.evaluation.metrics.search` gives them."""

COLUMNS = {
    "retrieval": {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_100": "recall@100"},
    "classification": {"accuracy": "accuracy", "macro_f1": "macro F1"},
    "clustering": {"v_measure": "V-measure"},
    "sts": {"spearman": "Spearman"},
    "pair_classification": {"average_precision": "avg. precision", "best_f1": "best F1"},
}
"""What tables show of each kind, by heading; the first is what stands for the task among several."""


class TaskResult(NamedTuple):
    metrics: dict[str, float]
    item_I: NDArray[Any] | None = None
    """The first metric of each item, where the metric is their mean; what a paired bootstrap draws from."""
    run: Run | None = None
    """Of retrieval: deep enough to mix with another."""
    vectors: tuple[Tensor, Tensor] | None = None
    """Of retrieval: (Q, D) and (N, D)."""


@dataclass(frozen=True)
class Task:
    """A task whose data are read."""

    facts: dict[str, Any]
    """`kind`, and how much there is of what."""
    texts: Sequence[str]
    """All that is embedded."""
    measure: Callable[[Embed, torch.device], TaskResult] = field(repr=False)
    """(a model's Embed, the device that searches) -> its metrics; every rank must call."""
    beir: Beir | None = field(default=None, repr=False)


# --- retrieval -------------------------------------------------------------------------------


class Retrieval(Section):
    kind: Literal["retrieval"]
    data: str
    """A folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/*.tsv, gz or not."""
    split: str = "test"
    """Which file of qrels/."""
    max_queries: Count | None = None
    """Only the first so many queries; none: all."""
    max_documents: Count | None = None
    """Only the documents that answer those queries and the first others, up to so many; none: all."""

    def read(self, label: str) -> Task:
        from retrieval.evaluation.beir import read_beir

        beir = read_beir(self.data, self.split, max_queries=self.max_queries, max_documents=self.max_documents)
        return retrieval(beir, self.split)


def retrieval(beir: Beir, split: str = "test") -> Task:
    """Exact search; the metrics of `retrieval.evaluation.metrics.metrics`, per query nDCG@10."""
    from retrieval.embedding.exact_search import distributed_search
    from retrieval.evaluation.bm25 import POOL

    def measure(embed: Embed, device: torch.device) -> TaskResult:
        query_QD, document_ND = embed(beir.queries, "query"), embed(beir.documents, "document")
        found = measure_run(beir, distributed_search(query_QD, document_ND, POOL, device))
        return found._replace(vectors=(query_QD, document_ND))

    counts = {"queries": len(beir.queries), "documents": len(beir.documents)}
    return Task({"kind": "retrieval", "split": split, **counts}, beir.queries + beir.documents, measure, beir)


def measure_run(beir: Beir, run: Run) -> TaskResult:
    """The metrics of the first 100 documents, ordered as trec_eval would."""
    from retrieval.evaluation.metrics import as_run, metrics_per_query, trec_order

    scores_QK, index_QK = run
    ranked = trec_order(as_run(beir, scores_QK[:, :100], index_QK[:, :100]))
    found = metrics_per_query(ranked, beir.relevant)
    return TaskResult({name: float(value_Q.mean()) for name, value_Q in found.items()}, found["ndcg_at_10"], run)


# --- classification and clustering -----------------------------------------------------------


class _Labelled(Section):
    text: str = "text"
    """The field of a row that holds its text."""
    label: str = "label"
    """The field that holds its label, a text or a whole number."""
    seed: Seed = 42

    def rows(self, path: str, where: str) -> tuple[list[str], list[str]]:
        """(texts, labels) of a file."""
        rows = list(_rows(path, where))
        texts = [_value(place, row, self.text, str) for place, row in rows]
        labels = [str(_value(place, row, self.label, (str, int))) for place, row in rows]
        if len(set(labels)) < 2:
            raise DataError(f"{path}: {self.label}: {len(set(labels))} labels (two or more are needed)")
        return texts, labels


class Classification(_Labelled):
    """Logistic regression on embeddings of a few texts for each label."""

    kind: Literal["classification"]
    train: str
    """JSONL, Parquet, a folder or a glob of them, or a data set of the hub; so is each file of a task."""
    test: str
    samples_per_label: Count = 8
    """Texts of each label in one training set."""
    experiments: Count = 10
    """Training sets drawn; metrics are their mean."""

    def read(self, label: str) -> Task:
        import numpy as np

        texts, labels = self.rows(self.train, f"tasks.{label}.train")
        test_texts, test_labels = self.rows(self.test, f"tasks.{label}.test")
        if unknown := sorted(set(test_labels) - set(labels)):
            raise DataError(
                f"{self.test}: {self.label}: {unknown[0]!r} is not in {self.train} (mend the one or the other)"
            )
        chosen_EM = undersample(labels, self.samples_per_label, self.experiments, self.seed)
        needed, place = np.unique(chosen_EM, return_inverse=True)
        train_EM, labels_I = place.reshape(chosen_EM.shape), np.array(test_labels)
        train_labels = np.array(labels)[needed]

        def measure(embed: Embed, _: torch.device) -> TaskResult:
            x_ND = embed(every, "text").numpy()
            train_ND, test_ID = x_ND[: len(needed)], x_ND[len(needed) :]
            return classify(train_ND, train_labels, train_EM, test_ID, labels_I, seed=self.seed)

        every = [texts[i] for i in needed] + test_texts
        counts = {"train": len(texts), "test": len(test_texts), "labels": len(set(labels))}
        return Task({"kind": self.kind, **counts}, every, measure)


def undersample(labels: Sequence[str], per_label: int, experiments: int, seed: int) -> NDArray[np.int64]:
    """(E, M) rows of `labels`: for each experiment the first `per_label` of each label in a shuffled order.

    `AbsTaskClassification._undersample_data` of mteb, which shuffles the order of the last experiment anew.
    """
    import numpy as np

    order, chosen = np.arange(len(labels)), []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        taken: Counter[str] = Counter()
        rows_M = []
        for i in order.tolist():
            if taken[labels[i]] < per_label:
                taken[labels[i]] += 1
                rows_M.append(i)
        chosen.append(rows_M)
    return np.array(chosen)


def classify(
    train_ND: NDArray[Any],
    labels_N: NDArray[Any],
    train_EM: NDArray[Any],
    test_ID: NDArray[Any],
    labels_I: NDArray[Any],
    *,
    seed: int,
) -> TaskResult:
    """`accuracy` and `macro_f1`, means over experiments; per item the share of experiments that were right.

    mteb's `AbsTaskClassification`: logistic regression of at most 100 iterations.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    right, f1 = [], []
    for rows_M in train_EM:
        model = LogisticRegression(max_iter=100, random_state=seed).fit(train_ND[rows_M], labels_N[rows_M])
        predicted_I = model.predict(test_ID)
        right.append(predicted_I == labels_I)
        f1.append(f1_score(labels_I, predicted_I, average="macro"))
    right_I = np.mean(right, axis=0)
    return TaskResult({"accuracy": float(right_I.mean()), "macro_f1": float(np.mean(f1))}, right_I)


class Clustering(_Labelled):
    """k-means with as many clusters as there are labels."""

    kind: Literal["clustering"]
    data: str

    def read(self, label: str) -> Task:
        texts, labels = self.rows(self.data, f"tasks.{label}.data")
        counts = {"texts": len(texts), "labels": len(set(labels))}
        return Task(
            {"kind": self.kind, **counts},
            texts,
            lambda embed, _: cluster(embed(texts, "text").numpy(), labels, seed=self.seed),
        )


def cluster(x_ND: NDArray[Any], labels: Sequence[str], *, seed: int) -> TaskResult:
    """`v_measure`. mteb's `ClusteringEvaluator`: MiniBatchKMeans in batches of 500.

    V-measure is of all texts together, no mean over items: nothing for a paired bootstrap to draw from.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    means = MiniBatchKMeans(len(set(labels)), batch_size=500, n_init="auto", random_state=seed)
    return TaskResult({"v_measure": float(v_measure_score(labels, means.fit_predict(x_ND)))})


# --- pairs -----------------------------------------------------------------------------------


class _Pairs(Section):
    data: str
    sentence1: str = "sentence1"
    """The field of a row that holds its first text."""
    sentence2: str = "sentence2"

    def task(
        self, kind: str, label: str, field: str, score: Callable[[NDArray[Any], NDArray[Any]], TaskResult]
    ) -> Task:
        """`score` of the pairs' cosines and the numbers of `field`."""
        import numpy as np

        rows = list(_rows(self.data, f"tasks.{label}.data"))
        first, second = ([_value(at, row, name, str) for at, row in rows] for name in (self.sentence1, self.sentence2))
        value_I = np.array([_value(at, row, field, (int, float)) for at, row in rows], float)
        if not rows or not np.ptp(value_I) > 0:
            raise DataError(f"{self.data}: {field}: all are equal, or not all are numbers (nothing to tell apart)")

        def measure(embed: Embed, _: torch.device) -> TaskResult:
            from sklearn.metrics.pairwise import paired_cosine_distances

            x_ND = embed(first + second, "text").numpy()
            return score(1 - paired_cosine_distances(x_ND[: len(first)], x_ND[len(first) :]), value_I)

        return Task({"kind": kind, "pairs": len(first)}, first + second, measure)


class Sts(_Pairs):
    """How well cosines order pairs as people's scores of their likeness do."""

    kind: Literal["sts"]
    score: str = "score"
    """The field that holds a number: the larger, the more alike."""

    def read(self, label: str) -> Task:
        return self.task(self.kind, label, self.score, spearman)


def spearman(cosine_I: NDArray[Any], score_I: NDArray[Any]) -> TaskResult:
    """`spearman`, of all pairs together: no mean over items. `cosine_spearman` of mteb's `AbsTaskSTS`."""
    from scipy.stats import spearmanr

    return TaskResult({"spearman": float(spearmanr(score_I, cosine_I)[0])})  # type: ignore[arg-type]


class PairClassification(_Pairs):
    """Whether a cosine tells pairs that belong together (1) from those that do not (0)."""

    kind: Literal["pair_classification"]
    label: str = "label"
    """The field that holds 0 or 1."""

    def read(self, label: str) -> Task:
        for place, row in _rows(self.data, f"tasks.{label}.data"):
            if row.get(self.label) not in (0, 1):
                raise DataError(f"{place}: {self.label}: must be 0 or 1, got {row.get(self.label)!r} (mend the row)")
        return self.task(self.kind, label, self.label, pair_classification_scores)


def pair_classification_scores(cosine_I: NDArray[Any], label_I: NDArray[Any]) -> TaskResult:
    """`average_precision`, and `best_f1` over thresholds; of all pairs together: no mean over items.

    `cosine_ap` and `cosine_f1` of mteb's `AbsTaskPairClassification`, which does not try to take all pairs.
    """
    import numpy as np
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(label_I, cosine_I)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    found = {"average_precision": average_precision_score(label_I, cosine_I), "best_f1": f1[1:].max()}
    return TaskResult({name: float(value) for name, value in found.items()})


AnyTask = Annotated[Retrieval | Classification | Clustering | Sts | PairClassification, Field(discriminator="kind")]


# --- rows ------------------------------------------------------------------------------------


def _rows(path: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for source in find_sources([path], where):
        yield from read_rows(source)


def _value(where: str, row: Mapping[str, Any], field: str, kinds: type | tuple[type, ...]) -> Any:
    if not isinstance(value := row.get(field), kinds):
        wanted = {str: "text", (str, int): "text or a whole number"}.get(kinds, "a number")
        hint = "mend the row" if field in row else f"its fields: {', '.join(row)}"
        raise DataError(f"{where}: {field}: must be {wanted}, got {json.dumps(value, default=str)[:40]} ({hint})")
    return value
