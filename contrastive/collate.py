"""Queries with their passages: one rank's part of a step's global batch as micro-batches of texts.

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
from lodestar.data.sampler import DatasetMixture, Sampler

LENGTH_GROUPS = 4
"""Micro-batches of a step that needs no second pass: cut by length, all their graphs kept."""


class Query(NamedTuple):
    ids: list[int]
    hash: int


class Passage(NamedTuple):
    ids: list[int]
    hash: int
    score: float | None
    """A teacher's."""


@dataclass(frozen=True)
class MicroBatch:
    ids_BL: Tensor
    lengths_B: Tensor
    real: bool
    """False where its text only fills an empty place."""

    def tensors(self, device: torch.device) -> list[Tensor]:
        """In the order of BiEncoder.forward."""
        return [self.ids_BL.to(device, non_blocking=True), self.lengths_B.to(device, non_blocking=True)]

    def pin_memory(self) -> MicroBatch:
        return MicroBatch(self.ids_BL.pin_memory(), self.lengths_B.pin_memory(), self.real)


@dataclass(frozen=True)
class StepBatch:
    """This rank's queries and passages of one step; texts are numbered queries first, then passages."""

    micro_batches: list[MicroBatch]
    place_N: Tensor
    """Where the texts of all micro-batches, one after another, belong."""
    query_hash_Q: Tensor
    passage_hash_P: Tensor
    owner_P: Tensor
    """The query hash where a passage is that query's positive, else -1."""
    start_Q: Tensor
    """Each query's first passage, its positive, among this rank's passages."""
    count_Q: Tensor
    """How many passages each query brought."""
    teacher_QG: Tensor
    """Scores of each query's own passages; NaN where there are none."""
    in_batch_negatives: bool
    """Whether queries see the passages of other queries too."""
    single_pass: bool
    examples: int
    """Queries."""
    tokens: int
    padded_tokens: int

    def pin_memory(self) -> StepBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, micro_batches=[m.pin_memory() for m in self.micro_batches], **pinned)


@dataclass(frozen=True)
class TrainingDataset:
    """One entry of data.train; each batch is of one of them."""

    table: datasets.Dataset
    sampler: Sampler
    in_batch_negatives: bool


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    sets: Sequence[TrainingDataset]
    mixture: DatasetMixture
    plan: BatchPlan
    rank: int
    seed: int
    negatives: int
    pad_id: int

    def __call__(self, step: int) -> StepBatch:
        set_number, number = self.mixture.at(step)
        dataset = self.sets[set_number]
        part = self.plan.examples(self.rank)
        epochs, rows = dataset.sampler.batch(number, part if len(part) else range(0, 1))
        columns: dict[str, list[Any]] = dataset.table[rows.tolist()]
        filler = columns["query_ids"][0]
        if not len(part):  # a rank without a query takes part with a text that does not count
            return self._batch([], [], filler, dataset.in_batch_negatives)
        queries = [Query(ids, hash) for ids, hash in zip(columns["query_ids"], columns["query_hash"], strict=True)]
        return self._batch(queries, self._draw(columns, epochs, rows), filler, dataset.in_batch_negatives)

    def _draw(self, columns: dict[str, list[Any]], epochs: Tensor, rows: Tensor) -> list[list[Passage]]:
        """Each query's passages: one positive, then the negatives."""
        positives_Q = torch.tensor([len(pos) for pos in columns["pos_ids"]])
        keys_Q = rng.hashed(torch.tensor(rng.key(self.seed, "passages")), epochs, rows)
        positive_Q = rng.below(positives_Q, keys_Q, 0).tolist()
        most = max(len(neg) for neg in columns["neg_ids"])
        order_QN = rng.hashed(keys_Q[:, None], 1, torch.arange(most))
        groups: list[list[Passage]] = []
        for i, positive in enumerate(positive_Q):
            available = len(columns["neg_ids"][i])
            wanted = min(self.negatives, columns["most_negatives"][i]) if available else 0
            order = order_QN[i, :available].argsort().tolist()
            negatives = [_passage(columns, "neg", i, order[j % available]) for j in range(wanted)]
            groups.append([_passage(columns, "pos", i, positive), *negatives])
        return groups

    def _batch(
        self, queries: list[Query], groups: list[list[Passage]], filler: list[int], in_batch_negatives: bool
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
            place_N=torch.tensor(by_length, dtype=torch.int64),
            query_hash_Q=torch.tensor([query.hash for query in queries], dtype=torch.int64),
            passage_hash_P=torch.tensor([passage.hash for passage in passages], dtype=torch.int64),
            owner_P=torch.tensor(owners, dtype=torch.int64),
            start_Q=counts_Q.cumsum(0) - counts_Q,
            count_Q=counts_Q,
            teacher_QG=teacher_QG,
            in_batch_negatives=in_batch_negatives,
            single_pass=self.plan.num_micro_batches == 1,
            examples=len(queries),
            tokens=sum(map(len, texts)),
            padded_tokens=sum(m.ids_BL.numel() for m in micro_batches),
        )

    @property
    def _num_micro_batches(self) -> int:
        """The same on all ranks."""
        if self.plan.num_micro_batches > 1:
            return self.plan.num_micro_batches
        most = max(self.plan.examples_per_rank) * (2 + self.negatives)
        return LENGTH_GROUPS if most >= 8 * LENGTH_GROUPS else 1

    def _micro_batch(self, texts: list[list[int]], filler: list[int]) -> MicroBatch:
        rows = texts or [filler]
        return MicroBatch(padded(rows, self.pad_id), torch.tensor([len(row) for row in rows]), bool(texts))


def _passage(columns: dict[str, list[Any]], kind: str, example: int, number: int) -> Passage:
    """kind   pos | neg"""
    ids, hashes, scores = (columns[f"{kind}_{name}"][example] for name in ("ids", "hash", "scores"))
    return Passage(ids[number], hashes[number], scores[number] if scores else None)
