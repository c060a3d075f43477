"""The nearest documents by exact scores, on one device or on all ranks.

Shape suffixes: Q queries, N documents, K results of a query, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lodestar.devices import tf32
from lodestar.distributed.collectives import gather_rows, rank, world_size


class SearchResult(NamedTuple):
    scores_QK: Tensor
    """fp32, the best first; -inf where no document was found."""
    index_QK: Tensor
    """int64 rows of the documents."""


@torch.no_grad()
def search(query_QD: Tensor, document_ND: Tensor, k: int, *, block: int = 8192) -> SearchResult:
    """The k documents of largest dot product for each query, exactly; equal scores keep the documents' order.

    query_QD, document_ND   any float dtype; the product is in fp32, on the queries' device
    block                   documents scored at once, so that memory is 1,024 x block however many there are
    returns                 K = min(k, N)
    """
    if query_QD.shape[1] != document_ND.shape[1]:
        raise ValueError(f"query and document widths differ: {query_QD.shape[1]} != {document_ND.shape[1]}")
    k = min(k, len(document_ND))
    best_keys = []
    for block_qD in query_QD.float().split(1024):
        keys_qK = torch.empty(len(block_qD), 0, dtype=torch.int64, device=block_qD.device)
        for start in range(0, len(document_ND), block):
            with tf32(False):
                scores = block_qD @ document_ND[start : start + block].to(block_qD.device).float().T
            keys = torch.cat([keys_qK, _sort_keys(scores, start)], dim=1)
            keys_qK = keys.topk(min(k, keys.shape[1]), dim=1).values
        best_keys.append(keys_qK)
    return _from_sort_keys(torch.cat(best_keys))


def distributed_search(query_QD: Tensor, document_ND: Tensor, k: int, device: torch.device) -> SearchResult:
    """`search` on all ranks, each with its part of the queries on its device; every rank gets the whole, on the CPU."""
    shards = query_QD.tensor_split(world_size())
    counts = [len(shard) for shard in shards]
    scores_qK, index_qK = search(shards[rank()].to(device), document_ND, k)
    return SearchResult(gather_rows(scores_qK, counts).cpu(), gather_rows(index_qK, counts).cpu())


def top_k(scores_QN: Tensor, k: int) -> SearchResult:
    """The k largest scores of each row and their columns, as `search` orders them."""
    return _from_sort_keys(_sort_keys(scores_QN.float(), 0).topk(min(k, scores_QN.shape[1]), dim=1).values)


def _sort_keys(scores: Tensor, first_row: int) -> Tensor:
    """int64 numbers that order by score, then by lower row: torch.topk leaves the order of equal scores open.

    The bits of floats, read as integers, order as the floats do once those of negative floats are inverted.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    return (ordered << 32) | (0xFFFFFFFF - rows)


def _from_sort_keys(keys: Tensor) -> SearchResult:
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return SearchResult(bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF))
