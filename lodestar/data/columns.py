"""Columns of a memory-mapped Arrow table, read by numpy: no Python list of a text is built.

Shape suffixes: R rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import datasets  # not needed to run: a bare GPU machine lacks it

Indices = npt.NDArray[np.int64]
Values = npt.NDArray[Any]


class _Chunks:
    """Where the element of an index lies in a chunked column."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.starts = np.cumsum([0, *map(len, self.chunks)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, indices_R: Indices) -> tuple[Indices, Indices]:
        """(chunk, index in the chunk) of each."""
        chunk_R = np.searchsorted(self.starts, indices_R, side="right") - 1
        return chunk_R, indices_R - self.starts[chunk_R]


class Numbers(_Chunks):
    """A column of numbers."""

    @cached_property
    def all(self) -> Values:
        """Copied into memory."""
        arrays = [chunk.to_numpy(zero_copy_only=False) for chunk in self.chunks]
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)

    def __getitem__(self, indices_R: Indices) -> Values:
        return self.all[indices_R]


class Lists(_Chunks):
    """A column of lists of numbers, or of lists of lists."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        super().__init__(chunks)
        self._offsets = [chunk.offsets.to_numpy() for chunk in self.chunks]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Elements of each list."""
        return np.concatenate([np.empty(0, dtype=np.int32), *(np.diff(offsets) for offsets in self._offsets)])

    @cached_property
    def first(self) -> Indices:
        """Of each list, the index of its first element among those of all lists."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return ends - self.lengths

    @cached_property
    def _values(self) -> list[Values]:
        return [chunk.values.to_numpy() for chunk in self.chunks]

    def __getitem__(self, indices_R: Indices) -> list[Values]:
        """The elements of each list; views of the file."""
        chunk_R, row_R = self.locate(indices_R)
        offsets, values = self._offsets, self._values
        return [
            values[chunk][offsets[chunk][row] : offsets[chunk][row + 1]]
            for chunk, row in zip(chunk_R.tolist(), row_R.tolist(), strict=True)
        ]

    def flattened(self, kind: Callable[[Sequence[Any]], Any]) -> Any:
        """The elements of all lists, as a column of their own."""
        return kind([chunk.flatten() for chunk in self.chunks])


def column(table: datasets.Dataset, name: str) -> Sequence[Any]:
    """The Arrow arrays of a column."""
    return table.data.column(name).chunks  # type: ignore[no-any-return]
