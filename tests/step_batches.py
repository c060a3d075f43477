"""Batches of fine-tuning whose texts are vectors: each rank embeds those of its own part, queries before passages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive.collate import StepBatch
from lodestar.data.flat import FlatTensors
from lodestar.data.padding import TextShape


def step_batch(rank: int, counts: Sequence[int], teacher_QK: Tensor, micro_batches: Sequence[Tensor]) -> StepBatch:
    """The batch of one of the ranks, which have `counts` queries with K passages each."""
    group, start, total = teacher_QK.shape[1], sum(counts[:rank]), sum(counts)
    rank_G = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ends = torch.tensor([0, *counts]).cumsum(0)
    passage_place_GK = (ends[rank_G + 1] + group * torch.arange(total))[:, None] + torch.arange(group)
    query_hash_Q = 10_000 + start + torch.arange(counts[rank])
    owner_QK = torch.full((counts[rank], group), -1)
    owner_QK[:, 0] = query_hash_Q
    tensors = {
        "query_place_G": torch.arange(total) + group * ends[rank_G],
        "passage_place_M": passage_place_GK.flatten(),
        "query_hash_Q": query_hash_Q,
        "passage_hash_P": start * group + torch.arange(counts[rank] * group),
        "owner_P": owner_QK.flatten(),
        "start_Q": group * (start + torch.arange(counts[rank])),
        "count_Q": torch.full((counts[rank],), group),
        "teacher_QK": teacher_QK,
        **{f"ids.{i}": vectors_BF for i, vectors_BF in enumerate(micro_batches)},
        **{f"lengths.{i}": torch.ones(len(vectors_BF)) for i, vectors_BF in enumerate(micro_batches)},
    }
    return StepBatch(
        FlatTensors.of(tensors),
        shapes=[TextShape(1, False)] * len(micro_batches),
        numbers=range(len(micro_batches)),
        is_real=[True] * len(micro_batches),
        texts_per_rank=[(1 + group) * count for count in counts],
        queries_per_rank=counts,
        passages_per_rank=[group * count for count in counts],
        tokens_of_rank=[[1] * len(micro_batches)] * len(counts),
        first_query=start,
        in_batch_negatives=True,
        keeps_all_graphs=len(micro_batches) == 1,
        examples=counts[rank],
        tokens=0,
    )
