"""Small problems for the losses of fine-tuning, and their solution by the plain loss.

Shape suffixes: B queries, M passages, D width.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive.loss import LocalLoss, contrastive_local_loss, info_nce
from contrastive.negatives import NegativeMask

B, M, D = 7, 19, 5
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
"""fp64 against fp64 in another order of summation."""


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def distinct(positive_B: Tensor, passages: int = M) -> NegativeMask:
    """No two texts are equal; query i, hash 1000 + i, is answered by its positive, hash 1 + its place."""
    query_hash_B = 1000 + torch.arange(len(positive_B))
    zero_B = torch.zeros(len(positive_B), dtype=torch.int64)
    return NegativeMask(
        anchor_B=query_hash_B,
        answer_B=1 + positive_B,
        same_query_B=query_hash_B,
        candidate_M=1 + torch.arange(passages),
        owner_M=torch.full((passages,), -1).index_copy(0, positive_B, query_hash_B),
        positive_index_B=positive_B,
        in_row_only=False,
        start_B=zero_B,
        end_B=zero_B,
    )


def with_equal_texts(positive_B: Tensor, rules: str = "psq") -> NegativeMask:
    """Rules of masking: the (p)ositive's text again, the query it(s)elf, a positive of an equal (q)uery."""
    mask = distinct(positive_B)
    passage_hash_M, query_hash_B, owner_M = mask.candidate_M.clone(), mask.anchor_B.clone(), mask.owner_M.clone()
    if "p" in rules:
        passage_hash_M[positive_B[1] + 1] = passage_hash_M[positive_B[1]]
        passage_hash_M[positive_B[4]] = passage_hash_M[positive_B[1]]
    if "s" in rules:
        passage_hash_M[positive_B[2] + 1] = query_hash_B[2]
    if "q" in rules:
        query_hash_B[5] = query_hash_B[3]
        owner_M[positive_B[5]] = query_hash_B[3]
    return replace(
        mask,
        anchor_B=query_hash_B,
        same_query_B=query_hash_B,
        answer_B=passage_hash_M[positive_B],
        candidate_M=passage_hash_M,
        owner_M=owner_M,
    )


def not_negative_by_loops(mask: NegativeMask) -> Tensor:
    """The rule, pair by pair."""
    not_negative_BM = torch.zeros(len(mask.positive_index_B), len(mask.candidate_M), dtype=torch.bool)
    for i, positive_index in enumerate(mask.positive_index_B.tolist()):
        for m in range(len(mask.candidate_M)):
            if m == positive_index:
                continue
            equal = mask.candidate_M[m] in (mask.answer_B[i], mask.anchor_B[i])
            same_query = mask.owner_M[m] == mask.same_query_B[i]
            outside = mask.in_row_only and not mask.start_B[i] <= m < mask.end_B[i]
            not_negative_BM[i, m] = bool(equal or same_query or outside)
    return not_negative_BM


def query_to_passage_loss(q_BD: Tensor, d_MD: Tensor, mask: NegativeMask, **options: Any) -> LocalLoss:
    """From queries to passages: each is answered by its own candidate."""
    return contrastive_local_loss(q_BD, d_MD, None, mask, **options)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return unit(B, D, seed=seed), unit(M, D, seed=seed + 1), torch.arange(B) * 2


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def by_reference(
    q_BD: Tensor, d_MD: Tensor, positive_B: Tensor, not_negative_BM: Tensor | None = None, temperature: float = 0.1
) -> list[Tensor]:
    """Mean loss and its gradients, with all scores held."""
    q_BD, d_MD = q_BD.clone().requires_grad_(), d_MD.clone().requires_grad_()
    nats_B = info_nce(q_BD, d_MD, positive_B, temperature=temperature, not_negative_BM=not_negative_BM)
    return gradients(nats_B.mean(), q_BD, d_MD)


def by_tiles(q_BD: Tensor, d_MD: Tensor, mask: NegativeMask, rows: int = 3, temperature: float = 0.1) -> list[Tensor]:
    """The same in tiles of at most `rows` rows."""
    q_BD, d_MD = q_BD.clone().requires_grad_(), d_MD.clone().requires_grad_()
    tile_bytes = rows * len(d_MD) * q_BD.element_size()
    local_loss = query_to_passage_loss(
        q_BD, d_MD, mask, temperature=temperature, weight=1 / len(q_BD), tile_bytes=tile_bytes
    )
    return gradients(local_loss.value, q_BD, d_MD)
