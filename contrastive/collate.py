"""Rows of a query with its passages, and one rank's share of a step's global batch as micro-batches of texts.

Queries and passages go through the encoder together, sorted by length: less padding, the same mathematics.
Shape suffixes: B texts of a micro-batch, L tokens (padded), Q queries, P passages of this rank, G passages of a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from lodestar import rng
from lodestar.config.schema import BatchPlan
from lodestar.data.loader import cut, padded
from lodestar.data.sampler import DatasetMixture, ShuffledSampler

LENGTH_GROUPS = 4
"""Micro-batches of a step that needs no second pass: cut by length, all their graphs kept."""


# --- batches ---------------------------------------------------------------------------------


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
    rows: int
    tokens: int
    padded_tokens: int

    def pin_memory(self) -> StepBatch:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return StepBatch(**{**values, "micro_batches": [m.pin_memory() for m in self.micro_batches]})


@dataclass(frozen=True)
class DataSet:
    """One entry of data.train: each batch is of one of them."""

    table: datasets.Dataset
    order: ShuffledSampler
    in_batch_negatives: bool


@dataclass(frozen=True)
class Collate:
    """step -> this rank's StepBatch; a pure function of (seed, step)."""

    sets: Sequence[DataSet]
    mixture: DatasetMixture
    plan: BatchPlan
    rank: int
    seed: int
    negatives: int
    pad_id: int

    def __call__(self, step: int) -> StepBatch:
        which, number = self.mixture.at(step)
        chosen = self.sets[which]
        part = self.plan.rows(self.rank)
        epochs, numbers = chosen.order.batch(number, part if len(part) else range(0, 1))
        rows = chosen.table[numbers.tolist()]
        drawn = self._draw(rows, epochs, numbers)
        if not len(part):  # a rank without a query takes part with a text that does not count
            return self._batch([], [], rows["query_ids"], chosen)
        groups = [[(rows[f"{name}_ids"][i][j], rows[f"{name}_hash"][i][j], _score(rows, name, i, j)) for name, j in own]
                  for i, own in enumerate(drawn)]  # fmt: skip
        queries = list(zip(rows["query_ids"], rows["query_hash"], strict=True))
        return self._batch(queries, groups, rows["query_ids"], chosen)

    def _draw(self, rows: Mapping[str, list[Any]], epochs: Tensor, numbers: Tensor) -> list[list[tuple[str, int]]]:
        """For each row its passages as (pos | neg, index): one positive, then the negatives."""
        held_Q = torch.tensor([len(pos) for pos in rows["pos_ids"]])
        keys_Q = rng.hashed(torch.tensor(rng.key(self.seed, "passages")), epochs, numbers)
        positive_Q = rng.below(held_Q, keys_Q, 0).tolist()
        most = max(len(neg) for neg in rows["neg_ids"])
        order_QN = rng.hashed(keys_Q[:, None], 1, torch.arange(most))
        drawn = []
        for i, positive in enumerate(positive_Q):
            have = len(rows["neg_ids"][i])
            want = min(self.negatives, rows["most_negatives"][i]) if have else 0
            order = order_QN[i, :have].argsort().tolist()
            drawn.append([("pos", positive), *(("neg", order[j % have]) for j in range(want))])
        return drawn

    def _batch(self, queries: list[Any], groups: list[Any], filler: list[Any], chosen: DataSet) -> StepBatch:
        passages = [passage for group in groups for passage in group]
        texts = [ids for ids, _ in queries] + [ids for ids, _, _ in passages]
        widest = max(map(len, groups), default=1)
        starts = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0)[:-1]
        owners = [queries[i][1] if j == 0 else -1 for i, group in enumerate(groups) for j in range(len(group))]
        teacher = torch.full((len(groups), widest), float("nan"))
        for i, group in enumerate(groups):
            if all(score is not None for _, _, score in group):
                teacher[i, : len(group)] = torch.tensor([score for _, _, score in group])
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        micro_batches = [self._micro_batch([texts[i] for i in run], filler[:1]) for run in cut(by_length, self._parts)]
        return StepBatch(
            micro_batches,
            place_N=torch.tensor(by_length, dtype=torch.int64),
            query_hash_Q=torch.tensor([found for _, found in queries], dtype=torch.int64),
            passage_hash_P=torch.tensor([found for _, found, _ in passages], dtype=torch.int64),
            owner_P=torch.tensor(owners, dtype=torch.int64),
            start_Q=starts[: len(groups)],
            count_Q=torch.tensor([len(group) for group in groups], dtype=torch.int64),
            teacher_QG=teacher,
            in_batch_negatives=chosen.in_batch_negatives,
            single_pass=self.plan.num_micro_batches == 1,
            rows=len(queries),
            tokens=sum(map(len, texts)),
            padded_tokens=sum(m.ids_BL.numel() for m in micro_batches),
        )

    @property
    def _parts(self) -> int:
        """Micro-batches of a step, the same on all ranks."""
        if self.plan.num_micro_batches > 1:
            return self.plan.num_micro_batches
        most = max(self.plan.rows_per_rank) * (2 + self.negatives)
        return LENGTH_GROUPS if most >= 8 * LENGTH_GROUPS else 1

    def _micro_batch(self, texts: list[Any], filler: list[Any]) -> MicroBatch:
        rows = texts or filler
        return MicroBatch(padded(rows, self.pad_id), torch.tensor([len(row) for row in rows]), bool(texts))


def _score(rows: Mapping[str, list[Any]], name: str, row: int, passage: int) -> float | None:
    scores = rows[f"{name}_scores"][row]
    return scores[passage] if scores else None
