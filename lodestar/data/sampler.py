"""Which rows make the batch of a step: by arithmetic on a counter-based key, so that no step needs those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lodestar import rng


@dataclass(frozen=True)
class ShuffledSampler:
    """Which rows make the global batch of a step; epochs follow one another without a gap, each row once in each."""

    rows: int
    global_size: int
    seed: int
    name: str = ""

    def batch(self, number: int, part: range) -> tuple[Tensor, Tensor]:
        """(epochs, rows), int64, of the positions `part` of the batch that is the `number`-th of this order."""
        positions = torch.arange(part.start, part.stop) + number * self.global_size
        epochs = positions // self.rows
        result = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            result[here] = rng.permuted(positions[here] % self.rows, self.rows, self.seed, "order", self.name, epoch)
        return epochs, result


class DatasetMixture:
    """Which of several data sets a step draws its batch from: by weight, as a pure function of the step."""

    def __init__(self, shares: Sequence[float], steps: int, seed: int) -> None:
        bounds = torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares)
        draws = rng.uniform(torch.tensor(rng.key(seed, "mixture")), torch.arange(steps))
        self._choice = torch.bucketize(draws.double(), bounds[:-1], right=True)
        self._number = torch.zeros(steps, dtype=torch.int64)
        for which in range(len(shares)):
            here = self._choice == which
            self._number[here] = torch.arange(int(here.sum()))

    def at(self, step: int) -> tuple[int, int]:
        """(data set, how many earlier steps drew from it)."""
        return int(self._choice[step]), int(self._number[step])
