"""Texts dealt out to ranks, and their embeddings in order on each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lodestar.distributed.testing import run_world
from retrieval.embedding.embed_in_turns import embed_in_turns

ORDERS = [range(5), [4, 0, 3, 1, 2], range(2), [1, 0], []]  # of 3 ranks, some have no text


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_embed_in_turns_and_each_gets_all_in_order(world_size: int) -> None:
    for results in run_world(_embed_in_turns, world_size):
        for order, (embedding_ND, num_embedded) in zip(ORDERS, results, strict=True):
            assert torch.equal(embedding_ND, torch.arange(float(len(order)))[:, None].expand(-1, 3))
            assert num_embedded in (len(order) // world_size, -(-len(order) // world_size))


def _embed_in_turns(_rank: int, _world_size: int) -> list[tuple[torch.Tensor, int]]:
    results = []
    for order in ORDERS:
        own: list[int] = []

        def embed_indices(indices: Sequence[int], own: list[int] = own) -> torch.Tensor:
            own.extend(indices)
            return torch.tensor(own, dtype=torch.float32)[:, None].expand(-1, 3)

        results.append((embed_in_turns(order, embed_indices), len(own)))
    return results
