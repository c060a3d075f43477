"""The hash of a batch's examples: of which they are and in what order, not of the ranks that have them."""

from __future__ import annotations

import torch

from lodestar.config.schema import BatchPlan
from lodestar.data.sampler import ShuffledSampler, examples_hash

SAMPLER = ShuffledSampler(rows=23, global_size=19, seed=1)


def batch_hash(world_size: int, step: int = 0, dataset: int = 0, sampler: ShuffledSampler = SAMPLER) -> int:
    parts = [BatchPlan(19, world_size, 4).examples(rank) for rank in range(world_size)]
    return sum(examples_hash(part, *sampler.batch(step, part), dataset) for part in parts if len(part)) % 2**64


def test_the_hash_of_a_batch_does_not_depend_on_the_ranks() -> None:
    assert len({batch_hash(size) for size in (1, 2, 3, 5, 19, 30)}) == 1
    assert examples_hash(range(3, 3), torch.empty(0), torch.empty(0)) == 0


def test_another_step_order_epoch_or_data_set_has_another_hash() -> None:
    (epochs, rows), whole = SAMPLER.batch(0, range(19)), range(19)
    others = [batch_hash(1, step) for step in range(4)] + [batch_hash(1, dataset=1)]
    others += [examples_hash(whole, epochs, rows.flip(0)) % 2**64, examples_hash(whole, epochs + 1, rows) % 2**64]
    assert len(set(others)) == len(others)
