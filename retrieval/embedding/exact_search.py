"""The nearest documents by exact scores, on one device or shared among all ranks.

Shape suffixes: Q queries, N documents, K results of a query, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lodestar.distributed.collectives import gather_rows, rank, world_size


@torch.no_grad()
def search(query_QD: Tensor, document_ND: Tensor, k: int, *, block: int = 8192) -> tuple[Tensor, Tensor]:
    """The k documents of largest dot product for each query, exactly; of equal ones the first come first.

    query_QD, document_ND   any float dtype; the product is taken in fp32, on the queries' device
    block                   documents scored at once, so that memory is 1,024 x block however many there are
    returns                 (Q, K) fp32 scores, falling, and (Q, K) int64 rows of document_ND; K = min(k, N)
    """
    if query_QD.shape[1] != document_ND.shape[1]:
        raise ValueError(f"query and document widths differ: {query_QD.shape[1]} != {document_ND.shape[1]}")
    k = min(k, len(document_ND))
    best = []
    for part_qD in query_QD.float().split(1024):
        keys_qK = torch.empty(len(part_qD), 0, dtype=torch.int64, device=part_qD.device)
        for start in range(0, len(document_ND), block):
            scores = part_qD @ document_ND[start : start + block].to(part_qD.device).float().T
            keys = torch.cat([keys_qK, _keys(scores, start)], dim=1)
            keys_qK = keys.topk(min(k, keys.shape[1]), dim=1).values
        best.append(keys_qK)
    return _scores_and_rows(torch.cat(best))


def search_together(query_QD: Tensor, document_ND: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`search` by all ranks, each for its share of the queries on its device; every rank gets all, on the CPU."""
    shares = query_QD.tensor_split(world_size())
    found = search(shares[rank()].to(device), document_ND, k)
    scores_QK, index_QK = (gather_rows(x_qK, [len(share) for share in shares]).cpu() for x_qK in found)
    return scores_QK, index_QK


def top_k(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their columns, as `search` orders them."""
    return _scores_and_rows(_keys(scores_QN.float(), 0).topk(min(k, scores_QN.shape[1]), dim=1).values)


def _keys(scores: Tensor, first_row: int) -> Tensor:
    """int64 numbers that order as (score, then lower row): torch.topk alone orders equal scores as it likes.

    The bits of a float, read as an integer, order as the floats do once the negative ones are turned round.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    return (ordered << 32) | (0xFFFFFFFF - rows)


def _scores_and_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
