"""The texts of a stream."""

from __future__ import annotations

from torch import Tensor

from lodestar.data.micro_batches import Indices
from lodestar.data.stream_windows import Windows
from retromae.collate import CachedTexts, EncodedText


class StreamTexts:
    """Texts by window, which stands for the epoch, and row; those of a call are of one window."""

    def __init__(self, windows: Windows) -> None:
        self._windows, self._number = windows, -1

    def lengths(self, epochs: Tensor, rows: Tensor) -> Indices:
        """(G,) tokens of each text."""
        return self._texts(epochs).lengths(epochs, rows)

    def __call__(self, epochs: Tensor, rows: Tensor) -> list[EncodedText]:
        return self._texts(epochs)(epochs, rows)

    def _texts(self, epochs: Tensor) -> CachedTexts:
        if self._number != int(epochs[0]):
            self._number = int(epochs[0])
            self._cached = CachedTexts(self._windows.table(self._number))
        return self._cached
