"""Which rows make the batch of a step: by arithmetic on a counter-based key, so that no step needs those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lodestar import rng


class Sampler(Protocol):
    """Which rows make the global batch of a step."""

    def batch(self, index: int, positions: range) -> tuple[Tensor, Tensor]:
        """(epochs, rows), int64, at `positions` of the sampler's global batch `index`."""
        ...


MakeSampler = Callable[[int, int, int, str], Sampler]
"""(rows, global batch size, seed, name of the data set) -> sampler."""


@dataclass(frozen=True)
class ShuffledSampler:
    """A new order in each epoch, each row once; a batch may span two epochs."""

    rows: int
    global_size: int
    seed: int
    name: str = ""

    def batch(self, index: int, positions: range) -> tuple[Tensor, Tensor]:
        draws = torch.arange(positions.start, positions.stop) + index * self.global_size  # since the start of the run
        epochs = draws // self.rows
        rows = torch.empty_like(draws)
        for epoch in epochs.unique().tolist():
            in_epoch = epochs == epoch
            rows[in_epoch] = rng.permuted(draws[in_epoch] % self.rows, self.rows, self.seed, "order", self.name, epoch)
        return epochs, rows


def examples_hash(positions: range, epochs: Tensor, rows: Tensor, dataset: int = 0) -> int:
    """Of the examples at `positions` of a global batch; summed over ranks, modulo 2**64, it does not depend on them."""
    if not len(positions):
        return 0
    positions_B = torch.arange(positions.start, positions.stop)
    return int(rng.hashed(positions_B, dataset, epochs, rows).sum())  # wraps


class DatasetMixture:
    """From which of several data sets a step draws its batch: by weight, as a pure function of the step."""

    def __init__(self, weights: Sequence[float], steps: int, seed: int) -> None:
        bounds = torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights)
        draws = rng.uniform(torch.tensor(rng.key(seed, "mixture")), torch.arange(steps))
        self._dataset = torch.bucketize(draws.double(), bounds[:-1], right=True)
        self._batch = torch.zeros(steps, dtype=torch.int64)
        for dataset in range(len(weights)):
            is_drawn = self._dataset == dataset
            self._batch[is_drawn] = torch.arange(int(is_drawn.sum()))

    def at(self, step: int) -> tuple[int, int]:
        """(index of the data set, index of the batch in that data set)."""
        return int(self._dataset[step]), int(self._batch[step])
