"""A stream of examples as a row of small token caches, which a process of each node writes ahead of training.

Each window holds the examples of some batches, which are shuffled. It is a folder that is deleted after its last batch.
Which examples it holds is a function of the sources alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import torch
from torch import Tensor

from lodestar import rng
from lodestar.data.file_record import read_values, write_values
from lodestar.data.row_stream import Cursor
from lodestar.errors import DataError

FAILED, STARTED = "failed", "started"
"""Files in the folder of windows: why no more will be written, and the id of the process that reads them."""


def window_batches(global_size: int) -> int:
    """Batches whose examples are shuffled together."""
    return min(64, max(4, (1 << 18) // global_size))


@dataclass(frozen=True)
class StreamSampler:
    """The examples of each window in a new order; the window stands for an example's epoch."""

    global_size: int
    seed: int
    name: str = ""

    def batch(self, index: int, positions: range) -> tuple[Tensor, Tensor]:
        batches = window_batches(self.global_size)
        window, batch = divmod(index, batches)
        order = _order(batches * self.global_size, self.seed, self.name, window)
        rows = order[batch * self.global_size :][positions.start : positions.stop]
        return torch.full_like(rows, window), rows


@lru_cache(maxsize=4)
def _order(size: int, seed: int, name: str, window: int) -> Tensor:
    return rng.permutation(size, seed, "window", name, window)


@dataclass(frozen=True)
class Windows:
    """The windows of a stream in a folder of this node."""

    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def table(self, number: int) -> datasets.Dataset:
        """The tokenized examples of a window, once it is written. DataError where it will not be."""
        path, has_started = self.path(number), False
        while not path.exists():
            has_started = has_started or (self.folder / STARTED).exists()
            if (self.folder / FAILED).exists():
                raise DataError((self.folder / FAILED).read_text(encoding="utf-8"))
            if has_started and not self.folder.exists():
                raise DataError(f"data.cache_dir: {self.folder}: was deleted (resume the run)")
            time.sleep(0.05)
        return cast(datasets.Dataset, datasets.load_from_disk(str(path)))


class WindowStart(NamedTuple):
    """Where a window begins."""

    cursor: Cursor = Cursor()
    counts: dict[str, int] = {}
    """Of all rows before, when they were read for the first time; by the names of DatasetStats."""


class WindowStarts:
    """Where windows begin, in a file of the run, so that one that resumes does not read what is before.

    Empty where the file is missing, damaged, or of another stream.
    """

    def __init__(self, path: Path, stream: str) -> None:
        """stream   differs for streams whose windows differ"""
        self._path, self._stream = path, stream

    def read(self) -> dict[int, WindowStart]:
        values = read_values(self._path)
        starts: dict[str, Any] = values["starts"] if values.get("stream") == self._stream else {}
        return {int(number): WindowStart(Cursor(*cursor), counts) for number, (cursor, counts) in starts.items()}

    def add(self, number: int, start: WindowStart) -> None:
        starts = {**self.read(), number: start}
        write_values(self._path, {"stream": self._stream, "starts": {str(k): list(v) for k, v in starts.items()}})
