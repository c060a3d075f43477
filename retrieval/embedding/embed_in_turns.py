"""Each rank embeds a part of the texts, and every rank gets all embeddings.

Shape suffixes: N texts, n texts of this rank, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lodestar.distributed.collectives import gather_rows, rank, world_size


def embed_in_turns(order: Sequence[int], embed_indices: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """(N, D) on the CPU, on every rank, in the order 0 to N-1; every rank must call.

    order          the indices 0 to N-1 in any order: rank r of W takes order[r], order[r + W], ...
    embed_indices  (n, D) for the n indices of this rank
    """
    size = world_size()
    shards = [order[turn::size] for turn in range(size)]
    shard_nD = embed_indices(shards[rank()])
    if size == 1 and order == range(len(order)):
        return shard_nD.cpu()
    gathered_ND = gather_rows(shard_nD, [len(shard) for shard in shards]).cpu()
    result_ND = torch.empty_like(gathered_ND)
    result_ND[torch.tensor([i for shard in shards for i in shard], dtype=torch.int64)] = gathered_ND
    return result_ND
