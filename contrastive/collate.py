"""This rank's texts of a global batch as micro-batches of token ids, and what its loss needs to know of all texts.

Queries and passages of all ranks go through the encoder together, sorted by length: less padding, the same mathematics.
Which rank embeds a text follows from the lengths. A rank computes the loss of its own part of the queries.
Shape suffixes: G queries of the global batch, M passages of all of them, Q queries of this rank's part, P their
passages, K passages of one query, B texts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lodestar import rng
from lodestar.config.schema import BatchPlan
from lodestar.data.columns import Indices, Lists, Numbers, column
from lodestar.data.flat import FlatTensors
from lodestar.data.micro_batches import Dealt, deal
from lodestar.data.padding import TextShape, packed, padded
from lodestar.data.sampler import DatasetMixture, Sampler, examples_hash

if TYPE_CHECKING:
    import datasets  # not needed to run: a bare GPU machine lacks it


@dataclass(frozen=True)
class StepBatch:
    """What one rank needs for one step."""

    tensors: FlatTensors
    """`ids.INDEX` and `lengths.INDEX` of each micro-batch; the others are:

    query_place_G, passage_place_M     index of each query and passage among the embeddings of all ranks
    query_hash_Q, passage_hash_P       content hashes
    owner_P                            hash of the query that a passage answers; -1 for a negative
    start_Q, count_Q                   index of each query's first passage, its positive, among M; its passages
    teacher_QK                         teacher scores of each query's own passages; NaN where there are none
    """
    shapes: Sequence[TextShape]
    """Of each micro-batch."""
    numbers: Sequence[int]
    """Of each micro-batch among those of all ranks."""
    is_real: Sequence[bool]
    """Of each micro-batch; false for a filler: this rank has fewer than others."""
    texts_per_rank: Sequence[int]
    """Texts that each rank embeds."""
    queries_per_rank: Sequence[int]
    """Queries of each rank's part."""
    passages_per_rank: Sequence[int]
    """Passages of each rank's part."""
    tokens_of_rank: Sequence[Sequence[int]]
    """Tokens of each rank's micro-batches, padding included."""
    first_query: int
    """Index of this rank's first query among G."""
    in_batch_negatives: bool
    """Whether the passages of other queries are negatives too."""
    keeps_all_graphs: bool
    """The batch fits into memory at once, so GradCache need not embed it twice."""
    examples: int
    """Queries of this rank's part."""
    tokens: int
    """Of the texts that this rank embeds."""
    examples_hash: int = 0

    @property
    def num_micro_batches(self) -> int:
        return len(self.shapes)

    @property
    def padded_tokens(self) -> int:
        return sum(self.tensors[f"ids.{i}"].numel() for i in range(len(self.shapes)))

    def inputs(self, index: int) -> list[Any]:
        """The arguments of BiEncoder.forward for a micro-batch."""
        return [self.tensors[f"ids.{index}"], self.tensors[f"lengths.{index}"], self.shapes[index]]

    def to(self, device: torch.device) -> StepBatch:
        return replace(self, tensors=self.tensors.to(device))

    def pin_memory(self) -> StepBatch:
        return replace(self, tensors=self.tensors.pin_memory())


class SampledDataset(Protocol):
    """One entry of data.train, cached or streamed."""

    @property
    def sampler(self) -> Sampler: ...

    def at(self, epochs: Tensor) -> TrainingDataset:
        """What holds the rows of a batch."""
        ...


@dataclass(frozen=True)
class TrainingDataset:
    """One entry of data.train; each batch comes from one of them."""

    table: datasets.Dataset
    sampler: Sampler
    in_batch_negatives: bool

    def at(self, epochs: Tensor) -> TrainingDataset:
        """What holds the rows of a batch."""
        return self

    def with_columns(self) -> TrainingDataset:
        """Reads the columns that each batch needs now: loader workers inherit them, instead of each reading its own."""
        for numbers in (self.query_hash, self.most_negatives, self.positives.hash, self.negatives.hash):
            _ = numbers.all
        for lists in (self.queries, self.positives.ids, self.negatives.ids):
            _ = lists.lengths
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the columns: they read the table's file again."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def queries(self) -> Lists:
        return Lists(column(self.table, "query_ids"))

    @cached_property
    def query_hash(self) -> Numbers:
        return Numbers(column(self.table, "query_hash"))

    @cached_property
    def most_negatives(self) -> Numbers:
        return Numbers(column(self.table, "most_negatives"))

    @cached_property
    def positives(self) -> Passages:
        return Passages(self.table, "pos")

    @cached_property
    def negatives(self) -> Passages:
        return Passages(self.table, "neg")


class Passages:
    """The positives, or the negatives, of all rows; a passage has an index among those of all rows."""

    def __init__(self, table: datasets.Dataset, kind: str) -> None:
        of_row = Lists(column(table, f"{kind}_ids"))
        self.counts, self.first = of_row.lengths, of_row.first
        self.ids: Lists = of_row.flattened(Lists)
        self.hash: Numbers = Lists(column(table, f"{kind}_hash")).flattened(Numbers)
        self._scores = Lists(column(table, f"{kind}_scores"))

    @cached_property
    def has_scores(self) -> bool:
        return bool(self._scores.lengths.any())

    def scores(self, row: int) -> npt.NDArray[np.float32]:
        """Of one row, from a teacher; empty where the data has none."""
        return self._scores[np.array([row])][0]


@dataclass(frozen=True)
class _Drawn:
    """The passages of a global batch: those of each query together, its positive first."""

    count_G: Indices
    """Passages of each query."""
    start_G: Indices
    """Index of its first among M."""
    is_negative_M: npt.NDArray[np.bool_]
    index_M: Indices
    """Of each among the positives or the negatives of the data set."""

    def values(self, dataset: TrainingDataset, of: Callable[[Passages], Any], part: slice = slice(None)) -> Indices:
        """A number of each passage, or of a part of them, by a column of the data set's passages."""
        is_negative_P, index_P = self.is_negative_M[part], self.index_M[part]
        values_P = np.empty(len(index_P), dtype=np.int64)
        for passages, is_kind_P in ((dataset.positives, ~is_negative_P), (dataset.negatives, is_negative_P)):
            values_P[is_kind_P] = of(passages)[index_P[is_kind_P]]
        return values_P


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    datasets: Sequence[SampledDataset]
    mixture: DatasetMixture
    plan: BatchPlan
    rank: int
    seed: int
    negatives: int
    pad_id: int
    packed: bool = False

    def __call__(self, step: int) -> StepBatch:
        dataset_index, batch_index = self.mixture.at(step)
        sampled = self.datasets[dataset_index]
        epochs_G, rows_G = sampled.sampler.batch(batch_index, range(self.plan.global_size))
        dataset = sampled.at(epochs_G)
        rows = rows_G.numpy()
        drawn = self._draw(dataset, epochs_G, rows_G)
        lengths_M = drawn.values(dataset, lambda passages: passages.ids.lengths)
        lengths = np.concatenate([dataset.queries.lengths[rows], lengths_M])
        dealt = deal(lengths, self.plan, packed=self.packed)
        mine = dealt.of_rank[self.rank]
        tensors: dict[str, Tensor] = {}
        shapes: list[TextShape] = []
        for i, indices in enumerate(mine):
            # Without texts a rank still runs the collectives, on a filler.
            ids = _ids(dataset, rows, drawn, indices if len(indices) else np.array([lengths.argmin()]))
            lengths_B = torch.tensor([len(text) for text in ids])
            tensors[f"ids.{i}"] = packed(ids) if self.packed else padded(ids, self.pad_id)
            tensors[f"lengths.{i}"] = lengths_B
            shapes.append(TextShape.of(lengths_B))
        parts = [slice(p.start, p.stop) for p in map(self.plan.examples, range(self.plan.world_size))]
        part, positions = parts[self.rank], self.plan.examples(self.rank)
        return StepBatch(
            FlatTensors.of(tensors | _places(dealt, len(rows)) | _of_part(dataset, rows, drawn, part)),
            shapes=shapes,
            numbers=dealt.numbers[self.rank],
            is_real=[bool(len(indices)) for indices in mine],
            texts_per_rank=dealt.texts_per_rank,
            queries_per_rank=self.plan.examples_per_rank,
            passages_per_rank=[int(drawn.count_G[part].sum()) for part in parts],
            tokens_of_rank=dealt.tokens_of_rank,
            first_query=positions.start,
            in_batch_negatives=dataset.in_batch_negatives,
            keeps_all_graphs=dealt.fits_at_once,
            examples=len(positions),
            examples_hash=examples_hash(positions, epochs_G[part], rows_G[part], dataset_index),
            tokens=int(lengths[np.concatenate(mine)].sum()),
        )

    def _draw(self, dataset: TrainingDataset, epochs_G: Tensor, rows_G: Tensor) -> _Drawn:
        """Each query's passages: one of its positives, then negatives, again from the first where there are too few."""
        rows = rows_G.numpy()
        rng_key_G = rng.hashed(torch.tensor(rng.key(self.seed, "passages")), epochs_G, rows_G)
        num_positives_G = torch.from_numpy(dataset.positives.counts[rows].astype(np.int64))
        positive_G = dataset.positives.first[rows] + rng.below(num_positives_G, rng_key_G, 0).numpy()
        num_available_G = dataset.negatives.counts[rows].astype(np.int64)
        num_negatives_G = np.minimum(self.negatives, dataset.most_negatives[rows]) * (num_available_G > 0)
        position_N = np.arange(num_available_G.max())
        sort_key_GN = rng.hashed(rng_key_G[:, None], 1, torch.from_numpy(position_N)).numpy()
        sort_key_GN[position_N >= num_available_G[:, None]] = np.iinfo(np.int64).max
        order_GN = sort_key_GN.argsort(1, kind="stable")
        count_G = 1 + num_negatives_G
        start_G = count_G.cumsum() - count_G
        query_M = np.repeat(np.arange(len(rows)), count_G)
        place_M = np.arange(len(query_M)) - start_G[query_M] - 1  # -1: the positive
        is_negative_M = place_M >= 0
        index_M = positive_G[query_M]
        of_query, place = query_M[is_negative_M], place_M[is_negative_M]
        drawn = order_GN[of_query, place % num_available_G[of_query]]
        index_M[is_negative_M] = dataset.negatives.first[rows][of_query] + drawn
        return _Drawn(count_G, start_G, is_negative_M, index_M)


def _places(dealt: Dealt, queries: int) -> dict[str, Tensor]:
    """Index of each query and passage among the embeddings of all ranks."""
    order = dealt.order
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return {
        "query_place_G": torch.from_numpy(place[:queries]), "passage_place_M": torch.from_numpy(place[queries:])
    }  # fmt: skip


def _of_part(dataset: TrainingDataset, rows: Indices, drawn: _Drawn, part: slice) -> dict[str, Tensor]:
    """What the loss needs of this rank's queries and their passages."""
    count_Q, start_Q, query_hash_Q = drawn.count_G[part], drawn.start_G[part], dataset.query_hash[rows[part]]
    first = int(start_Q[0]) if len(start_Q) else 0
    passages = slice(first, first + int(count_Q.sum()))
    owner_P = np.repeat(query_hash_Q, count_Q)
    owner_P[drawn.is_negative_M[passages]] = -1
    arrays = {
        "query_hash_Q": query_hash_Q,
        "passage_hash_P": drawn.values(dataset, lambda passages: passages.hash, passages),
        "owner_P": owner_P,
        "start_Q": start_Q,
        "count_Q": count_Q,
        "teacher_QK": _teacher(dataset, rows[part], drawn.index_M[passages], count_Q),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _teacher(dataset: TrainingDataset, rows: Indices, index_P: Indices, count_Q: Indices) -> npt.NDArray[np.float32]:
    """(Q, K) scores of each query's passages, from a teacher; NaN for a query that lacks one."""
    teacher_QK = np.full((len(rows), count_Q.max(initial=1)), np.nan, dtype=np.float32)
    if not dataset.positives.has_scores:
        return teacher_QK
    start = 0
    for teacher_K, row, count in zip(teacher_QK, rows.tolist(), count_Q.tolist(), strict=True):
        of_positives, of_negatives = dataset.positives.scores(row), dataset.negatives.scores(row)
        positive, negatives = index_P[start], index_P[start + 1 : start + count]
        start += count
        if len(of_positives) and (len(of_negatives) or not len(negatives)):
            teacher_K[0] = of_positives[positive - dataset.positives.first[row]]
            teacher_K[1:count] = of_negatives[negatives - dataset.negatives.first[row]]
    return teacher_QK


def _ids(dataset: TrainingDataset, rows: Indices, drawn: _Drawn, indices: Indices) -> list[npt.NDArray[np.int32]]:
    """Token ids of some of the texts of a global batch: its queries, then its passages."""
    texts = np.empty(len(indices), dtype=object)
    is_query = indices < len(rows)
    passage = indices[~is_query] - len(rows)
    is_negative = np.zeros_like(is_query)
    is_negative[~is_query] = drawn.is_negative_M[passage]
    index = np.empty_like(indices)
    index[is_query], index[~is_query] = rows[indices[is_query]], drawn.index_M[passage]
    for of_kind, column_of_kind in (
        (is_query, dataset.queries),
        (~is_query & ~is_negative, dataset.positives.ids),
        (is_negative, dataset.negatives.ids),
    ):
        for place, ids in zip(of_kind.nonzero()[0].tolist(), column_of_kind[index[of_kind]], strict=True):
            texts[place] = ids
    return list(texts)
