"""A streamed data set."""

from __future__ import annotations

from torch import Tensor

from contrastive.collate import TrainingDataset
from lodestar.data.sampler import Sampler
from lodestar.data.stream_windows import Windows


class StreamedDataset:
    """Its examples by window, which stands for the epoch, and row; those of a batch are of one window."""

    def __init__(self, windows: Windows, sampler: Sampler, in_batch_negatives: bool) -> None:
        self.sampler, self.in_batch_negatives = sampler, in_batch_negatives
        self._windows, self._number = windows, -1

    def at(self, epochs: Tensor) -> TrainingDataset:
        """The window of a batch."""
        if self._number != int(epochs[0]):
            self._number = int(epochs[0])
            table = self._windows.table(self._number)
            self._dataset = TrainingDataset(table, self.sampler, self.in_batch_negatives)
        return self._dataset
