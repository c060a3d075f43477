"""Exact search: equal scores, numbers at the edges, and ranks."""

from __future__ import annotations

import math

import pytest
import torch

from lodestar.distributed.testing import run_world
from retrieval.embedding.exact_search import distributed_search, search, top_k


def small_integers(rows: int, width: int, seed: int) -> torch.Tensor:
    """Products of small whole numbers are exact in fp32 and often equal."""
    return torch.randint(-2, 3, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 101, 500])
def test_search_equals_a_stable_sort_with_ties_at_any_block(block, k):
    query_QD, document_ND = small_integers(13, 3, seed=1), small_integers(101, 3, seed=2)
    scores, rows = search(query_QD, document_ND, k, block=block)
    expected = (query_QD @ document_ND.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, expected.values[:, :k])
    assert torch.equal(rows, expected.indices[:, :k])
    assert len(expected.values.unique()) < 30, "the test has no ties"


def test_scores_order_as_numbers_whatever_their_sign_and_size():
    torch.set_flush_denormal(False)  # a run in this process may have set it
    scores = torch.tensor([[-0.0, 1e-40, -math.inf, 0.0, -1e-40, 3.5, math.inf, -7.0, 3.5, -1e30]])
    values, columns = top_k(scores, 10)
    assert columns.tolist() == [[6, 5, 8, 1, 0, 3, 4, 7, 9, 2]]
    assert torch.equal(values, scores.gather(1, columns))


def test_search_refuses_unequal_widths():
    with pytest.raises(ValueError, match="widths differ: 3 != 4"):
        search(torch.ones(2, 3), torch.ones(5, 4), 1)


def test_ranks_share_a_search_and_find_what_one_does():
    generator = torch.Generator().manual_seed(0)
    query_QD = torch.randint(-3, 4, (5, 4), generator=generator).float()  # whole numbers: ties, and exact sums
    document_ND = torch.randint(-3, 4, (40, 4), generator=generator).float()
    expected = search(query_QD, document_ND, 7)
    for world_size in (2, 3, 7):  # of 7 ranks, two have no query
        for found in run_world(_distributed_search, world_size, query_QD, document_ND):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _distributed_search(
    rank: int, world_size: int, query_QD: torch.Tensor, document_ND: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return distributed_search(query_QD, document_ND, 7, torch.device("cpu"))
