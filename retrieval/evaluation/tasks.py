"""Kinds of evaluation task and how their files are read. Loads without torch, so that mistakes in files show at once.

A kind is a config in `config.TaskConfig` and a function in READERS below. The query prompt precedes queries of
retrieval and the document prompt its documents; the texts of all other tasks are embedded without a prompt.
Protocols are those of MTEB (Muennighoff et al., 2023) as in the package `mteb` 2.26: same draws, same numbers.

Shape suffixes: N texts, D embedding width, I items of a test set, E experiments, M texts of a training set.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from lodestar.data.readers import Row, find_sources, read_rows
from lodestar.errors import DataError, names, naming, shown
from retrieval.embedding.protocols import EmbedTexts
from retrieval.evaluation.beir import Beir, read_beir
from retrieval.evaluation.config import (
    ClassificationConfig,
    ClusteringConfig,
    EvaluateRecipe,
    LabelledTextsConfig,
    PairClassificationConfig,
    PairsConfig,
    RetrievalConfig,
    StsConfig,
    TaskConfig,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from retrieval.embedding.exact_search import SearchResult

RETRIEVAL_COLUMNS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_100": "recall@100"}


class RetrievalOutput(NamedTuple):
    query_QD: Tensor
    document_ND: Tensor
    ranking: SearchResult
    """Deep enough for a fusion with another ranking."""


class TaskResult(NamedTuple):
    metrics: dict[str, float]
    item_I: np.ndarray | None = None
    """The first metric of each item, if the metric is a mean over items: input of the paired bootstrap."""
    retrieval: RetrievalOutput | None = None


@dataclass(frozen=True)
class Task:
    """A task with its data in memory."""

    kind: str
    counts: Mapping[str, int]
    """Sizes for tables and reports, by name."""
    columns: Mapping[str, str]
    """Headings of the metrics that tables show. The first one stands for the task in comparisons."""
    texts: Sequence[str]
    """All texts that `measure` embeds."""
    measure: Callable[[EmbedTexts, torch.device], TaskResult] = field(repr=False)
    """(model, device for the search) -> metrics; every rank must call."""
    beir: Beir | None = field(default=None, repr=False)
    split: str | None = None
    """Both for retrieval only."""

    @property
    def facts(self) -> dict[str, str | int]:
        """For `evaluation.json`."""
        return {"kind": self.kind, **({"split": self.split} if self.split else {}), **self.counts}

    def describe(self, name: str) -> dict[str, object]:
        """`facts` of the only task, or of that of `evaluate`, which is always retrieval."""
        return {"evaluation": name, **{key: value for key, value in self.facts.items() if key != "kind"}}

    @property
    def counts_in_words(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())


def task_of(recipe: EvaluateRecipe, label: str) -> Task:
    """As `read_task`, of a recipe's task; mistakes are told under its key."""
    with naming(f"tasks.{label}" if label in recipe.tasks else "evaluate.data"):
        return read_task(recipe.all_tasks[label], label)


def read_task(config: TaskConfig, label: str) -> Task:
    """Read and check the task's files; DataError for mistakes in them.

    label   of the task in the recipe, for error messages
    """
    return READERS[type(config)](config, label)


# --- retrieval -------------------------------------------------------------------------------


def read_retrieval(config: RetrievalConfig, label: str) -> Task:
    limits = {"max_queries": config.max_queries, "max_documents": config.max_documents}
    return retrieval_task(read_beir(config.data, config.split, **limits), config.split)


def retrieval_task(beir: Beir, split: str = "test") -> Task:
    """Exact search, measured by the metrics of `retrieval.evaluation.metrics`; nDCG@10 of each query."""

    def measure(embed: EmbedTexts, device: torch.device) -> TaskResult:
        from retrieval.evaluation.task_metrics import search_and_measure

        return search_and_measure(beir, embed, device)

    counts = {"queries": len(beir.queries), "documents": len(beir.documents)}
    return Task("retrieval", counts, RETRIEVAL_COLUMNS, beir.queries + beir.documents, measure, beir, split)


# --- labelled texts --------------------------------------------------------------------------


class LabelledTexts(NamedTuple):
    texts: list[str]
    labels: list[str]


def _read_labelled_texts(config: LabelledTextsConfig, path: str, where: str) -> LabelledTexts:
    rows = list(read_task_rows(path, where))
    texts = [value_of(place, row, config.text, str) for place, row in rows]
    labels = [str(value_of(place, row, config.label, (str, int))) for place, row in rows]
    if len(set(labels)) < 2:
        raise DataError(f"{path}: {config.label}: {len(set(labels))} labels (two or more are needed)")
    return LabelledTexts(texts, labels)


def read_classification(config: ClassificationConfig, label: str) -> Task:
    train = _read_labelled_texts(config, config.train, f"tasks.{label}.train")
    test = _read_labelled_texts(config, config.test, f"tasks.{label}.test")
    if unknown := sorted(set(test.labels) - set(train.labels)):
        raise DataError(
            f"{config.test}: {config.label}: {unknown[0]!r} is not in {config.train} (correct one of the two)"
        )
    drawn_EM = undersample(train.labels, config.samples_per_label, config.experiments, config.seed)
    needed_N, position = np.unique(drawn_EM, return_inverse=True)
    train_EM, train_labels_N = position.reshape(drawn_EM.shape), np.array(train.labels)[needed_N]
    texts = [train.texts[i] for i in needed_N] + test.texts

    def measure(embed: EmbedTexts, _: torch.device) -> TaskResult:
        from retrieval.evaluation.task_metrics import classify

        train_ND, test_ID = np.split(embed(texts, "text").numpy(), [len(needed_N)])
        return classify(train_ND, train_labels_N, train_EM, test_ID, np.array(test.labels), seed=config.seed)

    counts = {"train": len(train.texts), "test": len(test.texts), "labels": len(set(train.labels))}
    return Task(config.kind, counts, {"accuracy": "accuracy", "macro_f1": "macro F1"}, texts, measure)


def undersample(labels: Sequence[str], per_label: int, experiments: int, seed: int) -> np.ndarray:
    """(E, M) int64 rows of `labels`: in each experiment the first `per_label` of each label in a shuffled order.

    As `AbsTaskClassification._undersample_data` of mteb, which shuffles the order of the previous experiment again.
    """
    order, rows_EM = np.arange(len(labels)), []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        label_counts: Counter[str] = Counter()
        rows_M = []
        for i in order.tolist():
            if label_counts[labels[i]] < per_label:
                label_counts[labels[i]] += 1
                rows_M.append(i)
        rows_EM.append(rows_M)
    return np.array(rows_EM)


def read_clustering(config: ClusteringConfig, label: str) -> Task:
    texts, labels = _read_labelled_texts(config, config.data, f"tasks.{label}.data")

    def measure(embed: EmbedTexts, _: torch.device) -> TaskResult:
        from retrieval.evaluation.task_metrics import cluster

        return cluster(embed(texts, "text").numpy(), labels, seed=config.seed)

    counts = {"texts": len(texts), "labels": len(set(labels))}
    return Task(config.kind, counts, {"v_measure": "V-measure"}, texts, measure)


# --- pairs -----------------------------------------------------------------------------------


class Pairs(NamedTuple):
    first: list[str]
    second: list[str]
    target_I: np.ndarray
    """A number for each pair, which the cosine should predict."""


def _read_pairs(config: PairsConfig, target: str, where: str) -> Pairs:
    rows = list(read_task_rows(config.data, where))
    first, second = (
        [value_of(place, row, name, str) for place, row in rows] for name in (config.sentence1, config.sentence2)
    )
    target_I = np.array([value_of(place, row, target, (int, float)) for place, row in rows], float)
    if not rows or not np.ptp(target_I) > 0:
        raise DataError(f"{config.data}: {target}: all are equal, or not all are numbers (nothing to predict)")
    return Pairs(first, second, target_I)


def read_sts(config: StsConfig, label: str) -> Task:
    pairs = _read_pairs(config, config.score, f"tasks.{label}.data")

    def measure(embed: EmbedTexts, _: torch.device) -> TaskResult:
        from retrieval.evaluation.task_metrics import pair_cosines, spearman

        return spearman(pair_cosines(embed, pairs), pairs.target_I)

    return _pairs_task(config.kind, {"spearman": "Spearman"}, pairs, measure)


def read_pair_classification(config: PairClassificationConfig, label: str) -> Task:
    where = f"tasks.{label}.data"
    for place, row in read_task_rows(config.data, where):
        if value_of(place, row, config.label, (int, float)) not in (0, 1):
            problem = f"must be 0 or 1, got {shown(row.get(config.label))}"
            raise DataError(f"{place}: {config.label}: {problem} (correct the row)")
    pairs = _read_pairs(config, config.label, where)

    def measure(embed: EmbedTexts, _: torch.device) -> TaskResult:
        from retrieval.evaluation.task_metrics import pair_classification_scores, pair_cosines

        return pair_classification_scores(pair_cosines(embed, pairs), pairs.target_I)

    columns = {"average_precision": "avg. precision", "best_f1": "best F1"}
    return _pairs_task(config.kind, columns, pairs, measure)


def _pairs_task(
    kind: str, columns: Mapping[str, str], pairs: Pairs, measure: Callable[[EmbedTexts, torch.device], TaskResult]
) -> Task:
    return Task(kind, {"pairs": len(pairs.first)}, columns, pairs.first + pairs.second, measure)


# --- the kinds -------------------------------------------------------------------------------

READERS: Mapping[type[TaskConfig], Callable[[Any, str], Task]] = {
    RetrievalConfig: read_retrieval,
    ClassificationConfig: read_classification,
    ClusteringConfig: read_clustering,
    StsConfig: read_sts,
    PairClassificationConfig: read_pair_classification,
}
"""By the class of a task's config: (config, label of the task) -> the task."""


# --- rows ------------------------------------------------------------------------------------

Value = TypeVar("Value")


def read_task_rows(path: str, where: str) -> Iterator[tuple[str, Row]]:
    """(FILE:LINE, row) for each row; `where` is the key of the recipe that names the path."""
    for source in find_sources([path], where):
        yield from read_rows(source)


def value_of(where: str, row: Row, field: str, kinds: type[Value] | tuple[type[Value], ...]) -> Value:
    """The value of a field; DataError, with the place `where`, if it is missing or of another type."""
    value: Any = row.get(field)
    is_finite = not isinstance(value, int | float) or abs(value) <= sys.float_info.max
    if not isinstance(value, kinds) or isinstance(value, bool) or not is_finite:
        expected = {str: "text", (str, int): "text or a whole number"}.get(kinds, "a finite number")
        hint = "correct the row" if field in row else f"its fields: {names(row)}"
        raise DataError(f"{where}: {field}: must be {expected}, got {shown(value)} ({hint})")
    return value
