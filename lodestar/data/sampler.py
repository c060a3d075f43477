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

    def batch(self, number: int, part: range) -> tuple[Tensor, Tensor]:
        """(epochs, rows), int64, of the positions `part` of the sampler's `number`-th batch."""
        ...


MakeSampler = Callable[[int, int, int, str], Sampler]
"""(rows, global batch size, seed, name of the data set) -> a sampler."""


@dataclass(frozen=True)
class ShuffledSampler:
    """A new order in each epoch; epochs follow one another without a gap, each row once in each."""

    rows: int
    global_size: int
    seed: int
    name: str = ""

    def batch(self, number: int, part: range) -> tuple[Tensor, Tensor]:
        positions = torch.arange(part.start, part.stop) + number * self.global_size
        epochs = positions // self.rows
        result = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            of_epoch = epochs == epoch
            places = positions[of_epoch] % self.rows
            result[of_epoch] = rng.permuted(places, self.rows, self.seed, "order", self.name, epoch)
        return epochs, result


class DatasetMixture:
    """Which of several data sets a step draws its batch from: by weight, as a pure function of the step."""

    def __init__(self, weights: Sequence[float], steps: int, seed: int) -> None:
        bounds = torch.tensor(weights, dtype=torch.float64).cumsum(0) / sum(weights)
        draws = rng.uniform(torch.tensor(rng.key(seed, "mixture")), torch.arange(steps))
        self._choice = torch.bucketize(draws.double(), bounds[:-1], right=True)
        self._number = torch.zeros(steps, dtype=torch.int64)
        for dataset in range(len(weights)):
            chosen = self._choice == dataset
            self._number[chosen] = torch.arange(int(chosen.sum()))

    def at(self, step: int) -> tuple[int, int]:
        """(data set, how many earlier steps drew from it)."""
        return int(self._choice[step]), int(self._number[step])
