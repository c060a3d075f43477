"""This rank's queries and passages of a global batch, as micro-batches of token ids.

Queries and passages go through the encoder together, sorted by length: less padding, the same mathematics.
Shape suffixes: B texts of a micro-batch, L tokens (padded), Q queries, P passages of this rank, G passages of a query,
N all texts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor

from lodestar import rng
from lodestar.config.schema import BatchPlan
from lodestar.data.loader import cut, padded
from lodestar.data.sampler import DatasetMixture, Sampler, examples_hash

LENGTH_GROUPS = 4
"""Micro-batches, by length, of a batch that fits into memory at once: less padding, and all graphs are kept."""


class Query(NamedTuple):
    ids: list[int]
    hash: int


class Passage(NamedTuple):
    ids: list[int]
    hash: int
    score: float | None
    """From a teacher; none where the data has no scores."""


@dataclass(frozen=True)
class MicroBatch:
    """Texts that go through the encoder at once."""

    ids_BL: Tensor
    lengths_B: Tensor
    is_real: bool
    """False for a filler: this rank has fewer texts than micro-batches."""

    def tensors(self, device: torch.device) -> list[Tensor]:
        """In the order of BiEncoder.forward."""
        return [self.ids_BL.to(device, non_blocking=True), self.lengths_B.to(device, non_blocking=True)]

    def pin_memory(self) -> MicroBatch:
        return MicroBatch(self.ids_BL.pin_memory(), self.lengths_B.pin_memory(), self.is_real)


@dataclass(frozen=True)
class StepBatch:
    """This rank's queries and passages of one step; texts are indexed queries first, then passages."""

    micro_batches: list[MicroBatch]
    text_index_N: Tensor
    """Index of each text, in the order of the micro-batches."""
    query_hash_Q: Tensor
    """Content hash of each query."""
    passage_hash_P: Tensor
    owner_P: Tensor
    """Hash of the query that a passage answers; -1 for a negative."""
    start_Q: Tensor
    """Index of each query's first passage, its positive, among this rank's passages."""
    count_Q: Tensor
    """Number of passages of each query."""
    teacher_QG: Tensor
    """Teacher scores of each query's own passages; NaN where there are none."""
    in_batch_negatives: bool
    """Whether the passages of other queries are negatives too."""
    keep_all_graphs: bool
    """The batch fits into memory at once, so GradCache need not embed it twice."""
    examples: int
    """Queries."""
    tokens: int
    padded_tokens: int
    """Tokens, padding included."""
    examples_hash: int = 0

    def pin_memory(self) -> StepBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, micro_batches=[m.pin_memory() for m in self.micro_batches], **pinned)


@dataclass(frozen=True)
class TrainingDataset:
    """One entry of data.train; each batch comes from one of them."""

    table: datasets.Dataset
    sampler: Sampler
    in_batch_negatives: bool


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    datasets: Sequence[TrainingDataset]
    mixture: DatasetMixture
    plan: BatchPlan
    rank: int
    seed: int
    negatives: int
    pad_id: int

    def __call__(self, step: int) -> StepBatch:
        dataset_index, batch_index = self.mixture.at(step)
        dataset = self.datasets[dataset_index]
        positions = self.plan.examples(self.rank)
        epochs, rows = dataset.sampler.batch(batch_index, positions if len(positions) else range(0, 1))
        columns: dict[str, list[Any]] = dataset.table[rows.tolist()]
        filler = columns["query_ids"][0]
        if not len(positions):  # a rank without queries still runs the collectives, on a filler
            return self._step_batch([], [], filler, dataset.in_batch_negatives, 0)
        queries = [Query(ids, hash) for ids, hash in zip(columns["query_ids"], columns["query_hash"], strict=True)]
        passages = self._sample_passages(columns, epochs, rows)
        batch_hash = examples_hash(positions, epochs, rows, dataset_index)
        return self._step_batch(queries, passages, filler, dataset.in_batch_negatives, batch_hash)

    def _sample_passages(self, columns: dict[str, list[Any]], epochs: Tensor, rows: Tensor) -> list[list[Passage]]:
        """Each query's passages: one positive, then the negatives."""
        num_positives_Q = torch.tensor([len(pos) for pos in columns["pos_ids"]])
        rng_key_Q = rng.hashed(torch.tensor(rng.key(self.seed, "passages")), epochs, rows)
        positive_index_Q = rng.below(num_positives_Q, rng_key_Q, 0).tolist()
        max_negatives = max(len(neg) for neg in columns["neg_ids"])
        sort_key_QN = rng.hashed(rng_key_Q[:, None], 1, torch.arange(max_negatives))
        groups: list[list[Passage]] = []
        for i, positive_index in enumerate(positive_index_Q):
            num_available = len(columns["neg_ids"][i])
            num_negatives = min(self.negatives, columns["most_negatives"][i]) if num_available else 0
            order = sort_key_QN[i, :num_available].argsort().tolist()
            negatives = [_passage(columns, "neg", i, order[j % num_available]) for j in range(num_negatives)]
            groups.append([_passage(columns, "pos", i, positive_index), *negatives])
        return groups

    def _step_batch(
        self,
        queries: list[Query],
        groups: list[list[Passage]],
        filler: list[int],
        in_batch_negatives: bool,
        batch_hash: int,
    ) -> StepBatch:
        passages = [passage for group in groups for passage in group]
        texts = [text.ids for text in (*queries, *passages)]
        counts_Q = torch.tensor([len(group) for group in groups], dtype=torch.int64)
        owners = [query.hash if j == 0 else -1 for query, group in zip(queries, groups, strict=True)
                  for j in range(len(group))]  # fmt: skip
        teacher_QG = torch.full((len(groups), max(map(len, groups), default=1)), float("nan"))
        for i, group in enumerate(groups):
            scores = [passage.score for passage in group if passage.score is not None]
            if len(scores) == len(group):
                teacher_QG[i, : len(group)] = torch.tensor(scores)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        micro_batches = [
            self._micro_batch([texts[i] for i in indices], filler)
            for indices in cut(by_length, self._num_micro_batches)
        ]
        return StepBatch(
            micro_batches,
            text_index_N=torch.tensor(by_length, dtype=torch.int64),
            query_hash_Q=torch.tensor([query.hash for query in queries], dtype=torch.int64),
            passage_hash_P=torch.tensor([passage.hash for passage in passages], dtype=torch.int64),
            owner_P=torch.tensor(owners, dtype=torch.int64),
            start_Q=counts_Q.cumsum(0) - counts_Q,
            count_Q=counts_Q,
            teacher_QG=teacher_QG,
            in_batch_negatives=in_batch_negatives,
            keep_all_graphs=self.plan.num_micro_batches == 1,
            examples=len(queries),
            examples_hash=batch_hash,
            tokens=sum(map(len, texts)),
            padded_tokens=sum(m.ids_BL.numel() for m in micro_batches),
        )

    @property
    def _num_micro_batches(self) -> int:
        """Of this step; the same on all ranks."""
        if self.plan.num_micro_batches > 1:
            return self.plan.num_micro_batches
        max_texts = max(self.plan.examples_per_rank) * (2 + self.negatives)
        return LENGTH_GROUPS if max_texts >= 8 * LENGTH_GROUPS else 1

    def _micro_batch(self, texts: list[list[int]], filler: list[int]) -> MicroBatch:
        sequences = texts or [filler]
        lengths_B = torch.tensor([len(ids) for ids in sequences])
        return MicroBatch(padded(sequences, self.pad_id), lengths_B, is_real=bool(texts))


def _passage(columns: dict[str, list[Any]], kind: str, example: int, index: int) -> Passage:
    """The passage at `index` of an example's positives (kind: pos) or negatives (kind: neg)."""
    ids, hashes, scores = (columns[f"{kind}_{name}"][example] for name in ("ids", "hash", "scores"))
    return Passage(ids[index], hashes[index], scores[index] if scores else None)
